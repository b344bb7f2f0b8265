"""One writer per folder. Leases are judged by a clock that the tests move."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from mgie.errors import ConfigError
from mgie.storage.folder import open_folder
from pipelines.runs import lease
from pipelines.runs.lease import LEASE_FILE, hold_lease
from tests.pipelines.chaos import wait_for


@dataclass
class Clock:
    """What `pipelines.runs.lease` knows as `time`: it moves while somebody sleeps, and something may happen then."""

    now_s: float = 0.0
    events: dict[float, Callable[[], None]] = field(default_factory=dict)
    "by the time at which they are due"

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds
        for due_s in sorted(due_s for due_s in self.events if due_s <= self.now_s):
            self.events.pop(due_s)()


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Nothing is renewed by itself, unless a test wants it."""
    clock = Clock()
    monkeypatch.setattr(lease, "time", clock)
    monkeypatch.setattr(lease, "RENEW_S", 1e6)
    monkeypatch.setattr(lease, "SETTLE_S", 0.5)
    monkeypatch.setattr(lease, "WATCH_S", 30.0)
    return clock


def _leave(folder: Path, *, pid: int, machine: str, renewal: int = 0) -> None:
    content = {"token": "other", "machine": machine, "pid": pid, "renewal": renewal}
    # As writers do: readers never see half of it.
    (folder / ".lease.tmp").write_text(json.dumps(content))
    (folder / ".lease.tmp").replace(folder / LEASE_FILE)


def _content(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / LEASE_FILE).read_text())
    return content


def test_a_second_writer_is_refused_and_the_lease_goes_with_its_holder(tmp_path: Path, clock: Clock) -> None:
    folder = open_folder(tmp_path)
    with hold_lease(folder) as hold:
        clock.events[clock.now_s + 20] = hold.renew
        with (
            pytest.raises(ConfigError, match=f"process {os.getpid()} on {socket.gethostname()}.* is writing"),
            hold_lease(folder),
        ):
            pass
    assert not (tmp_path / LEASE_FILE).exists()
    with hold_lease(folder):
        pass


def test_the_lease_of_a_dead_process_here_is_taken_over_at_once(tmp_path: Path, clock: Clock) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    _leave(tmp_path, pid=dead.pid, machine=lease._machine())
    with hold_lease(open_folder(tmp_path)):
        assert _content(tmp_path)["pid"] == os.getpid()
    assert clock.now_s == lease.SETTLE_S


def test_a_lease_from_elsewhere_that_is_not_renewed_is_taken_over(tmp_path: Path, clock: Clock) -> None:
    _leave(tmp_path, pid=1, machine="elsewhere")
    with hold_lease(open_folder(tmp_path)):
        assert _content(tmp_path)["pid"] == os.getpid()
    assert lease.WATCH_S < clock.now_s <= lease.WATCH_S + 2 * lease.SETTLE_S


def test_a_lease_from_elsewhere_that_is_renewed_is_respected(tmp_path: Path, clock: Clock) -> None:
    _leave(tmp_path, pid=1, machine="elsewhere")
    clock.events[lease.WATCH_S - 1] = lambda: _leave(tmp_path, pid=1, machine="elsewhere", renewal=1)
    with pytest.raises(ConfigError, match="on elsewhere is writing"), hold_lease(open_folder(tmp_path)):
        pass
    assert not clock.events


def test_of_two_that_begin_at_the_same_moment_the_later_one_holds(tmp_path: Path, clock: Clock) -> None:
    clock.events[0.1] = lambda: _leave(tmp_path, pid=1, machine="elsewhere")
    with pytest.raises(ConfigError, match="at the same moment"), hold_lease(open_folder(tmp_path)):
        pass
    assert _content(tmp_path)["machine"] == "elsewhere"


def test_a_damaged_lease_does_not_lock_the_folder_for_ever(tmp_path: Path) -> None:
    (tmp_path / LEASE_FILE).write_text('{"token": ')
    with hold_lease(open_folder(tmp_path)):
        pass


def test_a_held_lease_is_renewed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEW_S", 0.01)
    with hold_lease(open_folder(tmp_path)) as hold:
        first = _content(tmp_path)["renewal"]
        wait_for(lambda: _content(tmp_path)["renewal"] > first, "a renewal")
        hold.check()


def test_a_holder_learns_that_its_lease_was_taken_over(tmp_path: Path) -> None:
    with hold_lease(open_folder(tmp_path)) as hold:
        hold.renew()
        hold.check()
        _leave(tmp_path, pid=1, machine="elsewhere")
        hold.renew()
        with pytest.raises(ConfigError, match="another job has taken over"):
            hold.check()
    assert _content(tmp_path)["machine"] == "elsewhere"
