"""Checkpoints of a run in its folder, and Ray's index of them, which Ray's own manager must read."""

import json
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ray.train.v2._internal.exceptions import CheckpointManagerInitializationError
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import CheckpointManager
from ray.train.v2._internal.execution.context import StorageContext
from ray.train.v2.api.config import CheckpointConfig

from mgie.storage.folder import Folder, open_folder
from mgie.training.checkpoint import SNAPSHOT_FILE, snapshot_name, write_snapshot
from pipelines.runs.command import FaultError
from pipelines.training.checkpoints import (
    CHECKPOINTS,
    complete_snapshots,
    fetch_snapshot,
    repair_checkpoints,
    upload_snapshot,
)

INDEX = "checkpoint_manager_snapshot.json"


def _write(folder: Path, step: int, *, score: float = 0.0, num_values: int = 100) -> Path:
    tensors = {"weight": torch.full((num_values,), float(step))}
    write_snapshot(
        folder,
        step=step,
        variant="e2e",
        base="b",
        base_bundle="random",
        config={},
        data="d",
        data_names=[],
        metrics={"step": step, "score": score},
        trainable=tensors,
        ema=None,
        optimizer=tensors,
    )
    return folder


def _run(tmp_path: Path, scores: dict[int, float]) -> Folder:
    run = open_folder(tmp_path / "run")
    for step, score in scores.items():
        _write(tmp_path / "run" / CHECKPOINTS / snapshot_name(step), step, score=score)
    return run


def _manager(run: Folder, config: CheckpointConfig) -> CheckpointManager:
    return CheckpointManager(config, StorageContext(run.path, CHECKPOINTS, storage_filesystem=run.filesystem))


def _names(manager: CheckpointManager) -> list[str]:
    return [Path(result.checkpoint.path).name for result in manager._checkpoint_results]


def _truncate(index: Path) -> None:
    index.write_bytes(index.read_bytes()[:200])


def _forget(index: Path) -> None:
    """As if the last checkpoints had come after the index."""
    content = json.loads(index.read_text())
    content["checkpoint_results"] = content["checkpoint_results"][:1]
    content["checkpoint_report_indices"] = [0]
    content["latest_checkpoint_result"] = content["checkpoint_results"][0]
    index.write_text(json.dumps(content))


def _invent(index: Path) -> None:
    """As if a checkpoint of the index had been deleted."""
    index.write_text(index.read_text().replace(snapshot_name(20), snapshot_name(25)))


@pytest.mark.parametrize("damage", [_truncate, _forget, _invent, Path.unlink, lambda path: path.write_text("")])
def test_ray_reads_the_index_again_whatever_became_of_it(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    run = _run(tmp_path, {10: 0.0, 20: 0.0, 100: 0.0})
    index = tmp_path / "run" / CHECKPOINTS / INDEX
    config = CheckpointConfig(num_to_keep=2)
    repair_checkpoints(run, score=None)
    intact = index.read_bytes()
    damage(index)
    if damage is _truncate:
        with pytest.raises(CheckpointManagerInitializationError):
            _manager(run, config)
    repair_checkpoints(run, score=None)
    assert index.read_bytes() == intact
    manager = _manager(run, config)
    assert _names(manager) == [snapshot_name(step) for step in (10, 20, 100)]
    assert Path(manager.latest_checkpoint_result.checkpoint.path).name == snapshot_name(100)
    assert manager.latest_checkpoint_result.metrics == {"step": 100, "score": 0.0}


def test_checkpoints_kept_by_score_are_in_the_order_in_which_ray_would_have_them(tmp_path: Path) -> None:
    run = _run(tmp_path, {10: 3.0, 20: 1.0, 30: 2.0, 40: 4.0})
    repair_checkpoints(run, score="score")
    config = CheckpointConfig(num_to_keep=2, checkpoint_score_attribute="score", checkpoint_score_order="min")
    manager = _manager(run, config)
    scores = [result.metrics["score"] for result in manager._checkpoint_results]
    assert scores == [4.0, 3.0, 2.0, 1.0]  # worst first: Ray deletes from the front
    assert sorted(manager._checkpoint_results, key=manager._get_checkpoint_score) == manager._checkpoint_results
    assert manager.best_checkpoint_result.metrics["step"] == 20
    assert manager.latest_checkpoint_result.metrics["step"] == 40


def test_what_was_cut_off_is_removed_and_does_not_count(tmp_path: Path) -> None:
    run = _run(tmp_path, {10: 0.0, 20: 0.0, 30: 0.0, 40: 0.0})
    folder = tmp_path / "run" / CHECKPOINTS
    (folder / snapshot_name(40) / SNAPSHOT_FILE).unlink()
    (folder / snapshot_name(30) / "optimizer.safetensors").write_bytes(b"cut")
    (folder / ".validate_storage_marker").touch()
    assert list(complete_snapshots(run)) == [snapshot_name(10), snapshot_name(20)]
    assert list(repair_checkpoints(run, score=None)) == [snapshot_name(10), snapshot_name(20)]
    names = [INDEX, ".validate_storage_marker", snapshot_name(10), snapshot_name(20)]
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)


