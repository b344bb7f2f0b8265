"""The training job: what it refuses before it starts, and runs on a cluster through faults of every kind."""

import io
import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mgie.bundle.bundle import open_bundle
from mgie.config import AugmentConfig, TrainingConfig
from mgie.data.latent_cache import finish_cache, list_shards, write_shard
from mgie.data.ledger import LEDGER_SCHEMA
from mgie.errors import BundleError, ConfigError, DataError
from mgie.storage.folder import Folder, open_folder
from mgie.training.checkpoint import read_snapshot, snapshot_name
from pipelines.runs import lease
from pipelines.runs.lease import hold_lease
from pipelines.runs.run_record import read_run
from pipelines.stages.encode import EncodeLatents
from pipelines.stages.squares import CACHED_SCHEMA, FetchSquares, cache_spec
from pipelines.train import main, train
from pipelines.training.checkpoints import CHECKPOINTS, complete_snapshots
from pipelines.training.config import TrainConfig, WorkerSize
from pipelines.training.tracking import read_metrics
from tests.pipelines.chaos import Cluster, wait_for
from tests.pipelines.gates import TRACKER, close_gate, open_gate
from tests.pipelines.jobs import Background, kill_when, run_here
from tests.pipelines.training.chaos import (
    TRAIN,
    Kill,
    differing_steps,
    numbers,
    run_with_kills,
    strike,
    tensor_hashes,
    train_flags,
    write_ledger,
)

NUM_ROWS, NUM_STEPS, EVERY, SIDE_PX = 24, 12, 3, 64


def write_cache(folder: Folder, ledger: Folder, *, bundle: str = "random", side_px: int = SIDE_PX) -> None:
    """VAE moments of all rows, as `pipelines/cache.py` makes them."""
    spec = cache_spec(open_bundle(bundle), "vae_moments", image_side_px=side_px, dtype="float32")
    with ledger.filesystem.open_input_file(ledger.at("part-0.parquet")) as file:
        rows = pq.read_table(file).select(CACHED_SCHEMA.names)
    encoded = EncodeLatents(bundle, [spec], batch_size=8, device="cpu")(FetchSquares(ledger, [spec])(rows))
    arrays = {
        name: encoded.column(name).combine_chunks().flatten().to_numpy().reshape(len(rows), -1) for name in spec.shapes
    }
    write_shard(folder, spec, rows.column("id").to_numpy(), arrays)
    finish_cache(folder, spec, list_shards(folder, spec))


# ---- refused before anything starts


@pytest.fixture(scope="module")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    folder = open_folder(tmp_path_factory.mktemp("train") / "ledger")
    write_ledger(folder, NUM_ROWS)
    return folder


def _config(ledger: Folder, out: Path, **given: Any) -> TrainConfig:
    training = TrainingConfig(image_side_px=SIDE_PX)
    return TrainConfig(**{"ledger": (ledger.url,), "out": str(out), "init": "random", "training": training} | given)


def test_captions_that_are_missing_are_counted_and_named(tmp_path: Path) -> None:
    write_ledger(folder := open_folder(tmp_path / "ledger"), 3, expressive=None)
    with pytest.raises(DataError, match=r"3 of 3 rows have no expressive \(ids \d+, \d+, \d+\); complete the ledger"):
        train(_config(folder, tmp_path / "out"))


def test_the_variant_that_reads_brief_instructions_needs_no_captions(tmp_path: Path) -> None:
    write_ledger(folder := open_folder(tmp_path / "ledger"), 3, expressive=None)
    given = _config(folder, tmp_path / "out", init="random-ip2p", cache=str(tmp_path / "none"))
    with pytest.raises(DataError, match="holds no vae_moments"):  # what is checked after the rows
        train(replace(given, training=TrainingConfig(variant="ip2p")))


def test_a_ledger_without_good_rows_is_refused(tmp_path: Path) -> None:
    write_ledger(folder := open_folder(tmp_path / "ledger"), 3, status="rejected")
    with pytest.raises(DataError, match="holds no rows of status 'ok'"):
        train(_config(folder, tmp_path / "out"))


