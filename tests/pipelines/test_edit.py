"""Bulk edits: the stage as plain Python, and the job on a cluster, killed and continued."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mgie.data.ledger import EDITS_SCHEMA, rejection_code, to_table
from mgie.editor import Editor
from mgie.errors import ConfigError, DataError
from mgie.images.files import read_image, read_metadata
from mgie.storage.folder import open_folder
from pipelines.edit import EditConfig, _edits, _plan, _read_source, main
from pipelines.stages.edit import EditImages
from pipelines.stages.fetch import EDIT_ROW_SCHEMA, FetchSources
from tests.pipelines.chaos import ROOT, Cluster
from tests.pipelines.jobs import kill_when, run_here, stuck

SETTINGS = {"steps": 2}


def _photos(folder: Path, count: int) -> Path:
    folder.mkdir(parents=True)
    for i in range(count):
        Image.new("RGB", (60 + 30 * (i % 3), 60), (25 * i % 256, 80, 220 - 20 * i % 200)).save(folder / f"{i:02d}.png")
    return folder


def _config(**given: Any) -> EditConfig:
    return EditConfig(**({"instruction": "make it night", "bundle": "random"} | given))


def test_the_stage_edits_each_row_as_the_editor_does(tmp_path: Path) -> None:
    photos = _photos(tmp_path / "in", 4)
    (photos / "03.png").write_bytes(b"broken")
    folder, rows = _read_source(_config(source=str(photos), steps=2))
    fetched = FetchSources(folder, column="image", schema=EDIT_ROW_SCHEMA)(to_table(rows, EDITS_SCHEMA))
    stage = EditImages("random", settings=SETTINGS, output_format="png", batch_size=8, device="cpu", dtype="auto")
    done = stage(fetched).to_pylist()
    assert [row["status"] for row in done] == ["ok", "ok", "ok", "rejected"]
    assert rejection_code(done[3]["reason"]) == "bad_image"
    editor = Editor.load("random", device="cpu")
    for row in done[:3]:
        alone = editor.edit(photos / row["image"], row["instruction"], seed=row["seed"], **SETTINGS)
        ours = np.asarray(read_image(row["data"])).astype(int)
        assert np.abs(ours - np.asarray(alone.image).astype(int)).max() <= 2
        assert row["expressive"] == alone.expressive
        assert json.loads(row["settings"])["steps"] == 2
        assert read_metadata(row["data"])["seed"] == str(row["seed"])


def test_seeds_follow_from_the_run_and_the_row(tmp_path: Path) -> None:
    photos = _photos(tmp_path / "in", 3)
    asked = [{"image": f"{i:02d}.png", "instruction": "x"} for i in range(3)]
    first = [row["seed"] for row in _edits(_config(source=str(photos)), asked)]
    assert len(set(first)) == 3
    assert [row["seed"] for row in _edits(_config(source=str(photos)), asked[::-1])] == first[::-1]
    assert [row["seed"] for row in _edits(_config(source=str(photos), seed=1), asked)] != first
    assert _edits(_config(source=str(photos)), [asked[0] | {"seed": 7}])[0]["seed"] == 7


def test_jsonl_rows_may_share_a_photo_and_repeated_edits_are_one(tmp_path: Path) -> None:
    _photos(tmp_path / "in", 1)
    rows = [
        {"image": "00.png", "instruction": "a"},
        {"image": "00.png", "instruction": "b", "expressive": "Dark."},
        {"image": "00.png", "instruction": "b"},
        {"image": "00.png", "instruction": "a"},
    ]
    (tmp_path / "in" / "edits.jsonl").write_text("\n".join(map(json.dumps, rows)))
    folder, edits = _read_source(_config(source=str(tmp_path / "in" / "edits.jsonl"), instruction=""))
    assert folder.path == str(tmp_path / "in")
    assert [(row["instruction"], row["given"]) for row in edits] == [("a", None), ("b", "Dark."), ("b", None)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1 is not JSON"),
        ('{"image": "a.png"}', "line 1 must be an object"),
        ('{"image": "a.png", "instruction": "x", "sed": 1}', "line 1 must be an object"),
        ('{"image": "a.png", "instruction": "x", "seed": "1"}', "seed is '1'; it must be a int"),
        ("", "holds no rows"),
    ],
)
def test_a_bad_jsonl_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "e.jsonl").write_text(line)
    with pytest.raises(DataError, match=message):
        _read_source(_config(source=str(tmp_path / "e.jsonl"), instruction=""))


def test_instruction_and_source_must_fit(tmp_path: Path) -> None:
    photos = _photos(tmp_path / "in", 1)
    with pytest.raises(ConfigError, match="an instruction is needed"):
        _read_source(_config(source=str(photos), instruction=""))
    (tmp_path / "e.jsonl").write_text('{"image": "a.png", "instruction": "x"}')
    with pytest.raises(ConfigError, match="the source names its own"):
        _read_source(_config(source=str(tmp_path / "e.jsonl")))
    with pytest.raises(DataError, match="neither a manifest nor images"):
        _read_source(_config(source=str(tmp_path / "none")))


def test_only_failed_edits_are_tried_again(tmp_path: Path) -> None:
    out = open_folder(tmp_path / "out")
    rows = _edits(_config(source="x"), [{"image": f"{i}.png", "instruction": "x"} for i in range(4)])
    written = [rows[0] | {"status": "ok"}, rows[1], rows[2], rows[2] | {"attempt": 2, "status": "ok"}]
    (tmp_path / "out").mkdir()
    pq.write_table(to_table(written, EDITS_SCHEMA), tmp_path / "out" / "part-0.parquet")
    assert _plan(_config(source="x"), out, rows).num_rows == 1
    assert _plan(_config(source="x", retry_failed=True), out, rows).num_rows == 2
    pending = pq.read_table(tmp_path / "out" / "_work").to_pylist()
    assert [(row["id"], row["attempt"]) for row in pending] == [(rows[3]["id"], 1), (rows[1]["id"], 2)]


@pytest.mark.ray
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("num_photos", [8, pytest.param(24, marks=pytest.mark.endure)])
def test_a_killed_job_is_continued_by_the_same_command(cluster: Cluster, tmp_path: Path, num_photos: int) -> None:
    photos, out = _photos(tmp_path / "in", num_photos), tmp_path / "out"
    (photos / "98.png").write_bytes(b"broken")
    (photos / "99.png").write_bytes((photos / "00.png").read_bytes())
    flags = [photos, "make it night", "--out", out, "--bundle", "random", "--steps", "2", "--rows-per-commit", "2"]
    # Of two CPUs there is room for one process that reads, beside the one that edits.
    flags += ["--device", "cpu", "--edit.num-cpus", "1.75"]
    with stuck(photos / "99.png"):
        script = ROOT / "pipelines" / "edit.py"
        kill_when(flags, cluster, script, tmp_path, lambda: bool(list(out.glob("part-*.parquet"))))
    before = {path: path.read_bytes() for path in out.glob("part-*.parquet")}
    assert 0 < len(before) < num_photos // 2 + 1

    status, text = run_here(main, flags)
    assert status == 0, text  # one photo of at least ten cannot be read
    assert "1 rejected (1 bad_image)" in text
    rows = [row for path in out.glob("part-*.parquet") for row in pq.read_table(path).to_pylist()]
    assert len(rows) == len({row["id"] for row in rows}) == num_photos + 2
    assert all(path.read_bytes() == content for path, content in before.items())
    for row in rows:
        if row["status"] == "ok":
            with Image.open(photos / row["image"]) as source, Image.open(out / row["edited"]) as edited:
                assert edited.size == source.size

    status, text = run_here(main, flags)
    assert status == 0, text
    assert "0 edits to do" in text
