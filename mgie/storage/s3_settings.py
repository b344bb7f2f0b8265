"""Where an S3 store is and how long it is waited for: the one place for pyarrow's file systems and for boto3.

Credentials are found by either library as AWS tools find them: environment, profile, role of the instance.
"""

import os
from dataclasses import dataclass

from mgie.errors import ConfigError

ATTEMPTS = 10  # with 5 % of requests failing, one read in 10^13 fails for good


@dataclass(frozen=True, kw_only=True)
class S3Settings:
    """What both libraries are told."""

    endpoint: str | None
    "address of the store; None: Amazon's"
    region: str | None
    "None: by the profile, else asked of Amazon"
    attempts: int
    "of each request; a store that does not answer at all is given up after about a minute and a half of ten"
    connect_timeout_s: int = 5
    read_timeout_s: int = 30


def s3_settings(endpoint: str | None = None, *, attempts: int | None = None) -> S3Settings:
    """The settings of a store.

    Args:
        endpoint: Its address; None = AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL, else Amazon's.
        attempts: None = AWS_MAX_ATTEMPTS, else 10.

    Raises:
        ConfigError: AWS_MAX_ATTEMPTS is no whole number above 0.
    """
    endpoint = endpoint or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if endpoint and not region:
        region = "us-east-1"  # stores that are not Amazon's accept it; without one the SDK asks Amazon
    if attempts is None:
        given = os.environ.get("AWS_MAX_ATTEMPTS") or str(ATTEMPTS)
        if not given.isdecimal() or int(given) < 1:
            raise ConfigError(f"AWS_MAX_ATTEMPTS is {given!r}; it must be a whole number above 0")
        attempts = int(given)
    return S3Settings(endpoint=endpoint, region=region, attempts=attempts)
