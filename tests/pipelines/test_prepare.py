"""The job on a cluster of two (logical) CPUs."""

import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from mgie.data.ledger import images_root, read_manifest, rejection_code, row_id
from mgie.errors import ConfigError, DataError
from mgie.images.files import read_image
from mgie.storage.folder import open_folder, resolve_uri
from mgie.tiny.world import write_layout
from pipelines.runs import lease
from pipelines.runs.lease import hold_lease
from tests.pipelines import raw_data
from tests.pipelines.chaos import ROOT, Cluster, Job
from tests.pipelines.jobs import run_here, stuck
from tests.pipelines.raw_data import Edit, edits, picture, with_one

ray = pytest.importorskip("ray", reason="Ray is not installed")

from pipelines import prepare as job  # noqa: E402
from pipelines.prepare import PrepareConfig, prepare  # noqa: E402

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1800)]
LOCAL = pafs.LocalFileSystem()


@pytest.fixture
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards are made by the driver: four folders each."""
    monkeypatch.setattr("pipelines.readers.ipr2pr.FOLDERS_PER_SHARD", 4)


def _rows(folder: Path, name: str = "manifest") -> list[dict[str, Any]]:
    return [row for path in sorted((folder / name).glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def _files(folder: Path) -> dict[str, bytes]:
    """All but the record of the run, which holds times, and its settings, which say where it lies."""
    of_the_run = ("run.json", "config.yaml")
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name not in of_the_run]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def _messy(folder: Path) -> list[Edit]:
    """Seven edits: two good, then the second again, the first saved again, a damaged one, a blank one, an unchanged one."""
    second = edits(2)[1]
    first = Edit(picture(0, (256, 192)), picture(1, (256, 192)), instruction="change number 0")
    again = dataclasses.replace(first, source=_saved_again(first.source), goal=_saved_again(first.goal))
    again = dataclasses.replace(again, instruction=f" {str(first.instruction).upper()}. ")
    rows = [first, second, second, again, *edits(3)[2:], *edits(4)[3:], *edits(5)[4:]]
    rows = with_one(rows, 4, goal=b"no image")
    rows = with_one(rows, 5, instruction="")
    rows = with_one(rows, 6, goal=rows[6].source)
    raw_data.write_ipr2pr(folder, rows)
    return rows


def _saved_again(data: bytes | None) -> bytes:
    out = io.BytesIO()
    read_image(data or b"").save(out, "jpeg", quality=70)
    return out.getvalue()


@pytest.mark.usefixtures("cluster", "_small_shards")
def test_the_result_does_not_depend_on_what_runs_in_parallel(tmp_path: Path) -> None:
    write_layout("ipr2pr", tmp_path / "raw", 32)
    common = {"input": str(tmp_path / "raw"), "rows_per_file": 10}
    one = prepare(PrepareConfig(**common, out=str(tmp_path / "one"), max_tasks=1, threads_per_task=1))
    four = prepare(
        PrepareConfig(**common, out=str(tmp_path / "four"), max_tasks=4, cpus_per_task=0.5, threads_per_task=3)
    )
    assert one.num_rows == four.num_rows == 32
    assert one.splits == {"test": 2, "train": 28, "val": 2}
    assert _files(tmp_path / "one") == _files(tmp_path / "four")
    assert sorted(_files(tmp_path / "one")) == [
        "manifest/images.json",
        *(f"manifest/part-0000{i}.parquet" for i in range(4)),
        "rejected/part-00000.parquet",
    ]
    seeds = json.loads((tmp_path / "raw" / "seeds.json").read_text())
    assert [row["source"] for row in _rows(tmp_path / "one")] == [f"{d}/{s}_0.jpg" for d, some in seeds for s in some]


@pytest.mark.usefixtures("cluster", "_small_shards")
def test_every_raw_row_is_in_the_manifest_or_rejected_with_its_reason(tmp_path: Path) -> None:
    rows = _messy(tmp_path / "raw")
    report = prepare(PrepareConfig(input=str(tmp_path / "raw"), out=str(tmp_path / "out"), licence="CC0"))
    assert report.num_rows == 2
    assert report.rejected == {
        "bad_image": 1,
        "empty_instruction": 1,
        "exact_duplicate": 1,
        "near_duplicate": 1,
        "unchanged": 1,
    }
    found = _rows(tmp_path / "out")
    assert [row["id"] for row in found] == [row_id(e.source, e.goal, e.instruction, "forward") for e in rows[:2]]
    assert {(row["dataset"], row["licence"]) for row in found} == {("ipr2pr", "CC0")}
    rejected = {json.loads(row["provenance"])["folder"]: row for row in _rows(tmp_path / "out", "rejected")}
    assert {name: rejection_code(row["reason"]) for name, row in rejected.items()} == {
        "0000002": "exact_duplicate",
        "0000003": "near_duplicate",
        "0000004": "bad_image",
        "0000005": "empty_instruction",
        "0000006": "unchanged",
    }
    assert str(found[0]["id"]) in rejected["0000003"]["reason"]  # of which row
    assert rejected["0000003"]["source"] == "0000003/103_0.jpg"


@pytest.mark.usefixtures("cluster", "_small_shards")
def test_duplicates_are_the_same_in_one_pass_and_in_several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _messy(tmp_path / "raw")
    prepare(PrepareConfig(input=str(tmp_path / "raw"), out=str(tmp_path / "one")))
    monkeypatch.setattr(job, "_ROWS_PER_PASS", 1)
    prepare(PrepareConfig(input=str(tmp_path / "raw"), out=str(tmp_path / "several")))
    assert _files(tmp_path / "one") == _files(tmp_path / "several")


@pytest.mark.usefixtures("cluster", "_small_shards")
def test_what_is_kept_can_be_chosen(tmp_path: Path) -> None:
    _messy(tmp_path / "raw")
    config = PrepareConfig(
        input=str(tmp_path / "raw"), out=str(tmp_path / "out"), keeps_near_duplicates=True, keeps_unchanged=True
    )
    assert prepare(config).rejected == {"bad_image": 1, "empty_instruction": 1, "exact_duplicate": 1}


@pytest.mark.usefixtures("cluster")
def test_a_folder_that_brings_its_images_can_be_moved(tmp_path: Path) -> None:
    written = edits(3)
    raw_data.write_magicbrush(tmp_path / "raw", with_one(written, 0, mask=picture(60, kind="png")))
    prepare(PrepareConfig(input=str(tmp_path / "raw"), out=str(tmp_path / "out"), layout="magicbrush"))
    shutil.rmtree(tmp_path / "raw")
    (tmp_path / "out").rename(tmp_path / "moved")
    manifest = str(tmp_path / "moved" / "manifest")
    root = images_root(open_folder(manifest))
    (batch,) = read_manifest(open_folder(manifest))
    for row, edit in zip(batch.to_pylist(), written, strict=True):
        assert Path(resolve_uri(root, row["source"])).read_bytes() == edit.source
        assert Path(resolve_uri(root, row["goal"])).read_bytes() == edit.goal


@pytest.mark.usefixtures("cluster", "_small_shards")
def test_a_finished_run_is_not_run_again_and_another_one_is_refused(tmp_path: Path) -> None:
    write_layout("ipr2pr", tmp_path / "raw", 6)
    config = PrepareConfig(input=str(tmp_path / "raw"), out=str(tmp_path / "out"))
    flags = ["--input", config.input, "--out", config.out]
    assert run_here(job.main, flags)[0] == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    status, said = run_here(job.main, flags)
    assert (status, "nothing to do" in said) == (0, True), said
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before
    assert prepare(dataclasses.replace(config, max_tasks=3)).was_done  # speed decides nothing

    status, said = run_here(job.main, [*flags, "--licence", "other"])
    assert (status, 'licence was null, is "other"' in said) == (2, True), said
    write_layout("ipr2pr", tmp_path / "raw", 8)
    with pytest.raises(ConfigError, match="the files of its input were others"):
        prepare(config)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


@pytest.mark.usefixtures("cluster")
def test_a_second_writer_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_layout("ipr2pr", tmp_path / "raw", 4)
    config = PrepareConfig(input=str(tmp_path / "raw"), out=str(tmp_path / "out"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "_stage", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare(config)
    monkeypatch.setattr(lease, "RENEW_S", 0.01)
    with hold_lease(open_folder(tmp_path / "out")), pytest.raises(ConfigError, match="only one job may"):
        prepare(config)
    assert not (tmp_path / "out" / "manifest").exists()
    assert prepare(config).num_rows == 4


@pytest.mark.usefixtures("cluster")
def test_no_good_rows_is_an_error_that_says_why(tmp_path: Path) -> None:
    raw_data.write_ipr2pr(tmp_path / "raw", [dataclasses.replace(edit, goal=b"") for edit in edits(3)])
    status, error = run_here(job.main, ["--input", tmp_path / "raw", "--out", tmp_path / "out"])
    assert status == 2
    assert "gives no rows" in error
    assert "'bad_image': 3" in error
    assert len(_rows(tmp_path / "out", "rejected")) == 3
    with pytest.raises(DataError, match="did not finish"):
        images_root(open_folder(tmp_path / "out" / "manifest"))


@pytest.mark.usefixtures("cluster", "_small_shards")
def test_a_store_in_trouble_stops_the_job_and_the_next_run_goes_on(tmp_path: Path) -> None:
    """A file that may not be read is no bad row: nobody knows what is in it."""
    write_layout("ipr2pr", tmp_path / "raw", 12)
    name, seeds = json.loads((tmp_path / "raw" / "seeds.json").read_text())[-1]
    locked = tmp_path / "raw" / name / f"{seeds[0]}_0.jpg"
    locked.rename(tmp_path / "aside")
    locked.symlink_to("/proc/self/mem")  # reading it at 0 is an input/output error, for root too
    config = PrepareConfig(input=str(tmp_path / "raw"), out=str(tmp_path / "out"))
    with pytest.raises((OSError, ray.exceptions.RayError)):
        prepare(config)
    staged = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out" / "_staging").glob("*.parquet")}
    locked.unlink()
    (tmp_path / "aside").rename(locked)
    assert prepare(config).num_rows == 12
    prepare(dataclasses.replace(config, out=str(tmp_path / "undisturbed")))
    assert _files(tmp_path / "out") == _files(tmp_path / "undisturbed")
    assert "000002.parquet" not in staged


@pytest.mark.usefixtures("cluster", "_small_shards")
@pytest.mark.parametrize("layout", ["ipr2pr", "ultraedit"])
def test_on_s3_the_rows_are_the_same_as_on_disk(layout: Any, s3: str, s3_server: str, tmp_path: Path) -> None:
    raw_data.WRITERS[layout](tmp_path / "raw", edits(5))
    bucket = open_folder(f"{s3}/raw", endpoint=s3_server)
    for path in (tmp_path / "raw").rglob("*"):
        if path.is_file():
            bucket.write(str(path.relative_to(tmp_path / "raw")), path.read_bytes())
    config = PrepareConfig(input=str(tmp_path / "raw"), out=str(tmp_path / "out"), layout=layout)
    prepare(config)
    remote = dataclasses.replace(config, input=f"{s3}/raw", out=f"{s3}/run", endpoint=s3_server)
    report = prepare(remote)
    assert report.num_rows == 5
    assert prepare(remote).was_done
    out = open_folder(report.manifest, endpoint=s3_server)
    rows = [row for batch in read_manifest(out) for row in batch.to_pylist()]
    assert rows == _rows(tmp_path / "out")
    root = images_root(out)
    assert root == (f"{s3}/raw" if layout == "ipr2pr" else f"{s3}/run")
    assert open_folder(root, endpoint=s3_server).read(rows[0]["goal"]) == edits(5)[0].goal
    assert open_folder(f"{s3}/run/_staging", endpoint=s3_server).list() == []


@pytest.mark.usefixtures("cluster")
def test_the_real_samples_become_a_manifest(sample_photos: Path, tmp_path: Path) -> None:
    report = prepare(PrepareConfig(input=str(sample_photos / "ipr2pr"), out=str(tmp_path / "out")))
    assert (report.num_rows, report.rejected) == (4, {})
    assert Counter(row["split"] for row in _rows(tmp_path / "out")) == {"train": 2, "test": 2}


def test_an_input_that_is_not_there_is_refused(tmp_path: Path) -> None:
    config = PrepareConfig(input=str(tmp_path / "nothing"), out=str(tmp_path / "out"), layout="ipr2pr")
    with pytest.raises(ConfigError, match="there is no such folder"):
        prepare(config)
    assert not (tmp_path / "out").exists()


def test_arguments_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ConfigError, match="out"):
        PrepareConfig(input="/data")
    with pytest.raises(ConfigError, match="sample"):
        PrepareConfig(layout="gier")
    with pytest.raises(ConfigError, match="rows_per_file"):
        PrepareConfig(rows_per_file=0)


# ---- as a script


def _environment(tmp_path: Path) -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MGIE_"))}
    return environment | {
        "RAY_ADDRESS": "local",
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "MGIE_CACHE": str(tmp_path / "cache"),
        "COLUMNS": "120",
    }


@pytest.mark.slow
def test_without_arguments_the_script_prepares_the_sample(tmp_path: Path) -> None:
    script = ROOT / "pipelines" / "prepare.py"
    environment = _environment(tmp_path) | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run([script], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    manifest = tmp_path / "cache" / "sample" / "prepared" / "manifest"
    assert str(manifest) in done.stdout
    assert len(_rows(manifest.parent)) == 24
    assert list(tmp_path.iterdir()) == [tmp_path / "cache"]


@pytest.mark.slow
@pytest.mark.usefixtures("_small_shards")
@pytest.mark.parametrize("num_rows", [16, pytest.param(96, marks=pytest.mark.endure)])
def test_a_killed_run_goes_on_and_gives_what_an_undisturbed_one_gives(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_rows: int
) -> None:
    write_layout("ipr2pr", tmp_path / "raw", num_rows)
    num_shards = num_rows // 4
    config = PrepareConfig(
        input=str(tmp_path / "raw"), out=str(tmp_path / "killed"), max_tasks=1, keeps_near_duplicates=True
    )
    program = tmp_path / "program.py"
    program.write_text(
        "import sys, pipelines.readers.ipr2pr as layout; layout.FOLDERS_PER_SHARD = 4\n"
        "from pipelines.prepare import main\n"
        "sys.exit(main())"
    )
    flags = ["--input", config.input, "--out", config.out, "--max-tasks", "1", "--keeps-near-duplicates"]
    staging = tmp_path / "killed" / "_staging"
    name, seeds = json.loads((tmp_path / "raw" / "seeds.json").read_text())[-1]
    with (
        stuck(tmp_path / "raw" / name / f"{seeds[-1]}_1.jpg"),
        Job(flags, cluster.env, cwd=tmp_path, script=program) as running,
    ):
        running.wait_until(lambda: len(list(staging.glob("*.parquet"))) >= 3, "three shards")
        running.kill()
        cluster.settle()
    staged = {path.name: path.stat().st_mtime_ns for path in staging.glob("*.parquet")}
    assert 3 <= len(staged) < num_shards
    assert not (tmp_path / "killed" / "manifest").exists()

    kept: dict[str, int] = {}
    look_for_duplicates = job._duplicates

    def look(*args: Any, **given: Any) -> dict[int, str]:
        """All is staged now, and not yet removed."""
        kept.update({path.name: path.stat().st_mtime_ns for path in staging.glob("*.parquet")})
        return look_for_duplicates(*args, **given)

    monkeypatch.setattr(job, "_duplicates", look)
    assert run_here(job.main, flags)[0] == 0
    assert len(kept) == num_shards
    assert {name: kept[name] for name in staged} == staged  # what was done was not done again
    undisturbed = dataclasses.replace(config, out=str(tmp_path / "undisturbed"))
    assert prepare(undisturbed).num_rows == len(_rows(tmp_path / "killed")) == num_rows
    assert _files(tmp_path / "killed") == _files(tmp_path / "undisturbed")
