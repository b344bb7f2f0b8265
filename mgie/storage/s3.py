"""S3 by boto3, which nothing else imports: its client and its errors.

For what pyarrow's file systems cannot do: conditional writes and presigned addresses.
"""

from typing import Any

import boto3
import boto3.exceptions
import botocore.exceptions
from botocore.config import Config

from mgie.storage.s3_settings import s3_settings

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


def open_s3(endpoint: str | None = None, *, attempts: int | None = None) -> Any:
    """A client of the store that `s3_settings` finds.

    Args:
        attempts: Attempts of each request; None = as there.
    """
    settings = s3_settings(endpoint, attempts=attempts)
    config = Config(
        signature_version="s3v4",  # signed addresses of other versions cannot be limited in time everywhere
        retries={"mode": "standard", "total_max_attempts": settings.attempts},
        connect_timeout=settings.connect_timeout_s,
        read_timeout=settings.read_timeout_s,
        max_pool_connections=50,
    )
    return boto3.client("s3", endpoint_url=settings.endpoint, region_name=settings.region, config=config)
