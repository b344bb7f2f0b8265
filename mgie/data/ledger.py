"""Rows of data sets: the schemas of manifest, rejected rows and ledger, where a row's images lie, and reading them.

    manifest   what there is to learn from: one row per edit (source, goal, instruction), written by `prepare`
    rejected   what `prepare` left out: the same columns as far as they are known, and why
    ledger     manifest rows with their expressive instructions, one row per edit and attempt, by `summarize`

Each is a folder of parquet files. File names that begin with `.` or `_` are not part of it.

**Images.** `source`, `goal` and `mask` are URIs relative to one root per folder: plain POSIX paths, not
percent-encoded, without `..`. The file `images.json` beside the parquet files names the root: an absolute path,
the URL of a store, or a path relative to the folder itself (so that a folder which brings its images can be moved
as a whole). It is written last: a folder without it was not finished. `images_root` reads it, `resolve_uri`
joins; nothing else in the project puts a root and a URI together.

**Reasons** are text `code: what happened`; the codes are few (`RejectionCode`), so that they can be counted.

Knows nothing of data-set layouts, models or Ray, nor of how a folder is opened.
"""

import hashlib
import io
import json
import posixpath
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from mgie.errors import DataError
from mgie.storage.folder import Folder
from mgie.storage.retry import with_retries

Direction = Literal["forward", "inverse"]
Status = Literal["ok", "rejected"]
RejectionCode = Literal[
    "bad_file",  # a container (a parquet file or row group, a tar file) cannot be read
    "bad_row",  # a field is missing or is not what its layout says
    "missing_file",  # a file that the row names is not there
    "bad_image",  # bytes that are no usable image
    "empty_instruction",
    "unchanged",  # source and goal are the same bytes
    "exact_duplicate",  # the id was seen before
    "near_duplicate",  # both images near those of a row with the same normalised instruction
    "describe_failed",  # the describing model cannot do this row, even alone
    "no_description",  # it wrote nothing that can be used
    "summarize_failed",
    "no_summary",
    "edit_failed",  # the editing model could not take the row
]

IMAGES_FILE = "images.json"
IMAGES_FORMAT = 1
READ_BATCH_ROWS = 4096


def _fields(columns: str) -> list[pa.Field]:
    """Columns of these names and types; `!` after a name: never null."""
    pairs = (column.split() for column in columns.split(","))
    return [pa.field(name.rstrip("!"), pa.type_for_alias(kind), nullable="!" not in name) for name, kind in pairs]


_MANIFEST_FIELDS = _fields(
    "id! int64, dataset! string, split! string, source! string, goal! string, mask string, instruction! string,"
    "source_caption string, goal_caption string, turn int32, session string, licence string, provenance! string"
)

MANIFEST_SCHEMA = pa.schema(_MANIFEST_FIELDS)
"""
id              stable 63-bit hash of source bytes, goal bytes, instruction and direction: `row_id`
dataset         name of the data set                    split           train | val | test
source, goal    URIs of the images                      mask            URI; transparent, or white where nothing is, = edited; null = none
instruction     the user's words, without white space around them
source_caption, goal_caption   what the images show, where the data set says
turn            from 1, in a session of several edits   session         what its turns share
licence         as given to `prepare`                   provenance      JSON object: where the row comes from
"""

REJECTED_SCHEMA = pa.schema([*(field.with_nullable(True) for field in _MANIFEST_FIELDS), *_fields("reason! string")])
"What is known of a row that was left out, and `reason`."

LEDGER_SCHEMA = pa.schema(
    _MANIFEST_FIELDS
    + _fields(
        "verbose string, expressive string, status! string, reason string, attempt! int32, describe_model string,"
        "describe_revision string, summarize_model string, summarize_revision string, preset string,"
        "describe_prompt_tokens int32, describe_tokens int32, summarize_prompt_tokens int32, summarize_tokens int32,"
        "describe_seconds double, summarize_seconds double"
    )
)
"""Every manifest column, then
verbose      what the describing model wrote            expressive   its summary: the expressive instruction
status       ok | rejected                              reason       null unless rejected
attempt      from 1; `--retry-failed` appends a row with the next
describe_*, summarize_*   model, revision, tokens read and written, seconds of the row's share of its batch
preset       which prompts and settings
"""


