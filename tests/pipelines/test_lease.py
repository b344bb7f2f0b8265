"""One writer per folder."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mgie.errors import ConfigError
from pipelines import lease
from pipelines.lease import LEASE_FILE, hold_lease
from pipelines.storage import open_folder


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEW_S", 0.1)
    monkeypatch.setattr(lease, "SETTLE_S", 0.05)
    monkeypatch.setattr(lease, "WATCH_S", 1.0)


def _leave(folder: Path, *, pid: int, machine: str, renewal: int = 0) -> None:
    content = {"token": "other", "machine": machine, "pid": pid, "renewal": renewal}
    # As writers do: readers never see half of it.
    (folder / ".lease.tmp").write_text(json.dumps(content))
    (folder / ".lease.tmp").replace(folder / LEASE_FILE)


def _content(folder: Path) -> dict[str, object]:
    content: dict[str, object] = json.loads((folder / LEASE_FILE).read_text())
    return content


def test_a_second_writer_is_refused_and_the_lease_goes_with_its_holder(tmp_path: Path) -> None:
    folder = open_folder(tmp_path)
    with (
        hold_lease(folder),
        pytest.raises(ConfigError, match=f"process {os.getpid()} on {socket.gethostname()}.* is writing"),
        hold_lease(folder),
    ):
        pass
    assert not (tmp_path / LEASE_FILE).exists()
    with hold_lease(folder):
        pass


def test_the_lease_of_a_dead_process_here_is_taken_over_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "WATCH_S", 60.0)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    _leave(tmp_path, pid=dead.pid, machine=lease._machine())
    started = time.monotonic()
    with hold_lease(open_folder(tmp_path)):
        assert _content(tmp_path)["pid"] == os.getpid()
    assert time.monotonic() - started < 5


def test_a_lease_from_elsewhere_that_is_not_renewed_is_taken_over(tmp_path: Path) -> None:
    _leave(tmp_path, pid=1, machine="elsewhere")
    started = time.monotonic()
    with hold_lease(open_folder(tmp_path)):
        assert _content(tmp_path)["pid"] == os.getpid()
    assert time.monotonic() - started >= lease.WATCH_S


def test_a_lease_from_elsewhere_that_is_renewed_is_respected(tmp_path: Path) -> None:
    _leave(tmp_path, pid=1, machine="elsewhere")
    renewal = threading.Timer(0.3, _leave, [tmp_path], {"pid": 1, "machine": "elsewhere", "renewal": 1})
    renewal.start()
    with pytest.raises(ConfigError, match="on elsewhere is writing"), hold_lease(open_folder(tmp_path)):
        pass
    renewal.join()


def test_a_damaged_lease_does_not_lock_the_folder_for_ever(tmp_path: Path) -> None:
    (tmp_path / LEASE_FILE).write_text('{"token": ')
    with hold_lease(open_folder(tmp_path)):
        pass


def test_a_held_lease_is_renewed(tmp_path: Path) -> None:
    with hold_lease(open_folder(tmp_path)) as hold:
        first = _content(tmp_path)["renewal"]
        time.sleep(0.5)
        assert _content(tmp_path)["renewal"] > first
        hold.check()


def test_a_holder_learns_that_its_lease_was_taken_over(tmp_path: Path) -> None:
    with hold_lease(open_folder(tmp_path)) as hold:
        _leave(tmp_path, pid=1, machine="elsewhere")
        time.sleep(0.5)
        with pytest.raises(ConfigError, match="another job has taken over"):
            hold.check()
    assert _content(tmp_path)["machine"] == "elsewhere"
