"""Folders on a local disk or in an object store, named by URL.

    /data/x   data/x   ~/x   file:///data/x          a disk
    s3://bucket/prefix                               S3 (Amazon's, MinIO, Ceph, ..): see `s3_settings.py`
    gs://bucket/prefix                               Google Cloud Storage; Application Default Credentials
    az://container/prefix                            Azure; the account is AZURE_STORAGE_ACCOUNT
    abfs://container@account.dfs.core.windows.net/x  Azure; both with its default credentials
    hf://datasets/org/name/x   hf://org/name/x       the Hugging Face hub, to read from; HF_TOKEN or `hf auth login`

A `Folder` can be sent to other processes: the address travels with it, credentials do not.

Files appear complete or not at all. Knows nothing of rows.
"""

import errno
import io
import os
import posixpath
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from urllib.parse import unquote, urlparse

from pyarrow import fs as pafs

from mgie.errors import ConfigError, DataError
from mgie.storage.atomic import atomic_file
from mgie.storage.retry import with_retries
from mgie.storage.s3_settings import s3_settings

_COPY_BYTES = 8 << 20
_COPY_THREADS = 8
_GOOGLE_PATIENCE = timedelta(seconds=90)  # its own is 15 minutes


@dataclass(frozen=True)
class Entry:
    """One name in a folder."""

    name: str
    "relative to the folder that was listed"
    is_folder: bool
    num_bytes: int
    "0 for folders"


@dataclass(frozen=True)
class Folder:
    """A folder in a store; `name` arguments are relative to it (see `resolve_uri`).

    In an object store a folder is a prefix: it needs not be made, and an empty one does not exist.
    """

    url: str
    "absolute path or `scheme://bucket/prefix`, without a slash at the end"
    filesystem: pafs.FileSystem
    path: str
    "the same as the file system spells it"

    @property
    def is_local(self) -> bool:
        """Whether the files lie on this machine's disks, or on one that is mounted."""
        return bool(self.filesystem.type_name == "local")

    def at(self, name: str) -> str:
        """Path of a file, for `filesystem`. Raises DataError for a name that leads out of the folder."""
        return resolve_uri(self.path, name)

    def child(self, name: str) -> "Folder":
        """A folder in this one. Raises DataError for a name that leads out."""
        return Folder(resolve_uri(self.url, name), self.filesystem, self.at(name))

    def read(self, name: str) -> bytes:
        """A whole file.

        Raises:
            DataError: The name leads out of the folder.
            OSError: It cannot be read; `retry.is_absent` tells a fault of the name from one of the store.
        """
        path = self.at(name)

        def read() -> bytes:
            with self.filesystem.open_input_stream(path) as stream:
                return bytes(stream.read())

        return with_retries(read)

    def download(self, name: str, target: Path) -> None:
        """Copies a file of any size to a local disk, in blocks, several at a time.

        Raises:
            DataError: The name leads out of the folder.
            OSError: It cannot be read, or the disk is full.
        """
        with (
            with_retries(lambda: self.filesystem.open_input_file(self.at(name))) as source,
            target.open("wb") as file,
            ThreadPoolExecutor(_COPY_THREADS) as pool,
        ):

            def copy(start: int) -> None:
                block = with_retries(lambda: source.read_at(_COPY_BYTES, start))
                if os.pwrite(file.fileno(), block, start) != len(block):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))

            list(pool.map(copy, range(0, source.size(), _COPY_BYTES)))

    def write(self, name: str, data: bytes) -> None:
        """Writes a small file at once; others see all of it or nothing. Raises OSError."""
        path = self.at(name)
        if self.is_local:
            with atomic_file(Path(path)) as partial:
                partial.write_bytes(data)
        else:
            with_retries(lambda: self._upload(io.BytesIO(data), path))

    @contextmanager
    def publish(self, name: str) -> Iterator[Path]:
        """A local path to write to; the file gets its name when the block ends well, else it vanishes.

        For files of any size, also by libraries that want a path. Raises OSError.
        """
        target = self.at(name)
        if self.is_local:
            with atomic_file(Path(target)) as partial:
                yield partial
            return
        with tempfile.TemporaryDirectory(prefix="mgie-") as local:
            partial = Path(local) / "file"
            yield partial
            with partial.open("rb") as source:
                self._upload(source, target)

    def _upload(self, source: io.BufferedIOBase, target: str) -> None:
        """Copies to an object store, which shows an object when its upload is complete."""
        try:
            with self.filesystem.open_output_stream(target) as stream:
                shutil.copyfileobj(source, stream, _COPY_BYTES)
        except OSError:  # closing the stream published what had arrived
            if self.filesystem.get_file_info(target).type == pafs.FileType.File:
                self.filesystem.delete_file(target)
            raise

    def list(self, name: str = ".", *, is_recursive: bool = False) -> list[Entry]:
        """What the folder `name` in this one holds, sorted; nothing if there is none. Hidden names (`.x`) are left out."""
        base = self.at(name).removesuffix("/.")
        found = self.filesystem.get_file_info(pafs.FileSelector(base, recursive=is_recursive, allow_not_found=True))
        entries = [
            Entry(info.path[len(base) :].lstrip("/"), info.type == pafs.FileType.Directory, info.size or 0)
            for info in found
        ]
        return sorted(
            (entry for entry in entries if not any(part.startswith(".") for part in entry.name.split("/"))),
            key=lambda entry: entry.name,
        )

    def exists(self, name: str) -> bool:
        """Whether there is a file of this name."""
        return bool(self.filesystem.get_file_info(self.at(name)).type == pafs.FileType.File)

    def num_bytes(self, name: str) -> int | None:
        """Size of a file; None if there is none."""
        info = self.filesystem.get_file_info(self.at(name))
        return int(info.size) if info.type == pafs.FileType.File else None

    def delete(self, name: str) -> None:
        """Removes a folder and all that is in it, if it is there."""
        if self.filesystem.get_file_info(self.at(name)).type == pafs.FileType.Directory:
            self.filesystem.delete_dir(self.at(name))


