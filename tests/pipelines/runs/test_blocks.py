"""Blocks of rows to do: what is written is read, block by block."""

from pathlib import Path

import pyarrow as pa
import pytest

from mgie.storage.folder import open_folder
from pipelines.runs.blocks import _BLOCKS_PER_FILE, _read, write_pending

SCHEMA = pa.schema([("id", pa.int64())])
ROWS_PER_BLOCK = 3


def batches(num_rows: int, rows_per_batch: int) -> list[pa.RecordBatch]:
    table = pa.table({"id": range(num_rows)}, schema=SCHEMA)
    return table.to_batches(max_chunksize=rows_per_batch)


@pytest.mark.parametrize("num_rows", [0, 1, 3, 3 * _BLOCKS_PER_FILE, 3 * _BLOCKS_PER_FILE + 1, 500])
@pytest.mark.parametrize("rows_per_batch", [1, 7, 1000])
def test_every_row_is_in_one_block_in_order(tmp_path: Path, num_rows: int, rows_per_batch: int) -> None:
    out = open_folder(tmp_path / "out")
    pending = write_pending(out, batches(num_rows, rows_per_batch), SCHEMA, rows_per_block=ROWS_PER_BLOCK)
    assert pending.num_rows == num_rows
    num_blocks = -(-num_rows // ROWS_PER_BLOCK)
    blocks = [
        _read(pa.table({"block": [number]}), out=out, prepare=lambda rows: rows).column("id").to_pylist()
        for number in range(num_blocks)
    ]
    assert [len(block) for block in blocks[:-1]] == [ROWS_PER_BLOCK] * (num_blocks - 1 if num_blocks else 0)
    assert [number for block in blocks for number in block] == list(range(num_rows))


def test_what_a_killed_run_left_is_replaced_and_a_run_that_is_done_leaves_nothing(tmp_path: Path) -> None:
    out = open_folder(tmp_path / "out")
    write_pending(out, batches(200, 7), SCHEMA, rows_per_block=ROWS_PER_BLOCK)
    pending = write_pending(out, batches(4, 7), SCHEMA, rows_per_block=ROWS_PER_BLOCK)
    assert len(list((tmp_path / "out" / "_work").iterdir())) == 1
    pending.delete()
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == []
