import io
import json
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mgie.data.ledger import LEDGER_SCHEMA, to_table, write_images_root
from mgie.errors import ConfigError, DataError
from mgie.images.files import read_image
from mgie.storage.folder import open_folder
from pipelines.export import ExportConfig, export, main
from tests.pipelines.jobs import run_here
from tests.pipelines.raw_data import picture, read_rows

LOCAL = pafs.LocalFileSystem()


def _write_ledger(folder: Path, splits: list[str], *, kind: str = "jpeg") -> list[dict[str, Any]]:
    """One row per split name, the second with a mask and two attempts; and a rejected one."""
    (folder / "images").mkdir(parents=True)
    rows = []
    for i, split in enumerate(splits):
        for role in (0, 1):
            (folder / "images" / f"{i}_{role}.{kind}").write_bytes(picture(2 * i + role, kind=kind))
        row = {"id": 2**62 + i, "dataset": "d", "split": split, "instruction": f"change ü {i}", "provenance": "{}"}
        row |= {"source": f"images/{i}_0.{kind}", "goal": f"images/{i}_1.{kind}"}
        rows.append(row | {"expressive": f'"Expressive" {i}.', "status": "ok", "attempt": 1, "describe_seconds": 0.5})
    rows[1]["mask"] = rows[0]["source"]
    stored = [*rows, {**rows[1], "attempt": 0, "expressive": "old"}, {**rows[0], "id": 1, "status": "rejected"}]
    (folder / "ledger").mkdir()
    pq.write_table(to_table(stored, LEDGER_SCHEMA), folder / "ledger" / "a.parquet")
    write_images_root(open_folder(folder / "ledger"), "..")
    return rows


def test_hugging_face_parquet_holds_the_rows_with_their_images(tmp_path: Path) -> None:
    rows = _write_ledger(tmp_path, ["train", "train", "val", "train"])
    config = ExportConfig(ledger=str(tmp_path / "ledger"), out=str(tmp_path / "out"), rows_per_file=2)
    assert export(config) == {"train": 3, "val": 1}
    names = ["train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001"]
    assert sorted(path.name for path in (tmp_path / "out" / "data").iterdir()) == [f"{name}.parquet" for name in names]
    found = [row for name in names for row in pq.read_table(tmp_path / "out" / "data" / f"{name}.parquet").to_pylist()]
    expected = [rows[0], rows[1], rows[3], rows[2]]
    assert [row["id"] for row in found] == [row["id"] for row in expected]
    for row, ledger_row in zip(found, expected, strict=True):
        assert row["expressive"] == ledger_row["expressive"]
        assert row["goal"]["bytes"] == (tmp_path / ledger_row["goal"]).read_bytes()
    assert found[1]["mask"] == {"bytes": picture(0), "path": "0_0.jpeg"}
    assert found[0]["mask"] is None


def test_hugging_face_parquet_says_which_columns_are_images(tmp_path: Path) -> None:
    _write_ledger(tmp_path, ["train", "train"])
    export(ExportConfig(ledger=str(tmp_path / "ledger"), out=str(tmp_path / "out")))
    schema = pq.read_schema(tmp_path / "out" / "data" / "train-00000-of-00001.parquet")
    features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    assert {name for name, feature in features.items() if feature["_type"] == "Image"} == {"source", "goal", "mask"}
    assert list(features) == schema.names
    assert (features["id"]["dtype"], features["describe_seconds"]["dtype"]) == ("int64", "float64")
    assert "status" not in features


def test_mgie_files_are_read_back_by_our_own_reader(tmp_path: Path) -> None:
    rows = _write_ledger(tmp_path, ["train", "train", "val"])
    config = ExportConfig(ledger=str(tmp_path / "ledger"), out=str(tmp_path / "out"), format="mgie")
    assert export(config) == {"train": 2, "val": 1}
    found = read_rows("mgie", tmp_path / "out", tmp_path / "again")
    assert [row.get("reason") for row in found] == [None] * 3
    assert [row["instruction"] for row in found] == [row["instruction"] for row in rows]
    assert [json.loads(row["provenance"])["expressive"] for row in found] == [row["expressive"] for row in rows]
    assert [json.loads(row["provenance"])["item"] for row in found] == [str(row["id"]) for row in rows]
    for row, ledger_row in zip(found, rows, strict=True):  # JPEG files are not encoded again
        assert (tmp_path / "again" / row["source"]).read_bytes() == (tmp_path / ledger_row["source"]).read_bytes()


