"""Your own data: tables of any column names (parquet or JSON Lines), or WebDataset tar files.

ParquetReader     images as bytes, as {bytes, path}, or as file names relative to the folder
JSONLinesReader   images as file names relative to the folder
WebDatasetReader  *.tar with <key>.<field>.<jpg|png|...> for images and <key>.json for all else
"""

import functools
import json
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import pyarrow as pa

from mgie.errors import DataError
from mgie.storage.folder import Folder
from mgie.storage.retry import is_store_fault
from pipelines.readers.base import (
    BadRow,
    ImageRef,
    RawEdit,
    Shard,
    as_record,
    guarded,
    image,
    image_cell,
    kept,
    split_name,
    text,
    text_or_none,
    whole_or_none,
)
from pipelines.readers.tables import jsonl_rows, jsonl_shards, parquet_rows, parquet_schema, parquet_shards


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Which of your columns is what (layouts parquet, jsonl and webdataset). "" = there is none."""

    source: str = "source"
    "image before the edit"
    goal: str = "goal"
    "image after it"
    instruction: str = "instruction"
    "what the user asked for"
    mask: str = ""
    "image, white where the edit is"
    source_caption: str = ""
    "what the source shows"
    goal_caption: str = ""
    "what the goal shows"
    turn: str = ""
    "number of the edit in a session, from 1"
    session: str = ""
    "what the turns of a session share"
    split: str = ""
    "train, val or test; without it the name of the file decides, else all is train"
    keep: tuple[str, ...] = ()
    "more columns of plain values, for the provenance of each row"

    def names(self) -> list[str]:
        """The columns that are needed."""
        named = [getattr(self, field.name) for field in fields(self) if field.name != "keep"]
        return list(dict.fromkeys(name for name in (*named, *self.keep) if name))


def edit_of(record: Mapping[str, Any], columns: Columns, default_split: str, where: Mapping[str, Any]) -> RawEdit:
    """The edit of a record. Raises DataError for fields that are not as they should be."""
    session = record.get(columns.session) if columns.session else None
    named_split = text_or_none(record, columns.split) if columns.split else None
    mask: ImageRef | None = image_cell(record, columns.mask) if columns.mask else None
    return RawEdit(
        split=split_name(named_split) if named_split else default_split,
        source=image(record, columns.source),
        goal=image(record, columns.goal),
        mask=mask,
        instruction=text(record, columns.instruction),
        source_caption=text_or_none(record, columns.source_caption) if columns.source_caption else None,
        goal_caption=text_or_none(record, columns.goal_caption) if columns.goal_caption else None,
        turn=whole_or_none(record, columns.turn) if columns.turn else None,
        session=None if session is None else str(session),
        provenance={**where, **kept(record, *columns.keep)},
    )


class ParquetReader:
    """See the module."""

    def __init__(self, columns: Columns) -> None:
        self._columns = columns

    def extracts(self, folder: Folder) -> bool:
        """Unless all image columns are file names."""
        schema = parquet_schema(folder)
        names = [name for name in (self._columns.source, self._columns.goal, self._columns.mask) if name]
        found = [schema.field(name).type for name in names if name in schema.names]
        return not all(pa.types.is_string(kind) or pa.types.is_large_string(kind) for kind in found)

    def shards(self, folder: Folder) -> list[Shard]:
        """Runs of row groups."""
        return parquet_shards(folder, self._columns.names())

    def read(self, folder: Folder, shard: Shard) -> Iterator[RawEdit | BadRow]:
        """One edit for each row."""
        yield from _edits(parquet_rows(folder, shard, self._columns.names()), self._columns, shard)


class JSONLinesReader:
    """See the module."""

    def __init__(self, columns: Columns) -> None:
        self._columns = columns

    def extracts(self, folder: Folder) -> bool:  # noqa: ARG002
        """No: the images are files."""
        return False

    def shards(self, folder: Folder) -> list[Shard]:
        """Ranges of lines."""
        return jsonl_shards(folder)

    def read(self, folder: Folder, shard: Shard) -> Iterator[RawEdit | BadRow]:
        """One edit for each line."""
        yield from _edits(jsonl_rows(folder, shard), self._columns, shard)


class WebDatasetReader:
    """See the module."""

    def __init__(self, columns: Columns) -> None:
        self._columns = columns

    def extracts(self, folder: Folder) -> bool:  # noqa: ARG002
        """Yes: the images are in tar files."""
        return True

    def shards(self, folder: Folder) -> list[Shard]:
        """The tar files."""
        found = [entry for entry in folder.list(is_recursive=True) if entry.name.endswith(".tar")]
        if not found:
            raise DataError(f"{folder.url} holds no .tar files")
        return [
            Shard(
                file=e.name,
                num_bytes=e.num_bytes,
                split=split_name(e.name.rsplit("/", 1)[-1].split("-")[0].split(".")[0]),
            )
            for e in found
        ]

    def read(self, folder: Folder, shard: Shard) -> Iterator[RawEdit | BadRow]:
        """One edit for each key."""
        yield from _edits(_tar_rows(folder, shard), self._columns, shard)


def _edits(
    rows: Iterator[tuple[int, dict[str, Any]] | BadRow], columns: Columns, shard: Shard
) -> Iterator[RawEdit | BadRow]:
    yield from edits_of(rows, shard, lambda record, where: [edit_of(record, columns, shard.split, where)])


def edits_of(
    rows: Iterator[tuple[int, dict[str, Any]] | BadRow],
    shard: Shard,
    make: Callable[[Mapping[str, Any], dict[str, Any]], Iterable[RawEdit]],
    **more: str,
) -> Iterator[RawEdit | BadRow]:
    """What is made of each row, and of where it is (file, row, and `more`); what could not be read stays as it is."""
    for found in rows:
        if isinstance(found, BadRow):
            yield found
            continue
        number, record = found
        where = {"file": shard.file, "row": number, **more}
        yield from guarded(functools.partial(make, record, where), split=shard.split, provenance=where)


def _tar_rows(folder: Folder, shard: Shard) -> Iterator[tuple[int, dict[str, Any]] | BadRow]:
    """Records of a tar file, read once from front to back; a key's members follow each other."""
    key, number = "", 0
    record: dict[str, Any] = {}
    try:
        with (
            folder.filesystem.open_input_stream(folder.at(shard.file)) as stream,
            tarfile.open(fileobj=stream, mode="r|") as tar,
        ):
            for member in tar:
                path, _, base = member.name.rpartition("/")
                stem, _, field = base.partition(".")
                content = tar.extractfile(member)
                if content is None or not stem:
                    continue  # a folder or a link
                if f"{path}/{stem}" != key:
                    if record:
                        yield number, record
                        number += 1
                    key, record = f"{path}/{stem}", {}
                if field == "json":
                    try:
                        record |= as_record(json.loads(content.read()))
                    except (ValueError, RecursionError, DataError):
                        record |= {}  # what is missing then is said of the row
                else:
                    record[field.rpartition(".")[0] or field] = content.read()
    except (tarfile.TarError, EOFError, OSError) as error:
        if isinstance(error, OSError) and is_store_fault(error):
            raise
        # The record under way may lack members: it goes with the rest of the file.
        message = f"{shard.file} cannot be read from row {number} on: {error}"
        yield BadRow(
            split=shard.split, code="bad_file", message=message, provenance={"file": shard.file, "row": number}
        )
        return
    if record:
        yield number, record
