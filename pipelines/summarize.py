#!/usr/bin/env python
"""Manifest -> ledger: LLaVA says what each edit will look like, Flan-T5 makes it concise. A Ray Data job.

    ray job submit --working-dir . -- python pipelines/summarize.py --manifest s3://bucket/manifest --out s3://bucket/ledger

Without arguments: the embedded sample rows and tiny models, into `out/ledger`.

The rows still to do are cut into blocks of `rows_per_commit`. A block is read, described, summarised and written
as one file, whole or not at all, under a name that follows from its rows: a task that Ray runs twice writes the
same file twice. The same command continues an interrupted run: it takes what is not in the ledger yet. Before a
block is described it takes its rows out of a budget of `max_rows_in_flight` and gives them back when its file is
written, so a kill loses at most that many rows of work, and never a written one.
"""

import asyncio
import dataclasses
import hashlib
import itertools
import json
import os
import posixpath
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data
from rich.console import Console

from mgie.bundle.resolve import locate_bundle
from mgie.data.ledger import (
    LEDGER_SCHEMA,
    MANIFEST_SCHEMA,
    count_ledger,
    images_root,
    read_latest,
    read_ledger,
    read_manifest,
    write_images_root,
)
from mgie.errors import ConfigError
from mgie.storage.folder import Folder, open_folder
from pipelines.prepare import PrepareConfig, prepare
from pipelines.reports.summarize import REPORT_HTML, RunTotals, summarize_run, write_report
from pipelines.runs.blocks import (
    PendingRows,
    figures_of,
    figures_table,
    part_name,
    run_blocks,
    write_part,
    write_pending,
)
from pipelines.runs.cluster import StageSize, absolute_bundle, local_bundles
from pipelines.runs.command import Ending, run_command
from pipelines.runs.progress import say
from pipelines.runs.run import open_run
from pipelines.runs.run_record import RunRecord, make_record
from pipelines.runs.settings import LedgerSettings
from pipelines.stages.describe import DescribeEdit
from pipelines.stages.describers import BackendName, Describer, OpenAIDescriber
from pipelines.stages.fetch import FetchSources
from pipelines.stages.summarize import PRESETS, Preset, Summarize, TextSummarizer

PresetName = Literal["mgie_paper", "fast"]

_FETCH_CPUS = 0.25  # waits for storage most of the time
_STALL_S = 1800.0


@dataclass(frozen=True, kw_only=True)
class SummarizeConfig(LedgerSettings):
    """Writes expressive instructions for the rows of a manifest."""

    manifest: str | None = None
    "manifest folder, local or s3://; none: the embedded sample rows"
    out: str = "out/ledger"
    "ledger folder, local or s3://"
    images: str | None = None
    "where the images lie, if not where the manifest says"
    backend: BackendName = "bundle"
    "who describes: a bundle of ours, a LLaVA of transformers, or an OpenAI-compatible endpoint"
    describe_model: str = "tiny-llava"
    "bundle, hub id or folder, or the endpoint's name of the model"
    describe_revision: str | None = None
    "revision of a hub id"
    base_url: str | None = None
    "address of the OpenAI-compatible endpoint, up to /v1; its key is read from OPENAI_API_KEY"
    summarize_model: str = "tiny-summarizer"
    "bundle with a T5"
    preset: PresetName = "mgie_paper"
    "prompts and settings: those of the paper, or faster ones"
    describe_max_new_tokens: int | None = None
    "tokens of a description at most; none: the preset's"
    describe: StageSize = field(default_factory=StageSize)
    "size of the describing stage"
    summarize: StageSize = field(default_factory=StageSize)
    "size of the summarising stage"
    rows_per_commit: int = 32
    "rows of one block, which is written whole or not at all"
    max_rows_in_flight: int = 256
    "rows of work that a kill may lose"
    gpu_hour_price: float | None = None
    "price of one GPU hour, for the report's cost per 1,000 rows"

    def __post_init__(self) -> None:
        super().__post_init__()
        needed = self.rows_per_commit * self.describe.max_actors
        if self.max_rows_in_flight < needed:
            raise ConfigError(
                f"max_rows_in_flight is {self.max_rows_in_flight}; it must be at least {needed}, "
                "rows_per_commit for each describing actor, or some would never work",
                param="max_rows_in_flight",
            )
        if self.backend == "openai" and not self.base_url:
            raise ConfigError("backend is openai; give its --base-url", param="base_url")


