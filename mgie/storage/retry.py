"""What goes wrong with stores of files, and trying again where that helps.

Knows nothing of what is stored.
"""

import errno
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

_PAUSES_S = (0.2, 1.0, 5.0, 25.0)
# How the file systems of S3, Google Cloud, Azure and the hub mark what their store said.
_STORES = ("AWS Error", "google::cloud::Status", "Azure Error", "Hub Error")
_LASTING = (
    *("ACCESS_DENIED", "INVALID_ACCESS_KEY_ID", "SIGNATURE_DOES_NOT_MATCH", "NETWORK_CONNECTION"),
    *("PERMISSION_DENIED", "UNAUTHENTICATED", "Retry policy exhausted"),
    *(
        "AuthenticationFailed",
        "AuthorizationFailure",
        "AuthorizationPermissionMismatch",
        "Fail to get a new connection",
    ),
    "Hub Error",  # its client tries again by itself
)

Result = TypeVar("Result")


def is_absent(error: OSError) -> bool:
    """Whether an error says that this one name cannot be read, and not that the store is in trouble."""
    if isinstance(error, (FileNotFoundError, IsADirectoryError, NotADirectoryError)):
        return True
    # For a folder Arrow raises an OSError without a number.
    return error.errno in (errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL) or "is a directory" in str(error)


def is_store_fault(error: OSError) -> bool:
    """Whether an error says that the store is in trouble, and not that the content of a file is damaged.

    Libraries report damaged content as an OSError too: one that comes neither from the system nor from a store.
    """
    return not is_absent(error) and (error.errno is not None or _names_one(error, _STORES))


def with_retries(work: Callable[[], Result]) -> Result:
    """Result of `work`, tried again where an object store is in trouble beyond the tries of its file system.

    Needed even for a single fault: the SDK of AWS writes an error's body into the buffer of the read, and gives up
    with INTERNAL_FAILURE when it does not fit, as in a read of less than about 300 bytes.

    Raises:
        OSError: The trouble lasts for half a minute, or is of a kind that goes on: access is refused, or nothing
            answers, which the file system itself has tried for long enough.
    """
    for pause_s in _PAUSES_S:
        try:
            return work()
        except OSError as error:
            if is_absent(error) or not _names_one(error, _STORES) or _names_one(error, _LASTING):
                raise
            time.sleep(pause_s)
    return work()


def _names_one(error: OSError, words: Sequence[str]) -> bool:
    return any(word in str(error) for word in words)
