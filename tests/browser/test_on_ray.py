"""The page over the deployments of Ray Serve, whose proxy lies between."""

from collections.abc import Callable

import pytest

from serving.args import ServingArgs
from serving.demo import free_port, local_service

pytest.importorskip("playwright", reason="playwright is not installed")
from playwright.sync_api import expect

from tests.browser.edit_page import EditPage

pytestmark = [pytest.mark.browser, pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]


def test_edits_turns_previews_and_cancelling_work_on_ray(visit: Callable[..., EditPage], photo: bytes) -> None:
    args = ServingArgs(device="cpu", mllm_max_replicas=1, diffusion_max_replicas=1)
    with local_service(args, port=free_port(prefer_usual=False)) as address:
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