def summarize(config: SummarizeConfig, *, console: Console | None = None) -> Ending:
    """Runs the job to its end.

    Raises:
        ConfigError: The output holds another run or has another writer, or the cluster is too small.
        DataError: The manifest cannot be read.
        OSError: A store is in trouble.
        ray.exceptions.RayError: A stage failed.
    """
    out = open_folder(config.out, endpoint=config.endpoint)
    manifest = _open_manifest(config, out, console)
    say(console, f"reading the manifest {manifest.url} ...")
    images = open_folder(images_root(manifest, moved_to=config.images), endpoint=config.endpoint)
    stages = {"describe": config.describe, "summarize": config.summarize}
    with open_run(out, _run_record(config, manifest), config, console) as run:
        is_folder = config.backend != "openai"
        config = dataclasses.replace(
            config,
            describe_model=absolute_bundle(config.describe_model) if is_folder else config.describe_model,
            summarize_model=absolute_bundle(config.summarize_model),
        )
        pending = plan(config, manifest, out)
        num_lost = min(pending.num_rows, config.max_rows_in_flight)
        loss = f"a kill loses at most {num_lost} rows of work" if pending.num_rows else "all are in the ledger"
        run.say(f"{pending.num_rows} rows to do; {loss}; ledger: {out.url}")
        started = time.monotonic()
        totals = RunTotals()
        shared = {"the folder of the images": images, **local_bundles(config.describe_model, config.summarize_model)}
        work = partial(stream, config, out, images, pending)
        run.work(pending, work, stages, shared, task_cpus=_FETCH_CPUS, each=totals.add)
        seconds, counts = time.monotonic() - started, dict(vars(count_ledger(out)))
        if pending.num_rows:
            run.say("making the report ...")
            report = summarize_run(
                totals,
                seconds=seconds,
                num_gpus=sum(stage.max_actors * stage.num_gpus for stage in stages.values()),
                gpu_hour_price=config.gpu_hour_price,
                ledger=counts,
            )
            write_report(out, images, report)
            run.finish(report)
        write_images_root(out, images.url)
    return Ending(
        said=f"{totals.rows} rows written in {seconds:.1f} s; ledger: {out.url}; report: {out.url}/{REPORT_HTML}",
        report={"rows": totals.rows, "seconds": seconds, "ledger": counts},
        num_rows=counts["num_ids"],
        num_rejected=counts["num_rejected"],
        max_rejected=config.max_rejected,
    )


def _open_manifest(config: SummarizeConfig, out: Folder, console: Console | None) -> Folder:
    if config.manifest:
        return open_folder(config.manifest, endpoint=config.endpoint)
    sample = PrepareConfig(out=posixpath.join(posixpath.dirname(out.url), "sample"), endpoint=config.endpoint)
    return open_folder(prepare(sample, console=console).manifest, endpoint=config.endpoint)


def _run_record(config: SummarizeConfig, manifest: Folder) -> RunRecord:
    """What must not be mixed in one ledger: models, preset, rows."""
    decides = {
        "backend": config.backend,
        "describe_model": config.describe_model,
        "describe_revision": config.describe_revision or _identity(config),
        "base_url": config.base_url,
        "summarize_model": config.summarize_model,
        "summarize_revision": locate_bundle(config.summarize_model).identity,
        "preset": config.preset,
        "describe_max_new_tokens": _preset(config).describe_max_new_tokens,
        "dtype": config.dtype,
        "rows": _hash_ids(manifest),
    }
    record = make_record("summarize", config, decides)
    return dataclasses.replace(record, config={**record.config, "manifest": manifest.url})


def _identity(config: SummarizeConfig) -> str | None:
    return locate_bundle(config.describe_model).identity if config.backend == "bundle" else None


def _hash_ids(manifest: Folder) -> str:
    digest = hashlib.sha256()
    for batch in read_manifest(manifest, columns=["id"]):
        digest.update(batch.column("id").to_numpy().tobytes())
    return digest.hexdigest()[:16]


