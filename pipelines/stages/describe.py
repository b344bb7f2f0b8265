"""The stages of the jobs: callable classes from batch to batch, plain Python.

A batch is a pyarrow table. What a stage cannot do for a row it writes into the row's `reason`; a row with a
reason passes through the later stages untouched, so every row that comes in goes out. Knows nothing of Ray,
schedules or resuming.

A row on its way is a ledger row with four columns more: `pixels` (RGB bytes), `width`, `height`, and `times`
(JSON: which actor of each stage worked on the row's block, for how long, and how long it had waited for it).
"""

import json
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa
from PIL import Image

from mgie.data.ledger import rejection, to_table
from mgie.inference.batch_failures import bisect_failures, one_line
from pipelines.stages.describers import Describer
from pipelines.stages.fetch import DESCRIBE_ROW_SCHEMA


class _Clock:
    """How an actor spends its time."""

    def __init__(self, stage: str) -> None:
        self._stage, self._actor, self._free_since = stage, uuid.uuid4().hex[:8], time.perf_counter()

    def start(self) -> None:
        """Work on a block begins."""
        self._started = time.perf_counter()

    def stop(self, rows: Sequence[dict[str, Any]]) -> None:
        """Work on a block has ended; notes it in the block's rows."""
        ended = time.perf_counter()
        spent = {"actor": self._actor, "busy_s": ended - self._started, "waiting_s": self._started - self._free_since}
        self._free_since = ended
        for row in rows:
            row["times"] = json.dumps(json.loads(row["times"] or "{}") | {self._stage: spent})


class DescribeEdit:
    """What will the image be like? Fills `verbose`.

    Args:
        make_describer: Called once, where the stage runs. batch_size: Rows per model call.
        preset: Name, written into the rows.
        before_work: Called with a table before work on it begins; may wait.
    """

    def __init__(
        self,
        make_describer: Callable[[], Describer],
        *,
        preset: str,
        batch_size: int,
        before_work: Callable[[pa.Table], None] = lambda _: None,
    ) -> None:
        self._describer, self._preset = make_describer(), preset
        self._batch_size, self._before_work = batch_size, before_work
        self._clock = _Clock("describe")

    def __call__(self, table: pa.Table) -> pa.Table:
        """Describes each row that has pixels; the pixels end here."""
        self._before_work(table)
        self._clock.start()
        rows = table.to_pylist()
        # Alike lengths together: a batch is padded to its longest prompt.
        todo = sorted((row for row in rows if row["reason"] is None), key=lambda row: len(row["instruction"]))
        for start in range(0, len(todo), self._batch_size):
            self._describe(todo[start : start + self._batch_size])
        for row in rows:
            row |= {
                "pixels": None,
                "width": None,
                "height": None,
                "preset": self._preset,
                "describe_model": self._describer.model,
                "describe_revision": self._describer.revision,
            }
        self._clock.stop(rows)
        return to_table(rows, DESCRIBE_ROW_SCHEMA)

    def _describe(self, rows: Sequence[dict[str, Any]]) -> None:
        def work(part: Sequence[dict[str, Any]]) -> list[Any]:
            images = [Image.frombytes("RGB", (row["width"], row["height"]), row["pixels"]) for row in part]
            return list(self._describer.describe(images, [row["instruction"] for row in part]))

        started = time.perf_counter()
        for row, result in zip(rows, bisect_failures(work, rows), strict=True):
            seconds = (time.perf_counter() - started) / len(rows)
            if isinstance(result, Exception):
                row["reason"] = rejection("describe_failed", one_line(result))
            elif not result.text:
                row["reason"] = rejection("no_description", "the model wrote no words")
            else:
                row |= {"verbose": result.text}
            if not isinstance(result, Exception):
                row |= {
                    "describe_prompt_tokens": result.prompt_tokens,
                    "describe_tokens": result.output_tokens,
                    "describe_seconds": seconds,
                }
