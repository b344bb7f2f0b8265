"""The page over the deployments of Ray Serve, whose proxy lies between."""

import json
from collections.abc import Callable

import pytest

pytest.importorskip("playwright", reason="playwright is not installed")
from playwright.sync_api import expect

from tests.browser.edit_page import EditPage

pytestmark = [pytest.mark.browser, pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]


# `service` comes first: Ray is started before Playwright's event loop runs.
def test_edits_turns_previews_and_cancelling_work_on_ray(
    service: str, visit: Callable[..., EditPage], photo: bytes
) -> None:
    from tests.ray_cluster import KEY

    page = visit(service, expects=("status of 401",))
    page["#key"].fill(KEY)
    page["#key"].press("Enter")
    expect(page["#key-dialog"]).to_be_hidden()
    page.choose(photo)
    with page.page.expect_response(lambda response: response.request.method == "POST") as answer:
        page.edit("make it night", steps=60, seed=1)
    events = answer.value.text()
    assert events.count("event: image_edit.partial_image") >= 1
    assert f": expressive {json.dumps(page['#expressive'].input_value())}" in events
    page.edit("more contrast", steps=2)
    assert page.tree() == [["photo.png", [["make it night", [["more contrast", []]]]]]]
    page.fill_numbers(steps=1000, n=4)
    page.ask("let it rain")
    expect(page["#progress"]).to_have_attribute("max", "1000")
    page["#cancel"].click()
    expect(page["#status"]).to_have_text("Cancelled.")
