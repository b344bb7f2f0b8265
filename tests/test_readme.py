"""The README: what it names, and its way from raw data to an edit by one's own model, run as it is written."""

import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from mgie.bundle.bundle import Bundle
from mgie.images.files import read_image, read_metadata
from mgie.training.checkpoint import newest

if TYPE_CHECKING:
    from tests.ray_cluster import ServiceHost

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent


def _commands() -> list[str]:
    """The block that begins with preparing data, with fewer steps of training."""
    blocks = (ROOT / "README.md").read_text(encoding="utf-8").split("```")[1::2]
    [block] = [block for block in blocks if block.startswith("\npython pipelines/prepare.py")]
    return [line.replace("--training.steps 20", "--training.steps 6") for line in block.strip().splitlines()]


def test_what_the_readme_names_is_there() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\b(?:benchmarks|docs|examples|pipelines)/[\w./-]*\w", text))
    assert len(named) > 20
    assert not [name for name in named if not (ROOT / name).exists()]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_from_raw_data_to_an_edit_by_ones_own_model(service_host: "ServiceHost", tmp_path: Path) -> None:
    """The first command and the last have clusters of their own, the others join that of the tests."""
    from serving.local_cluster import HOST  # and Ray with it

    service_host.stop()
    commands = _commands()
    assert [shlex.split(command)[1].rpartition("/")[2] for command in commands] == [
        "prepare.py", "summarize.py", "cache.py", "train.py", "export", "-m",
    ]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    for name in ("pipelines", "serving", "mgie"):
        (tmp_path / name).symlink_to(ROOT / name)
    joined = service_host.environment()
    for number, command in enumerate(commands):
        cluster = joined if 0 < number < len(commands) - 1 else {}
        done = subprocess.run(
            shlex.split(command), cwd=tmp_path, env=environment | cluster, capture_output=True, text=True, check=False
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
    # What the demo says, `done`, and what it leaves.
    assert "UNTRAINED" not in done.stdout
    assert "make it night" in done.stdout
    edited = (out / "edited" / "edited.png").read_bytes()
    assert read_image(edited).size == (512, 512)
    assert read_metadata(edited)["seed"] == "0"
    assert read_image((out / "edited" / "before_after.png").read_bytes()).width > 1000
    port = int(done.stdout.split(f"http://{HOST}:")[1].split("/")[0])
    with socket.socket() as probe:
        assert probe.connect_ex((HOST, port)) != 0  # nobody answers any more
