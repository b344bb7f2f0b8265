"""Snapshots: the checkpoints of a training run. One folder each, of what trains and what goes on training it.

    trainable.safetensors   trained parameters, by the training module's parameter names
    ema.safetensors         their running averages, by the same names (absent where averaging is off)
    optimizer.safetensors   the optimiser's state
    snapshot.json           `Snapshot`, with sha256 and size of the files above; written last

A folder without `snapshot.json`, or with a file of another size, is a write or a copy that was cut off. The
frozen base is not stored but named by its bundle's identity. Knows nothing of where folders are kept, nor of
what the tensors mean.
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mgie.bundle.record import hash_file
from mgie.config import FileEntry
from mgie.errors import DataError
from mgie.storage.atomic import atomic_file

TensorSet = Literal["trainable", "ema", "optimizer"]

SNAPSHOT_FILE = "snapshot.json"
_FORMAT = 1  # of `snapshot.json`; changes whenever an older program could not read it
_TYPES = {
    "step": int, "variant": str, "base": str, "base_bundle": str, "config": dict, "data": str, "data_names": list,
    "metrics": dict, "files": dict,
}  # fmt: skip


def snapshot_name(step: int) -> str:
    """Name of the folder of the snapshot after `step` steps; names sort as steps do."""
    return f"step-{step:08d}"


def tensor_file(name: TensorSet) -> str:
    """Name of the file that holds a set of tensors."""
    return f"{name}.safetensors"


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What `snapshot.json` says; the tensors on demand."""

    folder: Path
    "where the files lie"
    step: int
    "training steps done"
    variant: str
    "what was trained, see `TrainingConfig`"
    base: str
    "identity of the bundle that training began from"
    base_bundle: str
    "where that bundle was opened from"
    config: Mapping[str, Any]
    "the run's resolved configuration"
    data: str
    "fingerprint of the data"
    data_names: tuple[str, ...]
    "names of the data sets, for provenance"
    metrics: Mapping[str, Any]
    "losses and scores at this step"
    files: Mapping[str, FileEntry]
    "the files of tensors, by name"

    def load(self, name: TensorSet) -> dict[str, Tensor]:
        """A set of tensors, on the CPU.

        Raises:
            DataError: It is not part of this snapshot, or its file is missing, damaged or altered.
        """
        path = self.folder / tensor_file(name)
        if (entry := self.files.get(path.name)) is None:
            raise DataError(f"checkpoint {self.folder} has no {path.name}; it holds {', '.join(self.files)}")
        _check_size(path, entry)
        try:
            if (digest := hash_file(path)) != entry.sha256:
                raise DataError(f"{path} has sha256 {digest}; {SNAPSHOT_FILE} says {entry.sha256}: it was altered")
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise DataError(f"{path} cannot be read: {error}") from error


def write_snapshot(
    folder: Path,
    *,
    step: int,
    variant: str,
    base: str,
    base_bundle: str,
    config: Mapping[str, Any],
    data: str,
    data_names: Sequence[str],
    metrics: Mapping[str, Any],
    trainable: Mapping[str, Tensor],
    ema: Mapping[str, Tensor] | None,
    optimizer: Mapping[str, Tensor],
) -> Snapshot:
    """Writes a snapshot to `folder`, in place of one that is there. The arguments are the fields of `Snapshot`.

    Args:
        folder: Made where it is missing.
        trainable: Tensors by parameter name. ema: Tensors by the same names; None where averaging is off.
        optimizer: Tensors by names of the caller's choice.

    Raises:
        DataError: The folder cannot be written, for example because the disk is full; nothing that could pass
            for a snapshot is left.
    """
    sets: dict[TensorSet, Mapping[str, Tensor] | None] = {"trainable": trainable, "ema": ema, "optimizer": optimizer}
    files: dict[str, FileEntry] = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove(folder)  # an older record must not vouch for newer files
        for name, tensors in sets.items():
            if tensors is not None:
                path = folder / tensor_file(name)
                save_file({key: value.detach().contiguous() for key, value in tensors.items()}, path)
                files[path.name] = FileEntry(sha256=hash_file(path), size=path.stat().st_size)
        snapshot = Snapshot(
            folder=folder,
            step=step,
            variant=variant,
            base=base,
            base_bundle=base_bundle,
            config=config,
            data=data,
            data_names=tuple(data_names),
            metrics=metrics,
            files=files,
        )
        record = {"format": _FORMAT, **dataclasses.asdict(snapshot)}
        del record["folder"]
        with atomic_file(folder / SNAPSHOT_FILE) as partial:
            partial.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            _remove(folder)  # half a checkpoint would only keep a full disk full
        raise DataError(f"checkpoint {folder} cannot be written: {error}") from error
    return snapshot


def read_snapshot(folder: Path) -> Snapshot:
    """The snapshot in `folder`; its files are there in full, their content is checked when they are loaded.

    Raises:
        DataError: A file is missing or of another size, or `snapshot.json` cannot be used.
    """
    try:
        content = (folder / SNAPSHOT_FILE).read_bytes()
    except OSError as error:
        raise DataError(f"{folder} is no checkpoint: {SNAPSHOT_FILE} cannot be read ({error.strerror})") from error
    snapshot = parse_snapshot(content, folder)
    for name, entry in snapshot.files.items():
        _check_size(folder / name, entry)
    return snapshot


def parse_snapshot(content: bytes, folder: Path) -> Snapshot:
    """The record in a `snapshot.json`, whose tensors lie, or will lie, in `folder`.

    Raises:
        DataError: It is not JSON, of another format, or a field is missing or not of its type.
    """
    try:
        record = json.loads(content)
        if (version := record.pop("format")) != _FORMAT:
            raise DataError(f"{folder}/{SNAPSHOT_FILE} has format {version!r:.80}; this program reads {_FORMAT}")
        _check_fields(record)
        files = {name: FileEntry(**entry) for name, entry in record.pop("files").items()}
        names = tuple(record.pop("data_names"))
        return Snapshot(folder=folder, files=files, data_names=names, **record)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{folder}/{SNAPSHOT_FILE} cannot be used: {type(error).__name__} {error}") from error


def newest(folders: Iterable[Path]) -> Snapshot | None:
    """The complete snapshot of most steps; None where there is none."""
    found = []
    for folder in folders:
        with contextlib.suppress(DataError):
            found.append(read_snapshot(folder))
    return max(found, key=lambda snapshot: snapshot.step, default=None)


def _check_fields(record: Mapping[str, Any]) -> None:
    for name, kind in _TYPES.items():
        if type(record[name]) is not kind:
            raise TypeError(f"{name} is {record[name]!r:.80}; it must be a {kind.__name__}")
    if unknown := set(record["files"]) - {tensor_file(name) for name in get_args(TensorSet)}:
        raise ValueError(f"files lists {min(unknown)!r:.80}")


def _check_size(path: Path, entry: FileEntry) -> None:
    if not path.is_file():
        raise DataError(f"{path} is missing; {SNAPSHOT_FILE} lists it")
    if (size := path.stat().st_size) != entry.size:
        raise DataError(f"{path} has {size} bytes; {SNAPSHOT_FILE} says {entry.size}: it was cut off or altered")


def _remove(folder: Path) -> None:
    """Removes a snapshot's files, its record first."""
    for name in (SNAPSHOT_FILE, *map(tensor_file, get_args(TensorSet))):
        (folder / name).unlink(missing_ok=True)
