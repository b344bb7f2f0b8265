"""`ray job submit` takes the jobs as they are: with `python`, and as a bare executable."""

import os
import re
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from mgie.data.ledger import count_ledger
from mgie.storage.folder import open_folder
from tests.pipelines.chaos import ROOT, private_cluster, wait_for

BIN = Path(sys.executable).parent
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1800)]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A private head node with its job server on loopback; gives the environment for its clients."""
    address = f"http://127.0.0.1:{(port := _free_port())}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(BIN), prepend=os.pathsep)
        patch.setenv("MGIE_CACHE", str(tmp_path_factory.mktemp("cache")))
        with private_cluster(num_cpus=2, dashboard_port=port) as cluster:
            wait_for(lambda: _answers(f"{address}/api/jobs/"), "the job server")
            environment = {name: value for name, value in cluster.env.items() if name != "RAY_ADDRESS"}
            yield environment | {"RAY_API_SERVER_ADDRESS": address}


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def _submit(environment: dict[str, str], *entry: str) -> str:
    command = [str(BIN / "ray"), "job", "submit", "--working-dir", str(ROOT), "--", *entry]
    while True:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if "No available agent" not in done.stdout + done.stderr:  # the node's, which starts after the job server
            break
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_prepare_without_arguments_prepares_the_sample_as_a_bare_executable(head: dict[str, str]) -> None:
    text = _submit(head, "pipelines/prepare.py")
    [manifest] = re.findall(r"manifest: (\S+)", text)
    assert manifest == f"{head['MGIE_CACHE']}/sample/prepared/manifest"
    assert len(list(Path(manifest).glob("part-*.parquet"))) == 1


@pytest.mark.endure
def test_summarize_without_arguments_runs_the_sample_as_a_bare_executable(head: dict[str, str]) -> None:
    text = _submit(head, "pipelines/summarize.py")
    [folder] = re.findall(r"ledger: (\S+?);", " ".join(text.split()))[-1:]
    counts = count_ledger(open_folder(folder))
    assert counts.num_ids == counts.num_ok > 0


@pytest.mark.endure
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
