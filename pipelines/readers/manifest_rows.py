"""A raw edit -> a row: read its images, check them, give it its id, extract what lies in containers.

Every edit gives one row; a bad one carries the reason. Knows nothing of Ray or of layouts.
"""

import hashlib
import json
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from mgie.config import ImageLimits
from mgie.data.ledger import REJECTED_SCHEMA, RejectionCode, rejection, row_id
from mgie.errors import DataError, ImageError
from mgie.images.files import detect_format, read_image
from mgie.storage.folder import Folder
from mgie.storage.retry import is_absent
from pipelines.readers import BadRow, ImageRef, RawEdit
from pipelines.readers.duplicates import PAIR_BYTES, instruction_key, signature

IMAGES_FOLDER = "images"
_EXTENSIONS = {"PNG": "png", "JPEG": "jpg", "WebP": "webp", "HEIC": "heic"}

STAGED_SCHEMA = pa.schema(
    [
        *(field.with_nullable(True) for field in REJECTED_SCHEMA),
        pa.field("instruction_key", pa.int64()),
        pa.field("signatures", pa.binary(PAIR_BYTES)),
    ]
)
"A checked row before duplicates are known: `reason` is null, or the row is rejected and the last two are."

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class RowMaker:
    """Makes rows of the edits of one data set."""

    folder: Folder
    "the raw data set"
    extract_to: Folder | None
    "where images out of containers are written, as `images/<sha256>.<ext>`; None = all images are files of `folder`"
    dataset: str
    licence: str | None
    limits: ImageLimits
    keeps_unchanged: bool = False
    "whether an edit whose images are the same bytes is a row"

    def rows(self, edits: Iterable[RawEdit | BadRow], *, num_threads: int = 1) -> Iterator[Row]:
        """One row per edit, in order. Threads hide the latency of stores; twice as many edits are under way.

        Raises:
            OSError: The store is in trouble.
        """
        with ThreadPoolExecutor(num_threads) as pool:
            waiting: deque[Future[Row]] = deque()
            for edit in edits:
                waiting.append(pool.submit(self.row, edit))
                if len(waiting) >= 2 * num_threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

    def row(self, edit: RawEdit | BadRow) -> Row:
        """The row of one edit (`STAGED_SCHEMA`). Raises OSError when the store is in trouble."""
        row: Row = {"dataset": self.dataset, "licence": self.licence, "split": edit.split}
        if isinstance(edit, BadRow):
            return _rejected(row, edit.code, edit.message, edit.provenance)
        row |= {name: getattr(edit, name) for name in ("source_caption", "goal_caption", "turn", "session")}
        row["instruction"] = instruction = edit.instruction.strip()
        for name in ("source", "goal", "mask"):
            if isinstance(ref := getattr(edit, name), str):
                row[name] = ref
        if problem := _text_problem(row):
            clean = {k: v for k, v in row.items() if k in ("dataset", "licence", "split", "turn")}
            return _rejected(clean, "bad_row", problem, edit.provenance)
        provenance = dict(edit.provenance) | ({"direction": edit.direction} if edit.direction != "forward" else {})
        if not instruction:
            return _rejected(row, "empty_instruction", "the instruction is empty", provenance)

        images: dict[str, bytes] = {}
        signatures: dict[str, bytes] = {}
        for name, ref in (("source", edit.source), ("goal", edit.goal), ("mask", edit.mask)):
            if ref is None:
                continue
            try:
                images[name] = self._load(ref)
                pixels = read_image(images[name], limits=self.limits)
            except DataError as error:
                return _rejected(row, "bad_row", f"{name}: {error}", provenance)
            except ImageError as error:
                return _rejected(row, "bad_image", f"{name}: {error}", provenance)
            except OSError as error:
                if not is_absent(error):
                    raise
                return _rejected(row, "missing_file", f"{name}: there is no file {ref!r}", provenance)
            provenance[f"{name}_wh"] = list(pixels.size)
            signatures[name] = signature(pixels) if name != "mask" else b""
        if images["source"] == images["goal"] and not self.keeps_unchanged:
            return _rejected(row, "unchanged", "source and goal are the same file", provenance)

        if self.extract_to is not None:
            row |= {name: _extract(self.extract_to, data) for name, data in images.items()}
        row["id"] = row_id(images["source"], images["goal"], instruction, edit.direction)
        row["provenance"] = _json(provenance)
        row["instruction_key"] = instruction_key(instruction)
        row["signatures"] = signatures["source"] + signatures["goal"]
        return row

    def _load(self, ref: ImageRef) -> bytes:
        """Raises DataError for a name that leads out of the data set, OSError when it cannot be read."""
        return ref if isinstance(ref, bytes) else self.folder.read(ref)


def _extract(folder: Folder, data: bytes) -> str:
    """Writes an image once; its name is its content. Returns the URI."""
    extension = _EXTENSIONS[str(detect_format(data))]
    uri = f"{IMAGES_FOLDER}/{hashlib.sha256(data).hexdigest()}.{extension}"
    if folder.num_bytes(uri) != len(data):
        folder.write(uri, data)
    return uri


def _rejected(row: Row, code: RejectionCode, what: str, provenance: Mapping[str, Any]) -> Row:
    reason = rejection(code, what).encode(errors="replace").decode()
    return row | {"reason": reason, "provenance": _json(provenance)}


def _text_problem(row: Row) -> str | None:
    """Text that cannot be stored: JSON lets half of a surrogate pair through."""
    for name, value in row.items():
        if isinstance(value, str) and not _is_encodable(value):
            return f"{name} is not valid Unicode"
    return None


def _is_encodable(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _json(value: Mapping[str, Any]) -> str:
    """One text per content, ASCII: nothing in it can fail to be stored."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
