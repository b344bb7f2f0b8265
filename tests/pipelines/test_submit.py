"""`ray job submit` takes the jobs as they are: with `python`, and as a bare executable."""

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mgie.ledger import count_ledger
from pipelines.storage import open_folder

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(420)]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A private head node with its job server on loopback; gives the environment for its clients."""
    dashboard, gcs = _free_port(), _free_port()
    # Unix sockets lie below it, and their paths must be short.
    temp = Path("/tmp") / f"mgie-{os.getpid()}"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"RAY_AUTH_MODE": "disabled", "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    start = [
        str(BIN / "ray"), "start", "--head", "--block", f"--port={gcs}", "--num-cpus=4", f"--temp-dir={temp}",
        "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", "--object-store-memory=200000000",
    ]  # fmt: skip
    node = subprocess.Popen(start, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield environment | {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}"}
    finally:
        node.terminate()  # `--block` ends what it started
        node.wait(timeout=60)
        shutil.rmtree(temp, ignore_errors=True)


def _submit(environment: dict[str, str], *entry: str) -> str:
    for _ in range(30):  # until the job server answers
        listed = subprocess.run(
            [str(BIN / "ray"), "job", "list"], env=environment, capture_output=True, text=True, check=False
        )
        if listed.returncode == 0:
            break
    assert listed.returncode == 0, listed.stderr
    command = [str(BIN / "ray"), "job", "submit", "--working-dir", str(ROOT), "--", *entry]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_summarize_without_arguments_runs_the_sample_as_a_bare_executable(head: dict[str, str]) -> None:
    text = _submit(head, "pipelines/summarize.py")
    [folder] = re.findall(r"ledger: (\S+?);", " ".join(text.split()))[-1:]
    counts = count_ledger(open_folder(folder).filesystem, open_folder(folder).path)
    assert counts.num_ids == counts.num_ok > 0


def test_edit_runs_with_python(head: dict[str, str], tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "in").mkdir()
    Image.new("RGB", (64, 48), (10, 90, 200)).save(tmp_path / "in" / "a.png")
    out = tmp_path / "out"
    text = _submit(
        head, "python", "pipelines/edit.py", str(tmp_path / "in"), "night", "--out", str(out), "--steps", "2"
    )
    assert "1 edited, 0 rejected" in " ".join(text.split())
    assert len(list((out / "images").glob("*.png"))) == 1
