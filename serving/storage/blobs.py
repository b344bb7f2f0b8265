"""Bytes under keys, in a local folder or in S3: written whole or not at all, and on a condition where several may write.

Any number of processes may have the same store open. Keys look like `folder/name`; they are made by this package,
never taken from a user. Methods block, some for seconds, and are safe to call from any thread. Knows nothing of what
is stored.
"""

import fcntl
import hashlib
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from serving.errors import StoreError

LEFTOVER_S = 3600.0  # no write takes this long


@dataclass(frozen=True)
class Blob:
    """What lies under a key."""

    data: bytes
    version: str
    "differs between any two contents"


@dataclass(frozen=True)
class Entry:
    """One key of a listing."""

    key: str
    modified_s: float
    "Unix time of the last write, by the store's clock"


class Blobs(Protocol):
    """A store. Every method raises StoreError."""

    def read(self, key: str) -> Blob | None:
        """The newest content; None if there is none."""
        ...

    def write(self, key: str, data: bytes, *, content_type: str, expires_s: float, is_durable: bool = False) -> None:
        """Puts or replaces a content.

        Args:
            expires_s: Unix time after which no cache may keep it; nothing is deleted then.
            is_durable: Return when it would survive a power cut, for which a local disk takes some ten milliseconds.
                Otherwise one may leave it absent, empty or in part. In S3 all is durable.
        """
        ...

    def write_if(self, key: str, data: bytes, *, version: str | None) -> str | None:
        """Replaces the content of a version, or with None puts one where there is none; durable.

        Args:
            data: Must differ from all that anybody else may write there, so that a write whose answer was lost
                can be told from another's.

        Returns:
            The new version; None if the content is not of the version expected, and stays.
        """
        ...

    def delete(self, key: str, *, version: str | None = None) -> None:
        """Removes the content, if it is there and, where a version is given, of that version."""
        ...

    def list(self, prefix: str, *, after: str = "") -> Iterator[Entry]:
        """The keys that begin with `folder/start` and come behind `after`, sorted."""
        ...

    def url(self, key: str, *, valid_s: float) -> str | None:
        """An address at which anybody may read the content for a while; None if the store has no such thing."""
        ...


@contextmanager
def _told(action: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        raise StoreError(f"{action}: {error}") from error


# ---- a folder


class LocalBlobs:
    """A folder, on this machine or mounted by several; see `Blobs`.

    Contents are written to `tmp/`, then moved into place. Conditions are checked under a lock
    that the kernel frees when its holder dies.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tmp = folder / "tmp"
        with _told(f"store {folder} cannot be opened"):
            self._tmp.mkdir(parents=True, exist_ok=True)
            for path in self._tmp.iterdir():  # of processes that were killed while they wrote
                with suppress(FileNotFoundError):  # moved into place since
                    if path.stat().st_mtime < time.time() - LEFTOVER_S:
                        path.unlink()

    def read(self, key: str) -> Blob | None:
        """See `Blobs`."""
        with _told(f"store {self._folder} cannot be read"):
            try:
                data = (self._folder / key).read_bytes()
            except FileNotFoundError:
                return None
        return Blob(data, _version(data))

    def write(
        self,
        key: str,
        data: bytes,
        *,
        content_type: str,  # noqa: ARG002  # the Protocol's
        expires_s: float,  # noqa: ARG002
        is_durable: bool = False,
    ) -> None:
        """See `Blobs`."""
        with (
            _told(f"store {self._folder} cannot be written to"),
            self._prepared(data, is_durable=is_durable) as prepared,
        ):
            self._publish(prepared, key, is_durable=is_durable)

    def write_if(self, key: str, data: bytes, *, version: str | None) -> str | None:
        """See `Blobs`."""
        with (
            _told(f"store {self._folder} cannot be written to"),
            self._prepared(data, is_durable=True) as prepared,
            self._locked(),
        ):
            if not self._is_at(key, version):
                return None
            self._publish(prepared, key, is_durable=True)
        return _version(data)

    def delete(self, key: str, *, version: str | None = None) -> None:
        """See `Blobs`."""
        with _told(f"store {self._folder} cannot be written to"), self._locked():
            if version is None or self._is_at(key, version):
                (self._folder / key).unlink(missing_ok=True)

    def list(self, prefix: str, *, after: str = "") -> Iterator[Entry]:
        """See `Blobs`."""
        folder, _, start = prefix.rpartition("/")
        with _told(f"store {self._folder} cannot be listed"):
            try:
                names = sorted(name for name in os.listdir(self._folder / folder) if name.startswith(start))  # noqa: PTH208  # a Path per name is slow
            except FileNotFoundError:
                names = []
            for key in (f"{folder}/{name}" for name in names):
                if key > after:
                    try:
                        entry = Entry(key, (self._folder / key).stat().st_mtime)
                    except FileNotFoundError:  # deleted since
                        continue
                    yield entry

    def url(self, key: str, *, valid_s: float) -> None:
        """None: a folder has no addresses."""

    def _is_at(self, key: str, version: str | None) -> bool:
        blob = self.read(key)
        return (blob and blob.version) == version

    @contextmanager
    def _prepared(self, data: bytes, *, is_durable: bool) -> Iterator[Path]:
        """A file with this content that vanishes unless it is moved."""
        handle, name = tempfile.mkstemp(dir=self._tmp)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            if is_durable:
                _sync(Path(name))
            yield Path(name)
        finally:
            Path(name).unlink(missing_ok=True)

    def _publish(self, prepared: Path, key: str, *, is_durable: bool) -> None:
        target = self._folder / key
        target.parent.mkdir(exist_ok=True)
        prepared.replace(target)
        if is_durable:
            _sync(target.parent)  # else a power cut may take the move back

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with (self._folder / "lock").open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # of this opening of the file: it holds off other threads too
            yield


def _sync(path: Path) -> None:
    """Returns when the content of a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _version(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
