"""docs/api.md says what the service says of itself."""

import re
from pathlib import Path

import pytest

from docs.api_page import PAGE, filled, openapi_document, tables

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def made() -> dict[str, str]:
    return tables(openapi_document())


@pytest.fixture(scope="module")
def page() -> str:
    return PAGE.read_text(encoding="utf-8")


def test_the_tables_are_those_of_the_openapi_document_and_the_error_table(page: str, made: dict[str, str]) -> None:
    assert filled(page, made) == page, "run: python docs/api_page.py"
    for place, part in (("paths", "`POST /v1/images/edits`"), ("fields", "`expressive`"), ("errors", "`engine_full`")):
        assert part in made[place]


def test_a_table_that_is_out_of_date_or_has_no_place_is_noticed(page: str, made: dict[str, str]) -> None:
    stale = page.replace("`GET /readyz`", "`GET /ready`")
    assert stale != page
    assert filled(stale, made) == page
    with pytest.raises(ValueError, match="there are tables"):
        filled(page.replace("<!-- fields -->\n", ""), made)


def test_every_code_that_the_source_gives_to_an_error_is_on_the_page(page: str) -> None:
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "serving").rglob("*.py"))
    codes = set(re.findall(r'\bcode="(\w+)"', sources)) | set(re.findall(r'40\d: "(\w+)"', sources))
    assert {"missing_required_parameter", "method_not_allowed"} <= codes
    assert {code for code in codes if f"`{code}`" not in page} == set()
