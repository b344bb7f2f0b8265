"""What a person does with the page, and what comes of it."""

import re
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from fastapi import FastAPI
from PIL import Image
from starlette.types import ASGIApp

from mgie.bundle.bundle import open_bundle
from mgie.images.files import read_image, read_metadata

pytest.importorskip("playwright", reason="playwright is not installed")
from playwright.sync_api import expect

from tests.browser.edit_page import EditPage, Recorder

pytestmark = [pytest.mark.browser, pytest.mark.timeout(300)]

Serve = Callable[[ASGIApp], str]
Visit = Callable[..., EditPage]


def array(data: bytes) -> np.ndarray:
    return np.asarray(read_image(data), dtype=int)


def test_an_edit_shows_its_words_steps_and_previews_while_it_runs(edit_page: EditPage, photo: bytes) -> None:
    edit_page.choose(photo)
    edit_page.page.evaluate("""() => {
        window.seen = {previews: new Set(), steps: new Set(), said: new Set(), words: new Set()};
        new MutationObserver(() => {
            if (!document.querySelector("#viewer").matches(".is-waiting")) return;
            const after = document.querySelector("#after");
            if (document.querySelector("#viewer").matches(".is-split")) seen.previews.add(after.src);
            seen.steps.add(document.querySelector("#progress").value);
            seen.said.add(document.querySelector("#status").textContent);
            seen.words.add(document.querySelector("#expressive").value);
        }).observe(document.body, {subtree: true, childList: true, attributes: true, characterData: true});
    }""")
    edit_page.edit("make it night", steps=60)
    seen = edit_page.page.evaluate("Object.fromEntries(Object.entries(seen).map(([name, all]) => [name, [...all]]))")
    words = edit_page["#expressive"].input_value()
    assert "night" in words.lower()
    assert 1 <= len(seen["previews"]) <= 3
    assert max(seen["steps"]) == 60
    assert len(seen["steps"]) > 3
    assert {"Looking at the photo …", f"Understood: {words}"} <= set(seen["said"])
    assert words in seen["words"]  # before the picture was there
    expect(edit_page["#asked"]).to_have_text("make it night")
    expect(edit_page["#viewer"]).to_have_class(re.compile("is-split"))
    assert edit_page["#after"].evaluate("image => [image.naturalWidth, image.naturalHeight]") == [192, 128]
    assert array(edit_page.download()).mean() < array(photo).mean() - 20  # it is night


def test_the_users_own_words_make_another_picture_of_the_same_photo_and_seed(
    api: FastAPI, serve: Serve, visit: Visit, photo: bytes
) -> None:
    recorder = Recorder(api)
    page = visit(serve(recorder))
    page.choose(photo)
    page.edit("make it night", seed=5)
    first, facts = page.download(), page["#facts"].inner_text()
    assert not recorder.sent("expressive")
    page["#expressive"].fill("The whole picture turns sepia, like an old photograph.")
    page["#again"].click()
    expect(page["#tree .node"]).to_have_count(3)
    page.is_done()
    assert recorder.sent("expressive")
    assert page.tree() == [["photo.png", [["make it night", []], ["make it night", []]]]]
    expect(page["[aria-current] small"]).to_have_text("your words")
    expect(page["#expressive"]).to_have_value("The whole picture turns sepia, like an old photograph.")
    assert "seed 5" in facts
    assert "seed 5" in page["#facts"].inner_text()
    assert abs(array(page.download()) - array(first)).mean() > 5


def test_words_can_be_changed_while_the_picture_is_being_made(edit_page: EditPage, photo: bytes) -> None:
    edit_page.choose(photo)
    edit_page.fill_numbers(steps=1000)
    edit_page.ask("make it night")
    expect(edit_page["#expressive"]).to_be_enabled()
    edit_page.fill_numbers(steps=4)
    edit_page["#expressive"].fill("Make it a bright day.")
    edit_page["#again"].click()
    edit_page.is_done()
    assert edit_page.tree() == [["photo.png", [["make it night", []]]]]  # the first never came about
    expect(edit_page["#expressive"]).to_have_value("Make it a bright day.")