EDITS_SCHEMA = pa.schema(
    _fields(
        "id! int64, image! string, instruction! string, given string, seed! int64, attempt! int32, status! string,"
        "reason string, edited string, expressive string, used_fallback bool, settings string, bundle string, seconds double"
    )
)
"""Bulk edits (`pipelines/edit.py`), one row per edit and attempt:
id           of the edit: hash of image URI, instruction, given expressive instruction and seed
image        URI of the source              given        expressive instruction given by the user, or null
edited       URI of the result, below the folder of this ledger
expressive   what guided the edit           used_fallback   the model gave no usable visual tokens
settings     JSON of EditSettings           bundle       identity of the bundle
"""


# ---- identity


def row_id(source: bytes, goal: bytes, instruction: str, direction: Direction) -> int:
    """The stable identity of an edit, 0 to 2^63 - 1: hash of the encoded images, the instruction and the direction."""
    digest = hashlib.sha256()
    for part in (source, goal, instruction.encode(), direction.encode()):
        digest.update(len(part).to_bytes(8, "big"))  # so that no two different sequences of parts read the same
        digest.update(part)
    return int.from_bytes(digest.digest()[:8], "big") & (2**63 - 1)


def rejection(code: RejectionCode, what: str) -> str:
    """A `reason`."""
    return f"{code}: {what}"


def rejection_code(reason: str) -> str:
    """The part of a `reason` that is counted."""
    return reason.partition(":")[0]


# ---- where images lie


def write_images_root(folder: Folder, root: str) -> None:
    """Writes `images.json`; last, when all rows of the folder are there.

    Args:
        root: Absolute path, URL of a store, or a path relative to the folder (`..`).
    """
    text = json.dumps({"format": IMAGES_FORMAT, "root": root}, ensure_ascii=False)
    folder.write(IMAGES_FILE, text.encode() + b"\n")


def images_root(folder: Folder, *, moved_to: str | None = None) -> str:
    """The root that the URIs of a folder's rows are relative to.

    Args:
        moved_to: What to take instead of what `images.json` says, for images that lie elsewhere by now.

    Returns:
        An absolute path or the URL of a store.

    Raises:
        DataError: There is no readable `images.json`: no such folder, or whoever wrote it did not finish.
    """
    try:
        content = json.loads(folder.read(IMAGES_FILE))
        if content["format"] != IMAGES_FORMAT:
            raise DataError(
                f"{folder.path}/{IMAGES_FILE} has format {content['format']!r}; this version reads {IMAGES_FORMAT}"
            )
        root = str(content["root"])
    except FileNotFoundError as error:
        if not folder.list():
            raise DataError(f"{folder.path} does not exist or is empty; give a folder that holds rows") from error
        message = f"{folder.path} holds no {IMAGES_FILE}: there are no rows, or the job that wrote them did not finish"
        raise DataError(message) from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder.path}/{IMAGES_FILE} is damaged: {error!r}") from error
    if moved_to is not None:
        return moved_to
    if root.startswith("/") or "://" in root:
        return root
    scheme, separator, path = folder.url.rpartition("://")
    return scheme + separator + posixpath.normpath(posixpath.join(path, root))


# ---- reading


def list_parquet(folder: Folder) -> list[str]:
    """Paths of a folder's parquet files, sorted by name; those directly in it, not hidden ones."""
    found = with_retries(folder.list)
    return [
        folder.at(entry.name)
        for entry in found
        if not entry.is_folder and entry.name.endswith(".parquet") and not entry.name.startswith("_")
    ]


def read_manifest(
    folder: Folder, *, columns: Sequence[str] | None = None, batch_rows: int = READ_BATCH_ROWS
) -> Iterator[pa.RecordBatch]:
    """The rows of a manifest in order, streamed.

    Args:
        columns: Which, in this order; None = all of `MANIFEST_SCHEMA`.
        batch_rows: Most rows per batch.

    Raises:
        DataError: No rows, a file is damaged, or columns are missing or of another type (they are named).
    """
    yield from _not_empty(
        _read(folder, list_parquet(folder), _choose(MANIFEST_SCHEMA, columns), batch_rows),
        f"manifest {folder.path} holds no rows",
    )


