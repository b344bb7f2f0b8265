"""Lists of edits in the forms in which common tools write text."""

import json

import pytest

from mgie.data.edit_list import parse_edit_list
from mgie.errors import DataError

ROWS = [
    {"image": "a.jpg", "instruction": "mach es größer"},
    {"image": "b.jpg", "instruction": "one\u2028line", "seed": 3},
]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_list_is_read_as_notepad_powershell_and_others_write_it(encoding: str, end: str) -> None:
    text = end.join([*(json.dumps(row, ensure_ascii=False) for row in ROWS), "", ""])
    assert parse_edit_list(text.encode(encoding), "list.jsonl") == ROWS


def test_bytes_that_are_no_text_are_refused_by_name() -> None:
    with pytest.raises(DataError, match=r"list\.jsonl"):
        parse_edit_list(b'{"image": "\xff\xfe"}', "list.jsonl")
