"""How a command ends: what counts as refused, as a fault and as a bug; signals."""

import errno
import io
import os
import pty
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mgie.errors import ConfigError, DataError
from pipelines.runs.command import Ending, FaultError, judge, run_command
from pipelines.runs.progress import Bar
from tests.pipelines.chaos import ROOT


@dataclass
class Config:
    steps: int = 3


def _from(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


class RayTaskError(Exception):
    """As Ray's: its module begins so."""


RayTaskError.__module__ = "ray.exceptions"


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (ConfigError("steps is 0"), 2, "steps is 0"),
        (FaultError("gone"), 3, "gone"),
        (OSError(errno.ENOSPC, "No space"), 3, "OSError: [Errno 28] No space"),
        (FileNotFoundError(errno.ENOENT, "none"), 2, "FileNotFoundError: [Errno 2] none"),
        (ConnectionError("nobody"), 3, "ConnectionError: nobody"),
        (_from(DataError("unread"), OSError(errno.EIO, "disk")), 3, "unread"),
        (_from(DataError("unread"), FileNotFoundError()), 2, "unread"),
        (RayTaskError("in a worker\nOSError: [Errno 28] No space"), 3, "OSError: [Errno 28] No space"),
        (RayTaskError("in a worker\nmgie.errors.DataError: row 3"), 2, "row 3"),
        (RayTaskError("a node\nhas died"), 3, "RayTaskError: a node has died"),
    ],
)
def test_errors_are_refusals_or_faults(error: Exception, status: int, said: str) -> None:
    assert judge(error) == (status, said)


@pytest.mark.parametrize("error", [KeyError("x"), RayTaskError("in a worker\nKeyError: 'x'")])
def test_what_is_neither_is_a_bug(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def job(config: Config, *, console: Console) -> Ending:
        raise error

    assert judge(error) is None
    monkeypatch.setattr(sys, "argv", ["job"])
    with pytest.raises(type(error)):
        run_command(Config, job, about=None)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_stop_the_job_and_leave_the_handlers_as_they_were(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def job(config: Config, *, console: Console) -> Ending:
        try:
            signal.raise_signal(number)
        finally:
            raise OSError("what was cut off complains")

    before = signal.getsignal(number)
    monkeypatch.setattr(sys, "argv", ["job"])
    assert run_command(Config, job, about=None) == 130
    assert capsys.readouterr().err == "stopped; the same command goes on\n"
    assert signal.getsignal(number) == before


@pytest.mark.parametrize(("num_rejected", "status"), [(0, 0), (1, 0), (2, 4)])
def test_more_rejected_rows_than_allowed_are_a_status_of_their_own(
    num_rejected: int, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def job(config: Config, *, console: Console) -> Ending:
        return Ending(said="done", num_rows=10, num_rejected=num_rejected, max_rejected=0.1)

    monkeypatch.setattr(sys, "argv", ["job"])
    assert run_command(Config, job, about=None) == status


def test_what_libraries_write_to_a_terminal_by_themselves_goes_to_a_file() -> None:
    program = (
        "import os, sys; from pipelines.runs.command import *; from dataclasses import make_dataclass\n"
        "def job(config, console):\n"
        "    os.write(2, b'core_worker.cc frightens\\n'); raise FaultError('it broke')\n"
        "sys.exit(run_command(make_dataclass('C', []), job, about=None))"
    )
    ours, theirs = pty.openpty()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    with subprocess.Popen([sys.executable, "-c", program], stderr=theirs, env=environment) as process:
        os.close(theirs)
        said = b""
        while True:
            try:
                said += os.read(ours, 4096)
            except OSError:  # the other end is closed
                break
    os.close(ours)
    assert process.returncode == 3
    assert b"it broke" in said
    assert b"frightens" not in said
    path = Path(said.split(b"what Ray wrote: ")[1].split()[0].split(b"\x1b")[0].decode())
    assert path.read_text() == "core_worker.cc frightens\n"
    path.unlink()


def _lines(monkeypatch: pytest.MonkeyPatch, *shown: tuple[float, int]) -> list[str]:
    now = [0.0]
    monkeypatch.setattr("pipelines.runs.progress.time.monotonic", lambda: now[0])
    out: Any = io.StringIO()
    with Bar(Console(file=out, force_terminal=False), "edits", 10, done=2) as bar:
        for now[0], done in shown:
            bar.show(done, "fine")
    return str(out.getvalue()).splitlines()


def test_without_a_terminal_a_line_is_told_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    told = _lines(monkeypatch, (1, 3), (40, 6), (41, 7), (80, 10))
    assert told == ["edits: 2 of 10", "edits: 6 of 10, 0:00:40 left, fine", "edits: 10 of 10, 0:00:00 left, fine"]
    assert _lines(monkeypatch, (1, 3)) == ["edits: 2 of 10", "edits: 3 of 10, 0:00:07 left"]