def read_ledger(
    folder: Folder,
    *,
    status: Status | None = "ok",
    columns: Sequence[str] | None = None,
    batch_rows: int = READ_BATCH_ROWS,
) -> Iterator[pa.RecordBatch]:
    """One row per id, that of the highest attempt, in the order of files and rows, streamed.

    Ids and attempts of the whole ledger are held in memory: about 30 bytes per row.

    Args:
        status: Only rows whose highest attempt ended so; None = all.
        columns: Which, in this order; None = all of `LEDGER_SCHEMA`.
        batch_rows: Most rows per batch.

    Raises:
        DataError: No such rows, a file is damaged, or columns are missing or of another type (they are named).
    """
    files = list_parquet(folder)
    schema = _choose(LEDGER_SCHEMA, columns)
    chosen = _latest(folder, files).chosen(status)
    yield from _not_empty(
        _filtered(_read(folder, files, schema, batch_rows), chosen),
        f"ledger {folder.path} holds no rows" + (f" of status {status!r}" if status else ""),
    )


def is_ledger(folder: Folder) -> bool:
    """Whether a folder of rows is a ledger, and not a manifest.

    Raises:
        DataError: A file is damaged.
    """
    files = list_parquet(folder)
    try:
        return bool(files) and "attempt" in pq.read_schema(files[0], filesystem=folder.filesystem).names
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{files[0]} cannot be read: {error}") from error


def read_edits(
    folder: Folder, *, columns: Sequence[str], batch_rows: int = READ_BATCH_ROWS
) -> Iterator[pa.RecordBatch]:
    """The edits of a ledger (those that are ok) or of a manifest, in which what only ledgers have is null.

    For what can do without expressive instructions. Arguments and errors as of `read_ledger`.
    """
    if is_ledger(folder):
        yield from read_ledger(folder, columns=columns, batch_rows=batch_rows)
        return
    schema = _choose(LEDGER_SCHEMA, columns)
    given = [name for name in columns if name in MANIFEST_SCHEMA.names]
    for batch in read_manifest(folder, columns=given, batch_rows=batch_rows):
        arrays = [batch[name] if name in given else pa.nulls(len(batch), schema.field(name).type) for name in columns]
        yield pa.record_batch(arrays, schema=schema)


@dataclass(frozen=True, kw_only=True)
class LedgerCounts:
    """What a ledger holds."""

    num_rows: int
    "rows in its files: all attempts"
    num_ids: int
    "edits"
    num_ok: int
    "edits whose highest attempt is ok"
    num_rejected: int
    "edits whose highest attempt is rejected"
    num_repeated: int
    "rows beyond the first of the same id and attempt; the reader leaves them out"


def count_ledger(folder: Folder) -> LedgerCounts:
    """Counts, as the reader sees the ledger; all zero for an empty folder.

    Raises:
        DataError: As `read_ledger`.
    """
    latest = _latest(folder, list_parquet(folder))
    return LedgerCounts(
        num_rows=len(latest.is_latest),
        num_ids=int(latest.is_latest.sum()),
        num_ok=int(latest.chosen("ok").sum()),
        num_rejected=int(latest.chosen("rejected").sum()),
        num_repeated=latest.num_repeated,
    )


def compact_ledger(folder: Folder, *, rows_per_file: int = 50_000) -> LedgerCounts:
    """Rewrites a ledger to one row per id. Nobody may write to it meanwhile.

    The new files are complete before the old ones go: after a kill in between the reader sees the same rows
    as before, and another compaction tidies up.

    Returns:
        The counts from before.

    Raises:
        DataError: As `read_ledger`, or there are no rows.
    """
    old = list_parquet(folder)
    counts = count_ledger(folder)
    batches = read_ledger(folder, status=None)
    # Named by what they replace, so that they are never among them.
    stem = f"compacted-{hashlib.sha256(json.dumps(old).encode()).hexdigest()[:12]}"
    for number, table in enumerate(split_rows(batches, LEDGER_SCHEMA, rows_per_file)):
        out = io.BytesIO()
        pq.write_table(table, out)
        folder.write(f"{stem}-{number:05d}.parquet", out.getvalue())
    for path in old:
        folder.filesystem.delete_file(path)
    return counts