def plan(config: SummarizeConfig, manifest: Folder, out: Folder) -> PendingRows:
    """Writes the rows still to do."""
    latest = read_latest(out, LEDGER_SCHEMA, columns=["id", "attempt", "status"])
    rows = _unseen(manifest, latest.column("id").to_numpy())
    if config.retry_failed and "rejected" in latest.column("status").unique().to_pylist():
        rows = itertools.chain(rows, _failed(out))
    return write_pending(out, rows, LEDGER_SCHEMA, rows_per_block=config.rows_per_commit)


def _unseen(manifest: Folder, done: npt.NDArray[np.int64]) -> Iterator[pa.RecordBatch]:
    for batch in read_manifest(manifest):
        new = ~np.isin(batch.column("id").to_numpy(), done, assume_unique=False)
        yield from _as_ledger(pa.Table.from_batches([batch.filter(pa.array(new))]), attempt=None)


def _failed(out: Folder) -> Iterator[pa.RecordBatch]:
    for batch in read_ledger(out, status="rejected"):
        table = pa.Table.from_batches([batch])
        attempts = pa.array(table.column("attempt").to_numpy() + 1, pa.int32())
        yield from _as_ledger(table.select(MANIFEST_SCHEMA.names), attempt=attempts)


def _as_ledger(table: pa.Table, attempt: pa.Array | None) -> list[pa.RecordBatch]:
    """Manifest rows as ledger rows that nothing has been done for yet."""
    blank = {name: pa.nulls(table.num_rows, LEDGER_SCHEMA.field(name).type) for name in LEDGER_SCHEMA.names}
    columns = blank | {name: table.column(name) for name in MANIFEST_SCHEMA.names}
    columns["attempt"] = pa.array([1] * table.num_rows, pa.int32()) if attempt is None else attempt
    columns["status"] = pa.array(["rejected"] * table.num_rows, pa.string())  # until it is ok
    batches: list[pa.RecordBatch] = pa.table(columns, schema=LEDGER_SCHEMA).to_batches()
    return batches


