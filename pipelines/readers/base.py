"""What a reader is: shards of a raw data set, and the edits in each.

A reader is a plain class. `shards` divides the data set by its content alone, never by the machine, so that rows
come in one order whatever runs in parallel; `read` streams one shard in bounded memory. What one bad row holds is
one `BadRow`, never an exception: an exception says that the data set as a whole is not in this layout, or that
the store is in trouble. Knows nothing of Ray, of decoding images or of ids.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from mgie.data.ledger import Direction, RejectionCode
from mgie.errors import DataError
from mgie.storage.folder import Folder
from mgie.storage.retry import is_absent

ROWS_PER_SHARD = 1000

ImageRef = bytes | str
"Encoded image, or the name of a file in the data set's folder."


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A part of a data set. JSON values: it is sent to workers, and hashed to tell data sets apart."""

    file: str
    "container file, or what to call the shard"
    start: int = 0
    stop: int = 0
    "range in the container, in the reader's own unit"
    split: str = "train"
    items: Sequence[Any] = ()
    "what to read, where that is not a range"
    num_bytes: int = 0
    "size of the container, where known"


@dataclass(frozen=True, kw_only=True)
class RawEdit:
    """One edit as the data set has it, unchecked."""

    split: str
    source: ImageRef
    goal: ImageRef
    mask: ImageRef | None = None
    instruction: str
    source_caption: str | None = None
    goal_caption: str | None = None
    turn: int | None = None
    session: str | None = None
    direction: Direction = "forward"
    provenance: Mapping[str, Any] = field(default_factory=dict)
    "where it comes from, and what else the data set says of it: JSON values"


@dataclass(frozen=True, kw_only=True)
class BadRow:
    """What could not even be read as an edit."""

    split: str
    code: RejectionCode
    message: str
    provenance: Mapping[str, Any] = field(default_factory=dict)


class Reader(Protocol):
    """One layout of data sets."""

    def extracts(self, folder: Folder) -> bool:
        """Whether images come as bytes out of containers, to be written once as files of their own."""
        ...

    def shards(self, folder: Folder) -> list[Shard]:
        """The parts, in order.

        Raises:
            DataError: The folder is not in this layout.
        """
        ...

    def read(self, folder: Folder, shard: Shard) -> Iterator[RawEdit | BadRow]:
        """The rows of a part, in order, streamed."""
        ...


def guarded(
    make: Callable[[], Iterable[RawEdit]], *, split: str, provenance: Mapping[str, Any]
) -> Iterator[RawEdit | BadRow]:
    """The edits of one record; the DataError that ends them becomes a bad row."""
    try:
        yield from make()
    except DataError as error:
        yield BadRow(split=split, code="bad_row", message=str(error), provenance=provenance)


# ---- fields of records that others wrote


def text(record: Mapping[str, Any], key: str) -> str:
    """A field that must be text. Raises DataError."""
    value = record.get(key)
    if not isinstance(value, str):
        raise DataError(f"field {key!r} is {_shown(value)}; it must be text")
    return value


def text_or_none(record: Mapping[str, Any], key: str) -> str | None:
    """A field that may be absent, null or empty. Raises DataError for anything else than text."""
    return (text(record, key).strip() or None) if record.get(key) is not None else None


def texts(record: Mapping[str, Any], key: str) -> list[str]:
    """A field that is a list of texts; absent or null = empty. Raises DataError."""
    value = record.get(key)
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise DataError(f"field {key!r} is {_shown(value)}; it must be a list of texts")
    return value


def whole_or_none(record: Mapping[str, Any], key: str) -> int | None:
    """A field that is a whole number, also as text; absent or null = None. Raises DataError."""
    value = record.get(key)
    try:
        number = None if value is None else int(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(f"field {key!r} is {_shown(value)}; it must be a whole number") from error
    if number is not None and not -(2**31) <= number < 2**31:
        raise DataError(f"field {key!r} is {number}; it must fit 32 bits")
    return number


def image_cell(record: Mapping[str, Any], key: str) -> ImageRef | None:
    """An image in a table: bytes, a file name, or Hugging Face's {bytes, path}; null = None. Raises DataError."""
    value = record.get(key)
    if isinstance(value, Mapping):
        value = value.get("bytes") if value.get("bytes") is not None else value.get("path")
    if value is None or isinstance(value, (bytes, str)):
        return value
    raise DataError(f"field {key!r} is {_shown(value)}; it must be an image as bytes, a path or {{bytes, path}}")


def image(record: Mapping[str, Any], key: str) -> ImageRef:
    """An image that must be there. Raises DataError."""
    found = image_cell(record, key)
    if found is None:
        raise DataError(f"field {key!r} holds no image")
    return found


def kept(record: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    """The fields that go to the provenance: those that are there and hold plain values."""
    found = {key: record[key] for key in keys if isinstance(record.get(key), (str, int, float, list, dict))}
    return {key: value for key, value in found.items() if not (isinstance(value, float) and not math.isfinite(value))}


def _shown(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


# ---- files of a data set


def read_json(folder: Folder, name: str) -> Any:
    """The content of a JSON file.

    Raises:
        DataError: It is not there or is no JSON.
    """
    try:
        return json.loads(folder.read(name))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name} is not JSON: {error}") from error
    except OSError as error:
        if not is_absent(error):
            raise
        raise DataError(f"{name} is missing in {folder.url}") from error


def read_records(folder: Folder, name: str) -> list[Any]:
    """The content of a JSON file that is a list.

    Raises:
        DataError: It is not there or is no such file.
    """
    records = read_json(folder, name)
    if not isinstance(records, list):
        raise DataError(f"{name} is not a list of records")
    return records


def as_record(value: object) -> Mapping[str, Any]:
    """A JSON object. Raises DataError."""
    if not isinstance(value, Mapping):
        raise DataError(f"record is {_shown(value)}; it must be an object")
    return value


def ranges(num_rows: int, rows_per_shard: int = ROWS_PER_SHARD) -> list[tuple[int, int]]:
    """`num_rows` rows in consecutive ranges (start, stop) of `rows_per_shard`."""
    return [(start, min(start + rows_per_shard, num_rows)) for start in range(0, num_rows, rows_per_shard)]


def split_name(name: str) -> str:
    """`train`, `val` or `test` for what data sets call them; anything else is training data."""
    return {"validation": "val", "valid": "val", "val": "val", "dev": "val", "test": "test"}.get(name.lower(), "train")
