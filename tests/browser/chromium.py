"""A real browser: for tests, the page's benchmark and the guide's screenshots."""

import contextlib
import os
import shutil
from collections.abc import Iterator

from playwright.sync_api import Browser, sync_playwright

# Nothing that Chromium would ask of hosts outside, and no sandbox where it cannot have one.
BROWSER_ARGS = ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run")


def find_chromium() -> str | None:
    """The browser's program; None: there is none."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next((path for name in names if (path := shutil.which(name))), None)


@contextlib.contextmanager
def open_browser() -> Iterator[Browser]:
    """A headless Chromium of this machine's own."""
    args = [*BROWSER_ARGS, *(["--no-sandbox"] if os.geteuid() == 0 else [])]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=args)
        yield browser
        browser.close()
