"""The page over the deployments of Ray Serve, whose proxy lies between."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import httpx2
import pytest

from serving.demo import HOST, free_port

pytest.importorskip("playwright", reason="playwright is not installed")
from playwright.sync_api import expect

from tests.browser.edit_page import EditPage

pytestmark = [pytest.mark.browser, pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture
def address() -> Iterator[str]:
    """A service in a process of its own: Ray would leave its traces in this one, for all tests to come."""
    port = free_port(prefer_usual=False)
    found = f"http://{HOST}:{port}"
    with subprocess.Popen([sys.executable, "-m", "serving.demo", "--keep", "--port", str(port)]) as process:
        try:
            while not _is_ready(found):
                assert process.poll() is None
                time.sleep(1.0)
            yield found
        finally:
            process.terminate()


def _is_ready(address: str) -> bool:
    try:
        return httpx2.get(f"{address}/readyz", timeout=10).status_code == 200
    except httpx2.TransportError:
        return False


def test_edits_turns_previews_and_cancelling_work_on_ray(
    address: str, visit: Callable[..., EditPage], photo: bytes
) -> None:
    page = visit(address)
    page.choose(photo)
    page.edit("make it night", steps=20, seed=1)
    assert "night" in page["#expressive"].input_value().lower()
    page.edit("more contrast", steps=2)
    assert page.tree() == [["photo.png", [["make it night", [["more contrast", []]]]]]]
    page.fill_numbers(steps=100, n=4)
    page.ask("let it rain")
    expect(page["#progress"]).to_have_attribute("max", "100")
    page["#cancel"].click()
    expect(page["#status"]).to_have_text("Cancelled.")
