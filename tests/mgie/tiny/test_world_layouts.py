"""The world writes raw data sets that the project's own readers read, in every layout."""

from pathlib import Path
from typing import get_args

import pyarrow.parquet as pq
import pytest

from mgie.errors import ConfigError
from mgie.images.files import read_image
from mgie.storage.folder import open_folder
from mgie.tiny.world import LAYOUTS, layouts, make_sample, write_layout
from pipelines.readers import BadRow, Columns, Layout, RawEdit, make_reader

OWN = Columns(
    mask="mask", source_caption="source_caption", goal_caption="goal_caption", keep=("operation", "tiny_world")
)
COUNT = 6
WITHOUT_CAPTIONS = {"magicbrush", "gier", "ma5k", "evr", "mgie"}
WITH_MASKS = {"magicbrush", "magicbrush-test", "ultraedit", "parquet", "jsonl", "webdataset"}


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _read(layout: Layout, path: Path) -> list[RawEdit]:
    folder = open_folder(path)
    reader = make_reader(layout, OWN)
    found = [row for shard in reader.shards(folder) for row in reader.read(folder, shard)]
    assert not [row for row in found if isinstance(row, BadRow)]
    return [row for row in found if isinstance(row, RawEdit)]


def _bytes(path: Path, image: bytes | str) -> bytes:
    return (path / image).read_bytes() if isinstance(image, str) else image


def test_every_layout_that_is_read_can_be_written() -> None:
    assert set(LAYOUTS) == set(get_args(Layout))


@pytest.mark.parametrize("layout", get_args(Layout))
def test_the_reader_of_a_layout_reads_what_was_written(layout: Layout, tmp_path: Path) -> None:
    write_layout(layout, tmp_path, COUNT, seed=4, side_px=48)
    samples = [make_sample(4, "train", number, side_px=48) for number in range(COUNT)]
    rows = [row for row in _read(layout, tmp_path) if row.direction == "forward"]
    # GIER lists all its records again in `splits`, of which the reader takes one
    assert [row.instruction for row in rows] == [sample.instruction for sample in samples]
    if layout not in WITHOUT_CAPTIONS:
        assert [row.goal_caption for row in rows] == [sample.goal_caption for sample in samples]
    for row in rows:
        source, goal = (_bytes(tmp_path, one) for one in (row.source, row.goal))
        assert source != goal
        assert read_image(source).size == (48, 48)
        assert (row.mask is not None) == (layout in WITH_MASKS)


@pytest.mark.parametrize("layout", ["parquet", "jsonl", "webdataset"])
def test_a_row_of_an_own_layout_says_which_sample_it_is(layout: Layout, tmp_path: Path) -> None:
    write_layout(layout, tmp_path, 3, seed=4, split="test", side_px=48)
    for row in _read(layout, tmp_path):
        sample = make_sample(**row.provenance["tiny_world"])
        assert sample.instruction == row.instruction
        assert sample.operation == row.provenance["operation"]


@pytest.mark.parametrize("layout", ["ipr2pr", "jsonl", "webdataset", "mgie"])
def test_a_layout_has_the_same_bytes_each_time(layout: str, tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_layout(layout, tmp_path / name, 3, side_px=48)
    assert _files(tmp_path / "a") == _files(tmp_path / "b")


def test_more_rows_than_a_row_group_are_all_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layouts, "_ROWS_PER_GROUP", 4)
    write_layout("parquet", tmp_path, 9, side_px=32)
    assert len(_read("parquet", tmp_path)) == 9
    assert pq.ParquetFile(tmp_path / "train.parquet").num_row_groups == 3


def test_an_unknown_layout_and_an_empty_data_set_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="layout is 'png'"):
        write_layout("png", tmp_path, 1)
    with pytest.raises(ConfigError, match="count is 0"):
        write_layout("ipr2pr", tmp_path, 0)
