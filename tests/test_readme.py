"""The README's way from raw data to an edit by one's own model, run as it is written."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from mgie.checkpoint import Bundle
from mgie.snapshot import newest

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent


def _commands() -> list[str]:
    """The block that begins with preparing data, with fewer steps of training."""
    blocks = (ROOT / "README.md").read_text(encoding="utf-8").split("```")[1::2]
    [block] = [block for block in blocks if block.startswith("\npython pipelines/prepare.py")]
    return [line.replace("--training.steps 200", "--training.steps 6") for line in block.strip().splitlines()]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_from_raw_data_to_an_edit_by_ones_own_model(tmp_path: Path) -> None:
    commands = _commands()
    assert [shlex.split(command)[1].rpartition("/")[2] for command in commands] == [
        "prepare.py", "summarize.py", "cache.py", "train.py", "export", "-m",
    ]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    for name in ("pipelines", "serving", "mgie"):
        (tmp_path / name).symlink_to(ROOT / name)
    for command in commands:
        done = subprocess.run(
            shlex.split(command), cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    out = tmp_path / "out" / "first"
    snapshot = newest((out / "run" / "checkpoints").glob("step-*"))
    assert snapshot is not None
    assert snapshot.step == 6
    bundle = Bundle(out / "bundle")
    bundle.verify()
    assert bundle.config.trained
    assert bundle.identity != snapshot.base
    assert list((out / "edited").glob("*.png"))
