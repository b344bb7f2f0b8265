"""Descriptions -> expressive instructions, by any summariser, and the presets of a run."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import pyarrow as pa

from mgie.data.ledger import rejection, to_table
from mgie.inference.batch_failures import bisect_failures, one_line
from pipelines.stages.describe import _Clock
from pipelines.stages.fetch import DESCRIBE_ROW_SCHEMA


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Prompts and settings of a run, recorded by name in every row."""

    describe_max_new_tokens: int
    "limit of a description"
    stop_early: bool
    "end a description at its second sentence; the cleaned text is the same"
    num_beams: int
    "beams of the summariser"
    min_length: int
    "tokens of a summary at least"
    max_length: int
    "tokens of a summary at most"
    no_repeat_ngram_size: int
    "tokens in a row that a summary never repeats"


class TextSummarizer(Protocol):
    """Writes short texts of long ones."""

    model: str
    "name of the model"
    revision: str
    "its revision or identity"

    def summarize(self, texts: Sequence[str]) -> list[tuple[str, int, int]]:
        """Summary, tokens read and tokens written for each text."""
        ...


class Summarize:
    """Verbose to concise: fills `expressive` and settles the row's `status`.

    Args:
        make_summarizer: Called once, where the stage runs. batch_size: Rows per model call.
    """

    def __init__(self, make_summarizer: Callable[[], TextSummarizer], *, batch_size: int) -> None:
        self._summarizer, self._batch_size = make_summarizer(), batch_size
        self._clock = _Clock("summarize")

    def __call__(self, table: pa.Table) -> pa.Table:
        """The finished rows."""
        self._clock.start()
        rows = table.to_pylist()
        todo = sorted((row for row in rows if row["reason"] is None), key=lambda row: len(row["verbose"]))
        for start in range(0, len(todo), self._batch_size):
            part = todo[start : start + self._batch_size]
            started = time.perf_counter()
            results = bisect_failures(self._summarizer.summarize, part, key=lambda row: row["verbose"])
            for row, result in zip(part, results, strict=True):
                if isinstance(result, Exception):
                    row["reason"] = rejection("summarize_failed", one_line(result))
                    continue
                text, num_read, num_written = result
                row |= {
                    "expressive": text or None,
                    "summarize_prompt_tokens": num_read,
                    "summarize_tokens": num_written,
                    "summarize_seconds": (time.perf_counter() - started) / len(part),
                }
                if not text:
                    row["reason"] = rejection("no_summary", "the model wrote no words")
        for row in rows:
            row |= {
                "status": "ok" if row["reason"] is None else "rejected",
                "summarize_model": self._summarizer.model,
                "summarize_revision": self._summarizer.revision,
            }
        self._clock.stop(rows)
        return to_table(rows, DESCRIBE_ROW_SCHEMA)


PRESETS: Mapping[str, Preset] = {
    # The published run. Stopping early changes no text, only the tokens that would be cut.
    "mgie_paper": Preset(
        describe_max_new_tokens=1024, stop_early=True, num_beams=5, min_length=5, max_length=64, no_repeat_ngram_size=3
    ),
    "fast": Preset(
        describe_max_new_tokens=192, stop_early=True, num_beams=1, min_length=5, max_length=64, no_repeat_ngram_size=3
    ),
}
