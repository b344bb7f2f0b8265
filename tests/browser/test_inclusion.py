"""For everybody: keyboard only, screen readers, narrow and wide screens, dark and light."""

from collections.abc import Callable
from io import BytesIO
from typing import Any

import pytest
from fastapi import FastAPI
from PIL import Image
from starlette.types import ASGIApp

from mgie.images.files import read_image

pytest.importorskip("playwright", reason="playwright is not installed")
from playwright.sync_api import expect

from tests.browser.edit_page import EditPage

pytestmark = [pytest.mark.browser, pytest.mark.timeout(300)]

Serve = Callable[[ASGIApp], str]
Visit = Callable[..., EditPage]

NARROW, WIDE = (360, 780), (1440, 900)
MAX_TABS = 60


def tab_to(page: EditPage, selector: str) -> None:
    for _ in range(MAX_TABS):
        page.page.keyboard.press("Tab")
        if page[selector].evaluate("element => element === document.activeElement"):
            return
    raise AssertionError(f"{selector} was not reached by {MAX_TABS} tabs")


def test_an_edit_its_words_and_its_mask_need_no_pointer(edit_page: EditPage, photo: bytes) -> None:
    keyboard = edit_page.page.keyboard
    # So early, because Chromium hears of the first listener some time after Playwright does.
    edit_page.page.on("filechooser", lambda _: None)
    tab_to(edit_page, "#choose")
    with edit_page.page.expect_file_chooser() as chooser:
        keyboard.press("Enter")
    chooser.value.set_files({"name": "photo.png", "mimeType": "image/png", "buffer": photo})
    expect(edit_page["#prompt"]).to_be_focused()
    keyboard.type("make it night")
    keyboard.press("Enter")
    edit_page.is_done()
    tab_to(edit_page, "#expressive")
    keyboard.press("Control+a")
    keyboard.type("Make it a sepia picture.")
    tab_to(edit_page, "#again")
    keyboard.press("Enter")
    expect(edit_page[".node"]).to_have_count(3)
    edit_page.is_done()

    edit_page["body"].evaluate("() => document.activeElement.blur()")
    tab_to(edit_page, "#split")
    keyboard.press("Home")
    assert edit_page["#split"].input_value() == "0"
    keyboard.press("ArrowRight")
    assert edit_page["#split"].input_value() == "1"
    keyboard.press("+")
    expect(edit_page["#zoom-level"]).not_to_have_text("fit")
    keyboard.press("0")
    expect(edit_page["#zoom-level"]).to_have_text("fit")

    tab_to(edit_page, ".node >> nth=0")  # the photo
    keyboard.press("Enter")
    expect(edit_page[".node[aria-current]"]).to_be_focused()
    tab_to(edit_page, "#mask-button")
    keyboard.press("Space")
    expect(edit_page["#mask"]).to_be_focused()
    for key in ("ArrowLeft",) * 8 + ("Space",):
        keyboard.press(key)
    expect(edit_page["#undo"]).to_be_enabled()
    keyboard.press("Control+z")
    expect(edit_page["#undo"]).to_be_disabled()
    keyboard.press("Space")
    keyboard.press("Escape")
    expect(edit_page["#mask-button"]).to_have_text("Only a part will change")
    tab_to(edit_page, "#prompt")
    keyboard.type("black and white")
    keyboard.press("Enter")
    edit_page.is_done()
    expect(edit_page["[aria-current] small"]).to_have_text("a part")


def test_escape_cancels_an_edit(edit_page: EditPage, photo: bytes) -> None:
    edit_page.choose(photo)
    edit_page.fill_numbers(steps=1000)
    edit_page.ask("make it night")
    expect(edit_page["#progress"]).to_have_attribute("max", "1000")  # the service knows it
    edit_page.page.keyboard.press("Escape")
    expect(edit_page["#status"]).to_have_text("Cancelled.")


@pytest.mark.parametrize("wh", [NARROW, WIDE])
def test_nothing_is_cut_off_and_the_photo_and_the_question_are_seen_at_once(
    api: FastAPI, serve: Serve, visit: Visit, photo: bytes, wh: tuple[int, int]
) -> None:
    page = visit(serve(api), wh=wh)
    page.choose(photo)
    page.edit("make it night", n=2, steps=1)
    page["#mask-button"].click()
    page["#settings summary"].click()
    page["#key-button"].click()
    sizes = page.page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert sizes == [wh[0], wh[0]]
    page["#key-close"].click()
    page["#mask-button"].click()
    page.page.evaluate("scrollTo(0, 0)")
    boxes = {name: page[f"#{name}"].bounding_box() for name in ("viewer", "prompt", "send", "understood", "history")}
    for name in ("viewer", "prompt", "send"):
        box = boxes[name]
        assert box is not None
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= wh[0]
        assert box["y"] + box["height"] <= wh[1]
    viewer, understood, history = (boxes[name] or {} for name in ("viewer", "understood", "history"))
    if wh == WIDE:
        assert history["x"] < viewer["x"] < understood["x"]
    else:
        assert viewer["y"] < understood["y"] < history["y"]
    cut = page["button:visible"].evaluate_all(
        "all => all.filter((b) => b.scrollWidth > b.clientWidth + 1).map((b) => b.id)"
    )
    assert cut == []


def test_the_page_is_dark_or_light_as_the_system_says_or_as_the_reader_chose(
    api: FastAPI, serve: Serve, visit: Visit
) -> None:
    def is_dark(page: EditPage) -> bool:
        picture = read_image(page.page.screenshot())
        red, green, blue = Image.open(BytesIO(page.page.screenshot())).convert("RGB").getpixel((3, picture.height - 3))  # type: ignore[misc]
        return (red + green + blue) / 3 < 128

    address = serve(api)
    dark, light = (visit(address, color_scheme=scheme) for scheme in ("dark", "light"))
    assert is_dark(dark)
    assert not is_dark(light)
    for page in (dark, light):
        page["#theme"].click()
    assert not is_dark(dark)
    assert is_dark(light)
    light.page.reload()
    assert is_dark(light)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious_in_any_state(
    api: FastAPI, serve: Serve, visit: Visit, photo: bytes, scheme: str
) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not installed").Axe()
    page = visit(serve(api), color_scheme=scheme, reduced_motion="reduce")
    found: list[Any] = []
    num_checked = 0

    def look(state: str) -> None:
        nonlocal num_checked
        response = axe.run(page.page, options={"resultTypes": ["violations", "passes"]}).response
        num_checked += len(response["passes"])
        found.extend(
            (state, problem["id"], [node["html"][:120] for node in problem["nodes"]])
            for problem in response["violations"]
            if problem["impact"] in {"serious", "critical"}
        )

    look("empty")
    page["#file"].set_input_files({"name": "notes.txt", "mimeType": "text/plain", "buffer": b"no picture"})
    expect(page["#error"]).to_be_visible()
    look("error")
    page.choose(photo)
    look("photo")
    page.fill_numbers(steps=1000, n=4)
    page.ask("make it night")
    expect(page["#progress"]).to_have_attribute("max", "1000")
    look("running")
    page["#cancel"].click()
    page.edit("make it night", steps=2, n=1)
    look("edited")
    page["#mask-button"].click()
    look("mask")
    page.edit("let it rain", n=2, steps=2)
    look("variants")
    page["#key-button"].click()
    look("key")
    assert found == []
    assert num_checked > 100