def test_a_ledger_of_another_schema_is_refused(tmp_path: Path) -> None:
    write_ledger(folder := open_folder(tmp_path / "ledger"), 3)
    part = tmp_path / "ledger" / "part-0.parquet"
    pq.write_table(pq.read_table(part).drop(["expressive"]), part)
    assert "expressive" in LEDGER_SCHEMA.names
    with pytest.raises(DataError, match=r"part-0\.parquet does not have the expected columns: missing.*expressive"):
        train(_config(folder, tmp_path / "out"))


def test_a_folder_without_a_ledger_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist or is empty"):
        train(_config(open_folder(tmp_path / "none"), tmp_path / "out"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder, ledger: None, "holds no vae_moments or clip_features; make them with"),
        (lambda folder, ledger: write_cache(folder, ledger, side_px=72), "image_side_px is 72, not 64"),
        (lambda folder, ledger: folder.write("vae_moments/part-1.bin", b""), "the cache was not finished"),
    ],
)
def test_a_cache_that_does_not_fit_is_refused(
    tmp_path: Path, ledger: Folder, make: Callable[[Folder, Folder], None], message: str
) -> None:
    make(open_folder(tmp_path / "cache"), ledger)
    with pytest.raises(DataError, match=message):
        train(_config(ledger, tmp_path / "out", cache=str(tmp_path / "cache")))


def test_a_cache_of_another_encoder_is_refused(tmp_path: Path, ledger: Folder) -> None:
    write_cache(cache := open_folder(tmp_path / "cache"), ledger)
    stamp = tmp_path / "cache" / "vae_moments" / "cache.json"
    stamp.write_text(re.sub(r'"encoder": "\w+"', '"encoder": "0123456789abcdef"', stamp.read_text()))
    with pytest.raises(DataError, match="encoder is '0123456789abcdef', not"):
        train(_config(ledger, tmp_path / "out", cache=cache.url))


def test_a_bundle_of_the_other_kind_is_refused(tmp_path: Path, ledger: Folder) -> None:
    with pytest.raises(ConfigError, match=r"variant e2e trains a bundle with conditioner 'mllm'; .* has 'text'"):
        train(_config(ledger, tmp_path / "out", init="random-ip2p"))
    with pytest.raises(BundleError):
        train(_config(ledger, tmp_path / "out", init=str(tmp_path / "none")))
    assert not (tmp_path / "out").exists()


def test_another_run_in_the_same_folder_is_refused_and_so_is_a_second_writer(
    tmp_path: Path, ledger: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "RENEW_S", 0.01)
    given = _config(ledger, tmp_path / "out", cache=str(tmp_path / "none"))
    for _ in range(2):  # a run that did not come far may be begun again
        with pytest.raises(DataError, match="holds no vae_moments"):
            train(given)
    with pytest.raises(
        ConfigError, match=r"another run: training\.image_side_px was 64, is 0; training\.steps was 1000, is 7"
    ):
        train(replace(given, training=TrainingConfig(steps=7)))
    with hold_lease(open_folder(tmp_path / "out")), pytest.raises(ConfigError, match="only one job may"):
        train(given)


def test_rows_are_frozen_when_the_run_begins(tmp_path: Path) -> None:
    write_ledger(folder := open_folder(tmp_path / "ledger"), 5)
    given = _config(folder, tmp_path / "out", cache=str(tmp_path / "none"))
    for _ in range(2):
        with pytest.raises(DataError, match="holds no vae_moments"):
            train(given)
        frozen = json.loads((tmp_path / "out" / "data" / "data.json").read_text())
        assert sum(frozen["ledgers"][0]["counts"][name] for name in ("num_train", "num_validation")) == 5
        write_ledger(folder, 9)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"weights": (1.0, 2.0)}, "weights has 2 entries for 1 ledgers"),
        ({"images": ("a", "b")}, "images has 2 entries"),
        ({"keep": 0}, "keep is 0; it must be at least 1"),
        ({"checkpoint_every": 0}, "checkpoint_every is 0"),
        ({"validation_share": 1.0}, r"validation_share is 1\.0"),
        ({"workers": WorkerSize(num=2, max=64)}, "global_batch is 32; each of 64 workers needs a sample"),
        ({"cache": "x", "training": TrainingConfig(augment=AugmentConfig(flip=0.5))}, "a cache holds them unchanged"),
    ],
)
def test_settings_are_checked(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**given)