def test_without_any_checkpoint_there_is_no_index(tmp_path: Path) -> None:
    run = _run(tmp_path, {10: 0.0})
    repair_checkpoints(run, score=None)
    (tmp_path / "run" / CHECKPOINTS / snapshot_name(10) / SNAPSHOT_FILE).unlink()
    assert repair_checkpoints(run, score=None) == {}
    assert list((tmp_path / "run" / CHECKPOINTS).iterdir()) == []
    assert repair_checkpoints(open_folder(tmp_path / "none"), score=None) == {}


def test_a_checkpoint_is_uploaded_in_place_of_another_and_fetched_again(tmp_path: Path, s3: str) -> None:
    for number, run in enumerate((open_folder(tmp_path / "run"), open_folder(f"{s3}/run"))):
        name = snapshot_name(10)
        for values in (200, 100):
            local = _write(tmp_path / f"local-{number}-{values}", 10, num_values=values)
            upload_snapshot(local, run, name)
        assert list(complete_snapshots(run)) == [name]
        scratch = tmp_path / f"scratch-{number}"
        scratch.mkdir()
        assert torch.equal(fetch_snapshot(run, name, scratch).load("trainable")["weight"], torch.full((100,), 10.0))


def test_repairing_works_in_a_store(tmp_path: Path, s3: str) -> None:
    run = open_folder(f"{s3}/run")
    for step in (10, 20, 30):
        upload_snapshot(_write(tmp_path / str(step), step), run, snapshot_name(step))
    run.filesystem.delete_file(run.at(f"{CHECKPOINTS}/{snapshot_name(20)}/{SNAPSHOT_FILE}"))
    run.write(f"{CHECKPOINTS}/{INDEX}", b'{"ray_ver')
    repair_checkpoints(run, score=None)
    assert _names(_manager(run, CheckpointConfig())) == [snapshot_name(10), snapshot_name(30)]
    assert not run.list(f"{CHECKPOINTS}/{snapshot_name(20)}")


def test_a_disk_that_is_full_is_said_and_the_checkpoint_before_stays(tmp_path: Path) -> None:
    run = _run(tmp_path, {10: 0.0})
    local = _write(tmp_path / "local", 20, num_values=1 << 20)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(FaultError, match=f"checkpoint {run.url}/{CHECKPOINTS}/step-00000020 cannot be written"):
            upload_snapshot(local, run, snapshot_name(20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in (tmp_path / "run" / CHECKPOINTS).iterdir()] == [snapshot_name(10)]
    assert fetch_snapshot(run, snapshot_name(10), tmp_path).load("optimizer")
