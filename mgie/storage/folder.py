"""Folders on a local disk or in an S3 store, named by URL.

`/data/x`, `data/x`, `~/x`, `file:///data/x` and `s3://bucket/prefix` are opened by `open_folder`. Credentials and
region are found as AWS tools find them (environment, profile, instance role); the address of a store that is not
Amazon's (MinIO, Ceph, ...) is an argument or AWS_ENDPOINT_URL_S3 / AWS_ENDPOINT_URL. A `Folder` can be sent to
other processes: the address travels with it, credentials do not.

Files appear complete or not at all. Knows nothing of rows.
"""

import io
import os
import posixpath
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlparse

from pyarrow import fs as pafs

from mgie.errors import ConfigError, DataError
from mgie.storage.atomic import atomic_file
from mgie.storage.retry import with_retries

S3_ATTEMPTS = 10  # with 5 % of requests failing, one read in 10^13 fails for good
_COPY_BYTES = 8 << 20


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
    "absolute path or `s3://bucket/prefix`, without a slash at the end"
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
        endpoint: Address of the S3 store (`http://127.0.0.1:9000`); None = from the environment, else Amazon's.

    Raises:
        ConfigError: The URL has another scheme or no bucket.
    """
    text = str(url)
    parsed = urlparse(text)
    if parsed.scheme == "s3":
        path = text.removeprefix("s3://").strip("/")  # not parsed.path: "?" and "#" are letters of a key
        if not parsed.netloc:
            raise ConfigError(f"folder is {text!r}; an S3 URL is s3://bucket/prefix")
        return Folder(f"s3://{path}", _s3(endpoint), path)
    if parsed.scheme == "file":
        text = unquote(parsed.path)
    elif "://" in text:
        raise ConfigError(f"folder is {text!r}; it must be a local path or s3://bucket/prefix")
    if not text:
        raise ConfigError("folder is ''; it must be a local path or s3://bucket/prefix")
    path = str(Path(text).expanduser().absolute())
    return Folder(path, pafs.LocalFileSystem(), path)


def _s3(endpoint: str | None) -> pafs.S3FileSystem:
    endpoint = endpoint or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if endpoint and not region:
        region = "us-east-1"  # stores that are not Amazon's accept it; without one the SDK asks Amazon
    return pafs.S3FileSystem(
        endpoint_override=endpoint,
        region=region,
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=S3_ATTEMPTS),
        connect_timeout=10,
        request_timeout=60,
    )


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
