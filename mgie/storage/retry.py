"""What goes wrong with stores of files, and trying again where that helps.

Knows nothing of what is stored.
"""

import errno
import time
from collections.abc import Callable
from typing import TypeVar

_PAUSES_S = (0.2, 1.0, 5.0, 25.0)

Result = TypeVar("Result")


def is_absent(error: OSError) -> bool:
    """Whether an error says that this one name cannot be read, and not that the store is in trouble."""
    if isinstance(error, (FileNotFoundError, IsADirectoryError, NotADirectoryError)):
        return True
    # For a folder Arrow raises an OSError without a number.
    return error.errno in (errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL) or "is a directory" in str(error)


def is_store_fault(error: OSError) -> bool:
    """Whether an error says that the store is in trouble, and not that the content of a file is damaged.

    Libraries report damaged content as an OSError too: one that comes neither from the system nor from S3.
    """
    return not is_absent(error) and (error.errno is not None or "AWS Error" in str(error))


def with_retries(work: Callable[[], Result]) -> Result:
    """Result of `work`, tried again where an object store is in trouble beyond the tries of its file system.

    Needed even for a single fault: the SDK writes an error's body into the buffer of the read, and gives up with
    INTERNAL_FAILURE when it does not fit, as in a read of less than about 300 bytes.

    Raises:
        OSError: The trouble lasts for half a minute, or is of another kind.
    """
    for pause_s in _PAUSES_S:
        try:
            return work()
        except OSError as error:
            if not is_store_fault(error) or "AWS Error" not in str(error) or "ACCESS_DENIED" in str(error):
                raise
            time.sleep(pause_s)
    return work()
