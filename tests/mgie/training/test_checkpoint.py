"""Snapshots: what is written comes back; what is cut off, altered or unwritable is said."""

import json
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mgie.errors import DataError
from mgie.training.checkpoint import SNAPSHOT_FILE, Snapshot, newest, read_snapshot, snapshot_name, write_snapshot

FILES = ("trainable.safetensors", "ema.safetensors", "optimizer.safetensors")


def _tensors(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(40, 30, generator=generator)
    return {"unet.weight": weight.T, "step.unet.weight": torch.tensor(3.0), "count": torch.tensor([1, 2])}


def _write(folder: Path, *, step: int = 50, ema: bool = True, **given: Any) -> Snapshot:
    fields: dict[str, Any] = {
        "variant": "e2e",
        "base": "0123456789abcdef",
        "base_bundle": "random",
        "config": {"steps": 100, "learning_rates": {"unet": 1e-4}, "name": "é"},
        "data": "f00d",
        "data_names": ["one", "two"],
        "metrics": {"loss": 0.25},
        "trainable": _tensors(0),
        "ema": _tensors(1) if ema else None,
        "optimizer": _tensors(2),
    }
    return write_snapshot(folder, step=step, **(fields | given))


def test_what_is_written_is_read_back_bit_by_bit(tmp_path: Path) -> None:
    written = _write(tmp_path / "a")
    read = read_snapshot(tmp_path / "a")
    assert read == written
    assert (read.step, read.variant, read.base, read.data_names) == (50, "e2e", "0123456789abcdef", ("one", "two"))
    assert read.config == {"steps": 100, "learning_rates": {"unet": 1e-4}, "name": "é"}
    for seed, name in enumerate(("trainable", "ema", "optimizer")):
        loaded, expected = read.load(name), _tensors(seed)  # type: ignore[arg-type]
        assert loaded.keys() == expected.keys()
        assert all(torch.equal(loaded[key], expected[key]) for key in expected)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == sorted([*FILES, SNAPSHOT_FILE])


def test_a_snapshot_without_running_averages_says_so(tmp_path: Path) -> None:
    _write(tmp_path / "a", ema=False)
    with pytest.raises(DataError, match=r"has no ema\.safetensors; it holds trainable\.safetensors, optimizer"):
        read_snapshot(tmp_path / "a").load("ema")


def test_a_snapshot_may_hold_no_tensors_at_all(tmp_path: Path) -> None:
    assert _write(tmp_path / "fz", trainable={}, ema=None, optimizer={}).load("trainable") == {}


def test_writing_again_replaces_all_of_the_older_one(tmp_path: Path) -> None:
    _write(tmp_path / "a")
    _write(tmp_path / "a", step=60, ema=False)
    assert read_snapshot(tmp_path / "a").step == 60
    assert not (tmp_path / "a" / "ema.safetensors").exists()


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["missing", "truncated", "grown"])
def test_a_file_that_is_missing_or_of_another_size_is_named(tmp_path: Path, name: str, damage: str) -> None:
    _write(tmp_path / "a")
    path = tmp_path / "a" / name
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(content[:-1] if damage == "truncated" else content + b"\0")
    with pytest.raises(DataError, match=name):
        read_snapshot(tmp_path / "a")
    assert newest([tmp_path / "a"]) is None


def test_an_altered_file_is_refused_when_it_is_loaded_and_the_others_are_not(tmp_path: Path) -> None:
    _write(tmp_path / "a")
    path = tmp_path / "a" / "trainable.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    snapshot = read_snapshot(tmp_path / "a")
    assert newest([tmp_path / "a"]) is not None
    with pytest.raises(DataError, match=r"trainable\.safetensors has sha256 [0-9a-f]{64}; snapshot.json says"):
        snapshot.load("trainable")
    assert snapshot.load("ema")


def test_a_file_that_vanishes_after_reading_is_named(tmp_path: Path) -> None:
    snapshot = _write(tmp_path / "a")
    (tmp_path / "a" / "ema.safetensors").unlink()
    with pytest.raises(DataError, match=r"ema\.safetensors is missing"):
        snapshot.load("ema")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "has format 2; this program reads 1"),
        ({"step": "50"}, "step is '50'; it must be a int"),
        ({"step": True}, "step is True"),
        ({"files": {"../x.safetensors": {"sha256": "", "size": 1}}}, "files lists '../x.safetensors'"),
        ({"files": {"ema.safetensors": {"size": 1}}}, "sha256"),
        ({"novelty": 1}, "novelty"),
        ({"base": None}, "base is None"),
    ],
)
def test_a_record_that_cannot_be_used_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    _write(tmp_path / "a")
    record = json.loads((tmp_path / "a" / SNAPSHOT_FILE).read_text())
    (tmp_path / "a" / SNAPSHOT_FILE).write_text(json.dumps(record | change))
    with pytest.raises(DataError, match=message) as caught:
        read_snapshot(tmp_path / "a")
    assert str(tmp_path / "a" / SNAPSHOT_FILE) in str(caught.value)


def test_a_record_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    _write(tmp_path / "a")
    content = (tmp_path / "a" / SNAPSHOT_FILE).read_bytes()
    for end in range(0, len(content) - 2, 7):  # the last two bytes are "}" and a line feed
        (tmp_path / "a" / SNAPSHOT_FILE).write_bytes(content[:end])
        assert newest([tmp_path / "a"]) is None


def test_an_empty_a_missing_and_a_plain_file_are_no_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for name in ("empty", "missing", "file"):
        with pytest.raises(DataError, match=f"{name} is no checkpoint"):
            read_snapshot(tmp_path / name)


def test_the_newest_is_the_complete_one_of_most_steps(tmp_path: Path) -> None:
    folders = [tmp_path / snapshot_name(step) for step in (9, 100, 20)]
    assert [folder.name for folder in sorted(folders)] == ["step-00000009", "step-00000020", "step-00000100"]
    for folder in folders:
        _write(folder, step=int(folder.name.removeprefix("step-")))
    assert (found := newest(folders)) is not None
    assert found.step == 100
    (folders[1] / "optimizer.safetensors").write_bytes(b"cut")
    assert (found := newest(folders)) is not None
    assert found.step == 20
    assert newest([tmp_path / "nothing"]) is None
    assert newest([]) is None


def test_a_disk_that_takes_no_more_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    """A limit on file sizes stands for the full disk: the write fails in the same place, by the same error class."""
    big = {"weight": torch.zeros(1 << 20)}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    _write(tmp_path / "before")
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(DataError, match=f"checkpoint {tmp_path / 'a'} cannot be written"):
            _write(tmp_path / "a", ema=True, optimizer=big)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list((tmp_path / "a").iterdir()) == []
    assert (found := newest(tmp_path.iterdir())) is not None
    assert found.folder == tmp_path / "before"


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(DataError, match=f"checkpoint {folder} cannot be written"):
            _write(folder)
