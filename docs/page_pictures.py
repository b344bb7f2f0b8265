"""Makes the screenshots of the guide from the running page: `python docs/page_pictures.py`.

Needs a Chromium and the packages of the extra `dev`. The edits are real ones by the shipped bundle, with fixed seeds.
"""

import io
import sys
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run as a script, for what is shared with the tests

from playwright.sync_api import Browser, Page, expect  # noqa: E402

from tests.browser.chromium import open_browser  # noqa: E402
from tests.live import api_over, listening, open_backend  # noqa: E402

WIDE, NARROW = (1200, 800), (390, 800)
SEED = 1
WAIT_MS = 60_000

expect.set_options(timeout=WAIT_MS)


def main() -> None:
    """Writes `pictures/*.webp` beside this file."""
    with (
        tempfile.TemporaryDirectory() as folder,
        open_backend("tiny") as backend,
        listening(api_over(backend, Path(folder))) as address,
        open_browser() as browser,
    ):
        page = opened(browser, address, wh=WIDE)
        shoot(page, "start")
        page.click("#sample")
        page.click("#settings summary")
        page.fill("[name=seed]", str(SEED))
        page.click("#settings summary")
        edit(page, "make it night")
        shoot(page, "edited")
        page.emulate_media(color_scheme="dark")
        shoot(page, "dark")
        page.emulate_media(color_scheme="light")
        page.fill("#expressive", "Make it sepia, like an old photo.")
        page.click("#again")
        expect(page.locator(".node")).to_have_count(3)
        done(page)
        page.click(".node >> nth=0")
        page.click("#mask-button")
        box = page.locator("#mask").bounding_box()
        assert box is not None
        page.mouse.move(box["x"] + 0.05 * box["width"], box["y"] + 0.1 * box["height"])
        page.mouse.down()
        for x, y in ((0.95, 0.1), (0.95, 0.2), (0.05, 0.2), (0.05, 0.3), (0.95, 0.3)):
            page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"], steps=8)
        page.mouse.up()
        page.fill("#prompt", "make it night")
        shoot(page, "part")
        page.click("#clear")
        page.keyboard.press("Escape")
        page.fill("[name=n]", "4")
        edit(page, "make it look like winter")
        shoot(page, "variants")
        narrow = opened(browser, address, wh=NARROW)
        narrow.click("#sample")
        edit(narrow, "make it look like winter")
        shoot(narrow, "narrow")


def opened(browser: Browser, address: str, *, wh: tuple[int, int]) -> Page:
    """The page, ready."""
    page = browser.new_page(viewport={"width": wh[0], "height": wh[1]}, color_scheme="light")
    page.set_default_timeout(WAIT_MS)
    page.goto(address)
    expect(page.locator("#examples button").first).to_be_attached()
    return page


def edit(page: Page, words: str) -> None:
    """Asks for an edit and waits for it."""
    page.fill("#prompt", words)
    page.click("#send")
    done(page)


def done(page: Page) -> None:
    """Waits for the end of an edit."""
    expect(page.locator("#status")).to_contain_text("Done")
    expect(page.locator("#send")).to_be_visible()


def shoot(page: Page, name: str) -> None:
    """Writes what the window shows."""
    page.evaluate("scrollTo(0, 0)")
    picture = Image.open(io.BytesIO(page.screenshot()))
    out = ROOT / "docs" / "pictures" / f"{name}.webp"
    out.parent.mkdir(exist_ok=True)
    picture.convert("RGB").save(out, quality=82, method=6)


if __name__ == "__main__":
    main()
