"""Streaming rows out of parquet files and JSON Lines, in bounded memory whatever the size of the row groups."""

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mgie.errors import DataError
from mgie.storage.folder import Folder
from mgie.storage.retry import is_absent, is_store_fault
from pipelines.readers.base import ROWS_PER_SHARD, BadRow, Shard, as_record, split_name

_BATCH_ROWS = 16  # a row may hold three images of a few megabytes each
_BUFFER_BYTES = 1 << 20
_SCAN_BYTES = 8 << 20
_HUB_NAME = re.compile(r"(.+?)-\d{5}-of-\d{5}.*\.parquet")
_CANNOT_READ = (pa.ArrowException, OSError)

Row = tuple[int, dict[str, Any]]
"Number of the row in its file, and its fields."


def parquet_files(folder: Folder) -> list[tuple[str, int]]:
    """Names and sizes of all parquet files in a folder and below, sorted. Raises DataError if there is none."""
    found = [(e.name, e.num_bytes) for e in folder.list(is_recursive=True) if e.name.endswith(".parquet")]
    if not found:
        raise DataError(f"{folder.url} holds no parquet files")
    return found


def hub_split(name: str) -> str:
    """Split as the Hugging Face hub writes it into file names: `data/train-00000-of-00262.parquet` gives `train`."""
    base = name.rsplit("/", 1)[-1]
    match = _HUB_NAME.fullmatch(base)
    return match[1] if match else base.removesuffix(".parquet")


def parquet_schema(folder: Folder) -> pa.Schema:
    """Columns of the first file that can be read. Raises DataError if none can."""
    for name, _ in parquet_files(folder):
        try:
            with folder.filesystem.open_input_file(folder.at(name)) as file:
                return pq.ParquetFile(file, pre_buffer=False).schema_arrow
        except _CANNOT_READ as error:
            _raise_store_fault(error)
    raise DataError(f"none of the parquet files in {folder.url} can be read")


def parquet_shards(folder: Folder, columns: Sequence[str]) -> list[Shard]:
    """Runs of row groups of about `ROWS_PER_SHARD` rows.

    A file whose footer is damaged is a shard too: reading it gives one bad row.

    Raises:
        DataError: There are no parquet files, or one lacks a column.
    """
    shards = []
    for name, num_bytes in parquet_files(folder):
        split = split_name(hub_split(name))
        try:
            with folder.filesystem.open_input_file(folder.at(name)) as file:
                metadata = pq.ParquetFile(file, pre_buffer=False).metadata
                found = set(metadata.schema.to_arrow_schema().names)
                groups = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        except _CANNOT_READ as error:
            _raise_store_fault(error)
            shards.append(Shard(file=name, split=split, num_bytes=num_bytes))
            continue
        if missing := sorted(set(columns) - found):
            raise DataError(f"{folder.url}/{name} lacks the columns {missing}; it has {sorted(found)}")
        start, waiting = 0, 0
        for i, num_rows in enumerate(groups):
            waiting += num_rows
            if waiting >= ROWS_PER_SHARD or i == len(groups) - 1:
                shards.append(Shard(file=name, split=split, num_bytes=num_bytes, start=start, stop=i + 1))
                start, waiting = i + 1, 0
    return shards


def parquet_rows(folder: Folder, shard: Shard, columns: Sequence[str]) -> Iterator[Row | BadRow]:
    """The rows of the shard's row groups. What cannot be read of a row group is one bad row."""

    def bad(error: Exception, what: str) -> BadRow:
        _raise_store_fault(error)
        return BadRow(
            split=shard.split,
            code="bad_file",
            message=f"{what} cannot be read: {error}",
            provenance={"file": shard.file},
        )

    try:
        with folder.filesystem.open_input_file(folder.at(shard.file)) as file:
            # A buffer instead of whole column chunks: row groups of 300 MB are common in image data sets.
            parquet = pq.ParquetFile(file, buffer_size=_BUFFER_BYTES, pre_buffer=False)
            metadata = parquet.metadata
            number = sum(metadata.row_group(i).num_rows for i in range(shard.start))
            for group in range(shard.start, shard.stop):
                end = number + metadata.row_group(group).num_rows
                try:
                    for batch in parquet.iter_batches(
                        batch_size=_BATCH_ROWS, row_groups=[group], columns=list(columns), use_threads=False
                    ):
                        for row in batch.to_pylist():
                            yield number, row
                            number += 1
                except _CANNOT_READ as error:
                    yield bad(error, f"rows {number} to {end - 1} of {shard.file}")
                    number = end
            if shard.stop == 0:  # its footer could not be read when shards were made; now it can
                raise DataError(f"{shard.file} changed while it was read; run again")
    except _CANNOT_READ as error:
        yield bad(error, shard.file)


def _raise_store_fault(error: Exception) -> None:
    """A store in trouble is no property of the data: it must stop the job, to be run again."""
    if isinstance(error, OSError) and is_store_fault(error):
        raise error


# ---- files of lines


def line_starts(folder: Folder, name: str) -> list[int]:
    """Offsets of the lines of a file, and at the end its size. Raises DataError if it is missing."""
    starts, position, last = [0], 0, b"\n"
    try:
        with folder.filesystem.open_input_stream(folder.at(name)) as stream:
            while chunk := stream.read(_SCAN_BYTES):
                ends = np.flatnonzero(np.frombuffer(chunk, dtype=np.uint8) == ord("\n"))
                starts += (ends + position + 1).tolist()
                position += len(chunk)
                last = chunk[-1:]
    except OSError as error:
        if not is_absent(error):
            raise
        raise DataError(f"{name} is missing in {folder.url}") from error
    return starts if last == b"\n" else [*starts, position]


def jsonl_shards(folder: Folder) -> list[Shard]:
    """Byte ranges of whole lines, of all JSON Lines files in a folder and below. Raises DataError if there is none."""
    files = [e for e in folder.list(is_recursive=True) if e.name.endswith((".jsonl", ".ndjson"))]
    if not files:
        raise DataError(f"{folder.url} holds no .jsonl files")
    shards = []
    for entry in files:
        starts = line_starts(folder, entry.name)
        for first in range(0, len(starts) - 1, ROWS_PER_SHARD):
            stop = starts[min(first + ROWS_PER_SHARD, len(starts) - 1)]
            shards.append(
                Shard(
                    file=entry.name,
                    start=starts[first],
                    stop=stop,
                    items=(first,),
                    split=split_name(entry.name.rsplit("/", 1)[-1].split(".")[0]),
                    num_bytes=entry.num_bytes,
                )
            )
    return shards


def jsonl_rows(folder: Folder, shard: Shard) -> Iterator[Row | BadRow]:
    """The records of a shard; empty lines are skipped."""
    with folder.filesystem.open_input_file(folder.at(shard.file)) as file:
        lines = file.read_at(shard.stop - shard.start, shard.start).splitlines()
    for number, line in enumerate(lines, shard.items[0]):
        if not line.strip():
            continue
        try:
            yield number, dict(as_record(json.loads(line)))
        except (ValueError, RecursionError, DataError) as error:
            yield BadRow(
                split=shard.split,
                code="bad_row",
                message=f"line {number + 1} is no JSON object: {error}",
                provenance={"file": shard.file, "row": number},
            )
