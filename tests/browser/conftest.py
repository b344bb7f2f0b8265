"""The page in a real Chromium, over a real service with the embedded bundle."""

import io
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from fastapi import FastAPI
from starlette.types import ASGIApp

from mgie.tiny.world import make_sample
from serving.edits.in_process import InProcessBackend
from tests.live import api_over, listening, open_backend

if TYPE_CHECKING:  # Playwright may be absent: then every file of tests skips, and says so
    from playwright.sync_api import Browser

    from tests.browser.edit_page import EditPage


# Of a module: while Playwright is open its event loop counts as running, and no other test could begin one.
@pytest.fixture(scope="module")
def browser() -> "Iterator[Browser]":
    from tests.browser.chromium import find_chromium, open_browser

    if find_chromium() is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    with open_browser() as opened:
        yield opened


@pytest.fixture(scope="session")
def backend() -> Iterator[InProcessBackend]:
    with open_backend("tiny") as opened:
        yield opened


@pytest.fixture
def api(backend: InProcessBackend, tmp_path: Path) -> FastAPI:
    return api_over(backend, tmp_path)


@pytest.fixture
def serve() -> Iterator[Callable[[ASGIApp], str]]:
    """Serves an application until the test ends; returns its address."""
    with ExitStack() as stack:
        yield lambda app: stack.enter_context(listening(app))


@pytest.fixture
def visit(browser: "Browser") -> "Iterator[Callable[..., EditPage]]":
    """Opens a page; when the test ends, nothing may have gone to another host or to the console.

    `expects`: parts of messages that the browser itself writes to the console for answers that the test provokes.
    """
    from tests.browser.edit_page import WAIT_MS, EditPage

    problems: list[str] = []
    with ExitStack() as stack:

        def make(
            address: str, *, wh: tuple[int, int] = (1280, 900), expects: tuple[str, ...] = (), **options: Any
        ) -> "EditPage":
            context = browser.new_context(viewport={"width": wh[0], "height": wh[1]}, **options)
            stack.callback(context.close)
            context.set_default_timeout(WAIT_MS)

            def note(text: str) -> None:
                if not any(part in text for part in expects):
                    problems.append(text)

            def look(url: str) -> None:
                if not url.startswith((address, f"blob:{address}")):
                    problems.append(f"request to {url}")

            page = context.new_page()
            page.on("console", lambda message: note(message.text) if message.type in {"error", "warning"} else None)
            page.on("pageerror", lambda error: problems.append(str(error)))
            page.on("request", lambda request: look(request.url))
            page.goto(address)
            return EditPage(page)

        yield make
    assert problems == []


@pytest.fixture
def edit_page(api: FastAPI, serve: Callable[[ASGIApp], str], visit: "Callable[..., EditPage]") -> "EditPage":
    return visit(serve(api))


@pytest.fixture(scope="session")
def photo() -> bytes:
    """A drawn scene of 192 x 128 px."""
    out = io.BytesIO()
    make_sample(11, "test", 37, side_px=192).source.crop((0, 20, 192, 148)).save(out, "PNG")
    return out.getvalue()
