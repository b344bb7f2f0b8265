"""Rows frozen for a run: what is kept, what validates, what is refused."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image

from mgie.data.examples import TRAIN_FILE, VALIDATION_FILE, ExampleCounts, Examples, freeze_examples
from mgie.data.ledger import LEDGER_SCHEMA
from mgie.errors import DataError
from tests.mgie.training_rows import draw_rows, encode_png, open_rows


def _row(i: int, **fields: Any) -> dict[str, Any]:
    return {
        "id": i,
        "dataset": "drawn",
        "split": "train",
        "session": None,
        "source": f"{i // 2}.png",  # two requests per photo
        "goal": f"goal-{i}.png",
        "instruction": f"make it {i}",
        "expressive": f"It is {i}.",
    } | fields


def _freeze(rows: list[dict[str, Any]], folder: Path, *, share: float = 0.0, **options: Any) -> ExampleCounts:
    batches = [pa.RecordBatch.from_pylist(rows[start : start + 7], LEDGER_SCHEMA) for start in range(0, len(rows), 7)]
    return freeze_examples(batches, folder, validation_share=share, **options)


def _ids(folder: Path, name: str) -> list[int]:
    return Examples(folder / name, lambda uri: b"").ids.tolist()


def test_rows_are_kept_in_order_with_their_words(tmp_path: Path) -> None:
    rows = [_row(i) for i in range(20)]
    counts = _freeze(rows, tmp_path)
    assert (counts.num_train, counts.num_validation, counts.datasets) == (20, 0, ("drawn",))
    found = list(Examples(tmp_path / TRAIN_FILE, lambda uri: b"").rows())
    assert [(r.id, r.instruction, r.expressive, r.source, r.goal) for r in found] == [
        (r["id"], r["instruction"], r["expressive"], r["source"], r["goal"]) for r in rows
    ]


def test_a_share_of_the_photos_validates_with_all_their_rows(tmp_path: Path) -> None:
    rows = [_row(i) for i in range(400)]
    counts = _freeze(rows, tmp_path, share=0.2)
    validation, train = _ids(tmp_path, VALIDATION_FILE), _ids(tmp_path, TRAIN_FILE)
    assert sorted(validation + train) == list(range(400))
    assert len(validation) == counts.num_validation
    assert 50 < len(validation) < 110
    assert not {i // 2 for i in validation} & {i // 2 for i in train}
    more = _freeze([*rows, *(_row(i) for i in range(400, 500))], tmp_path / "more", share=0.2)
    assert more.num_validation >= counts.num_validation
    assert set(validation) <= set(_ids(tmp_path / "more", VALIDATION_FILE))


def test_the_turns_of_a_session_stay_together(tmp_path: Path) -> None:
    _freeze([_row(i, session=f"s{i % 40}", source=f"{i}.png") for i in range(200)], tmp_path, share=0.3)
    validation, train = _ids(tmp_path, VALIDATION_FILE), _ids(tmp_path, TRAIN_FILE)
    assert validation
    assert not {i % 40 for i in validation} & {i % 40 for i in train}


def test_a_data_set_with_a_split_of_its_own_keeps_it(tmp_path: Path) -> None:
    rows = [_row(0), _row(1, split="val"), _row(2, split="test"), _row(3)]
    _freeze(rows, tmp_path, share=0.9)
    assert _ids(tmp_path, TRAIN_FILE) == [0, 3]
    assert _ids(tmp_path, VALIDATION_FILE) == [1]


def test_the_fingerprint_follows_ids_words_and_order(tmp_path: Path) -> None:
    rows = [_row(i) for i in range(9)]
    variants = [rows, rows[::-1], rows[:-1], [*rows[:-1], _row(8, expressive="Other.")]]
    prints = [_freeze(each, tmp_path / str(i)).fingerprint for i, each in enumerate(variants)]
    assert len(set(prints)) == 4
    assert _freeze(rows, tmp_path / "again").fingerprint == prints[0]


@pytest.mark.parametrize("missing", [None, "", "  "])
def test_missing_captions_are_refused_by_name(tmp_path: Path, missing: str | None) -> None:
    rows = [_row(i) if i % 2 else _row(i, expressive=missing) for i in range(10)]
    with pytest.raises(DataError, match=r"5 of 10 rows have no expressive \(ids 0, 2, 4, \.\.\.\)"):
        _freeze(rows, tmp_path)
    assert _freeze(rows, tmp_path, needs_expressive=False).num_train == 10


def test_nothing_left_to_train_on_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no row is left"):
        _freeze([_row(0, split="val"), _row(1, split="test")], tmp_path)


def test_images_come_with_the_row(tmp_path: Path) -> None:
    rows = open_rows(draw_rows(tmp_path, 3))
    example = rows.read(rows.row(2))
    assert example.source.size == (64, 48)
    assert example.instruction == "winter"
    assert encode_png(example.source) == encode_png(Image.open(tmp_path / "2-source.png").convert("RGB"))


def test_an_image_that_cannot_be_read_is_told_with_its_row(tmp_path: Path) -> None:
    rows = open_rows(draw_rows(tmp_path, 3))
    (tmp_path / "1-goal.png").write_bytes(b"no image")
    (tmp_path / "2-source.png").unlink()
    with pytest.raises(DataError, match=r"goal image 1-goal.png of row 1007"):
        rows.read(rows.row(1))
    with pytest.raises(DataError, match=r"source image 2-source.png of row 1014"):
        rows.read(rows.row(2))


def test_a_damaged_file_of_rows_is_refused(tmp_path: Path) -> None:
    path = draw_rows(tmp_path, 3) / TRAIN_FILE
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match="cannot be read"):
        open_rows(tmp_path)
