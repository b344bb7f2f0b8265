"""The form of an edit: what is accepted, and what an error says."""

import pytest

from mgie.config import MAX_INSTRUCTION_CHARS
from serving.api.request_body import parse_edit_form
from serving.edits.call import edit_options
from serving.errors import RequestError
from serving.schema import EditForm, form_schema

REQUIRED: list[tuple[str, str | bytes]] = [("image", b"..."), ("prompt", "make it night")]


def parse(*fields: tuple[str, str | bytes]) -> EditForm:
    return parse_edit_form([*REQUIRED, *fields])


def test_strings_become_values() -> None:
    form = parse(
        ("seed", "18446744073"),
        ("steps", "7"),
        ("guidance_scale", "3"),
        ("image_guidance_scale", "1.25"),
        ("sampler", "ddim"),
        ("square_crop", "true"),
        ("detail_transfer", "false"),
        ("n", "3"),
        ("mask", b"png"),
        ("deterministic", "true"),
        ("stream", "false"),
        ("output_format", "jpeg"),
        ("output_compression", "0"),
    )
    call = edit_options(form, model="m")
    assert call.seed == 18446744073
    assert (call.model, call.n, call.deterministic) == ("m", 3, True)
    assert dict(call.overrides) == {
        "sampler": "ddim", "steps": 7, "guidance_scale": 3.0, "image_guidance_scale": 1.25, "square_crop": True,
        "detail_transfer": False,
    }  # fmt: skip
    assert (call.output_format, call.output_quality) == ("jpeg", 0)


def test_what_is_not_given_is_left_to_the_bundle_and_the_seed_is_drawn() -> None:
    calls = [edit_options(parse()) for _ in range(8)]
    assert dict(calls[0].overrides) == {}
    assert calls[0].expressive is None
    assert len({call.seed for call in calls}) == 8
    assert all(0 <= call.seed < 2**32 for call in calls)


def test_image_in_brackets_is_the_same_field() -> None:
    form = parse_edit_form([("image[]", b"abc"), ("prompt", "p")])
    assert form.image == b"abc"


