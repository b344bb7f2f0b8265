"""The checkpoints of a training run in its folder, and Ray's index of them.

    checkpoints/step-<step>/                        `mgie.training.checkpoint`; `snapshot.json` arrives last
    checkpoints/checkpoint_manager_snapshot.json    Ray's index

Ray writes its index in place, so a kill may leave half of it, and a checkpoint that was complete may not be in it yet.
The folders are the truth here: the index is made afresh from them before each start. Knows nothing of what is in a
checkpoint but its record.
"""

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from pyarrow import fs as pafs
from ray.train.v2._internal.constants import CHECKPOINT_MANAGER_SNAPSHOT_FILENAME
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import _CheckpointManagerState, _TrainingResultState

from mgie.errors import DataError
from mgie.storage.folder import Folder
from mgie.storage.retry import with_retries
from mgie.training.checkpoint import SNAPSHOT_FILE, Snapshot, parse_snapshot, read_snapshot
from pipelines.runs.command import FaultError

CHECKPOINTS = "checkpoints"


def complete_snapshots(run: Folder) -> dict[str, Snapshot]:
    """Records of the checkpoints that are there in full, by name, oldest first. Raises OSError."""
    folder = run.child(CHECKPOINTS)
    sizes = {entry.name: entry.num_bytes for entry in folder.list(is_recursive=True) if not entry.is_folder}
    found = {}
    for record in (name for name in sizes if PurePosixPath(name).name == SNAPSHOT_FILE):
        name = str(PurePosixPath(record).parent)
        try:
            snapshot = parse_snapshot(folder.read(record), Path(folder.at(name)))
        except DataError:
            continue
        if all(sizes.get(f"{name}/{file}") == entry.size for file, entry in snapshot.files.items()):
            found[name] = snapshot
    return dict(sorted(found.items(), key=lambda item: item[1].step))


def repair_checkpoints(run: Folder, *, score: str | None) -> dict[str, Snapshot]:
    """Removes what was cut off, and makes Ray's index say what there is.

    Args:
        score: Name of the metric by which checkpoints are kept, least is best; None = the newest are kept.

    Returns:
        The complete checkpoints, by name, oldest first.

    Raises:
        OSError: The store is in trouble.
    """
    folder, snapshots = run.child(CHECKPOINTS), complete_snapshots(run)
    for entry in folder.list():
        if entry.is_folder and entry.name not in snapshots:
            folder.delete(entry.name)
    if snapshots:
        folder.write(CHECKPOINT_MANAGER_SNAPSHOT_FILENAME, _index(snapshots, score).encode())
    elif folder.exists(CHECKPOINT_MANAGER_SNAPSHOT_FILENAME):
        folder.filesystem.delete_file(folder.at(CHECKPOINT_MANAGER_SNAPSHOT_FILENAME))
    return snapshots


def _index(snapshots: Mapping[str, Snapshot], score: str | None) -> str:
    """Ray's index, with the checkpoints in the order in which it would have them: worst first."""
    age = {name: number for number, name in enumerate(snapshots)}
    order = list(snapshots)
    if score is not None:
        order.sort(key=lambda name: (-snapshots[name].metrics[score], age[name]))
    results = {
        name: _TrainingResultState(checkpoint_dir_name=name, metrics=dict(snapshots[name].metrics)) for name in order
    }
    state: Any = _CheckpointManagerState(
        checkpoint_results=list(results.values()),
        checkpoint_report_indices=[age[name] for name in order],
        latest_checkpoint_result=results[list(snapshots)[-1]],
        pending_training_results=[],
        pending_validation_specs=[],
        current_report_index=len(snapshots),
        validated_checkpoint_dir_names=[],
        timed_out_validation_checkpoint_dir_names=[],
        failed_validation_checkpoint_dir_names=[],
    )
    return str(state.model_dump_json())


def upload_snapshot(local: Path, run: Folder, name: str) -> Folder:
    """Copies a checkpoint into the run's folder, its record last; returns where it is.

    Raises:
        FaultError: The local disk takes no more.
        OSError: The store is in trouble.
    """
    folder = run.child(f"{CHECKPOINTS}/{name}")
    run.delete(f"{CHECKPOINTS}/{name}")  # an older record must not vouch for newer files
    folder.filesystem.create_dir(folder.path, recursive=True)
    try:
        for path in sorted(local.iterdir(), key=lambda path: path.name == SNAPSHOT_FILE):
            _copy(pafs.LocalFileSystem(), str(path), folder.filesystem, folder.at(path.name))
    except OSError as error:
        if not run.is_local:
            raise
        run.delete(f"{CHECKPOINTS}/{name}")  # half a checkpoint would only keep a full disk full
        raise FaultError(f"checkpoint {folder.url} cannot be written: {error}") from error
    return folder


def fetch_snapshot(run: Folder, name: str, scratch: Path) -> Snapshot:
    """A complete checkpoint where it can be loaded from: in place on a local disk, else copied into `scratch`.

    Raises:
        DataError: It is damaged.
        OSError: The store is in trouble.
    """
    folder = run.child(f"{CHECKPOINTS}/{name}")
    if run.is_local:
        return read_snapshot(Path(folder.path))
    local = scratch / name
    local.mkdir()
    for entry in folder.list():
        _copy(folder.filesystem, folder.at(entry.name), pafs.LocalFileSystem(), str(local / entry.name))
    return read_snapshot(local)


def _copy(source: pafs.FileSystem, path: str, target: pafs.FileSystem, target_path: str) -> None:
    """One file. Not several at once: Arrow's threads and uploads to S3 do not go together."""
    with_retries(lambda: pafs.copy_files(path, target_path, source_filesystem=source, destination_filesystem=target))
