"""The body of an edit request -> `EditForm`: multipart as the SDK sends it, or JSON with data URLs.

Both end in the same checks of the same fields. Nothing is fetched: an address of a picture is refused.
"""

import asyncio
import base64
import binascii
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails
from starlette.datastructures import UploadFile
from starlette.requests import Request

from serving.errors import MAX_QUOTED_CHARS, MediaTypeError, RequestError, quoted, quoted_field
from serving.schema import FILES, MAX_FIELD_BYTES, MAX_FIELDS, MAX_UPLOADS, EditForm, form_schema

JSON_TYPE, FORM_TYPE = "application/json", "multipart/form-data"

_DATA_URL = re.compile(r"data:image/[\w.+-]+;base64,", re.ASCII)


async def read_form(request: Request) -> EditForm:
    """Reads and checks the body of an edit.

    Raises:
        RequestError: See `parse_edit_form` and `parse_edit_json`; MediaTypeError for any other kind of body.
        HTTPException: The multipart framing is broken, or there are too many parts (400).
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type == JSON_TYPE:
        body = await request.body()
        return await asyncio.to_thread(parse_edit_json, body)
    if media_type != FORM_TYPE:
        raise MediaTypeError(f"content-type is {quoted(media_type)}; it must be {FORM_TYPE} or {JSON_TYPE}")
    async with request.form(max_files=MAX_UPLOADS, max_fields=MAX_FIELDS, max_part_size=MAX_FIELD_BYTES) as form:
        fields = [
            (name, await value.read() if isinstance(value, UploadFile) else value) for name, value in form.multi_items()
        ]
    return parse_edit_form(fields)


def parse_edit_json(body: bytes) -> EditForm:
    """Checks a JSON body: the fields of the form, pictures as `"data:..."` or `{"image_url": "data:..."}`.

    Args:
        body: `images`, a list of one picture, may stand for `image`; null stands for a field left out.

    Raises:
        RequestError: It is no JSON object, a picture is no data URL, or as `parse_edit_form`.
    """
    try:
        content = json.loads(body, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:  # ValueError: also no UTF-8, or a number of thousands of digits
        raise RequestError(f"the body is not JSON: {quoted(str(error))}", code="invalid_json") from error
    if not isinstance(content, dict):
        raise RequestError(
            f"the body is a JSON {type(content).__name__}; it must be a JSON object", code="invalid_json"
        )
    return parse_edit_form(_fields(content))


def parse_edit_form(fields: Iterable[tuple[str, str | bytes]]) -> EditForm:
    """Checks the fields of a multipart form.

    Args:
        fields: Name and value in the order of the form; files as bytes.

    Raises:
        RequestError: A field is unknown, repeated, missing, not supported yet, or has a bad value.
    """
    values: dict[str, str | bytes] = {}
    for sent_name, value in fields:
        name = "image" if sent_name == "image[]" else sent_name
        if name not in EditForm.model_fields:
            allowed = ", ".join(EditForm.model_fields)
            message = f"unknown parameter {quoted(name)}; known are {allowed}"
            raise RequestError(message, param=_printable(name), code="unknown_parameter")
        if name in values:
            raise RequestError(f"{name} is given more than once; send one", param=name, code="too_many_values")
        if isinstance(value, bytes) != (name in FILES):
            kind = "a file" if name in FILES else "text, not a file"
            raise RequestError(f"{name} must be {kind}", param=name)
        values[name] = value
    if ("image" in values) == ("previous" in values):
        given, code = ("both", "too_many_values") if "image" in values else ("neither", "missing_required_parameter")
        raise RequestError(f"{given} of image and previous is given; send one of them", param="image", code=code)
    try:
        form = EditForm.model_validate(values)
    except ValidationError as error:
        raise _first_problem(error) from error
    if form.output_format == "png" and form.output_compression is not None:
        raise RequestError(
            f"output_compression is {form.output_compression}, but output_format is png, which has none; "
            "use jpeg or webp, or leave it out",
            param="output_compression",
        )
    if form.partial_images and not form.stream:
        raise RequestError(
            f"partial_images is {form.partial_images}, but stream is false; it must be 0 without stream",
            param="partial_images",
        )
    if form.response_format == "url":
        # OpenAI's events have no room for an address.
        for name, is_bad, must_be in (("stream", form.stream, "false"), ("keep", form.keep is False, "true")):
            if is_bad:
                raise RequestError(f"response_format is 'url'; then {name} must be {must_be}", param=name)
    return form


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for name, value in pairs:
        if name in content:
            message = f"{quoted(name)} is given more than once; send one"
            raise RequestError(message, param=_printable(name), code="too_many_values")
        content[name] = value
    return content


def _fields(content: dict[str, Any]) -> Iterator[tuple[str, str | bytes]]:
    """The fields of a form that says the same."""
    properties = form_schema()["properties"]
    for name, value in content.items():
        if value is None:
            continue
        if name == "images":
            if not isinstance(value, list):
                raise RequestError(f"images is {quoted(value)}; it must be a list", param="images")
            yield from (("image", _picture("image", picture)) for picture in value)
        elif name in FILES:
            yield name, _picture(name, value)
        elif isinstance(value, str):
            yield name, value
        elif isinstance(value, bool | int | float) and properties.get(name, {}).get("type") != "string":
            yield name, json.dumps(value)
        else:
            message = f"{quoted(name)} is {quoted_field(name, value)}; it must be text or a number"
            raise RequestError(message, param=_printable(name))


def _picture(name: str, value: Any) -> bytes:
    """The bytes of a data URL, alone or as OpenAI wraps it."""
    allowed = "it must be a URL like data:image/png;base64,..."
    if isinstance(value, dict) and set(value) == {"image_url"}:
        value = value["image_url"]
    if not isinstance(value, str):
        raise RequestError(f"{name} is {quoted(value)}; {allowed}", param=name)
    if re.match(r"https?:", value, re.IGNORECASE):
        raise RequestError(
            f"{name} is {quoted(value)}; this service fetches nothing: {allowed}", param=name, code="unsupported_value"
        )
    match = _DATA_URL.match(value)
    if match is None:
        raise RequestError(f"{name} is {quoted(value)}; {allowed}", param=name)
    try:
        return base64.b64decode(value[match.end() :], validate=True)
    except (binascii.Error, ValueError) as error:  # ValueError: not ASCII
        raise RequestError(f"{name} is a data URL whose base64 is damaged: {error}", param=name) from error


def _printable(name: str) -> str:
    """A name of the client's making, fit to be sent back: JSON can hold halves of characters."""
    return name[:MAX_QUOTED_CHARS].encode(errors="replace").decode()


def _first_problem(error: ValidationError) -> RequestError:
    detail = error.errors(include_url=False)[0]
    name = str(detail["loc"][0])
    if detail["type"] == "missing":
        return RequestError(f"{name} is required", param=name, code="missing_required_parameter")
    code = "unsupported_value" if detail["type"] == "unsupported" else "invalid_value"
    value = quoted_field(name, detail["input"])
    return RequestError(f"{name} is {value}; {_allowed(name, detail)}", param=name, code=code)


def _allowed(name: str, detail: ErrorDetails) -> str:
    """What the value should have been: the field's own bounds, or pydantic's words."""
    schema = form_schema()["properties"][name]
    if detail["type"] == "string_pattern_mismatch":
        return "it must be auto or WxH, such as 512x512"
    if "minimum" in schema and "unsupported" not in detail["type"]:
        kind = "a whole number, " if schema["type"] == "integer" else ""
        return f"it must be {kind}{schema['minimum']:g} to {schema['maximum']}"
    return detail["msg"].replace("Input should be", "it must be").replace("String should", "it must")
