"""Claims that hold for every layout: the same edits are written in each and read back."""

import json
from pathlib import Path

import pytest

from mgie.data.ledger import rejection_code, row_id
from mgie.storage.folder import open_folder
from pipelines.readers import Layout, make_reader
from tests.pipelines.raw_data import OWN, WRITERS, bad, edits, good, picture, read_rows, with_one

ALL: list[Layout] = list(WRITERS)
WITH_CAPTIONS = {
    "ipr2pr",
    "instructpix2pix",
    "magicbrush-test",
    "ultraedit",
    "hq-edit",
    "parquet",
    "jsonl",
    "webdataset",
}
every_layout = pytest.mark.parametrize("layout", ALL)


def _forward(rows: list[dict[str, object]]) -> list[dict[str, object]]:
    return [row for row in rows if "inverse" not in str(row.get("provenance"))]


@every_layout
def test_every_edit_comes_back_once_in_order(layout: Layout, tmp_path: Path) -> None:
    written = edits(5)
    WRITERS[layout](tmp_path / "raw", written)
    rows = read_rows(layout, tmp_path / "raw", tmp_path / "out")
    assert bad(rows) == []
    found = _forward(rows)
    assert [row["instruction"] for row in found] == [edit.instruction for edit in written]
    assert [row["id"] for row in found] == [row_id(e.source, e.goal, e.instruction, "forward") for e in written]
    if layout in WITH_CAPTIONS:
        assert {(row["source_caption"], row["goal_caption"]) for row in found} == {("a house", "a house at night")}
    assert len(rows) == (10 if layout == "hq-edit" else 5)


@every_layout
def test_uris_lead_to_the_bytes_of_the_data_set(layout: Layout, tmp_path: Path) -> None:
    written = edits(3)
    WRITERS[layout](tmp_path / "raw", written)
    extracts = make_reader(layout, OWN).extracts(open_folder(tmp_path / "raw"))
    root = tmp_path / ("out" if extracts else "raw")
    for row, edit in zip(_forward(read_rows(layout, tmp_path / "raw", tmp_path / "out")), written, strict=True):
        assert (root / row["source"]).read_bytes() == edit.source
        assert (root / row["goal"]).read_bytes() == edit.goal
    assert (tmp_path / "out").exists() == extracts  # what lies in files is not copied


@every_layout
def test_a_corrupt_image_is_one_rejected_edit(layout: Layout, tmp_path: Path) -> None:
    WRITERS[layout](tmp_path / "raw", with_one(edits(4), 1, goal=picture(1)[:200]))
    rows = read_rows(layout, tmp_path / "raw", tmp_path / "out")
    assert [rejection_code(row["reason"]) for row in bad(rows)] == ["bad_image"] * (2 if layout == "hq-edit" else 1)
    assert len(_forward(good(rows))) == 3
    assert "damaged JPEG" in bad(rows)[0]["reason"]


@every_layout
def test_a_missing_image_is_one_rejected_edit(layout: Layout, tmp_path: Path) -> None:
    WRITERS[layout](tmp_path / "raw", with_one(edits(4), 2, goal=None))
    rows = read_rows(layout, tmp_path / "raw", tmp_path / "out")
    in_files = not make_reader(layout, OWN).extracts(open_folder(tmp_path / "raw"))
    # In a table there is no file to be missing: the field is empty.
    expected = "missing_file" if in_files else "bad_image" if layout == "mgie" else "bad_row"
    assert [rejection_code(row["reason"]) for row in bad(rows)] == [expected]
    assert len(_forward(good(rows))) == 3


@every_layout
def test_a_blank_instruction_is_one_rejected_edit(layout: Layout, tmp_path: Path) -> None:
    WRITERS[layout](tmp_path / "raw", with_one(edits(4), 3, instruction=" \n"))
    rows = read_rows(layout, tmp_path / "raw", tmp_path / "out")
    assert [rejection_code(row["reason"]) for row in bad(rows)] == ["empty_instruction"]
    assert len(_forward(good(rows))) == 3


@every_layout
def test_an_instruction_that_is_null_is_one_rejected_edit(layout: Layout, tmp_path: Path) -> None:
    if layout == "hq-edit":
        pytest.skip("HQ-Edit's writer derives the inverse from the text")
    WRITERS[layout](tmp_path / "raw", with_one(edits(4), 3, instruction=None))
    rows = read_rows(layout, tmp_path / "raw", tmp_path / "out")
    assert [rejection_code(row["reason"]) for row in bad(rows)] == ["bad_row"]
    assert len(_forward(good(rows))) == 3


@every_layout
def test_a_pair_of_different_sizes_is_kept_and_its_sizes_are_noted(layout: Layout, tmp_path: Path) -> None:
    WRITERS[layout](tmp_path / "raw", with_one(edits(2), 0, goal=picture(77, (64, 24))))
    row = read_rows(layout, tmp_path / "raw", tmp_path / "out")[0]
    assert row.get("reason") is None
    provenance = json.loads(row["provenance"])
    assert (provenance["source_wh"], provenance["goal_wh"]) == ([40, 32], [64, 24])


@every_layout
def test_unchanged_images_are_one_rejected_edit(layout: Layout, tmp_path: Path) -> None:
    same = edits(2)[0].source
    WRITERS[layout](tmp_path / "raw", with_one(edits(2), 0, goal=same))
    rows = read_rows(layout, tmp_path / "raw", tmp_path / "out")
    assert {rejection_code(row["reason"]) for row in bad(rows)} == {"unchanged"}


@every_layout
def test_shards_do_not_depend_on_anything_but_the_data(layout: Layout, tmp_path: Path) -> None:
    WRITERS[layout](tmp_path / "raw", edits(3))
    raw = open_folder(tmp_path / "raw")
    first = make_reader(layout, OWN).shards(raw)
    assert first == make_reader(layout, OWN).shards(raw)
    assert json.loads(json.dumps([vars(shard) for shard in first]))  # plain values


@every_layout
def test_an_empty_folder_is_an_error_not_an_empty_data_set(layout: Layout, tmp_path: Path) -> None:
    from mgie.errors import DataError

    with pytest.raises(DataError):
        make_reader(layout, OWN).shards(open_folder(tmp_path))
