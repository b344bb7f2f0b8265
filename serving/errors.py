"""Every error of the service, beside those of `mgie/errors.py`.

    MGIEError
    ├── RequestError               the request asks for something that is not allowed
    │   ├── UnknownModelError      ... a model that is not served
    │   ├── UnknownPreviousError   ... to go on from an edit of which there is no result
    │   ├── MediaTypeError         ... with a body of another kind
    │   └── BodyTooLargeError      ... with a body larger than any edit needs
    ├── UnknownKeyError            no valid API key
    ├── LimitError                 a key has used what it may
    ├── ContentPolicyError         the operator's check refused a picture or its instruction
    ├── SafetyCheckError           the operator's check failed
    ├── CancelledEditError         the edit was called off
    ├── BoardError                 whether an edit runs in another replica cannot be told now
    ├── StageUnavailableError      a stage has no replica that answers
    ├── ModelUnavailableError      a model that is served cannot be loaded now
    ├── BundleError
    │   └── MixedVersionsError     the two stages serve different bundles
    ├── StoreError                 a store is in trouble, or refuses
    │   └── DamagedError           something lies in it that it did not write
    ├── ArtifactMissingError       there is no artifact of that id
    ├── JobMissingError            there is no job of that id
    ├── JobEndedError              the job has ended, so that it cannot be cancelled
    ├── JobFailedError             the job failed too often, or brought down what ran it
    ├── KeyReusedError             an idempotency key belongs to another request
    └── BrokenAnswerError          an answer could not be sent to its end
    RuntimeError                   what only a caller in this process meets
    ├── BatcherClosedError         the batcher was closed before the item ran
    └── PoolClosedError            the pool of models was closed

`api/responses.py` maps them to status codes in one table.
"""

from typing import Literal

from mgie.errors import BundleError, MGIEError

MAX_QUOTED_CHARS = 80  # of a bad value in an error message
PRIVATE_FIELDS = ("prompt", "expressive", "user")


class RequestError(MGIEError):
    """The HTTP request asks for something that is not allowed (400).

    Args:
        message: One sentence: the parameter, the value got, the value allowed.
        param: The parameter at fault.
        code: Machine-readable reason.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str = "invalid_value") -> None:
        super().__init__(message, param=param)
        self.code = code


class UnknownModelError(RequestError):
    """The model asked for is not served (404)."""


class UnknownPreviousError(RequestError):
    """There is no result of the edit that this one is to go on from (404)."""


class MediaTypeError(RequestError):
    """The body is neither multipart/form-data nor application/json (415)."""


class BodyTooLargeError(RequestError):
    """The body is larger than any edit needs (413)."""


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


class ArtifactMissingError(MGIEError):
    """There is no artifact of the id given: never was, or not any more."""


class DamagedError(StoreError):
    """Something lies in the store that was not written by it."""


class ModelUnavailableError(MGIEError):
    """A model that is served cannot be loaded now."""


class PoolClosedError(RuntimeError):
    """The pool was closed."""


class MixedVersionsError(BundleError):
    """The two stages serve different bundles, as they do for a while during a roll-out."""


class UnknownKeyError(MGIEError):
    """A request has no key that is valid (401).

    Args:
        message: As for every error.
        code: What is wrong with it.
    """

    def __init__(self, message: str, *, code: Literal["missing_api_key", "invalid_api_key"]) -> None:
        super().__init__(message)
        self.code = code


class LimitError(MGIEError):
    """A key has used what it may (429).

    Args:
        message: As for every error.
        code: Which limit.
        retry_after_s: Seconds until there is enough again.
    """

    def __init__(
        self,
        message: str,
        *,
        code: Literal["rate_limited", "cost_limited", "too_many_concurrent"],
        retry_after_s: float,
    ) -> None:
        super().__init__(message)
        self.code, self.retry_after_s = code, retry_after_s


class JobMissingError(MGIEError):
    """There is no job of the id given: never was, or not any more."""


class JobEndedError(MGIEError):
    """The job has ended, so that it cannot be cancelled."""


class JobFailedError(MGIEError):
    """The job failed too often through no fault of its own, or brought down what ran it."""


class KeyReusedError(MGIEError):
    """The idempotency key belongs to another request."""


class BrokenAnswerError(MGIEError):
    """An answer could not be sent to its end."""


class BatcherClosedError(RuntimeError):
    """The batcher was closed before the item ran."""
