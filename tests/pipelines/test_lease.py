"""One writer per folder."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mgie.errors import ConfigError
from pipelines import lease
from pipelines.lease import LEASE_FILE, hold_lease
from pipelines.storage import open_folder


def _leave(folder: Path, *, pid: int, host: str, age_s: float) -> None:
    content = {"token": "other", "host": host, "pid": pid, "renewed_at": time.time() - age_s}
    (folder / LEASE_FILE).write_text(json.dumps(content))


def test_a_second_writer_is_refused_and_the_lease_goes_with_its_holder(tmp_path: Path) -> None:
    folder = open_folder(tmp_path)
    with (
        hold_lease(folder),
        pytest.raises(ConfigError, match=f"process {os.getpid()} on {socket.gethostname()} is writing"),
        hold_lease(folder),
    ):
        pass
    assert not (tmp_path / LEASE_FILE).exists()
    with hold_lease(folder):
        pass


def test_the_lease_of_a_dead_process_here_is_taken_over_at_once(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    _leave(tmp_path, pid=dead.pid, host=socket.gethostname(), age_s=0)
    with hold_lease(open_folder(tmp_path)):
        assert json.loads((tmp_path / LEASE_FILE).read_text())["pid"] == os.getpid()


@pytest.mark.parametrize(("age_s", "is_refused"), [(lease.TTL_S - 5, True), (lease.TTL_S + 5, False)])
def test_a_lease_from_elsewhere_counts_until_it_runs_out(tmp_path: Path, age_s: float, is_refused: bool) -> None:
    _leave(tmp_path, pid=1, host="elsewhere", age_s=age_s)
    if is_refused:
        with pytest.raises(ConfigError, match="on elsewhere is writing"), hold_lease(open_folder(tmp_path)):
            pass
    else:
        with hold_lease(open_folder(tmp_path)):
            pass


def test_a_damaged_lease_does_not_lock_the_folder_for_ever(tmp_path: Path) -> None:
    (tmp_path / LEASE_FILE).write_text('{"token": ')
    with hold_lease(open_folder(tmp_path)):
        pass


def test_a_held_lease_is_renewed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEW_S", 0.05)
    with hold_lease(open_folder(tmp_path)):
        first = json.loads((tmp_path / LEASE_FILE).read_text())["renewed_at"]
        time.sleep(0.4)
        assert json.loads((tmp_path / LEASE_FILE).read_text())["renewed_at"] > first
