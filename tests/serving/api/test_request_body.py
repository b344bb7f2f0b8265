"""The JSON variant of an edit's body: the same fields, the same checks as the form's."""

import base64
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.api.request_body import parse_edit_form, parse_edit_json
from serving.errors import RequestError
from serving.schema import json_schema

PICTURE = bytes(range(256))
DATA_URL = f"data:image/png;base64,{base64.b64encode(PICTURE).decode()}"


def body(**fields: Any) -> bytes:
    return json.dumps({"image": DATA_URL, "prompt": "p"} | fields).encode()


@pytest.mark.parametrize(
    "image", [{"image": DATA_URL}, {"image": {"image_url": DATA_URL}}, {"images": [{"image_url": DATA_URL}]}]
)
def test_a_json_body_says_the_same_as_a_form(image: dict[str, Any]) -> None:
    values = {
        "prompt": "make it night",
        "seed": 2**63 - 1,
        "guidance_scale": 1.25,
        "stream": True,
        "n": 3,
        "keep": None,
    }
    form = parse_edit_json(json.dumps(image | values | {"mask": {"image_url": DATA_URL}}).encode())
    sent = [(name, str(value)) for name, value in values.items() if value is not None]
    assert form == parse_edit_form([("image", PICTURE), ("mask", PICTURE), *sent])
    assert (form.seed, form.stream, form.keep) == (2**63 - 1, True, None)


@pytest.mark.parametrize(
    ("sent", "param", "code", "words"),
    [
        (b"", None, "invalid_json", "not JSON"),
        (b"\xff", None, "invalid_json", "not JSON"),
        (b"[" * 100_000, None, "invalid_json", "not JSON"),
        (b'{"seed": ' + b"1" * 5000 + b"}", None, "invalid_json", "not JSON"),
        (b"[]", None, "invalid_json", "must be a JSON object"),
        (b'{"prompt": "a", "prompt": "b"}', "prompt", "too_many_values", "more than once"),
        (b'{"mask": {"image_url": "a", "image_url": "b"}}', "image_url", "too_many_values", "more than once"),
        (body(images=[DATA_URL]), "image", "too_many_values", "more than once"),
        (body(image=None, images=[DATA_URL] * 2), "image", "too_many_values", "more than once"),
        (body(image=None, images=[]), "image", "missing_required_parameter", "neither of image and previous"),
        (body(images="x"), "images", "invalid_value", "must be a list"),
        (body(image="http://host/a.png"), "image", "unsupported_value", "this service fetches nothing"),
        (body(image={"image_url": "HTTPS://host/a.png"}), "image", "unsupported_value", "fetches nothing"),
        (body(mask="https://host/a.png"), "mask", "unsupported_value", "fetches nothing"),
        (body(image="file:///etc/passwd"), "image", "invalid_value", "data:image/png;base64"),
        (body(image="data:text/plain;base64,AAAA"), "image", "invalid_value", "data:image/png;base64"),
        (body(image="data:image/png,abc"), "image", "invalid_value", "data:image/png;base64"),
        (body(image=DATA_URL + "!"), "image", "invalid_value", "base64 is damaged"),
        (body(image=DATA_URL + "\u00e9"), "image", "invalid_value", "base64 is damaged"),
        (body(image={"file_id": "file-1"}), "image", "invalid_value", "file_id"),
        (body(image={"image_url": DATA_URL, "detail": "high"}), "image", "invalid_value", "must be a URL"),
        (body(image=5), "image", "invalid_value", "image is 5"),
        (body(prompt=5), "prompt", "invalid_value", "'prompt' is of type int; it must be text"),
        (body(prompt=["p"]), "prompt", "invalid_value", "must be text"),
        (body(prompt="\ud800"), "prompt", "invalid_value", "prompt"),
        (body(steps=True), "steps", "invalid_value", "1 to 1000"),
        (body(steps=2.5), "steps", "invalid_value", "1 to 1000"),
        (body(guidance_scale=float("nan")), "guidance_scale", "invalid_value", "0 to 50"),
        (body(strength=1), "strength", "unknown_parameter", "unknown parameter"),
        (body(**{"\ud800": 1}), "?", "unknown_parameter", "unknown parameter"),
    ],
)
def test_what_a_json_body_may_not_hold_is_named(sent: bytes, param: str | None, code: str, words: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_edit_json(sent)
    assert (caught.value.param, caught.value.code or "invalid_value") == (param, code)
    assert words in str(caught.value)
    assert len(str(caught.value)) < 700


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just(DATA_URL),
        lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from([*json_schema()["properties"], "x"]), inner),
    )
)
def test_any_json_is_a_form_or_an_error_that_can_be_sent(content: Any) -> None:
    try:
        parse_edit_json(json.dumps(content).encode())
    except RequestError as error:
        json.dumps([str(error), error.param], ensure_ascii=False).encode()


def test_the_openapi_schema_of_json_offers_each_way_to_give_a_picture() -> None:
    schema = json_schema()
    assert [option["required"] for option in schema["oneOf"]] == [["image"], ["images"], ["previous"]]
    assert schema["properties"]["images"]["maxItems"] == 1
    assert "binary" not in json.dumps(schema)