class RowBudget:
    """Rows that may be under way between the describing stage and the disk.

    A block that fails for good ends the job, so its rows need not come back.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._taken: dict[str, int] = {}
        self._freed = asyncio.Condition()

    async def take(self, block: str, num_rows: int) -> None:
        """Waits until the rows fit; a block that Ray runs again has its rows already.

        Raises:
            TimeoutError: No block was written for half an hour: what was under way is lost, as with a node.
        """
        async with self._freed:
            while block not in self._taken and sum(self._taken.values()) + num_rows > self._limit:
                await asyncio.wait_for(self._freed.wait(), _STALL_S)
            self._taken[block] = num_rows

    async def give_back(self, block: str) -> None:
        """The block is written."""
        async with self._freed:
            self._taken.pop(block, None)
            self._freed.notify_all()


class _Describe(DescribeEdit):
    """The stage as Ray Data runs it."""

    def __init__(
        self, make_describer: Callable[[], Describer], *, preset: PresetName, batch_size: int, budget: Any
    ) -> None:
        def take(table: pa.Table) -> None:
            ray.get(budget.take.remote(part_name(_block_key(table)), table.num_rows))

        super().__init__(make_describer, preset=preset, batch_size=batch_size, before_work=take)


class _SummarizeAndCommit(Summarize):
    """The stage as Ray Data runs it.

    It commits, too: were that another task, the tasks that free the budget might wait for resources that Ray Data
    keeps for a killed job (for minutes), while describing actors wait for the budget.
    """

    def __init__(
        self, make_summarizer: Callable[[], TextSummarizer], *, batch_size: int, out: Folder, budget: Any
    ) -> None:
        super().__init__(make_summarizer, batch_size=batch_size)
        self._out, self._budget = out, budget

    def __call__(self, table: pa.Table) -> pa.Table:
        """The figures of the finished and written block."""
        return _commit(super().__call__(table), out=self._out, budget=self._budget)


def _preset(config: SummarizeConfig) -> Preset:
    preset = PRESETS[config.preset]
    if config.describe_max_new_tokens is None:
        return preset
    return dataclasses.replace(preset, describe_max_new_tokens=config.describe_max_new_tokens)


def make_describer(config: SummarizeConfig) -> Describer:
    """The backend that the configuration names."""
    # Here, because it needs torch: the driver and the tasks that fetch and commit do without.
    from pipelines.stages.local_describers import BundleDescriber, TransformersDescriber

    preset = _preset(config)
    if config.backend == "bundle":
        return BundleDescriber(
            config.describe_model,
            max_new_tokens=preset.describe_max_new_tokens,
            stop_early=preset.stop_early,
            device=config.device,
            dtype=config.dtype,
        )
    if config.backend == "transformers":
        return TransformersDescriber(
            config.describe_model,
            revision=config.describe_revision,
            max_new_tokens=preset.describe_max_new_tokens,
            device=config.device,
            dtype=config.dtype,
        )
    return OpenAIDescriber(
        config.base_url or "",
        model=config.describe_model,
        api_key=os.environ.get("OPENAI_API_KEY"),
        max_new_tokens=preset.describe_max_new_tokens,
    )


def make_summarizer(config: SummarizeConfig) -> TextSummarizer:
    """The model that makes descriptions concise."""
    dtype = "auto" if config.dtype == "float16" else config.dtype  # T5 overflows in float16; auto never chooses it
    from pipelines.stages.summarizer import Summarizer  # here, as above

    return Summarizer(config.summarize_model, _preset(config), device=config.device, dtype=dtype)


def stream(
    config: SummarizeConfig,
    out: Folder,
    images: Folder,
    pending: PendingRows,
    *,
    describer: Callable[[SummarizeConfig], Describer] = make_describer,
    summarizer: Callable[[SummarizeConfig], TextSummarizer] = make_summarizer,
) -> Iterator[dict[str, Any]]:
    """Streams the planned blocks through the stages; gives the figures of each block when it is written.

    Args:
        pending: Blocks that were planned.
        describer: Makes the model of a describing actor. summarizer: Makes that of a summarising one.
    """
    budget: Any = ray.remote(num_cpus=0)(RowBudget).remote(config.max_rows_in_flight)
    describe = {"preset": config.preset, "batch_size": config.describe.batch_size, "budget": budget}
    # Each task is a process; more of them would decode far ahead of the models.
    fetchers = ray.data.TaskPoolStrategy(size=config.describe.max_actors + 2)
    sources = pending.fetch(FetchSources(images), num_cpus=_FETCH_CPUS, compute=fetchers)
    written = sources.map_batches(
        _Describe,
        fn_constructor_args=(partial(describer, config),),
        fn_constructor_kwargs=describe,
        **config.describe.pool(),
    ).map_batches(
        _SummarizeAndCommit,
        fn_constructor_args=(partial(summarizer, config),),
        fn_constructor_kwargs={"batch_size": config.summarize.batch_size, "out": out, "budget": budget},
        **config.summarize.pool(),
    )
    yield from run_blocks(written)


def _commit(rows: pa.Table, *, out: Folder, budget: Any) -> pa.Table:
    """Writes a block, then frees its share of the budget; returns its figures for the report."""
    key = _block_key(rows)
    write_part(out, rows.select(LEDGER_SCHEMA.names), key)
    ray.get(budget.give_back.remote(part_name(key)))
    counted = ("describe_prompt_tokens", "describe_tokens", "summarize_prompt_tokens", "summarize_tokens")
    return figures_table(
        {
            **figures_of(rows),
            "tokens": {name: pc.sum(rows.column(name)).as_py() or 0 for name in counted},
            "stages": json.loads(rows.column("times")[0].as_py()),
        }
    )


def _block_key(rows: pa.Table) -> bytes:
    """Follows from ids and attempts alone, so that the same rows give the same file."""
    return b"".join(rows.column(name).to_numpy().tobytes() for name in ("id", "attempt"))


def main() -> int:
    """The job as a command; returns the exit status."""
    return run_command(SummarizeConfig, summarize, about=__doc__)


if __name__ == "__main__":
    sys.exit(main())
