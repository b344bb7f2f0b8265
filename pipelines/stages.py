"""The stages of the jobs: callable classes from batch to batch, plain Python.

A batch is a pyarrow table. What a stage cannot do for a row it writes into the row's `reason`; a row with a
reason passes through the later stages untouched, so every row that comes in goes out. Knows nothing of Ray,
schedules or resuming.

A row on its way is a ledger row with four columns more: `pixels` (RGB bytes), `width`, `height`, and `times`
(JSON: which actor of each stage worked on the row's block, for how long, and how long it had waited for it).
"""

import json
import re
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import pyarrow as pa
import torch
from PIL import Image

from mgie.bundles import open_bundle
from mgie.config import ImageLimits
from mgie.errors import ConfigError, DataError, MGIEError
from mgie.images import read_image
from mgie.ledger import LEDGER_SCHEMA, rejection, to_table
from mgie.prompts import SUMMARIZE
from mgie.stores import is_absent
from pipelines.describe import Describer
from pipelines.storage import Folder

_SUMMARIZER_TOKENS = 512  # T5 was trained on inputs of this length

Item = TypeVar("Item")
Result = TypeVar("Result")

PIXEL_FIELDS = [pa.field("pixels", pa.binary()), pa.field("width", pa.int32()), pa.field("height", pa.int32())]
TRAVELLING_SCHEMA = pa.schema([*LEDGER_SCHEMA, *PIXEL_FIELDS, pa.field("times", pa.string())])


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Prompts and settings of a run, recorded by name in every row."""

    describe_max_new_tokens: int
    "limit of a description"
    stop_early: bool
    "end a description at its second sentence; the cleaned text is the same"
    num_beams: int
    "of the summariser"
    min_length: int
    "tokens of a summary"
    max_length: int
    "tokens of a summary"
    no_repeat_ngram_size: int
    "of the summariser"


PRESETS: Mapping[str, Preset] = {
    # The published run. Stopping early changes no text, only the tokens that would be cut.
    "mgie_paper": Preset(
        describe_max_new_tokens=1024, stop_early=True, num_beams=5, min_length=5, max_length=64, no_repeat_ngram_size=3
    ),
    "fast": Preset(
        describe_max_new_tokens=192, stop_early=True, num_beams=1, min_length=5, max_length=64, no_repeat_ngram_size=3
    ),
}


class FetchSources:
    """Reads and decodes the image of each row.

    Args:
        root: Folder that the rows' URIs are relative to.
        column: Which column holds the URI. schema: Of the rows on their way.
    """

    def __init__(
        self,
        root: Folder,
        *,
        column: str = "source",
        schema: pa.Schema = TRAVELLING_SCHEMA,
        limits: ImageLimits = ImageLimits(),  # noqa: B008  # frozen
    ) -> None:
        self._root, self._column, self._schema, self._limits = root, column, schema, limits

    def __call__(self, table: pa.Table) -> pa.Table:
        """Adds pixels, or a reason."""
        return to_table([row | self._fetch(row[self._column]) for row in table.to_pylist()], self._schema)

    def _fetch(self, uri: str) -> dict[str, Any]:
        try:
            image = read_image(self._root.read(uri), limits=self._limits)
        except DataError as error:
            return {"reason": rejection("bad_row", str(error))}
        except MGIEError as error:
            return {"reason": rejection("bad_image", str(error))}
        except OSError as error:
            if not is_absent(error):
                raise  # the store is in trouble, not the row: the task fails and is tried again
            return {"reason": rejection("missing_file", uri)}
        return {"pixels": image.tobytes(), "width": image.width, "height": image.height}


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
        return to_table(rows, TRAVELLING_SCHEMA)

    def _describe(self, rows: Sequence[dict[str, Any]]) -> None:
        def work(part: Sequence[dict[str, Any]]) -> list[Any]:
            images = [Image.frombytes("RGB", (row["width"], row["height"]), row["pixels"]) for row in part]
            return list(self._describer.describe(images, [row["instruction"] for row in part]))

        started = time.perf_counter()
        for row, result in zip(rows, in_halves(work, rows), strict=True):
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


class Summarizer:
    """Flan-T5 with the published prompt.

    Args:
        bundle: One with the part `summarizer`. dtype: float32 or bfloat16; T5 overflows in float16.
    """

    def __init__(self, bundle: str, preset: Preset, *, device: str = "auto", dtype: str = "auto") -> None:
        opened = open_bundle(bundle)
        self._model, self._tokenizer = opened.load_summarizer(device=device, dtype=dtype)
        self._preset = preset
        # Splits between the first and second character of every control token.
        control = sorted(self._tokenizer.all_special_tokens, key=len, reverse=True)
        self._control = re.compile("|".join(f"(?<={re.escape(t[0])})(?={re.escape(t[1:])})" for t in control))
        self.model, self.revision = opened.config.name, opened.identity

    @torch.inference_mode()
    def summarize(self, texts: Sequence[str]) -> list[tuple[str, int, int]]:
        """Summary, tokens read and tokens written for each text."""
        prompts = [self._ids(SUMMARIZE.format(text=text)) for text in texts]
        batch = self._tokenizer.pad({"input_ids": prompts}, return_tensors="pt").to(self._model.device)
        out = self._model.generate(
            **batch,
            do_sample=False,
            num_beams=self._preset.num_beams,
            min_length=self._preset.min_length,
            max_length=self._preset.max_length,
            no_repeat_ngram_size=self._preset.no_repeat_ngram_size,
        )
        num_read = batch["attention_mask"].sum(1).tolist()
        num_written = (out != self._tokenizer.pad_token_id).sum(1).tolist()
        summaries = self._tokenizer.batch_decode(out, skip_special_tokens=True)
        return list(zip([summary.strip() for summary in summaries], num_read, num_written, strict=True))

    def _ids(self, text: str) -> list[int]:
        """Ids of a prompt; too long a one is cut, as in the published run.

        What LLaVA wrote is text, whatever it looks like. T5's tokenizer finds `</s>` and its like even when
        told not to (they are ordinary pieces of its vocabulary), so such a string is encoded in two halves.
        """
        ids: list[int] = []
        for part in self._control.split(text):
            if part:
                ids += self._tokenizer(part, add_special_tokens=False)["input_ids"]
        return [*ids[: _SUMMARIZER_TOKENS - 1], self._tokenizer.eos_token_id]


class Summarize:
    """Verbose to concise: fills `expressive` and settles the row's `status`.

    Args:
        make_summarizer: Called once, where the stage runs. batch_size: Rows per model call.
    """

    def __init__(self, make_summarizer: Callable[[], Summarizer], *, batch_size: int) -> None:
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
            results = in_halves(self._summarizer.summarize, part, key=lambda row: row["verbose"])
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
        return to_table(rows, TRAVELLING_SCHEMA)


def in_halves(
    work: Callable[[Sequence[Any]], list[Result]],
    items: Sequence[Item],
    *,
    key: Callable[[Item], Any] = lambda item: item,
) -> list[Result | Exception]:
    """Results of `work` on all items; a batch that fails is halved, down to the single item at fault.

    Memory that ran out and errors of ours are taken so; a single item that fails gives its exception as its
    result. Anything else is a bug and is raised.
    """
    if not items:
        return []
    try:
        results = work([key(item) for item in items])
    except (torch.OutOfMemoryError, MGIEError) as error:
        if isinstance(error, ConfigError):
            raise  # wrong for every row
        if len(items) == 1:
            return [error]
        if isinstance(error, torch.OutOfMemoryError) and torch.cuda.is_available():
            torch.cuda.empty_cache()
    else:
        return list(results)
    middle = len(items) // 2
    return [*in_halves(work, items[:middle], key=key), *in_halves(work, items[middle:], key=key)]


def one_line(error: Exception) -> str:
    """What an exception says, on one line of bounded length."""
    return " ".join(str(error).split())[:300] or type(error).__name__