def test_mgie_images_are_upright_jpegs_whatever_they_were(tmp_path: Path) -> None:
    rows = _write_ledger(tmp_path, ["train", "train"], kind="png")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    turned = io.BytesIO()
    Image.open(tmp_path / rows[0]["source"]).save(turned, "jpeg", exif=exif)
    (tmp_path / rows[0]["source"]).write_bytes(turned.getvalue())
    export(ExportConfig(ledger=str(tmp_path / "ledger"), out=str(tmp_path / "out"), format="mgie"))
    found = read_rows("mgie", tmp_path / "out", tmp_path / "again")
    images = [Image.open(tmp_path / "again" / row[role]) for row in found for role in ("source", "goal")]
    assert {image.format for image in images} == {"JPEG"}
    assert [image.size for image in images] == [(32, 40), (40, 32), (40, 32), (40, 32)]
    assert read_image(turned.getvalue()).size == (32, 40)


def test_one_split_is_exported_alone(tmp_path: Path) -> None:
    _write_ledger(tmp_path, ["train", "val"])
    ledger = str(tmp_path / "ledger")
    assert export(ExportConfig(ledger=ledger, out=str(tmp_path / "out"), split="val")) == {"val": 1}
    with pytest.raises(DataError, match="no rows of split 'test'"):
        export(ExportConfig(ledger=ledger, out=str(tmp_path / "none"), split="test"))


@pytest.mark.parametrize("kind", ["huggingface", "mgie"])
def test_a_missing_image_stops_the_export_and_the_next_one_is_whole(kind: Any, tmp_path: Path) -> None:
    rows = _write_ledger(tmp_path, ["train", "train"])
    (tmp_path / rows[1]["goal"]).rename(tmp_path / "aside")
    config = ExportConfig(ledger=str(tmp_path / "ledger"), out=str(tmp_path / "out"), format=kind)
    with pytest.raises(DataError, match=f"goal image .* of row {rows[1]['id']}"):
        export(config)
    assert {path.name for path in (tmp_path / "out").rglob("*") if path.is_file()} == {"config.yaml", "run.json"}
    (tmp_path / "aside").rename(tmp_path / rows[1]["goal"])
    assert export(config) == {"train": 2}


def test_a_finished_export_is_not_run_again_and_another_is_refused(tmp_path: Path) -> None:
    _write_ledger(tmp_path, ["train", "train"])
    flags = ["--ledger", tmp_path / "ledger", "--out", tmp_path / "out"]
    status, said = run_here(main, flags)
    assert (status, "exported 2 rows (train 2)" in said) == (0, True), said
    (tmp_path / "out" / "data" / "train-00000-of-00001.parquet").unlink()
    assert run_here(main, flags)[0] == 0
    assert list((tmp_path / "out" / "data").iterdir()) == []
    status, said = run_here(main, [*flags, "--format", "mgie"])
    assert (status, 'format was "huggingface", is "mgie"' in said) == (2, True), said
    with pytest.raises(ConfigError, match="holds the ledger"):
        export(ExportConfig(ledger=str(tmp_path / "ledger"), out=str(tmp_path)))


def test_images_that_were_moved_are_found(tmp_path: Path) -> None:
    _write_ledger(tmp_path, ["train", "train"])
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "images").rename(tmp_path / "elsewhere" / "images")
    moved = str(tmp_path / "elsewhere")
    config = ExportConfig(ledger=str(tmp_path / "ledger"), out=str(tmp_path / "out"), images=moved)
    assert export(config) == {"train": 2}
