"""Folders of version 0.1.0, continued by the jobs as they are now: a ledger, edits, caches, a training run.

Input lies at `s3://v0-1`, as it did when the folders were filled, so that no record needs to be changed.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mgie.data.ledger import row_id
from mgie.storage.folder import open_folder
from mgie.training.checkpoint import snapshot_name
from pipelines.runs.run_record import read_run
from pipelines.training.checkpoints import complete_snapshots
from pipelines.training.tracking import read_lines
from tests.pipelines.chaos import ROOT, Cluster, Job, private_cluster
from tests.pipelines.training.chaos import EXACT
from tests.v0_1 import DATA, assert_same_picture, computes_alike, pixels_of, recorded

BUCKET = "v0-1"
AT_S3 = ("bundle", "raw", "manifest", "ledger")
TIMINGS = {"describe_seconds", "summarize_seconds", "seconds"}

SUMMARIZE = [
    *("--manifest", f"s3://{BUCKET}/manifest/manifest", "--out", "ledger", "--preset", "fast", "--device", "cpu"),
    *("--rows-per-commit", "4", "--max-rows-in-flight", "8"),
]
EDIT = [
    *("raw/edits.jsonl", "--out", "edits", "--bundle", f"s3://{BUCKET}/bundle", "--device", "cpu"),
    *("--steps", "3", "--sampler", "dpmpp_2m", "--rows-per-commit", "2"),
]
CACHE = [
    *("--ledger", f"s3://{BUCKET}/ledger", "--out", "cache", "--bundle", f"s3://{BUCKET}/bundle", "--what", "both"),
    *("--rows-per-shard", "4", "--encode.batch-size", "4", "--device", "cpu"),
]
TRAIN = [
    *("--ledger", f"s3://{BUCKET}/ledger", "--out", "run", "--init", f"s3://{BUCKET}/bundle", "--tracker", "none"),
    *("--training.steps", "12", "--training.global-batch", "4", "--training.micro-batch", "2"),
    *("--training.optimizer.ema-decay", "0.9", "--validation-share", "0.2", "--validate-every", "4"),
    *(
        "--checkpoint-every",
        "4",
        "--checkpoint-every-s",
        "0",
        "--keep",
        "1",
        "--sample-every",
        "0",
        "--log-every-s",
        "0",
    ),
]


@dataclass(frozen=True)
class Place:
    """A cluster, and a folder of one's own from which its jobs are started."""

    cluster: Cluster
    folder: Path

    def copy(self, name: str) -> Path:
        """One of the stored folders, to be worked on."""
        return Path(shutil.copytree(DATA / name, self.folder / name))

    def run(self, script: str, flags: list[str], *, status: int = 0) -> str:
        """Runs a job to its end; returns what it said, in one line."""
        with Job(flags, self.cluster.env, cwd=self.folder, script=ROOT / "pipelines" / script) as job:
            found, output = job.finish()
        assert found == status, output
        return " ".join(output.split())


@pytest.fixture(scope="module")
def cluster(s3_server: str) -> Iterator[Cluster]:
    """One for all of them; it is led to the store with what they read."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_PROFILE", "AWS_REGION", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
            patch.delenv(name, raising=False)
        patch.setenv("AWS_ACCESS_KEY_ID", "testing")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("AWS_ENDPOINT_URL", s3_server)
        store = boto3.client("s3", endpoint_url=s3_server)
        store.create_bucket(Bucket=BUCKET)
        for path in (path for name in AT_S3 for path in (DATA / name).rglob("*") if path.is_file()):
            store.upload_file(str(path), BUCKET, path.relative_to(DATA).as_posix())
        with private_cluster(num_cpus=3) as started:
            yield started


@pytest.fixture
def place(cluster: Cluster, tmp_path: Path) -> Place:
    return Place(cluster, tmp_path)


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _rows(part: Path) -> list[dict[str, Any]]:
    """Of a ledger's file, but for how long they took."""
    rows = pq.read_table(part).to_pylist()
    return [{name: value for name, value in row.items() if name not in TIMINGS} for row in rows]


# ---- what a reader sees without any job


