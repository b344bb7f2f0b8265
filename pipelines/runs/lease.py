"""One writer per output folder: a lease that is renewed while the job lives.

The lease of a process that is dead on this machine is taken over at once. Any other is watched: if it is renewed
meanwhile its holder lives, and if it is not for `WATCH_S` the holder is gone. No clocks of different machines are
compared. Stores without conditional writes leave a short race; a new holder therefore waits and looks again
before it believes in its lease, and looks at each renewal whether it still has it.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from mgie.errors import ConfigError
from mgie.storage.folder import Folder

LEASE_FILE = "_lease.json"
RENEW_S = 5.0
WATCH_S = 30.0  # several renewals may fail before a holder counts as gone
SETTLE_S = 0.5


@dataclass(frozen=True, kw_only=True)
class _Lease:
    """What the file says."""

    token: str
    machine: str
    pid: int
    renewal: int = 0


class HeldLease:
    """A lease that is held."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._lease = _Lease(token=uuid.uuid4().hex, machine=_machine(), pid=os.getpid())
        self._is_lost = False

    def check(self) -> None:
        """Raises ConfigError if the lease was taken over, as from a process that was stopped for long."""
        if self._is_lost:
            raise ConfigError(f"another job has taken over {self._folder.url}; this one ends")

    def take(self) -> None:
        """Begins to hold. Raises ConfigError if somebody else begins at the same moment."""
        self._write()
        time.sleep(SETTLE_S)
        if not self._is_ours():
            raise ConfigError(f"another job began to write to {self._folder.url} at the same moment; only one may")

    def renew(self) -> None:
        """Shows that the holder lives. Raises OSError."""
        if self._is_ours():
            self._lease = replace(self._lease, renewal=self._lease.renewal + 1)
            self._write()
        else:
            self._is_lost = True

    def release(self) -> None:
        """Ends. Raises OSError."""
        if self._is_ours():
            self._folder.filesystem.delete_file(self._folder.at(LEASE_FILE))

    def _is_ours(self) -> bool:
        lease = _read(self._folder)
        return lease is not None and lease.token == self._lease.token

    def _write(self) -> None:
        self._folder.write(LEASE_FILE, json.dumps(asdict(self._lease)).encode())


@contextlib.contextmanager
def hold_lease(folder: Folder) -> Iterator[HeldLease]:
    """Holds the folder's lease for the duration of the block.

    Raises:
        ConfigError: Another writer holds it.
        OSError: The folder cannot be written to.
    """
    _wait_for_end(folder)
    hold = HeldLease(folder)
    hold.take()
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(RENEW_S):
            with contextlib.suppress(OSError):  # the next round tries again, well before the holder counts as gone
                hold.renew()

    thread = threading.Thread(target=renew, name="lease", daemon=True)
    thread.start()
    try:
        yield hold
    finally:
        ended.set()
        thread.join()
        with contextlib.suppress(OSError):  # the next job waits a little longer
            hold.release()


def _wait_for_end(folder: Folder) -> None:
    """Returns when nobody holds the lease (any more). Raises ConfigError if somebody does."""
    first = _read(folder)
    deadline = time.monotonic() + WATCH_S
    while (lease := _read(folder)) is not None:
        if lease.machine == _machine() and not _is_alive(lease.pid):
            return
        if lease != first:
            raise ConfigError(f"process {lease.pid} on {lease.machine} is writing to {folder.url}; only one job may")
        if time.monotonic() > deadline:
            return
        time.sleep(SETTLE_S)


def _read(folder: Folder) -> _Lease | None:
    try:
        return _Lease(**json.loads(folder.read(LEASE_FILE)))
    except (FileNotFoundError, ValueError, TypeError):
        return None  # none, or not one of ours


def _machine() -> str:
    """Where process ids mean the same: containers of one host count their own."""
    try:
        namespace = Path("/proc/self/ns/pid").readlink().name
    except OSError:  # not Linux
        namespace = ""
    return f"{socket.gethostname()} {namespace}".strip()


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
