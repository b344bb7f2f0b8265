"""What the service writes into its logs, and what it does not: keys and the words of its users.

Replicas hand all their logs to the logger that Ray Serve gives them, whose format and files they share; `app.py` says
which that is. An exception is written with its class and place. Its own words are written only where they cannot be a
user's: a library may quote anything that it could not read. One line tells of each request.
"""

import logging
import threading
import traceback

from mgie.errors import MGIEError
from serving.errors import ContentPolicyError, RequestError, SafetyCheckError

WITHHELD = "(its words are withheld: they may be a user's)"
CLIENT_GONE = 499

# Packages whose errors quote no request, but for those named; and the classes of Python's own that say what the
# system has said.
_QUIET_PACKAGES, _QUIET_BUILTINS = {"mgie", "serving", "torch", "ray"}, (OSError, MemoryError, ImportError)
_QUOTING: tuple[type[MGIEError], ...] = (RequestError, SafetyCheckError, ContentPolicyError)
_QUOTING_OF_RAY = "RayTaskError"  # holds the words of the error that it stands for

logger = logging.getLogger("serving.telemetry.logs")


def configure_logs(target: logging.Logger, *, shows_words: bool) -> None:
    """Sends what is logged in this process to `target`, without the words of exceptions unless they are to be shown.

    Args:
        target: Propagates nothing: it gets what the root logger gets.
        shows_words: Write exceptions as they are.
    """
    assert not target.propagate
    if not shows_words:
        target.addFilter(withhold_words)
    root = logging.getLogger()
    if not any(isinstance(handler, _Forward) for handler in root.handlers):
        root.addHandler(_Forward(target))
    for package in ("mgie", "serving"):
        logging.getLogger(package).setLevel(target.getEffectiveLevel())
    threading.excepthook = _log_thread  # it would print the exception, words and all


def withhold_words(record: logging.LogRecord) -> bool:
    """A filter that passes every record, and leaves of its exceptions what may be read by anybody."""
    if record.name == "asyncio":  # the lines after the first show the task with its exception
        record.msg, record.args = record.getMessage().partition("\n")[0], ()
    if isinstance(record.args, tuple):
        record.args = tuple(_summary(arg) if isinstance(arg, BaseException) else arg for arg in record.args)
    if isinstance(record.msg, BaseException):
        record.msg = _summary(record.msg)
    if record.exc_info and record.exc_info[1] is not None:
        record.exc_text = describe_error(record.exc_info[1])  # formatters take it instead of their own
    return True


def describe_error(error: BaseException) -> str:
    """Class and place of an exception and of those that it came from, the first cause first."""
    parts: list[str] = []
    _describe(error, parts, set())
    return "\n".join(parts)


def _describe(error: BaseException, parts: list[str], seen: set[int]) -> None:
    seen.add(id(error))
    before = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    for other in (before, *getattr(error, "exceptions", ())):  # those of a group, too
        if other is not None and id(other) not in seen:
            _describe(other, parts, seen)
    parts.append("".join(traceback.format_tb(error.__traceback__)) + _summary(error))


def _summary(error: BaseException) -> str:
    kind = type(error)
    is_quiet = kind.__module__.partition(".")[0] in _QUIET_PACKAGES or (
        kind.__module__ == "builtins" and isinstance(error, _QUIET_BUILTINS)
    )
    quotes = isinstance(error, _QUOTING) or any(base.__name__ == _QUOTING_OF_RAY for base in kind.__mro__)
    return f"{kind.__qualname__}: {error if is_quiet and not quotes else WITHHELD}"


class _Forward(logging.Handler):
    """Hands records to another logger, whose filters see them."""

    def __init__(self, target: logging.Logger) -> None:
        super().__init__()
        self._target = target

    def emit(self, record: logging.LogRecord) -> None:
        self._target.handle(record)


def _log_thread(args: threading.ExceptHookArgs) -> None:
    if args.exc_value is not None:
        name = args.thread.name if args.thread else "?"
        logger.error("thread %s has ended", name, exc_info=args.exc_value)