def test_only_what_is_painted_changes_and_a_stroke_can_be_undone(edit_page: EditPage, photo: bytes) -> None:
    edit_page.choose(photo)
    edit_page["#mask-button"].click()
    box = edit_page["#mask"].bounding_box()
    assert box is not None

    def stroke(*xs: float) -> None:
        mouse = edit_page.page.mouse
        mouse.move(box["x"] + xs[0] * box["width"], box["y"] + box["height"] / 2)
        mouse.down()
        for x in xs[1:]:
            mouse.move(box["x"] + x * box["width"], box["y"] + box["height"] / 2, steps=5)
        mouse.up()

    def painted() -> list[bool]:
        """Of the left and the right half."""
        script = """canvas => {
            const copy = Object.assign(document.createElement("canvas"), {width: canvas.width, height: canvas.height});
            const pen = copy.getContext("2d", {willReadFrequently: true});
            pen.drawImage(canvas, 0, 0);
            const half = canvas.width / 2;
            return [0, half].map((x) => pen.getImageData(x, 0, half, canvas.height).data.some((value) => value));
        }"""
        halves: list[bool] = edit_page["#mask"].evaluate(script)
        return halves

    expect(edit_page["#undo"]).to_be_disabled()
    stroke(0.85)  # a dab
    assert painted() == [False, True]
    edit_page["#mask"].press("Control+z")
    assert painted() == [False, False]
    expect(edit_page["#undo"]).to_be_disabled()
    edit_page["#brush"].fill("30")
    stroke(0.1, 0.3)
    edit_page["#erase"].check()
    stroke(0.1)
    edit_page["#undo"].click()
    assert painted() == [True, False]
    edit_page.edit("make it night", seed=1)
    source, edited = array(photo), array(edit_page.download())
    assert (edited[:, 100:] == source[:, 100:]).all()
    assert abs(edited[50:78, 10:60] - source[50:78, 10:60]).mean() > 5
    expect(edit_page["[aria-current] small"]).to_have_text("a part")


def test_variants_stand_side_by_side_and_one_is_taken(edit_page: EditPage, photo: bytes) -> None:
    edit_page.choose(photo)
    edit_page.edit("let it rain", n=3, seed=10)
    expect(edit_page["#variants img"]).to_have_count(3)
    assert edit_page["#variants img"].evaluate_all("all => new Set(all.map((image) => image.src)).size") == 3
    edit_page["#variants button"].nth(1).click()
    expect(edit_page["#viewer"]).to_be_visible()
    expect(edit_page["#facts"]).to_contain_text("seed 11")
    edit_page["#variants-button"].click()
    expect(edit_page["#variants [aria-current] img"]).to_have_attribute("alt", "Variant 2, seed 11")
    assert edit_page.tree() == [["photo.png", [["let it rain", []]] * 3]]


def test_a_turn_goes_on_from_any_picture_without_sending_it_and_a_reload_keeps_the_tree(
    api: FastAPI, serve: Serve, visit: Visit, photo: bytes
) -> None:
    recorder = Recorder(api)
    page = visit(serve(recorder))
    page.choose(photo)
    page.edit("make it night")
    assert recorder.sent("image")
    page.open("photo.png")
    page.edit("black and white")
    page.open("make it night")
    page.edit("more contrast", n=2)
    assert recorder.sent("previous")
    assert not recorder.sent("image")
    page["#variants button"].nth(1).click()
    page.edit("let it rain", n=1)
    assert b":1\r\n" in recorder.bodies[-1]  # of the second variant
    tree = [
        ["photo.png", [
            ["make it night", [["more contrast", []], ["more contrast", [["let it rain", []]]]]],
            ["black and white", []],
        ]],
    ]  # fmt: skip
    assert page.tree() == tree
    shown, facts = page.download(), page["#facts"].inner_text()
    page.page.reload()
    expect(page["#facts"]).to_have_text(facts)
    assert page.tree() == tree
    assert page.download() == shown
    page.page.goto(page.page.url.partition("#")[0])  # without the address of the picture: the newest
    expect(page["#facts"]).to_have_text(facts)


def test_a_picture_that_the_service_no_longer_keeps_is_sent_again(
    api: FastAPI, serve: Serve, visit: Visit, photo: bytes, tmp_path: Path
) -> None:
    recorder = Recorder(api)
    page = visit(serve(recorder), expects=("status of 404",))
    page.choose(photo)
    page.edit("make it night")
    kept = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert kept
    for file in kept:
        file.unlink()
    page.edit("more contrast")
    assert len(recorder.bodies) == 3
    assert recorder.sent("image")
    assert page.tree() == [["photo.png", [["make it night", [["more contrast", []]]]]]]


def test_a_cancelled_edit_ends_in_the_engine_and_leaves_no_trace(edit_page: EditPage, photo: bytes) -> None:
    def figures() -> dict[str, int]:
        address = edit_page.page.url.partition("#")[0]
        work: dict[str, int] = edit_page.page.request.get(f"{address}stats").json()["diffusion"]["work"]
        return work

    num_before = figures()["num_cancelled"]
    edit_page.choose(photo)
    edit_page.fill_numbers(steps=1000)
    edit_page.ask("make it night")
    expect(edit_page["#progress"]).to_have_attribute("max", "1000")
    with edit_page.page.expect_response(lambda response: response.request.method == "DELETE") as answer:
        edit_page["#cancel"].click()
    assert answer.value.status == 204
    expect(edit_page["#status"]).to_have_text("Cancelled.")
    expect(edit_page["#send"]).to_be_visible()
    expect(edit_page["#error"]).to_be_hidden()
    assert edit_page.tree() == [["photo.png", []]]
    expect(edit_page["#prompt"]).to_have_value("make it night")  # to change it and ask again
    assert figures()["num_in_flight"] == 0
    assert figures()["num_cancelled"] == num_before + 1
    edit_page.edit("make it night", steps=2)


