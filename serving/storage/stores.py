"""A store of blobs by its URL: a folder, or `s3://bucket/prefix`."""

from pathlib import Path

from mgie.errors import ConfigError
from serving.storage.blobs import Blobs, LocalBlobs


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
