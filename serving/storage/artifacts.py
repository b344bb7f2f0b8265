"""What outlives a request: images with the record of how they came about, and small documents such as job states.

One store per service, shared by all replicas, so that any of them can answer for any result:

    artifacts/<id>.image     the encoded image, written first
    artifacts/<id>.json      its record, whose appearance makes the artifact exist
    documents/<kind>.<name>  a document, replaced only by those who know its present version

Everything expires: what has is absent at once, and deleted by a sweep. Methods block (call them on threads) and raise
`StoreError` when the store is in trouble. Knows nothing of HTTP but the path that artifacts are served under.
"""

import logging
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from math import ceil
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from mgie.errors import ConfigError
from serving.errors import DamagedError, NotFoundError
from serving.storage.blobs import Blob, Blobs, LocalBlobs

logger = logging.getLogger("serving.storage.artifacts")

MIN_TTL_S = 60.0  # what expires while it is being written helps nobody
ARTIFACT_PATH = "/v1/images/files"

# Hexadecimal, because some file systems do not tell "a" from "A": 32 bits of expiry time, 128 of chance.
_ID = re.compile(r"[0-9a-f]{40}")
_KIND = re.compile(r"[a-z]{1,32}")
_NAME = re.compile(r"[a-z0-9_-]{1,128}")


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, hide_input_in_errors=True)


class EditFacts(_Record):
    """How a result came about."""

    seed: int
    settings: dict[str, JsonValue] = Field(description="Fields of EditSettings, the bundle's defaults filled in.")
    expressive: str = Field(description="The expressive instruction that guided the edit.")
    bundle: str = Field(description="Identity of the bundle.")


class Artifact(_Record):
    """The record of a stored image."""

    id: str = Field(description="Opens the artifact to whoever knows it.")
    created_s: float = Field(description="Unix time.")
    expires_s: int = Field(description="Unix time from which it is absent.")
    content_type: str = Field(pattern=r"^image/(png|jpeg|webp|heic)$")
    num_bytes: int
    width: int
    height: int
    edit: EditFacts | None = Field(description="None: a photo that was sent, not a result.")


@dataclass(frozen=True, kw_only=True)
class Document:
    """A small JSON object at one moment."""

    kind: str
    name: str
    content: Mapping[str, Any]
    version: str
    "differs between any two writes"


class _Envelope(_Record):
    """A document as it is stored."""

    expires_s: float
    write: str = Field(description="Random: two writes of the same content still differ.")
    content: dict[str, JsonValue]


def open_blobs(url: str, *, endpoint: str | None = None) -> Blobs:
    """The store of a URL: a local folder, which is made, or `s3://bucket/prefix`, which is not contacted yet.

    Args:
        url: See above. Credentials and region are found as boto3 finds them.
        endpoint: Address of an S3 store that is not Amazon's; None = from the environment (AWS_ENDPOINT_URL).

    Raises:
        ConfigError: The URL has another scheme or no bucket.
        StoreError: The folder cannot be made or written to.
    """
    if url.startswith("s3://"):
        bucket, _, prefix = url.removeprefix("s3://").rstrip("/").partition("/")
        if not bucket:
            raise ConfigError(f"store is {url!r}; an S3 URL is s3://bucket/prefix")
        from serving.storage.s3_blobs import S3Blobs  # here, because a folder does without boto3

        return S3Blobs(bucket, prefix, endpoint=endpoint)
    if not url or "://" in url:
        raise ConfigError(f"store is {url!r}; it must be a local folder or s3://bucket/prefix")
    return LocalBlobs(Path(url).expanduser().absolute())