@pytest.mark.parametrize(
    ("fields", "param", "code", "words"),
    [
        ([("mask", "text")], "mask", "invalid_value", "mask must be a file"),
        ([("timeout_s", "0")], "timeout_s", "invalid_value", "greater than 0"),
        ([("timeout_s", "nan")], "timeout_s", "invalid_value", "finite"),
        ([("deterministic", "2")], "deterministic", "invalid_value", "boolean"),
        ([("n", "0")], "n", "invalid_value", "n is '0'; it must be a whole number, 1 to 10"),
        ([("n", "11")], "n", "invalid_value", "1 to 10"),
        ([("n", "two")], "n", "invalid_value", "1 to 10"),
        ([("size", "big")], "size", "invalid_value", "auto or WxH"),
        ([("size", "15x20")], "size", "invalid_value", "each side must be 16 to 4096 px"),
        ([("size", "16x4097")], "size", "invalid_value", "each side must be 16 to 4096 px"),
        ([("quality", "high")], "quality", "unsupported_value", "only auto"),
        ([("quality", "best")], "quality", "invalid_value", "'auto', 'low'"),
        ([("response_format", "file")], "response_format", "invalid_value", "'b64_json' or 'url'"),
        ([("response_format", "url"), ("stream", "true")], "stream", "invalid_value", "stream must be false"),
        ([("response_format", "url"), ("keep", "false")], "keep", "invalid_value", "keep must be true"),
        ([("keep", "perhaps")], "keep", "invalid_value", "boolean"),
        ([("previous", "an-id")], "image", "too_many_values", "both of image and previous"),
        ([("output_format", "gif")], "output_format", "invalid_value", "'png', 'jpeg' or 'webp'"),
        ([("output_compression", "50")], "output_compression", "invalid_value", "png, which has none"),
        ([("output_compression", "101")], "output_compression", "invalid_value", "0 to 100"),
        ([("background", "transparent")], "background", "unsupported_value", "auto or opaque"),
        ([("input_fidelity", "high")], "input_fidelity", "unsupported_value", "only low"),
        ([("stream", "perhaps")], "stream", "invalid_value", "boolean"),
        ([("partial_images", "2")], "partial_images", "invalid_value", "must be 0 without stream"),
        ([("partial_images", "4"), ("stream", "true")], "partial_images", "invalid_value", "0 to 3"),
        ([("seed", "-1")], "seed", "invalid_value", "0 to 9223372036854775807"),
        ([("seed", "9223372036854775808")], "seed", "invalid_value", "0 to 9223372036854775807"),
        ([("seed", "1" * 5000)], "seed", "invalid_value", "(5000 characters)"),
        ([("steps", "0")], "steps", "invalid_value", "1 to 1000"),
        ([("steps", "1001")], "steps", "invalid_value", "1 to 1000"),
        ([("steps", "")], "steps", "invalid_value", "steps is ''"),
        ([("guidance_scale", "nan")], "guidance_scale", "invalid_value", "0 to 50"),
        ([("guidance_scale", "inf")], "guidance_scale", "invalid_value", "0 to 50"),
        ([("image_guidance_scale", "50.5")], "image_guidance_scale", "invalid_value", "0 to 50"),
        ([("sampler", "best")], "sampler", "invalid_value", "'euler_ancestral'"),
        ([("square_crop", "1.5")], "square_crop", "invalid_value", "boolean"),
        ([("expressive", " \n")], "expressive", "invalid_value", "hold some text"),
        ([("user", "u" * 513)], "user", "invalid_value", "512"),
        (
            [("strength", "0.5")],
            "strength",
            "unknown_parameter",
            "unknown parameter 'strength'; known are image, previous, prompt",
        ),
        ([("prompt", "again")], "prompt", "too_many_values", "more than once"),
        ([("image", b"second")], "image", "too_many_values", "more than once"),
        ([("image[]", b"second")], "image", "too_many_values", "more than once"),
        ([("model", b"file")], "model", "invalid_value", "text, not a file"),
    ],
)
def test_a_bad_field_is_named_with_its_value_and_what_is_allowed(
    fields: list[tuple[str, str | bytes]], param: str, code: str, words: str
) -> None:
    with pytest.raises(RequestError) as caught:
        parse(*fields)
    assert (caught.value.param, caught.value.code or "invalid_value") == (param, code)
    assert words in str(caught.value)
    assert param in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ([], "image", "missing_required_parameter"),
        ([("image", b"...")], "prompt", "missing_required_parameter"),
        ([("image", "text"), ("prompt", "p")], "image", "invalid_value"),
        ([("image", b"..."), ("prompt", "")], "prompt", "invalid_value"),
        ([("image", b"..."), ("prompt", " \t ")], "prompt", "invalid_value"),
        ([("image", b"..."), ("prompt", "p" * (MAX_INSTRUCTION_CHARS + 1))], "prompt", "invalid_value"),
        ([("image", b"..."), ("prompt", "p" * 20_000)], "prompt", "invalid_value"),
    ],
)
def test_image_and_prompt_are_required_and_limited(
    fields: list[tuple[str, str | bytes]], param: str, code: str
) -> None:
    with pytest.raises(RequestError) as caught:
        parse_edit_form(fields)
    assert (caught.value.param, caught.value.code or "invalid_value") == (param, code)


def test_the_longest_prompt_allowed_is_accepted() -> None:
    form = parse_edit_form([("image", b"..."), ("prompt", "p" * MAX_INSTRUCTION_CHARS)])
    assert len(form.prompt) == MAX_INSTRUCTION_CHARS


def test_the_openapi_schema_of_the_form_tells_what_the_parser_does() -> None:
    schema = form_schema()
    assert schema["additionalProperties"] is False
    assert schema["required"] == ["prompt"]
    assert schema["oneOf"] == [{"required": ["image"]}, {"required": ["previous"]}]
    assert schema["properties"]["image"] == schema["properties"]["image"] | {"type": "string", "format": "binary"}
    fields = {
        name: field for name, field in schema["properties"].items() if name not in {"image", "previous", "prompt"}
    }
    assert len(fields) > 10
    for name, field in fields.items():
        assert field["type"] != "null"
        assert "anyOf" not in field
        for value in [*field.get("enum", []), *([field["default"]] if "default" in field else [])]:
            parse((name, str(value).lower()))
        for bound, beyond in (("minimum", -1), ("maximum", 1)):
            if bound in field:
                if name not in {"partial_images", "output_compression"}:  # narrowed by enum; needs a jpeg
                    parse((name, str(field[bound])))
                with pytest.raises(RequestError):
                    parse((name, str(field[bound] + beyond)))