def split_rows(batches: Iterable[pa.RecordBatch], schema: pa.Schema, rows_per_table: int) -> Iterator[pa.Table]:
    """Regroups batches into tables of `rows_per_table` rows; the last may be shorter, and there is at least one."""
    waiting: list[pa.RecordBatch] = []
    num_waiting, is_first = 0, True
    for batch in batches:
        waiting.append(batch)
        num_waiting += len(batch)
        while num_waiting >= rows_per_table:
            table = pa.Table.from_batches(waiting, schema)
            yield table.slice(0, rows_per_table)
            is_first = False
            waiting = table.slice(rows_per_table).to_batches()
            num_waiting -= rows_per_table
    if num_waiting or is_first:
        yield pa.Table.from_batches(waiting, schema)


@dataclass(frozen=True)
class _Latest:
    """Which rows of a ledger, counted through all files, hold the highest attempt of their id."""

    is_latest: npt.NDArray[np.bool_]
    is_ok: npt.NDArray[np.bool_]
    num_repeated: int

    def chosen(self, status: Status | None) -> npt.NDArray[np.bool_]:
        if status is None:
            return self.is_latest
        return self.is_latest & (self.is_ok if status == "ok" else ~self.is_ok)


def is_latest_attempt(keys: Sequence[npt.NDArray[Any]], attempts: npt.NDArray[np.int32]) -> npt.NDArray[np.bool_]:
    """Marks one row for each combination of keys: the highest attempt; of equal ones the first, in the order given."""
    order = np.lexsort((-attempts, *keys))  # stable: equal ones stay in their order
    is_first = np.ones(len(order), dtype=bool)
    is_first[1:] = np.any([key[order][1:] != key[order][:-1] for key in keys], axis=0)
    is_latest = np.zeros(len(order), dtype=bool)
    is_latest[order[is_first]] = True
    return is_latest


def read_latest(
    folder: Folder, schema: pa.Schema, *, columns: Sequence[str] | None = None, key: Sequence[str] = ("id",)
) -> pa.Table:
    """Rows of any ledger, of the highest attempt for each combination of `key`; an empty table for an empty folder.

    Args:
        columns: Which, in this order; None = all of `schema`. `key` and `attempt` must be among them.

    Raises:
        DataError: A file is damaged, or columns are missing or of another type (they are named).
    """
    schema = _choose(schema, columns)
    table = pa.Table.from_batches(_read(folder, list_parquet(folder), schema, READ_BATCH_ROWS), schema)
    keys = [np.unique(table.column(name).to_numpy(), return_inverse=True)[1] for name in key]
    return table.filter(pa.array(is_latest_attempt(keys, table.column("attempt").to_numpy())))


def _latest(folder: Folder, files: Sequence[str]) -> _Latest:
    """Reads id, attempt and status of all files."""
    ids, attempts, oks = [], [], []
    for batch in _read(folder, files, _choose(LEDGER_SCHEMA, ["id", "attempt", "status"]), READ_BATCH_ROWS):
        ids.append(batch.column("id").to_numpy())
        attempts.append(batch.column("attempt").to_numpy())
        oks.append(np.asarray(batch.column("status").to_pylist(), dtype=object) == "ok")
    if not ids:
        nothing = np.zeros(0, dtype=bool)
        return _Latest(nothing, nothing, 0)
    id_, attempt = np.concatenate(ids), np.concatenate(attempts)
    num_repeated = int((~is_latest_attempt([id_, attempt], attempt)).sum())
    return _Latest(is_latest_attempt([id_], attempt), np.concatenate(oks).astype(bool), num_repeated)


