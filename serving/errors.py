"""Every error of the service, beside those of `mgie/errors.py`.

    MGIEError
    ├── RequestError               the request asks for something that is not allowed
    │   ├── NotFoundError          ... for a model, result, file or job that is not there
    │   ├── MediaTypeError         ... with a body of another kind
    │   ├── BodyTooLargeError      ... with a body larger than any edit needs
    │   ├── KeyReusedError         ... with an idempotency key of another request
    │   ├── JobEndedError          ... to cancel a job that has ended
    │   ├── UnknownKeyError        ... without a valid API key
    │   └── LimitError             ... with a key that has used what it may
    ├── ContentPolicyError         the operator's check refused a picture or its instruction
    ├── SafetyCheckError           the operator's check failed
    ├── CancelledEditError         the edit was called off
    ├── JobFailedError             the job failed too often, or brought down what ran it
    ├── StageUnavailableError      a stage has no replica that answers
    ├── ModelUnavailableError      a model that is served cannot be loaded now
    ├── BoardError                 whether an edit runs in another replica cannot be told now
    ├── StoreError                 a store is in trouble, or refuses
    │   └── DamagedError           something lies in it that it did not write
    └── BundleError
        └── MixedVersionsError     the two stages serve different bundles

`api/responses.py` maps them to status codes in one table.
"""

from mgie.errors import BundleError, MGIEError

MAX_QUOTED_CHARS = 80  # of a bad value in an error message
PRIVATE_FIELDS = ("prompt", "expressive", "user")


class RequestError(MGIEError):
    """The HTTP request asks for something that is not allowed.

    Args:
        message: One sentence: the parameter, the value got, the value allowed.
        param: The parameter at fault.
        code: Machine-readable reason; None: that of the class in `api/responses.py`.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message, param=param)
        self.code = code


class NotFoundError(RequestError):
    """There is no such model, result, file or job: there never was, or not any more."""


class MediaTypeError(RequestError):
    """The body is neither multipart/form-data nor application/json."""


class BodyTooLargeError(RequestError):
    """The body is larger than any edit needs."""


class KeyReusedError(RequestError):
    """The idempotency key belongs to another request."""


class JobEndedError(RequestError):
    """The job has ended, so that it cannot be cancelled."""


class UnknownKeyError(RequestError):
    """There is no API key, or none that is valid."""


class LimitError(RequestError):
    """An API key has used what it may.

    Args:
        message, code: As for every `RequestError`.
        retry_after_s: Seconds until there is enough again.
    """

    def __init__(self, message: str, *, code: str = "rate_limited", retry_after_s: float = 1.0) -> None:
        super().__init__(message, code=code)
        self.retry_after_s = retry_after_s


def quoted_field(name: str, value: object) -> str:
    """A field's value as an error message shows it: the words of people are not, for messages end in many logs."""
    if name not in PRIVATE_FIELDS:
        return quoted(value)
    return f"text of {len(value)} characters" if isinstance(value, str) else f"of type {type(value).__name__}"


def quoted(value: object) -> str:
    """A value as an error message shows it, cut to a readable length."""
    text = repr(value)
    return text if len(text) <= MAX_QUOTED_CHARS else f"{text[:MAX_QUOTED_CHARS]}... ({len(str(value))} characters)"


class StageUnavailableError(MGIEError):
    """A stage has no replica that answers, or lost them faster than the call could be retried."""


class CancelledEditError(MGIEError):
    """The edit was called off by its id."""


class BoardError(MGIEError):
    """Whether an edit runs in another replica cannot be told now."""


class ContentPolicyError(MGIEError):
    """The operator's check refused a picture or its instruction."""


class SafetyCheckError(MGIEError):
    """The operator's check failed, or returned neither None nor a reason."""


class StoreError(MGIEError):
    """A store is in trouble, or refuses: no room, no permission, throttled beyond patience, not reachable.

    The message is for operators: it may hold paths and host names.
    """


class DamagedError(StoreError):
    """Something lies in the store that was not written by it."""


class ModelUnavailableError(MGIEError):
    """A model that is served cannot be loaded now."""


class MixedVersionsError(BundleError):
    """The two stages serve different bundles, as they do for a while during a roll-out."""


class JobFailedError(MGIEError):
    """The job failed too often through no fault of its own, or brought down what ran it."""
