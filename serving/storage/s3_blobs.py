"""`Blobs` in an S3 store: conditional writes and signed addresses by boto3."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from mgie.storage.s3 import BODY_ERRORS, S3_ERRORS, ClientError, open_s3
from serving.errors import StoreError
from serving.storage.blobs import Blob, Entry

# With 5 % of requests failing, one in 10^8 fails for good; a store that is gone is given up in half a minute.
S3_ATTEMPTS = 6
CONFLICT_PAUSE_S = 0.2
MAX_URL_S = 7 * 86_400  # the longest that S3 signs for

_CONDITION_ERRORS = (404, 409, 412)  # gone, collided with another conditional write, not as expected


class S3Blobs:
    """A prefix of a bucket; see `Blobs`.

    Needs GetObject, PutObject, DeleteObject and ListBucket (without the last, S3 answers "forbidden" for "absent"),
    and a store that honours If-Match and If-None-Match on writes: Amazon's, recent MinIO and Ceph.
    Where it ignores If-Match on deletes, `delete` with a version may take a content written in the same moment.
    """

    def __init__(self, bucket: str, prefix: str, *, endpoint: str | None) -> None:
        self._url = f"s3://{bucket}/{prefix}"
        self._bucket, self._prefix = bucket, f"{prefix}/" if prefix else ""
        with _told(f"store {self._url} cannot be opened"):
            self._client = open_s3(endpoint, attempts=S3_ATTEMPTS)

    def read(self, key: str) -> Blob | None:
        """See `Blobs`."""
        attempt = 1
        with _told(f"store {self._url} cannot be read"):
            while True:
                try:
                    answer = self._client.get_object(**self._at(key))
                    return Blob(answer["Body"].read(), answer["ETag"])
                except self._client.exceptions.NoSuchKey:
                    return None
                except BODY_ERRORS:
                    # The SDK's own patience ends where the body begins.
                    attempt += 1
                    if attempt > S3_ATTEMPTS:
                        raise

    def write(
        self,
        key: str,
        data: bytes,
        *,
        content_type: str,
        expires_s: float,
        is_durable: bool = False,  # noqa: ARG002  # everything is
    ) -> None:
        """See `Blobs`."""
        with _told(f"store {self._url} cannot be written to"):
            self._client.put_object(
                **self._at(key), Body=data, ContentType=content_type, Expires=datetime.fromtimestamp(expires_s, UTC)
            )

    def write_if(self, key: str, data: bytes, *, version: str | None) -> str | None:
        """See `Blobs`."""
        condition = {"IfNoneMatch": "*"} if version is None else {"IfMatch": version}
        for _ in range(S3_ATTEMPTS):
            with _told(f"store {self._url} cannot be written to"):
                try:
                    return str(self._client.put_object(**self._at(key), Body=data, **condition)["ETag"])
                except ClientError as error:
                    if _status(error) not in _CONDITION_ERRORS:
                        raise
            found = self.read(key)
            if found is not None and found.data == data:
                return found.version  # an earlier try of the SDK's did it, and its answer was lost
            if (found and found.version) != version:
                return None
            time.sleep(CONFLICT_PAUSE_S)  # it met another conditional write: both may have been refused
        raise StoreError(f"store {self._url} refused a write {S3_ATTEMPTS} times though nothing had changed")

    def delete(self, key: str, *, version: str | None = None) -> None:
        """See `Blobs`."""
        condition = {} if version is None else {"IfMatch": version}
        with _told(f"store {self._url} cannot be written to"):
            try:
                self._client.delete_object(**self._at(key), **condition)
            except ClientError as error:
                if version is None or _status(error) not in _CONDITION_ERRORS:
                    raise

    def list(self, prefix: str, *, after: str = "") -> Iterator[Entry]:
        """See `Blobs`."""
        pages = self._client.get_paginator("list_objects_v2").paginate(
            Bucket=self._bucket, Prefix=self._prefix + prefix, StartAfter=self._prefix + after
        )
        with _told(f"store {self._url} cannot be listed"):
            for page in pages:
                for found in page.get("Contents", ()):
                    yield Entry(found["Key"].removeprefix(self._prefix), found["LastModified"].timestamp())

    def url(self, key: str, *, valid_s: float) -> str:
        """See `Blobs`. Signed with temporary credentials it ends with them."""
        with _told(f"store {self._url} cannot sign"):
            return str(
                self._client.generate_presigned_url(
                    "get_object", Params=self._at(key), ExpiresIn=int(min(valid_s, MAX_URL_S))
                )
            )

    def _at(self, key: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": self._prefix + key}


def _status(error: ClientError) -> Any:
    """HTTP status; "NoSuchBucket" for its 404, which says nothing of a key."""
    is_bucket_gone = error.response["Error"]["Code"] == "NoSuchBucket"
    return "NoSuchBucket" if is_bucket_gone else error.response["ResponseMetadata"]["HTTPStatusCode"]


@contextmanager
def _told(action: str) -> Iterator[None]:
    try:
        yield
    except S3_ERRORS as error:
        raise StoreError(f"{action}: {error}") from error
