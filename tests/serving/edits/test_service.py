"""The size of a result: what is allowed, and that it is what was asked for."""

import base64
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st

from mgie.images.files import read_image
from mgie.images.geometry import resize
from serving.edits.service import check_output_size
from serving.errors import RequestError
from serving.schema import MAX_SIDE_PX, MIN_SIDE_PX

Photo = Callable[..., bytes]
URL = "/v1/images/edits"
SIDES = st.integers(MIN_SIDE_PX, MAX_SIDE_PX)


def is_allowed(wh: tuple[int, int], own_wh: tuple[int, int], **limits: Any) -> bool:
    try:
        check_output_size(wh, own_wh, **{"max_pixels": 2**40, "has_mask": False} | limits)
    except RequestError:
        return False
    return True


@given(SIDES, SIDES, SIDES)
def test_a_side_that_follows_from_the_other_by_any_rounding_is_allowed(width: int, height: int, side: int) -> None:
    for other in (side * height // width, -(-side * height // width), round(side * height / width)):
        if other:
            assert is_allowed((side, other), (width, height))
            assert is_allowed((other, side), (height, width))


@given(SIDES, SIDES, SIDES, SIDES)
def test_a_size_that_distorts_by_more_than_a_pixel_is_refused_with_one_that_fits(
    width: int, height: int, own_width: int, own_height: int
) -> None:
    is_far = abs(width - height * own_width / own_height) > 1 and abs(height - width * own_height / own_width) > 1
    assert is_allowed((width, height), (own_width, own_height)) != is_far
    if is_far:
        with pytest.raises(RequestError) as caught:
            check_output_size((width, height), (own_width, own_height), max_pixels=2**40, has_mask=False)
        example = re.search(r"e\.g\. (\d+)x(\d+)$", str(caught.value))
        if example is None:  # too slender for a size that has one of these sides
            assert str(caught.value).endswith("aspect ratio: auto")
        else:
            sides = int(example[1]), int(example[2])
            assert {width, height} & set(sides)
            assert MIN_SIDE_PX <= min(sides) <= max(sides) <= MAX_SIDE_PX
            assert is_allowed(sides, (own_width, own_height))


def test_the_message_of_a_size_that_does_not_fit() -> None:
    with pytest.raises(RequestError) as caught:
        check_output_size((1024, 1024), (640, 427), max_pixels=2**40, has_mask=False)
    assert str(caught.value) == (
        "size is 1024x1024, but the photo is 640x427 and keeps its aspect ratio: auto, or e.g. 1024x683"
    )
    assert not is_allowed((1024, 683), (640, 427), max_pixels=1024 * 682)
    assert not is_allowed((1024, 683), (640, 427), has_mask=True)
    assert is_allowed((640, 427), (640, 427), has_mask=True)


def send(client: TestClient, image: bytes, **fields: Any) -> Any:
    files = {"image": ("photo.png", image)}
    return client.post(URL, files=files, data={"prompt": "p", "steps": 1, "seed": 1} | fields)


def test_a_result_of_another_size_is_the_photo_sized_one_scaled(client: TestClient, photo: Photo) -> None:
    own, same, larger = (send(client, photo(97, 64), size=size) for size in ("auto", "97x64", "194x128"))
    assert own.json()["data"] == same.json()["data"]
    assert (own.json()["size"], larger.json()["size"]) == ("97x64", "194x128")
    results = [read_image(base64.b64decode(answer.json()["data"][0]["b64_json"])) for answer in (own, larger)]
    assert (np.asarray(resize(results[0], (194, 128))) == np.asarray(results[1])).all()


def test_a_size_is_refused_before_anything_is_derived(client: TestClient, photo: Photo, mask: Photo) -> None:
    before = client.get("/stats").json()["mllm"]["work"]["num_items"]
    for fields in (
        {"size": "128x128"},
        {"size": "128x128", "stream": "true"},
        {"size": "96x64", "square_crop": "true"},
    ):
        response = send(client, photo(96, 64), **fields)
        assert (response.status_code, response.json()["error"]["param"]) == (400, "size")
    files = {"image": photo(96, 64), "mask": mask((0, 0, 9, 9))}
    response = client.post(URL, files=files, data={"prompt": "p", "size": "192x128"})
    assert "with a mask" in response.json()["error"]["message"]
    assert client.get("/stats").json()["mllm"]["work"]["num_items"] == before
    assert send(client, photo(96, 64), size="32x32", square_crop="true").json()["size"] == "32x32"