def test_a_download_without_how_it_was_made_has_the_same_pixels_and_no_text(edit_page: EditPage, photo: bytes) -> None:
    edit_page.choose(photo)
    edit_page.edit("make it night", seed=3)
    whole, bare = edit_page.download(), edit_page.download(with_metadata=False)
    assert read_metadata(whole)["seed"] == "3"
    assert read_metadata(bare) == {}
    assert Image.open(BytesIO(bare)).info == {}
    assert (array(whole) == array(bare)).all()
    assert len(bare) < len(whole)


def test_zoom_shows_the_last_pixel_and_the_border_follows_the_pointer(edit_page: EditPage, photo: bytes) -> None:
    large = BytesIO()
    Image.open(BytesIO(photo)).resize((1800, 1200)).save(large, "JPEG")
    edit_page.choose(large.getvalue(), "large.jpg")
    edit_page.edit("make it night", steps=2)
    width = "image => image.getBoundingClientRect().width"
    assert edit_page["#after"].evaluate(width) < 1000
    edit_page["#zoom-full"].click()
    expect(edit_page["#zoom-level"]).to_have_text("100 %")
    assert edit_page["#after"].evaluate(width) == pytest.approx(1800, abs=0.5)
    assert edit_page["#after"].evaluate("image => image.naturalWidth") == 1800
    edit_page["#zoom-fit"].click()
    expect(edit_page["#zoom-level"]).to_have_text("fit")
    box = edit_page["#viewer"].bounding_box()
    assert box is not None
    edit_page.page.mouse.click(box["x"] + box["width"] * 0.25, box["y"] + 30)
    assert float(edit_page["#split"].input_value()) == pytest.approx(25, abs=1)
    clip = edit_page["#viewer .over"].evaluate("layer => getComputedStyle(layer).clipPath")
    assert clip.endswith("25%)")


def test_presets_are_numbers_and_numbers_win(edit_page: EditPage, photo: bytes) -> None:
    usual = open_bundle("tiny").config.defaults
    scale = 1 + 1.5 * (usual.guidance_scale - 1)
    edit_page.choose(photo)
    edit_page["#strength label"].filter(has_text="strong").click()
    edit_page["#care label"].filter(has_text="draft").click()
    edit_page.edit("make it night")
    expect(edit_page["#facts"]).to_contain_text(f"{usual.steps // 2} steps · guidance {scale:.2f} text")
    edit_page.fill_numbers(steps=3)
    expect(edit_page["#care :checked"]).to_have_count(0)
    edit_page.edit("make it night")
    expect(edit_page["#facts"]).to_contain_text(f"3 steps · guidance {scale:.2f} text")


def test_a_photo_can_be_pasted_dropped_or_drawn(edit_page: EditPage, photo: bytes) -> None:
    give = """([kind, bytes]) => {
        const transfer = new DataTransfer();
        transfer.items.add(new File([new Uint8Array(bytes)], "given.png", {type: "image/png"}));
        const event = kind === "paste" ? new ClipboardEvent(kind, {clipboardData: transfer, bubbles: true})
            : new DragEvent(kind, {dataTransfer: transfer, bubbles: true, cancelable: true});
        document.body.dispatchEvent(event);
    }"""
    edit_page["#sample"].click()
    expect(edit_page["#facts"]).to_have_text(re.compile("a drawing, 512 .* 512 px"))
    for kind, name in (("paste", "a pasted photo"), ("drop", "given.png")):
        edit_page.page.evaluate(give, [kind, list(photo)])
        expect(edit_page["#facts"]).to_have_text(re.compile(f"{name}, 192 .* 128 px"))
    assert [name for name, _ in edit_page.tree()] == ["given.png", "a pasted photo", "a drawing"]


def test_what_is_removed_is_gone_with_all_that_came_of_it(edit_page: EditPage, photo: bytes) -> None:
    edit_page.page.on("dialog", lambda dialog: dialog.accept())
    edit_page.choose(photo)
    edit_page.edit("make it night", steps=1)
    edit_page.edit("let it rain", steps=1)
    edit_page.open("make it night")
    edit_page["#remove"].click()
    expect(edit_page["#facts"]).to_contain_text("photo.png")
    edit_page.page.reload()
    expect(edit_page["#facts"]).to_contain_text("photo.png")
    assert edit_page.tree() == [["photo.png", []]]
    edit_page["#remove"].click()
    expect(edit_page["#empty"]).to_be_visible()
