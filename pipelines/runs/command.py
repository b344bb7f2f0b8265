"""One skeleton of every job's command: arguments, what is shown, how it ends.

Knows nothing of what the jobs do, and imports no Ray: a job that needs none starts without.
"""

import builtins
import contextlib
import io
import os
import re
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar

import tyro
from rich.console import Console

import mgie.errors
from mgie.errors import MGIEError
from mgie.storage.retry import is_store_fault
from pipelines.runs.config_file import expand

Config = TypeVar("Config")

DONE, REFUSED, FAULT, TOO_MANY_REJECTED, STOPPED = 0, 2, 3, 4, 130
STATUSES = """Exit status:
  0    done; rejected rows are counted in the report
  1    a bug, with Python's traceback
  2    refused: an argument, an input or a setting cannot be used
  3    a fault of store, disk, cluster or endpoint: the same command continues the run
  4    done, but a larger share of the rows was rejected than --max-rejected allows
  130  stopped by Ctrl-C or SIGTERM: the same command goes on

Settings may also come from `--config FILE.yaml`, by the names of the flags, which win over the file. Those of a run
are written beside its output, as config.yaml.
"""


class FaultError(MGIEError):
    """Store, disk, cluster or endpoint is in trouble: what was asked for may be asked again."""


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How a job that came to its end tells of it."""

    said: str
    "where the result is, and what there is to know of it"
    report: Mapping[str, Any] = field(default_factory=dict)
    num_rows: int = 0
    num_rejected: int = 0
    "of the rows"
    max_rejected: float = 1.0
    "share of the rows that may be"


def run_command(config_type: type[Config], job: Callable[..., Ending], *, about: str | None) -> int:
    """Runs a job with the arguments of this process; returns the exit status (`STATUSES`).

    Args:
        config_type: Dataclass whose fields are the flags.
        job: Does the work, with a configuration and `console`, to which it prints what it is about to do.
        about: What `--help` says of the job.
    """
    console = Console()
    errors = Console(stderr=True, style="red", soft_wrap=True, markup=False, highlight=False)
    has_ray = _is_ray_joined()
    with _quiet_terminal() as log, _Stop() as stop:
        try:
            ending = job(_parse(config_type, about), console=console)
        except (Exception, KeyboardInterrupt) as error:
            if stop.is_wanted or isinstance(error, KeyboardInterrupt):
                errors.print("stopped; the same command goes on", style="none")
                return STOPPED
            if (verdict := judge(error)) is None:
                raise
            status, said = verdict
            errors.print(f"error: {said}")
            if status == FAULT:
                errors.print(f"the same command continues the run{f'; what Ray wrote: {log}' if log else ''}")
            return status
        finally:
            if _is_ray_joined() and not has_ray:
                sys.modules["ray"].shutdown()  # here, since it is talkative, too
    console.print(ending.said, soft_wrap=True, highlight=False)
    if ending.num_rejected <= ending.max_rejected * ending.num_rows:
        return DONE
    rejected = f"{ending.num_rejected} of {ending.num_rows} rows were rejected"
    errors.print(f"error: {rejected}, more than --max-rejected {ending.max_rejected:g} allows")
    return TOO_MANY_REJECTED


def _is_ray_joined() -> bool:
    return "ray" in sys.modules and bool(sys.modules["ray"].is_initialized())


# ---- arguments


def _parse(config_type: type[Config], about: str | None) -> Config:
    """The arguments of this process. Raises ConfigError, or SystemExit once help is shown."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            arguments = expand(config_type, sys.argv[1:])
            return tyro.cli(config_type, args=arguments, description=f"{about or ''}\n\n{STATUSES}")
    except SystemExit as end:
        if not end.code:
            raise
    raise mgie.errors.ConfigError(f"{_one_line(said.getvalue())} (--help lists all settings)")


def _one_line(said: str) -> str:
    """What tyro says in a box of several parts, as one sentence: the first part, and what may have been meant."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", said)
    parts = re.split(r"[─-]{3,}", " ".join(line.strip("│ ") for line in text.splitlines()))
    parts = [" ".join(part.strip("╭╮╰╯─ ").split()) for part in parts[1:]]
    meant = next((re.findall(r"--[\w.-]+", part) for part in parts if part.startswith("Perhaps you meant")), [])
    parts[0] = re.sub(
        r"Error parsing (\S+): no type matching (\S+) .* from \[(.*?)\]\..*", r"\1 is \3; it must be \2", parts[0]
    )
    return parts[0] + (f"; did you mean {' or '.join(dict.fromkeys(meant))}?" if meant else "")


# ---- endings


def causes(error: BaseException) -> list[BaseException]:
    """The error, what it was raised from, and so on to what happened first."""
    chain = [error]
    while (inner := getattr(chain[-1], "cause", None) or chain[-1].__cause__) is not None and inner not in chain:
        chain.append(inner)
    return chain


def judge(error: BaseException) -> tuple[int, str] | None:
    """The exit status for an error and what is said of it; None for a bug."""
    chain = causes(error)
    for one in chain:
        if isinstance(one, MGIEError):
            return (FAULT if any(map(_is_fault, chain)) else REFUSED), str(one)
        if isinstance(one, OSError):
            return (FAULT if _is_fault(one) else REFUSED), f"{type(one).__name__}: {one}"
    if not type(error).__module__.startswith("ray."):
        return None
    # Of what a worker raised Ray may bring back no more than the text of its traceback.
    for one in reversed(chain):
        for name, text in reversed(re.findall(r"^([A-Za-z_][\w.]*(?:Error|Exception)): (.*)$", str(one), re.MULTILINE)):
            kind = getattr(mgie.errors, name.rpartition(".")[2], None) or getattr(builtins, name, None)
            if kind is not None and issubclass(kind, MGIEError):
                return REFUSED, text
            if kind is not None and not issubclass(kind, OSError):
                return None
            if kind is not None:
                return FAULT, f"{name}: {text}"
    return FAULT, " ".join(f"{type(error).__name__}: {error}".split())[:500]


def _is_fault(error: BaseException) -> bool:
    if isinstance(error, (FaultError, ConnectionError, TimeoutError)):
        return True
    return isinstance(error, OSError) and is_store_fault(error)


# ---- signals and the terminal


class _Stop:
    """Ctrl-C and SIGTERM end the job alike; a second one ends it at once."""

    is_wanted = False

    def __enter__(self) -> Self:
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            self._before = {one: signal.signal(one, self._stop) for one in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exc: object) -> None:
        for one, handler in self._before.items():
            signal.signal(one, handler)

    def _stop(self, *_: object) -> None:
        self.is_wanted = True
        for one in self._before:
            signal.signal(one, signal.SIG_DFL)
        raise KeyboardInterrupt


@contextlib.contextmanager
def _quiet_terminal() -> Iterator[Path | None]:
    """Sends what Ray's C++ parts write to a terminal by themselves to a file: it is harmless, and frightens."""
    try:
        is_terminal = sys.stderr.fileno() == 2 and os.isatty(2)  # standard error
    except (OSError, ValueError):
        is_terminal = False
    if not is_terminal:
        yield None
        return
    path = Path(tempfile.gettempdir()) / f"mgie-job-{os.getpid()}.log"
    with os.fdopen(os.dup(2), "w", buffering=1) as terminal, path.open("ab") as log:
        os.dup2(log.fileno(), 2)
        before, sys.stderr = sys.stderr, terminal
        try:
            yield path
        finally:
            sys.stderr = before
            os.dup2(terminal.fileno(), 2)
            if not path.stat().st_size:
                path.unlink()