def test_records_of_runs_are_read_with_all_that_they_say() -> None:
    jobs = {"manifest": "prepare", "ledger": "summarize", "edits": "edit", "cache": "cache", "run": "train"}
    fingerprints = {
        "manifest": "00d80864c401a27d",
        "ledger": "73881ea82768d8b9",
        "edits": "041c9cd10e3ffc04",
        "cache": "7a8a3d498dcd6809",
        "run": "2cd3781f5a27f7a2",
    }
    for name, job in jobs.items():
        run = read_run(open_folder(DATA / name))
        assert run is not None
        assert (run.job, run.fingerprint) == (job, fingerprints[name])
        assert run.is_finished == (name != "run")
    ledger = read_run(open_folder(DATA / "ledger"))
    assert ledger is not None
    assert ledger.report is not None
    assert ledger.report["ledger"] == {
        "num_rows": 12, "num_ids": 12, "num_ok": 11, "num_rejected": 1, "num_repeated": 0,
    }  # fmt: skip


def test_rows_are_known_by_the_ids_that_they_had() -> None:
    source, goal = ((DATA / "raw" / "photos" / f"00-{name}.png").read_bytes() for name in ("source", "goal"))
    assert row_id(source, goal, "make it night", "forward") == 5700366702183069559
    key = json.dumps(["photos/00-source.png", None, None]).encode()
    assert row_id(key, b"", "make it night", "forward") == 2296769873555956478


# ---- the jobs go on


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_ledger_is_continued_where_rows_are_missing_and_left_alone_where_none_are(place: Place) -> None:
    ledger = place.copy("ledger")
    lost = ledger / "part-0cdfd2a1889bb842b91b.parquet"
    before = _contents(ledger)
    lost.unlink()  # as if the run had been killed before this block was written
    said = place.run("summarize.py", SUMMARIZE)
    assert "4 rows to do" in said
    assert _contents(ledger).keys() == before.keys() | {"_report/report.html", "config.yaml"}
    kept = [name for name in before if name.startswith("part-") and name != lost.name]
    assert len(kept) == 2
    assert all((ledger / name).read_bytes() == before[name] for name in kept)
    again, then = _rows(lost), _rows(DATA / "ledger" / lost.name)
    assert [row["id"] for row in again] == [row["id"] for row in then]
    if computes_alike():
        assert again == then
    after = _contents(ledger)
    said = place.run("summarize.py", SUMMARIZE)
    assert "0 rows to do" in said
    assert _contents(ledger) == after


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_edits_are_continued_where_some_are_missing_and_left_alone_where_none_are(place: Place) -> None:
    edits = place.copy("edits")
    place.copy("raw")
    lost = edits / "part-5fb49a1a75fd3ae382e6.parquet"
    before = _contents(edits)
    lost.unlink()
    (edits / "images" / "667e93cc6860e7a4.png").unlink()
    said = place.run("edit.py", EDIT, status=4)  # one of six photos is not there
    assert "2 edits to do" in said
    assert "5 edited, 1 rejected (1 missing_file)" in said
    again, stored = _rows(lost), _rows(DATA / "edits" / lost.name)
    assert [row | {"edited": None} for row in again] == [row | {"edited": None} for row in stored]
    [(now, then)] = [(new["edited"], old["edited"]) for new, old in zip(again, stored, strict=True) if old["edited"]]
    with Image.open(edits / now) as picture, Image.open(DATA / "edits" / then) as expected:
        assert_same_picture(picture, DATA / "edits" / then, pixels_of(expected))
    # The result has got a name that says which photo it is of.
    assert _contents(edits).keys() == before.keys() - {then} | {now, "config.yaml"}
    said = place.run("edit.py", [*EDIT, "--max-rejected", "0.2"])
    assert "0 edits to do" in said


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_cache_that_holds_every_row_is_left_alone(place: Place) -> None:
    cache = place.copy("cache")
    before = _contents(cache)
    said = place.run("cache.py", CACHE)
    assert "0 rows to encode" in said
    assert "11 rows, " in said
    assert _contents(cache) == before


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_training_run_goes_on_from_its_checkpoint_with_the_losses_that_it_would_have_had(place: Place) -> None:
    path = place.copy("run")
    out = open_folder(path)
    assert list(complete_snapshots(out)) == [snapshot_name(4)]
    said = place.run("train.py", TRAIN)
    assert f"going on from {snapshot_name(4)}" in said
    run = read_run(out)
    assert run is not None
    assert run.is_finished
    found: dict[int, dict[str, float]] = {}
    for _, line in read_lines(out):
        if "loss" in line and line["step"] > 4:
            found[line["step"]] = {name: line[name] for name in EXACT}
    then = {int(step): numbers for step, numbers in recorded("losses.json")["steps"].items()}
    assert list(then) == list(range(5, 13))
    if computes_alike():
        assert found == then
    assert found.keys() == then.keys()
    for step, numbers in then.items():
        assert found[step] == pytest.approx(numbers, rel=1e-3)
    assert list(complete_snapshots(out)) == [snapshot_name(12)]
