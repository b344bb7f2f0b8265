"""S3 by boto3, which nothing else imports: its client, its errors, its URLs.

For what pyarrow's file systems cannot do: conditional writes, presigned addresses, downloads straight to a file.
"""

from typing import Any

import boto3
import boto3.exceptions
import botocore.exceptions
from botocore.config import Config

from mgie.errors import BundleError

ClientError = botocore.exceptions.ClientError  # the store answered, and refused
# The body of an answer broke off; the SDK tries again by itself only before it begins.
BODY_ERRORS = (
    botocore.exceptions.IncompleteReadError,
    botocore.exceptions.ReadTimeoutError,
    botocore.exceptions.ResponseStreamingError,
)
# What boto3 raises when a store or a name in it cannot be read.
S3_ERRORS = (
    botocore.exceptions.ClientError,
    botocore.exceptions.BotoCoreError,
    boto3.exceptions.Boto3Error,
    ValueError,  # an endpoint that is no URL
    OSError,
)


def open_s3(endpoint: str | None = None, **settings: Any) -> Any:
    """A client of S3; credentials, region and, without `endpoint`, the store's address as AWS tools find them.

    Args:
        settings: Of `botocore.config.Config`.
    """
    return boto3.client("s3", endpoint_url=endpoint, config=Config(**settings))


def split_s3_url(url: str) -> tuple[str, str]:
    """Bucket and prefix, without slashes at its ends.

    Raises:
        BundleError: It holds `..`.
    """
    bucket, _, prefix = url.removeprefix("s3://").strip("/").partition("/")
    if ".." in (bucket, *prefix.split("/")):
        raise BundleError(f"{url!r} holds '..'; give s3://bucket/prefix")
    return bucket, prefix
