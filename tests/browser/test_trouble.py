"""What goes wrong, and what the page then says to do; keys; models that mean nothing."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from fastapi import FastAPI
from PIL import Image
from starlette.types import ASGIApp, Receive, Scope, Send

from serving.access.keys import KeyRing, new_key
from serving.edits.in_process import InProcessBackend

pytest.importorskip("playwright", reason="playwright is not installed")
from playwright.sync_api import expect

from tests.browser.edit_page import EditPage
from tests.live import api_over, listening, open_backend

pytestmark = [pytest.mark.browser, pytest.mark.timeout(300)]

Serve = Callable[[ASGIApp], str]
Visit = Callable[..., EditPage]


def test_a_file_that_is_no_picture_is_refused_before_it_is_sent(edit_page: EditPage, photo: bytes) -> None:
    edit_page["#file"].set_input_files({"name": "notes.txt", "mimeType": "text/plain", "buffer": b"no picture"})
    expect(edit_page["#error-what"]).to_have_text("This browser cannot show “notes.txt” (text/plain).")
    expect(edit_page["#error-advice"]).to_contain_text("Choose another photo")
    expect(edit_page["#empty"]).to_be_visible()
    edit_page.choose(photo)
    expect(edit_page["#error"]).to_be_hidden()


def test_an_edit_that_took_too_long_says_so_and_can_be_mended(
    backend: InProcessBackend, serve: Serve, visit: Visit, photo: bytes
) -> None:
    impatient, patient = (api_over(backend, timeout_s=timeout_s) for timeout_s in (0.5, 60))

    async def in_turn(scope: Scope, receive: Receive, send: Send) -> None:
        await (patient if is_patient else impatient)(scope, receive, send)

    is_patient = False
    page = visit(serve(in_turn), expects=("status of 400", "status of 504"))
    page.choose(photo)
    page.fill_numbers(steps=1000, n=4)
    page.ask("make it night")
    expect(page["#error-advice"]).to_have_text("Use fewer steps or fewer variants, and try again.")
    expect(page["#error-what"]).to_contain_text("given up")
    expect(page["#error-id"]).to_have_text(re.compile("Request [0-9a-f]{32}"))
    expect(page["#prompt"]).to_have_value("make it night")
    is_patient = True
    page.fill_numbers(steps=2, n=1)
    page["#send"].click()
    page.is_done()
    expect(page["#error"]).to_be_hidden()


def test_a_service_that_is_gone_is_said_to_be_and_is_found_again(api: FastAPI, visit: Visit, photo: bytes) -> None:
    with listening(api) as address:
        page = visit(address, expects=("ERR_CONNECTION_REFUSED", "ERR_CONNECTION_RESET", "ERR_EMPTY_RESPONSE"))
        page.choose(photo)
    page.ask("make it night")
    expect(page["#error-what"]).to_have_text("The service cannot be reached.")
    expect(page["#error-advice"]).to_contain_text("Check that the service runs")
    with listening(api, port=int(address.rpartition(":")[2])):
        page.edit("make it night")
        expect(page["#error"]).to_be_hidden()


def test_an_edit_that_the_operator_forbids_is_explained(
    backend: InProcessBackend, serve: Serve, visit: Visit, photo: bytes
) -> None:
    def check(_: Image.Image, instruction: str, *, where: str) -> str | None:
        return "nothing about hats" if "hat" in instruction and where == "input" else None

    api = api_over(backend, check=check)
    page = visit(serve(api), expects=("status of 400",))
    page.choose(photo)
    page.ask("give it a hat")
    expect(page["#error-what"]).to_contain_text("nothing about hats")
    expect(page["#error-advice"]).to_have_text("This service does not make this edit; ask for something else.")


def test_a_number_out_of_range_is_not_sent_and_shown_where_it_is(edit_page: EditPage, photo: bytes) -> None:
    edit_page.choose(photo)
    for name, value in (("steps", "0"), ("n", "11"), ("guidance_scale", "99"), ("seed", "-1")):
        field, usual = edit_page[f"[name={name}]"], edit_page[f"[name={name}]"].input_value()
        edit_page["#settings details"].evaluate("details => details.open = true")
        field.fill(value)
        edit_page["#settings summary"].click()  # hidden, but for n
        edit_page.ask("make it night")
        expect(field).to_be_focused()
        expect(edit_page["#running"]).to_be_hidden()
        assert edit_page.tree() == [["photo.png", []]]
        field.fill(usual)


def test_a_service_with_keys_is_used_with_one_that_the_tab_remembers(
    backend: InProcessBackend, serve: Serve, visit: Visit, photo: bytes
) -> None:
    key, digest = new_key()
    keys = KeyRing(text=f'[[keys]]\nname = "ann"\nsha256 = "{digest}"\nrequests_per_minute = 60')
    address = serve(api_over(backend, keys=keys))
    page = visit(address, expects=("status of 401", "status of 400"))
    dialog = page["#key-dialog"]
    expect(dialog).to_contain_text("an API key is needed")
    page["#key"].fill("wrong")
    page["#key"].press("Enter")
    expect(dialog).to_contain_text("the API key is not valid")
    page["#key"].fill(key)
    dialog.get_by_role("button", name="Save").click()
    expect(page["#examples button"].first).to_be_attached()
    expect(page["#docs"]).to_be_hidden()
    page.choose(photo)
    page.edit("make it night")
    page.page.reload()
    expect(page["#examples button"].first).to_be_visible()
    expect(dialog).to_be_hidden()
    assert page.page.evaluate("[sessionStorage.length, Object.values(localStorage).length]") == [1, 0]
    # Taken away in the middle of work: asked for again, and the edit goes on.
    page["#key-button"].click()
    page["#key"].fill("")
    dialog.get_by_role("button", name="Save").click()
    page.ask("more contrast")
    expect(dialog).to_contain_text("an API key is needed")
    page["#key"].fill(key)
    page["#key"].press("Enter")
    page.is_done()
    assert page.tree() == [["photo.png", [["make it night", [["more contrast", []]]]]]]
    other = visit(address, expects=("status of 401",))
    expect(other["#key-dialog"]).to_be_visible()
    other["#key-close"].click()
    expect(other["#error-advice"]).to_have_text("Enter your key at “API key” above.")


def test_a_key_that_has_used_up_its_share_is_told_when_to_come_back(
    backend: InProcessBackend, serve: Serve, visit: Visit, photo: bytes
) -> None:
    key, digest = new_key()
    keys = KeyRing(text=f'[[keys]]\nname = "ann"\nsha256 = "{digest}"\nrequests_per_minute = 1')
    page = visit(serve(api_over(backend, keys=keys)), expects=("status of 401", "status of 429"))
    page["#key"].fill(key)
    page["#key"].press("Enter")
    expect(page["#examples button"].first).to_be_attached()
    page.choose(photo)
    page.ask("make it night")
    expect(page["#error-advice"]).to_have_text(re.compile(r"Try again in \d+ s\."))


def test_an_untrained_bundle_and_a_fallback_are_told(serve: Serve, visit: Visit, photo: bytes, tmp_path: Path) -> None:
    with open_backend("random") as backend:
        page = visit(serve(api_over(backend, tmp_path)))
        expect(page["#untrained"]).to_contain_text("The model random is untrained")
        expect(page["#examples"]).to_be_hidden()
        page.choose(photo)
        page.edit("make it night", steps=1)
        expect(page["#fallback"]).to_be_visible()
        expect(page["#facts"]).to_contain_text("random (untrained)")


def test_a_trained_bundle_has_neither_note(edit_page: EditPage, photo: bytes) -> None:
    edit_page.choose(photo)
    edit_page.edit("make it night", steps=1)
    expect(edit_page["#untrained"]).to_be_hidden()
    expect(edit_page["#fallback"]).to_be_hidden()
