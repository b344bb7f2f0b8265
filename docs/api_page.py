"""Writes the tables of `api.md` from the service's own OpenAPI document and error table: `python docs/api_page.py`."""

import inspect
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mgie.bundle.embedded import ensure_bundle
from serving.api.opened import Opened
from serving.api.responses import ANSWERS
from serving.api.routes import build_api
from serving.args import ServingArgs
from serving.edits.in_process import InProcessBackend
from serving.schema import CompletedEvent, PartialEvent
from serving.stages.diffusion import DiffusionStage
from serving.stages.mllm import MLLMStage

PAGE = Path(__file__).with_name("api.md")
Schema = Mapping[str, Any]


def main() -> None:
    """Rewrites what stands between the marks."""
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), tables(openapi_document())), encoding="utf-8")


def openapi_document() -> dict[str, Any]:
    """Of a service with everything that it can have."""
    folder = str(ensure_bundle("random"))
    mllm, diffusion = MLLMStage(folder, device="cpu"), DiffusionStage(folder, device="cpu")
    try:
        with tempfile.TemporaryDirectory() as results:
            args = ServingArgs(artifacts=results)
            api = build_api(InProcessBackend(mllm, diffusion), args, Opened.of(args))
            return api.openapi()
    finally:
        mllm.close()
        diffusion.close()


def filled(page: str, made: Mapping[str, str]) -> str:
    """The page with each table between its marks, `<!-- name -->` and `<!-- end -->`.

    Raises:
        ValueError: A table has no place in the page, or a place no table.
    """
    marks = re.findall(r"<!-- (\w+) -->\n", page)
    names = [name for name in marks if name != "end"]
    if sorted(names) != sorted(made) or len(marks) != 2 * len(names):
        raise ValueError(f"the page has marks for {sorted(names)}; there are tables {sorted(made)}")
    return re.sub(
        r"<!-- (\w+) -->\n.*?<!-- end -->\n",
        lambda match: f"<!-- {match[1]} -->\n{made[match[1]]}<!-- end -->\n",
        page,
        flags=re.DOTALL,
    )


def tables(document: Schema) -> dict[str, str]:
    """Markdown by the name of its place."""
    schemas = document["components"]["schemas"]
    form = document["paths"]["/v1/images/edits"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    # No route returns one of these as its body, so that they are not in the document.
    events = {model: model.model_json_schema()["properties"] for model in (PartialEvent, CompletedEvent)}
    return {
        "paths": table(("method and path", "what", "answers"), paths(document)),
        "fields": table(("field", "values", "if absent", "meaning"), fields(form)),
        "answer": table(("field", "type", "meaning"), properties(schemas["EditResponse"])),
        "data": table(("field", "type", "meaning"), properties(schemas["EditedImage"])),
        "mgie": table(("field", "type", "meaning"), properties(schemas["EditDetails"])),
        "job": table(("field", "type", "meaning"), properties(schemas["JobView"])),
        "events": table(
            ("event", "fields"),
            [
                (f"`{names['type']['const']}`", ", ".join(f"`{name}`" for name in names))
                for model, names in events.items()
            ],
        ),
        "errors": table(("status", "code", "when"), errors()),
    }


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def paths(document: Schema) -> list[tuple[str, str, str]]:
    """Every operation."""
    return [
        (f"`{method.upper()} {path}`", operation["summary"], ", ".join(sorted(operation["responses"])))
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
    ]


def fields(form: Schema) -> list[tuple[str, str, str, str]]:
    """Every field of the form."""
    rows = []
    for name, schema in form["properties"].items():
        absent = (
            "**required**"
            if name in form["required"]
            else f"`{shown(schema['default'])}`"
            if "default" in schema
            else ""
        )
        rows.append((f"`{name}`", kind(schema), absent, schema.get("description", "")))
    return rows


def properties(schema: Schema) -> list[tuple[str, str, str]]:
    """Every property of an object."""
    return [(f"`{name}`", kind(one), one.get("description", "")) for name, one in schema["properties"].items()]


def kind(schema: Schema) -> str:
    """A value's type and range in words."""
    if "$ref" in schema:
        return f"object {schema['$ref'].rpartition('/')[2]}"
    if "anyOf" in schema:
        return " or ".join(kind(option) for option in schema["anyOf"])
    if "const" in schema:
        return f"`{schema['const']}`"
    if "enum" in schema:
        return ", ".join(f"`{shown(value)}`" for value in schema["enum"])
    if schema.get("format") == "binary":
        return "file"
    if schema["type"] == "array":
        return f"list of {kind(schema['items'])}"
    words = {"integer": "whole number", "string": "text", "boolean": "`true`, `false`"}.get(
        schema["type"], schema["type"]
    )
    least, most = schema.get("minimum"), schema.get("maximum")
    if least is not None:
        return f"{words}, {least:g} to {most if isinstance(most, int) else format(most, 'g')}"
    if "exclusiveMinimum" in schema:
        return f"{words} above {schema['exclusiveMinimum']:g}"
    if "maxLength" in schema:
        return f"{words}, at most {schema['maxLength']} characters"
    return f"{words} like `{schema['pattern']}`" if "pattern" in schema else words


def shown(value: object) -> str:
    """A value as it is sent."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def errors() -> list[tuple[str, str, str]]:
    """Every class of errors that has an answer."""
    return [(str(answer.status), f"`{answer.code}`", first_line(error)) for error, answer in ANSWERS]


def first_line(documented: type) -> str:
    """The summary of a docstring."""
    return (inspect.getdoc(documented) or "").partition("\n\n")[0].replace("\n", " ")


if __name__ == "__main__":
    main()