def open_folder(url: str | Path, *, endpoint: str | None = None) -> Folder:
    """The folder of a URL. Nothing is contacted or made yet.

    Args:
        url: See the module.
        endpoint: Address of an S3 store (`http://127.0.0.1:9000`); None = from the environment, else Amazon's.

    Raises:
        ConfigError: The URL has another scheme, no bucket, or steps upwards.
    """
    text = str(url)
    scheme, slashes, path = text.partition(":/")  # no urlparse: "?" and "#" are letters of a key
    if scheme in _STORES and slashes:
        path = path.strip("/")
        if not text.startswith(f"{scheme}://") or not path or ".." in path.split("/"):
            raise ConfigError(f"folder is {text!r}; give {scheme}://bucket/prefix, without '..'")
        filesystem, inside = _STORES[scheme](path, endpoint)
        return Folder(f"{scheme}://{path}", filesystem, inside)
    if scheme == "file":
        text = unquote(urlparse(text).path)
    if not text or "://" in text:
        schemes = ", ".join(f"{scheme}://" for scheme in _STORES)
        raise ConfigError(f"folder is {text!r}; it must be a local path or s3://bucket/prefix (or {schemes})")
    path = str(Path(text).expanduser().absolute())
    return Folder(path, pafs.LocalFileSystem(), path)


def _s3(path: str, endpoint: str | None) -> tuple[pafs.FileSystem, str]:
    settings = s3_settings(endpoint)
    filesystem = pafs.S3FileSystem(
        endpoint_override=settings.endpoint,
        region=settings.region,
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=settings.attempts),
        connect_timeout=settings.connect_timeout_s,
        request_timeout=settings.read_timeout_s,
    )
    return filesystem, path


def _google(path: str, _endpoint: str | None) -> tuple[pafs.FileSystem, str]:
    return pafs.GcsFileSystem(retry_time_limit=_GOOGLE_PATIENCE), path


def _azure(path: str, _endpoint: str | None) -> tuple[pafs.FileSystem, str]:
    container, _, prefix = path.partition("/")
    container, _, host = container.partition("@")
    account = host.partition(".")[0] or os.environ.get("AZURE_STORAGE_ACCOUNT")
    if not account:
        raise ConfigError(f"folder is {path!r} on Azure; say whose by container@account or AZURE_STORAGE_ACCOUNT")
    return pafs.AzureFileSystem(account), f"{container}/{prefix}".rstrip("/")


def _hub(path: str, _endpoint: str | None) -> tuple[pafs.FileSystem, str]:
    from mgie.storage.hub_files import HubHandler

    return pafs.PyFileSystem(HubHandler()), path


_STORES: Mapping[str, Callable[[str, str | None], tuple[pafs.FileSystem, str]]] = {
    "s3": _s3,
    "gs": _google,
    "az": _azure,
    "abfs": _azure,
    "abfss": _azure,
    "hf": _hub,
}


def resolve_uri(root: str, uri: str) -> str:
    """A URI of a row below its root (a path or URL, as `images_root` gives it).

    Raises:
        DataError: The URI is empty, absolute, has a scheme, steps upwards or holds control characters:
            a manifest must not reach files outside its root.
    """
    is_plain = uri != "" and not uri.startswith("/") and "://" not in uri and min(uri) >= " "
    if not is_plain or ".." in uri.split("/"):
        raise DataError(f"image URI is {uri!r}; it must be a relative path without '..'")
    return f"{root.rstrip('/')}/{posixpath.normpath(uri)}"