def test_elastic_workers_are_at_least_the_fewest() -> None:
    with pytest.raises(ConfigError, match="workers are 3 to 2"):
        WorkerSize(num=3, max=2)


# ---- on a cluster


FLAGS = {"steps": NUM_STEPS, "checkpoint_every": EVERY}


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, ledger: Folder, tmp_path_factory: pytest.TempPathFactory) -> tuple[Folder, str]:
    """A run that nothing happens to, and what it said."""
    out = open_folder(tmp_path_factory.mktemp("undisturbed") / "out")
    flags = [*train_flags(ledger, **FLAGS), "--sample-every", "6", "--sample-steps", "2", "--out", out.url]
    status, said = run_here(main, flags)
    assert status == 0, said
    return out, said


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_leaves_checkpoints_numbers_pictures_and_a_summary(undisturbed: tuple[Folder, str]) -> None:
    out, said = undisturbed
    steps = read_metrics(out).steps
    assert list(steps) == list(range(1, NUM_STEPS + 1))
    losses = [float(scalars["loss"] or "nan") for scalars in steps.values()]
    assert np.mean(losses[-4:]) < np.mean(losses[:4]) - 0.5
    assert [step for step, scalars in steps.items() if "validation/loss" in scalars] == [3, 6, 9, 12]
    assert {"learning_rate/unet", "grad_norm", "samples_per_s", "tokens_per_s", "wait_share", "memory_bytes"} <= set(
        steps[1]
    )
    assert list(complete_snapshots(out)) == [snapshot_name(9), snapshot_name(12)]
    assert [entry.name for entry in out.list("samples")] == ["step-00000006.png", "step-00000012.png"]
    with Image.open(io.BytesIO(out.read("samples/step-00000012.png"))) as sheet:
        assert sheet.size[0] > 3 * SIDE_PX
        assert sheet.getextrema() == ((0, 255),) * 3
    assert len(out.read("metrics.jsonl").splitlines()) == NUM_STEPS
    assert b"<polyline" in out.read("summary.svg")
    assert out.list("tensorboard")
    run = read_run(out)
    assert run is not None
    assert run.is_finished
    assert run.report is not None
    assert run.report["steps"] == NUM_STEPS
    assert run.report["repeated_steps"] == 0
    assert f"steps: {NUM_STEPS} of {NUM_STEPS}" in said
    assert f"{NUM_STEPS} steps in" in said


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_killed_run_in_a_store_goes_on_from_the_last_good_checkpoint_and_is_bitwise_the_undisturbed_one(
    cluster: Cluster, ledger: Folder, undisturbed: tuple[Folder, str], s3: str, tmp_path: Path
) -> None:
    """Its driver is killed, its newest checkpoint is damaged (as a disk without power may leave it), a worker is killed."""
    out = open_folder(f"{s3}/run")
    flags = [*train_flags(ledger, **FLAGS), "--out", out.url, "--tracker", TRACKER]
    flags += ["--endpoint", os.environ["AWS_ENDPOINT_URL"]]
    close_gate(out, 8)
    driver, worker = Kill("driver", 8, checkpoint=6), Kill("worker", 11, checkpoint=9)
    kill_when(flags, cluster, TRAIN, tmp_path, lambda: driver.is_due(out))
    assert list(complete_snapshots(out)) == [snapshot_name(3), snapshot_name(6)]
    damaged = f"{CHECKPOINTS}/{snapshot_name(6)}/trainable.safetensors"
    out.write(damaged, out.read(damaged)[:-8] + bytes(8))  # of the right size

    close_gate(out, 11)
    open_gate(out, 8)

    def kill_the_worker() -> None:
        wait_for(lambda: worker.is_due(out), "step 11")
        strike(cluster, out, worker)

    with Background(kill_the_worker):
        status, said = run_here(main, flags)
    assert status == 0, said
    assert f"going on from {snapshot_name(6)}" in said  # the job does not read it; the worker does
    assert "failure 1 of 3 allowed without progress: worker 0 failed" in said
    assert f"going on from {snapshot_name(9)}" in said
    found, reference = numbers(out), numbers(undisturbed[0])
    assert len(reference) == NUM_STEPS
    assert differing_steps(found, reference) == []
    assert [step for step, measured in found.items() if len(measured) == 2] == [4, 5, 6, 7, 8, 10, 11]
    assert f"{NUM_STEPS} steps, 7 of them repeated" in said
    assert tensor_hashes(out, NUM_STEPS) == tensor_hashes(undisturbed[0], NUM_STEPS)
    assert out.list("tensorboard")
    status, said = run_here(main, flags)
    assert status == 0
    assert "the run was finished before" in said


