"""The rows that a run has to do: written in blocks beside its output, then read one by one by Ray tasks.

A block is what is done and committed at a time. The driver never holds more rows than a file has, and a task reads one file.
"""

import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray.data

from mgie.data.ledger import rejection_code, split_rows, to_table
from mgie.storage.folder import Folder
from pipelines.runs.cluster import StageSize

_WORK = "_work"
_BLOCKS_PER_FILE = 16  # row groups


@dataclass(frozen=True, kw_only=True)
class PendingRows:
    """Blocks of rows that were written."""

    out: Folder
    "folder of the run, of which they take a part"
    rows_per_block: int
    "the last may have fewer"
    num_rows: int

    def fetch(self, prepare: Callable[[pa.Table], pa.Table], *, num_cpus: float, **options: Any) -> ray.data.Dataset:
        """The blocks, each read and prepared by a task.

        Args:
            prepare: What the task makes of its rows; travels with the task.
            num_cpus: CPUs of a task.
            options: More of `map_batches`.
        """
        numbers = range(-(-self.num_rows // self.rows_per_block))
        read: Any = partial(_read, out=self.out, prepare=prepare)  # Ray's types know no pyarrow tables
        # Not ray.data.range(): its read tasks ask for a whole CPU each, which a small cluster may never have free.
        blocks = ray.data.from_items([{"block": number} for number in numbers], override_num_blocks=len(numbers))
        return blocks.map_batches(read, batch_size=1, batch_format="pyarrow", num_cpus=num_cpus, **options)

    def delete(self) -> None:
        """Removes them: the run is done."""
        self.out.delete(_WORK)


def write_pending(
    out: Folder, rows: Iterable[pa.RecordBatch], schema: pa.Schema, *, rows_per_block: int
) -> PendingRows:
    """Writes the rows in place of those of a run that was killed."""
    out.delete(_WORK)
    num_rows = 0
    for number, table in enumerate(split_rows(rows, schema, rows_per_block * _BLOCKS_PER_FILE)):
        if table.num_rows:
            with out.publish(_path(number)) as path:
                pq.write_table(table, path, row_group_size=rows_per_block)
            num_rows += table.num_rows
    return PendingRows(out=out, rows_per_block=rows_per_block, num_rows=num_rows)


def write_to_do(
    out: Folder,
    rows: Sequence[dict[str, Any]],
    schema: pa.Schema,
    *,
    latest: pa.Table,
    retry_failed: bool,
    rows_per_block: int,
) -> PendingRows:
    """Writes those of the rows that were not done yet.

    Args:
        latest: `id`, `attempt` and `status` of each id's highest attempt.
        retry_failed: Whether rows that were rejected are to be done, too, as their next attempt.
    """
    done = dict(zip(latest.column("id").to_pylist(), latest.column("attempt").to_pylist(), strict=True))
    pending = [row for row in rows if row["id"] not in done]
    if retry_failed:
        failed = set(latest.filter(pc.equal(latest.column("status"), "rejected")).column("id").to_pylist())
        pending += [row | {"attempt": done[row["id"]] + 1} for row in rows if row["id"] in failed]
    return write_pending(out, to_table(pending, schema).to_batches(), schema, rows_per_block=rows_per_block)


def write_part(out: Folder, rows: pa.Table, key: bytes) -> None:
    """Writes a block that is done as a file of the ledger; the same key gives the same file. Raises OSError."""
    buffer = io.BytesIO()
    pq.write_table(rows, buffer)
    out.write(f"part-{part_name(key)}.parquet", buffer.getvalue())


def part_name(key: bytes) -> str:
    """The part of a file's name that says which block it holds."""
    return hashlib.sha256(key).hexdigest()[:20]


def ids_key(rows: pa.Table) -> bytes:
    """Key of the rows' ids and attempts."""
    return json.dumps(list(zip(*(rows.column(name).to_pylist() for name in ("id", "attempt")), strict=True))).encode()


def figures_of(rows: pa.Table) -> dict[str, Any]:
    """What a block tells when it is done: how many rows there are by status and by reason."""
    reasons = [rejection_code(reason) for reason in rows.column("reason").to_pylist() if reason]
    return {"rows": rows.num_rows, "status": Counter(rows.column("status").to_pylist()), "reasons": Counter(reasons)}


def figures_table(figures: Mapping[str, Any]) -> pa.Table:
    """Figures of a block, as its last stage gives them to `run_blocks`."""
    return pa.table({"figures": [json.dumps(figures)]})


def stage_blocks(
    pending: PendingRows,
    prepare: Callable[[pa.Table], pa.Table],
    stage: type,
    *given: Any,
    size: StageSize,
    num_cpus: float,
) -> Iterator[dict[str, Any]]:
    """Runs pending blocks through one stage of actors; see `run_blocks`.

    Args:
        prepare, num_cpus: As of `PendingRows.fetch`.
        stage: Class of the actors; made of what is `given`.
    """
    prepared = pending.fetch(prepare, num_cpus=num_cpus)
    return run_blocks(prepared.map_batches(stage, fn_constructor_args=given, **size.pool()))


def run_blocks(written: ray.data.Dataset) -> Iterator[dict[str, Any]]:
    """Runs a dataset; yields the figures of each block as soon as it is done."""
    batches: Iterator[Any] = iter(written.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0))
    for batch in batches:
        yield from map(json.loads, batch.column("figures").to_pylist())


def _path(file_number: int) -> str:
    return f"{_WORK}/pending-{file_number:05d}.parquet"


def _read(block: pa.Table, *, out: Folder, prepare: Callable[[pa.Table], pa.Table]) -> pa.Table:
    [number] = block.column("block").to_pylist()
    file = pa.BufferReader(out.read(_path(number // _BLOCKS_PER_FILE)))
    return prepare(pq.ParquetFile(file).read_row_group(number % _BLOCKS_PER_FILE))