def _choose(schema: pa.Schema, columns: Sequence[str] | None) -> pa.Schema:
    if columns is None:
        return schema
    if unknown := [name for name in columns if name not in schema.names]:
        raise DataError(f"there are no columns {unknown}; there are {schema.names}")
    return pa.schema([schema.field(name) for name in columns])


def _read(folder: Folder, files: Sequence[str], schema: pa.Schema, batch_rows: int) -> Iterator[pa.RecordBatch]:
    """Streams the columns of `schema` of all files, cast to it."""
    for path in files:
        try:
            with _open(folder, path) as file:
                # One buffer instead of whole column chunks: memory stays bounded whatever the row groups are.
                parquet = pq.ParquetFile(file, buffer_size=1 << 16, pre_buffer=False)
                _check_columns(path, parquet.schema_arrow, schema)
                for batch in parquet.iter_batches(batch_size=batch_rows, columns=schema.names):
                    columns = [batch.column(name).cast(schema.field(name).type) for name in schema.names]
                    for name, column in zip(schema.names, columns, strict=True):
                        if column.null_count and not schema.field(name).nullable:
                            raise DataError(
                                f"{path} has {column.null_count} nulls in column {name!r}; none are allowed"
                            )
                    yield pa.RecordBatch.from_arrays(columns, schema=schema)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:  # damaged pages are an OSError
            raise DataError(f"{path} cannot be read: {error}") from error


def _open(folder: Folder, path: str) -> Any:
    """A file to read parts of.

    From an object store the whole object comes in one request instead of dozens. It also avoids reads of a few
    bytes, which the SDK does not try again when the store answers with an error (its body overruns the buffer).
    """
    if folder.is_local:
        return folder.filesystem.open_input_file(path)

    def read() -> Any:
        with folder.filesystem.open_input_file(path) as file:
            return file.read_buffer(file.size())

    return pa.BufferReader(with_retries(read))


def _check_columns(path: str, found: pa.Schema, wanted: pa.Schema) -> None:
    """Raises DataError unless each wanted column is there, of a type that holds the same kind of values."""
    missing = [name for name in wanted.names if found.get_field_index(name) < 0]
    wrong = [
        f"{field.name} is {found.field(field.name).type}, not {field.type}"
        for field in wanted
        if field.name not in missing and not _same_kind(found.field(field.name).type, field.type)
    ]
    problems = [f"missing columns {', '.join(missing)}"] * bool(missing) + wrong
    if problems:
        raise DataError(f"{path} does not have the expected columns: {'; '.join(problems)}")


def _same_kind(found: pa.DataType, wanted: pa.DataType) -> bool:
    """Text stored as another kind of text, a narrower or wider integer, and a column of nothing but nulls are fine."""
    if pa.types.is_null(found) or found.equals(wanted):
        return True
    if pa.types.is_integer(wanted):
        return cast("bool", pa.types.is_integer(found))
    if pa.types.is_floating(wanted):
        return cast("bool", pa.types.is_floating(found))
    return cast("bool", pa.types.is_string(found) or pa.types.is_large_string(found))


def _filtered(batches: Iterable[pa.RecordBatch], chosen: npt.NDArray[np.bool_]) -> Iterator[pa.RecordBatch]:
    start = 0
    for batch in batches:
        yield batch.filter(pa.array(chosen[start : start + len(batch)]))
        start += len(batch)


def _not_empty(batches: Iterable[pa.RecordBatch], otherwise: str) -> Iterator[pa.RecordBatch]:
    """The batches that have rows. Raises DataError if there is none."""
    is_empty = True
    for batch in batches:
        if len(batch):
            is_empty = False
            yield batch
    if is_empty:
        raise DataError(otherwise)


def to_table(rows: Sequence[dict[str, Any]], schema: pa.Schema) -> pa.Table:
    """Rows as a table; keys that a row lacks are null.

    Raises:
        DataError: A value does not fit its column.
    """
    try:
        return pa.Table.from_pylist(list(rows), schema=schema)
    except (pa.ArrowInvalid, pa.ArrowTypeError, UnicodeEncodeError) as error:
        raise DataError(f"rows do not fit the schema: {error}") from error