@pytest.mark.ray
@pytest.mark.endure
@pytest.mark.timeout(1800)
def test_whatever_is_killed_the_run_is_bitwise_the_undisturbed_one(
    cluster: Cluster, ledger: Folder, undisturbed: tuple[Folder, str], tmp_path: Path
) -> None:
    out = open_folder(tmp_path / "out")
    kills = [Kill("disk", 4, checkpoint=3), Kill("worker", 7), Kill("controller", 10), Kill("driver", 11)]
    full, killed, last = run_with_kills(train_flags(ledger, **FLAGS), cluster, out, kills, tmp_path)
    found_full = re.search(r"error: checkpoint \S+step-(\d+) cannot be written", full)
    assert found_full, full
    assert f"going on from {snapshot_name(int(found_full[1]) - EVERY)}" in killed
    assert "failure 1 of 3 allowed without progress: worker 0 failed" in killed
    assert re.search("failure [12] of 3 allowed without progress: Ray's controller failed", killed)
    assert "going on from" in last
    reference = numbers(undisturbed[0])
    found = numbers(out)
    assert len(reference) == NUM_STEPS
    assert differing_steps(found, reference) == []
    num_repeated = sum(len(measured) - 1 for measured in found.values())
    assert num_repeated >= 3
    assert f"{num_repeated} of them repeated" in last
    assert tensor_hashes(out, NUM_STEPS) == tensor_hashes(undisturbed[0], NUM_STEPS)


@pytest.mark.ray
@pytest.mark.endure
@pytest.mark.timeout(1800)
def test_a_run_in_an_object_store_reads_a_cache_from_there_and_survives_a_kill(
    cluster: Cluster, undisturbed: tuple[Folder, str], s3: str, tmp_path: Path
) -> None:
    write_ledger(remote := open_folder(f"{s3}/ledger"), NUM_ROWS)
    write_cache(open_folder(f"{s3}/cache"), remote)
    out = open_folder(f"{s3}/run")
    flags = train_flags(remote, **FLAGS)
    flags += [
        "--cache",
        f"{s3}/cache",
        "--endpoint",
        os.environ["AWS_ENDPOINT_URL"],
        "--keep",
        "1",
        "--keep-by",
        "loss",
    ]
    _, said = run_with_kills(flags, cluster, out, [Kill("driver", 8)], tmp_path)
    assert re.search("going on from step-000000(03|06)", said)  # an upload may take longer than some steps
    found, reference = numbers(out), numbers(undisturbed[0])
    for step, [expected] in reference.items():
        for measured in found[step]:  # the cache's encoder saw other batches: rounding
            np.testing.assert_allclose(measured, expected, rtol=2e-4)
    assert list(complete_snapshots(out)) == [snapshot_name(NUM_STEPS)]
    validation = {
        step: scalars["validation/loss"] for step, scalars in read_metrics(out).steps.items() if step % EVERY == 0
    }
    assert min(validation, key=lambda step: validation[step] or 0) == NUM_STEPS
    assert out.list("tensorboard")


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_checkpoint_of_the_job_is_a_snapshot_that_names_its_base(undisturbed: tuple[Folder, str]) -> None:
    snapshot = read_snapshot(Path(undisturbed[0].path) / CHECKPOINTS / snapshot_name(NUM_STEPS))
    assert snapshot.base == open_bundle("random").identity
    assert (snapshot.variant, snapshot.step, snapshot.data_names) == ("e2e", NUM_STEPS, ("drawn",))
    assert snapshot.config["image_side_px"] == SIDE_PX
    assert set(snapshot.load("ema")) == set(snapshot.load("trainable"))
