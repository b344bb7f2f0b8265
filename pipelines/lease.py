"""One writer per output folder: a lease that is renewed while the job lives.

A lease of a dead process on this machine is taken over at once, any other when it has not been renewed for
`TTL_S`. Stores without conditional writes leave a short race; a new holder therefore waits and looks again
before it believes in its lease.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator

from mgie.errors import ConfigError
from pipelines.storage import Folder

LEASE_FILE = "_lease.json"
TTL_S = 60.0
RENEW_S = 10.0
SETTLE_S = 0.5


@contextlib.contextmanager
def hold_lease(folder: Folder) -> Iterator[None]:
    """Holds the folder's lease for the duration of the block.

    Raises:
        ConfigError: Another writer holds it.
    """
    token = uuid.uuid4().hex
    _refuse_if_held(folder)
    _write(folder, token)
    time.sleep(SETTLE_S)
    if _read(folder).get("token") != token:
        raise ConfigError(f"another job began to write to {folder.url} at the same moment; only one may")
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(RENEW_S):
            with contextlib.suppress(OSError):  # the next round tries again, well before the lease runs out
                _write(folder, token)

    thread = threading.Thread(target=renew, name="lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with contextlib.suppress(OSError):  # it runs out by itself
            if _read(folder).get("token") == token:
                folder.filesystem.delete_file(folder.at(LEASE_FILE))


def _refuse_if_held(folder: Folder) -> None:
    held = _read(folder)
    if not held:
        return
    age_s = time.time() - held["renewed_at"]
    is_here = held["host"] == socket.gethostname()
    if age_s > TTL_S or (is_here and not _is_alive(held["pid"])):
        return
    raise ConfigError(
        f"process {held['pid']} on {held['host']} is writing to {folder.url} (lease renewed {age_s:.0f} s ago); "
        f"stop it, or wait until its lease is {TTL_S:.0f} s old"
    )


def _read(folder: Folder) -> dict[str, object] | dict[str, float]:
    try:
        lease = json.loads(folder.read(LEASE_FILE))
        return {name: lease[name] for name in ("token", "host", "pid", "renewed_at")}
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return {}  # none, or one that a dead writer left half-written


def _write(folder: Folder, token: str) -> None:
    lease = {"token": token, "host": socket.gethostname(), "pid": os.getpid(), "renewed_at": time.time()}
    folder.write(LEASE_FILE, json.dumps(lease).encode())


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