class ArtifactStore:
    """Images and documents; see the module. Open one with `open`.

    Args:
        blobs: Where they lie.
        ttl_s: How long an image is kept from its writing, and a document from its last; at least 60.
        clock: Unix time. Those of the replicas should agree to a few seconds.

    Raises:
        ConfigError: `ttl_s` is too short.
    """

    def __init__(self, blobs: Blobs, *, ttl_s: float, clock: Callable[[], float] = time.time) -> None:
        if not ttl_s >= MIN_TTL_S:
            raise ConfigError(f"ttl_s is {ttl_s:g}; it must be at least {MIN_TTL_S:g}", param="ttl_s")
        self._blobs, self._ttl_s, self.now_s = blobs, ttl_s, clock
        self._swept_to = ""

    @classmethod
    def open(
        cls, url: str, *, ttl_s: float, endpoint: str | None = None, clock: Callable[[], float] = time.time
    ) -> "ArtifactStore":
        """The store in a local folder, which is made, or at `s3://bucket/prefix`; arguments as those of the class.

        In S3 set a lifecycle rule as well, for when no service is left to sweep: expiration of all below the prefix
        after `ttl_s` in whole days plus one; in a bucket with versions, also of the noncurrent ones.

        Raises:
            ConfigError: The URL is neither, or `ttl_s` is too short.
            StoreError: The folder cannot be made.
        """
        return cls(open_blobs(url, endpoint=endpoint), ttl_s=ttl_s, clock=clock)

    def check(self) -> None:
        """Tries all that the service will need.

        Raises:
            StoreError: Something is not permitted or not reachable.
            ConfigError: The store ignores the conditions of writes, so that documents would not be safe.
        """
        name = secrets.token_hex(16)
        old = self.create("check", name, {})
        new = old and self.replace(old, {})
        if new is None or self.create("check", name, {}) or (old and self.replace(old, {})):
            raise ConfigError("the store ignores If-None-Match or If-Match on writes; use one that honours them")
        self.remove(new)
        if self.find("check", name) is not None or name in self.names("check"):
            raise ConfigError("the store shows what was deleted; use one that is consistent")

    # ---- images

    def new_id(self) -> str:
        """An id that nobody can guess, for an artifact or a document; it begins with the time of its expiry."""
        return f"{ceil(self.now_s() + self._ttl_s):08x}{secrets.token_hex(16)}"

    def put(
        self,
        data: bytes,
        *,
        content_type: str,
        width: int,
        height: int,
        edit: EditFacts | None = None,
        is_durable: bool = False,
    ) -> Artifact:
        """Stores an encoded image; others see all of it or nothing.

        Args:
            is_durable: Return when it would survive a power cut, as a job's photo and result should; takes some 30
                milliseconds on a local disk. (A document always does.)
        """
        artifact_id = self.new_id()
        artifact = Artifact(
            id=artifact_id,
            created_s=self.now_s(),
            expires_s=_expiry_s(artifact_id),
            content_type=content_type,
            num_bytes=len(data),
            width=width,
            height=height,
            edit=edit,
        )
        files = (("image", data, content_type), ("json", artifact.model_dump_json().encode(), "application/json"))
        for suffix, content, kind in files:
            key = f"artifacts/{artifact_id}.{suffix}"
            self._blobs.write(key, content, content_type=kind, expires_s=artifact.expires_s, is_durable=is_durable)
        return artifact

    def get(self, artifact_id: str) -> Artifact:
        """The record of an image.

        Raises:
            NotFoundError: There is none (any more), or the id is none.
        """
        self.expiry_s(artifact_id)
        blob = self._blobs.read(f"artifacts/{artifact_id}.json")
        if blob is None:
            raise self._missing()
        try:
            artifact = Artifact.model_validate_json(blob.data)
        except ValidationError as error:
            raise DamagedError(f"the record of an artifact is damaged: {error}") from error
        if artifact.id != artifact_id:
            raise DamagedError("the record of an artifact is that of another")
        return artifact

    def read(self, artifact_id: str) -> tuple[Artifact, bytes]:
        """An image and its record.

        Raises:
            NotFoundError: There is none (any more), or the id is none.
        """
        artifact = self.get(artifact_id)
        blob = self._blobs.read(f"artifacts/{artifact_id}.image")
        if blob is None:
            raise self._missing()
        if len(blob.data) != artifact.num_bytes:
            raise DamagedError(f"the image of an artifact has {len(blob.data)} bytes, not {artifact.num_bytes}")
        return artifact, blob.data

    def url(self, artifact_id: str, base_url: str) -> str:
        """An address of the image that works until it expires (in S3 for seven days at most).

        Args:
            base_url: Address of this service, as clients reach it; an S3 store's addresses lead to the store itself.

        Raises:
            NotFoundError: The id has expired, or is none; whether the image exists is not looked up.
        """
        left_s = self.expiry_s(artifact_id) - self.now_s()
        signed = self._blobs.url(f"artifacts/{artifact_id}.image", valid_s=max(1.0, left_s))
        return signed or f"{base_url.rstrip('/')}{ARTIFACT_PATH}/{artifact_id}"

    def delete(self, artifact_id: str) -> None:
        """Removes an image, if it is there.

        Raises:
            NotFoundError: The id has expired, or is none.
        """
        self.expiry_s(artifact_id)
        self._blobs.delete(f"artifacts/{artifact_id}.json")
        self._blobs.delete(f"artifacts/{artifact_id}.image")

    # ---- documents

    def create(self, kind: str, name: str, content: Mapping[str, Any]) -> Document | None:
        """Writes a document that is not there yet; of several who try, one succeeds.

        Args:
            kind: Lower-case letters, up to 32.
            name: Unique among its kind: lower-case letters, digits, `_` and `-`, up to 128.
            content: A JSON object.

        Returns:
            The document; None if there is one already.

        Raises:
            ConfigError: The kind or the name is not allowed.
        """
        made = self._write(kind, name, content, version=None)
        if made is None:
            found = self._blobs.read(_document_key(kind, name))
            # One that has expired is absent, though it was not swept yet.
            if found is None or _envelope(found).expires_s <= self.now_s():
                made = self._write(kind, name, content, version=found.version if found else None)
        return made

    def find(self, kind: str, name: str) -> Document | None:
        """The document as it is now; None if there is none. Raises ConfigError as `create` does."""
        blob = self._blobs.read(_document_key(kind, name))
        if blob is None:
            return None
        envelope = _envelope(blob)
        if envelope.expires_s <= self.now_s():
            return None
        return Document(kind=kind, name=name, content=envelope.content, version=blob.version)

    def replace(self, document: Document, content: Mapping[str, Any]) -> Document | None:
        """Writes a new content, if nobody has since `document` was read; its time begins anew.

        Returns:
            The document as it is now; None if it was changed or deleted meanwhile. Also None in the rare case that this
            write succeeded, its answer was lost, and another has replaced it already.
        """
        return self._write(document.kind, document.name, content, version=document.version)

    def remove(self, document: Document) -> None:
        """Deletes the document, unless it was changed since."""
        self._blobs.delete(_document_key(document.kind, document.name), version=document.version)

    def names(self, kind: str) -> Iterator[str]:
        """Names of the documents of a kind, sorted; some may have expired. Raises ConfigError as `create` does."""
        prefix = _document_key(kind, "x").removesuffix("x")
        return (entry.key.removeprefix(prefix) for entry in self._blobs.list(prefix))

    def _write(self, kind: str, name: str, content: Mapping[str, Any], *, version: str | None) -> Document | None:
        envelope = _Envelope(expires_s=self.now_s() + self._ttl_s, write=secrets.token_hex(8), content=dict(content))
        data = envelope.model_dump_json().encode()
        written = self._blobs.write_if(_document_key(kind, name), data, version=version)
        if written is None:
            return None
        return Document(kind=kind, name=name, content=envelope.content, version=written)

    # ---- expiry

    def sweep(self, limit: int = 1000) -> int:
        """Deletes what has expired; to be called now and then, by any number of replicas.

        Args:
            limit: Most files to delete, and most documents to look at; the next call goes on behind them.

        Returns:
            Number of files deleted.
        """
        num_deleted = 0
        for entry in islice(self._blobs.list("artifacts/"), limit):
            artifact_id = entry.key.removeprefix("artifacts/").partition(".")[0]
            if _ID.fullmatch(artifact_id) is None:
                continue  # not ours: network file systems and desktops leave files of their own
            # Sorted by expiry, as ids begin with it. An image whose record was never written goes with the others.
            if _expiry_s(artifact_id) > self.now_s():
                break
            self._blobs.delete(entry.key)
            num_deleted += 1
        documents = list(islice(self._blobs.list("documents/", after=self._swept_to), limit))
        self._swept_to = documents[-1].key if len(documents) == limit else ""
        for entry in documents:
            if entry.modified_s + self._ttl_s > self.now_s():
                continue  # spares the reading
            blob = self._blobs.read(entry.key)
            try:
                is_expired = blob is not None and _envelope(blob).expires_s <= self.now_s()
            except DamagedError as error:
                logger.warning("left in the store: %s", error)
                continue
            if blob is not None and is_expired:
                self._blobs.delete(entry.key, version=blob.version)  # not one that was made in its place just now
                num_deleted += 1
        return num_deleted

    def expiry_s(self, artifact_id: str) -> int:
        """Expiry of an id, Unix time.

        Raises:
            NotFoundError: It has passed, or the id is none.
        """
        if _ID.fullmatch(artifact_id) is None or _expiry_s(artifact_id) <= self.now_s():
            raise self._missing()
        return _expiry_s(artifact_id)

    def _missing(self) -> NotFoundError:
        # Without the id: who reads it in a log could open the artifact.
        return NotFoundError(f"there is no such artifact, or not any more: they are kept for {self._ttl_s:g} s")


def _expiry_s(artifact_id: str) -> int:
    return int(artifact_id[:8], 16)


def _document_key(kind: str, name: str) -> str:
    if _KIND.fullmatch(kind) is None:
        raise ConfigError(f"kind of a document is {kind!r}; it must match {_KIND.pattern}")
    if _NAME.fullmatch(name) is None:
        raise ConfigError(f"name of a document is {name!r}; it must match {_NAME.pattern}")
    return f"documents/{kind}.{name}"


def _envelope(blob: Blob) -> _Envelope:
    try:
        return _Envelope.model_validate_json(blob.data)
    except ValidationError as error:
        raise DamagedError(f"a document is damaged: {error}") from error
