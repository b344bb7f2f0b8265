#!/usr/bin/env python3
"""Raw data set -> manifest: one row per edit, each checked, identified and located.

    raw folder -> shards -> [Ray: read, check, extract images, hash] -> staged rows -> duplicates -> manifest, rejected

    <out>/manifest/part-00000.parquet ...   and images.json: where the images lie (`mgie.data.ledger`)
    <out>/rejected/part-00000.parquet ...   rows left out, each with its reason
    <out>/images/<sha256>.<ext>             images that lay in containers, each once
    <out>/run.json                          what ran, on what, with what result

The result depends on data and settings alone: the same rows in the same files, whatever runs in parallel. The
same command after a kill goes on with the shards that are not done; after the end it does nothing.
"""

import dataclasses
import functools
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray.data
from rich.console import Console

from mgie.config import ImageLimits, check_range
from mgie.data.ledger import (
    MANIFEST_SCHEMA,
    REJECTED_SCHEMA,
    rejection,
    rejection_code,
    split_rows,
    to_table,
    write_images_root,
)
from mgie.errors import ConfigError, DataError
from mgie.storage.folder import Folder, open_folder
from pipelines.readers import Columns, Layout, Reader, Shard, make_reader
from pipelines.readers.duplicates import PAIR_BYTES, find_duplicates
from pipelines.readers.manifest_rows import STAGED_SCHEMA, RowMaker
from pipelines.runs.command import Ending, run_command
from pipelines.runs.progress import say
from pipelines.runs.run import Run, open_run
from pipelines.runs.run_record import RunRecord, fingerprint

RESULT_VERSION = 1  # another number when the same input gives other rows: old runs are not continued then
SAMPLE = "sample"
STAGING = "_staging"
_STAGED_GROUP_ROWS = 1000
_ROWS_PER_PASS = 250_000  # duplicates are looked for in about 100 MB of signatures at a time


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Raw data set -> manifest. Without arguments: 24 drawn rows, to see it work."""

    input: str = SAMPLE
    "folder of the raw data set, local or s3://bucket/prefix; `sample` draws a small one"
    out: str = ""
    "folder of the run, local or s3://; without it, one in the user's cache folder (for the sample only)"
    layout: Layout = "ipr2pr"
    "how the raw data set is laid out"
    columns: Columns = field(default_factory=Columns)
    dataset: str = ""
    "name of the data set in the rows; without it, the layout"
    licence: str | None = None
    "licence of the data, noted in each row"
    limits: ImageLimits = field(default_factory=ImageLimits)
    keeps_unchanged: bool = False
    "keep edits whose source and goal are the same file"
    keeps_near_duplicates: bool = False
    "keep edits that look the same and ask for the same (exact duplicates always go)"
    rows_per_file: int = 50_000
    "rows of a manifest file"
    endpoint: str | None = None
    "address of an S3 store that is not Amazon's; without it, AWS_ENDPOINT_URL"
    max_tasks: int | None = None
    "most shards at a time; without it, as many as there are free CPUs"
    cpus_per_task: float = 1.0
    "CPUs that Ray reserves for a shard"
    threads_per_task: int = 4
    "edits of a shard that are read at the same time, which hides the latency of stores"
    max_rejected: float = 0.1
    "share of the rows that may be unusable (repeated and unchanged ones are not) without the job ending in status 4"

    def __post_init__(self) -> None:
        check_range("rows_per_file", self.rows_per_file, 1, 10_000_000)
        check_range("cpus_per_task", self.cpus_per_task, 0.0, 1024.0)
        check_range("max_rejected", self.max_rejected, 0.0, 1.0)
        check_range("threads_per_task", self.threads_per_task, 1, 256)
        if self.max_tasks is not None:
            check_range("max_tasks", self.max_tasks, 1, 1_000_000)
        if self.input != SAMPLE and not self.out:
            raise ConfigError("out is not given; name a folder, local or s3://bucket/prefix", param="out")
        if self.input == SAMPLE and self.layout != "ipr2pr":
            raise ConfigError(f"layout is {self.layout!r}; the sample is 'ipr2pr'", param="layout")


_NOT_UNUSABLE = ("exact_duplicate", "near_duplicate", "unchanged")
# What decides the rows. The rest is how fast they come.
_DECISIVE = ("input", "layout", "columns", "dataset", "licence", "limits", "keeps_unchanged", "keeps_near_duplicates", "rows_per_file")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PrepareReport:
    """What a run gave; kept in `run.json`."""

    folder: str
    "folder of the run"
    num_rows: int
    "in the manifest"
    splits: dict[str, int]
    "rows of the manifest by split"
    rejected: dict[str, int]
    "rows left out, by the code of their reason"
    seconds: float
    "seconds of the call that finished"
    was_done: bool
    "an earlier call had finished; this one did nothing"

    @property
    def manifest(self) -> str:
        """Folder of the manifest."""
        return f"{self.folder}/manifest"


def prepare(config: PrepareConfig, *, console: Console | None = None) -> PrepareReport:
    """Runs the job; goes on with a run that was killed.

    Raises:
        ConfigError: The output folder holds something else, another process writes to it, or not all nodes see it.
        DataError: The input is not in the layout, or gives no rows.
        OSError: A store is in trouble.
    """
    say(console, f"reading the names in {config.input} ...")
    source, output = _folders(config)
    reader = make_reader(config.layout, config.columns)
    shards = reader.shards(source)
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name in _DECISIVE}
    content = {"version": RESULT_VERSION, **settings, "input": source.url}
    record = RunRecord(
        job="prepare",
        fingerprint=fingerprint({**content, "shards": [dataclasses.asdict(shard) for shard in shards]}),
        config=content,
    )
    with open_run(output, record, config, console, is_done_once=True) as run:
        if run.is_finished:
            return PrepareReport(**{**(run.found.report or {}), "folder": output.url, "was_done": True})
        return _fill(config, source, run, reader=reader, shards=shards)


def _fill(config: PrepareConfig, source: Folder, run: Run, *, reader: Reader, shards: list[Shard]) -> PrepareReport:
    began, output = time.monotonic(), run.out
    extracts = reader.extracts(source)
    maker = RowMaker(
        folder=source,
        extract_to=output if extracts else None,
        dataset=config.dataset or config.layout,
        licence=config.licence,
        limits=config.limits,
        keeps_unchanged=config.keeps_unchanged,
    )
    _stage(config, maker, run, shards)
    duplicates = _duplicates(run, shards, near=not config.keeps_near_duplicates)
    run.say("writing the manifest ...")
    splits, rejected = _write(config, output, shards, duplicates)
    report = PrepareReport(
        folder=output.url,
        num_rows=sum(splits.values()),
        splits=dict(sorted(splits.items())),
        rejected=dict(sorted(rejected.items())),
        seconds=round(time.monotonic() - began, 3),
        was_done=False,
    )
    if not report.num_rows:
        raise DataError(f"{source.url} gives no rows: all of them are in {output.url}/rejected, {report.rejected}")
    # Relative where the images are in the run's own folder, which can then be moved as a whole.
    write_images_root(output.child("manifest"), ".." if extracts else source.url)
    run.finish(dataclasses.asdict(report))
    output.delete(STAGING)
    return report


def _folders(config: PrepareConfig) -> tuple[Folder, Folder]:
    """The raw data set and the folder of the run; draws the sample where that is what is asked for."""
    if config.input != SAMPLE:
        source = open_folder(config.input, endpoint=config.endpoint)
        if source.is_local and not Path(source.path).is_dir():
            raise ConfigError(f"input is {config.input!r}; there is no such folder", param="input")
        return source, open_folder(config.out, endpoint=config.endpoint)
    from mgie.bundle.embedded import cache_folder
    from mgie.tiny.world import write_layout

    raw = cache_folder() / "sample" / "ipr2pr"
    write_layout("ipr2pr", raw, 24)
    return open_folder(raw), open_folder(config.out or cache_folder() / "sample" / "prepared")


# ---- shards -> staged rows, in parallel


def _staged_name(index: int) -> str:
    return f"{STAGING}/{index:06d}.parquet"


def read_shard(
    task: dict[str, Any], *, maker: RowMaker, output: Folder, layout: Layout, columns: Columns, num_threads: int
) -> dict[str, Any]:
    """Reads, checks and stages one shard. Killed in between it leaves nothing, run twice it writes the same."""
    shard = Shard(**json.loads(task["shard"]))
    reader = make_reader(layout, columns)
    num_rows = 0
    with output.publish(_staged_name(task["index"])) as path, pq.ParquetWriter(path, STAGED_SCHEMA) as writer:
        rows: list[dict[str, Any]] = []
        for row in maker.rows(reader.read(maker.folder, shard), num_threads=num_threads):
            rows.append(row)
            if len(rows) == _STAGED_GROUP_ROWS:
                writer.write_table(to_table(rows, STAGED_SCHEMA))
                num_rows, rows = num_rows + len(rows), []
        writer.write_table(to_table(rows, STAGED_SCHEMA))
    return {"index": task["index"], "num_rows": num_rows + len(rows)}


def _stage(config: PrepareConfig, maker: RowMaker, run: Run, shards: list[Shard]) -> None:
    """Stages the shards that are not staged yet, one Ray task each."""
    output = run.out
    done = {entry.name for entry in output.list(STAGING)}
    tasks = [
        {"index": index, "shard": json.dumps(dataclasses.asdict(shard))}
        for index, shard in enumerate(shards)
        if _staged_name(index).removeprefix(f"{STAGING}/") not in done
    ]
    if not tasks:
        return
    run.join({}, {"the raw data set": maker.folder}, task_cpus=config.cpus_per_task)
    # One block per shard. What crosses the object store are shard descriptions and counts, never images.
    staged = ray.data.from_items(tasks, override_num_blocks=len(tasks)).map(
        functools.partial(
            read_shard,
            maker=maker,
            output=output,
            layout=config.layout,
            columns=config.columns,
            num_threads=config.threads_per_task,
        ),
        num_cpus=config.cpus_per_task,
        compute=ray.data.TaskPoolStrategy(size=config.max_tasks),
    )
    with run.bar("shards", len(shards), done=len(shards) - len(tasks)) as bar:
        num_rows = 0
        for result in staged.iter_rows():
            num_rows += result["num_rows"]
            bar.show(bar.done + 1, f"{num_rows} rows")
            run.lease.check()


# ---- staged rows -> manifest and rejected rows, in the order of the shards


def _staged(output: Folder, shards: list[Shard], columns: list[str]) -> Iterator[pa.RecordBatch]:
    for index in range(len(shards)):
        with output.filesystem.open_input_file(output.at(_staged_name(index))) as file:
            yield from pq.ParquetFile(file, pre_buffer=False).iter_batches(
                batch_size=_STAGED_GROUP_ROWS, columns=columns
            )


def _duplicates(run: Run, shards: list[Shard], *, near: bool) -> dict[int, str]:
    """Reasons of the rows that repeat an earlier one, by their number among all staged rows.

    Rows that could be duplicates share an instruction, hence a remainder of its key: large data sets are looked
    through in several passes, each over the rows of one remainder, so that memory does not grow with them.
    """
    run.say("looking for duplicates ...")
    output = run.out
    num_good = sum(b.num_rows - b.column(0).null_count for b in _staged(output, shards, ["instruction_key"]))
    num_passes = max(1, math.ceil(num_good / _ROWS_PER_PASS))
    reasons: dict[int, str] = {}
    for remainder in range(num_passes):
        if num_passes > 1:
            run.say(f"pass {remainder + 1} of {num_passes} ...")
        numbers, ids, keys, signatures = [], [], [], []
        start = 0
        for batch in _staged(output, shards, ["id", "instruction_key", "signatures"]):
            key = np.asarray(pc.fill_null(batch.column("instruction_key"), -1))
            chosen = np.flatnonzero((key >= 0) & (key % num_passes == remainder))
            part = batch.take(pa.array(chosen))
            numbers.append(chosen + start)
            ids.append(part.column("id").to_numpy(zero_copy_only=False).astype(np.int64))
            keys.append(key[chosen])
            packed = b"".join(part.column("signatures").to_pylist())
            signatures.append(np.frombuffer(packed, dtype=np.uint8).reshape(-1, PAIR_BYTES))
            start += batch.num_rows
        number, id_ = np.concatenate(numbers), np.concatenate(ids)
        repeats = find_duplicates(id_, np.concatenate(keys), np.concatenate(signatures) if near else None)
        for index in np.flatnonzero(repeats >= 0):
            first = repeats[index]
            is_exact = id_[first] == id_[index]
            reasons[int(number[index])] = rejection(
                "exact_duplicate" if is_exact else "near_duplicate", f"repeats the row with id {id_[first]}"
            )
    return reasons


def _write(
    config: PrepareConfig, output: Folder, shards: list[Shard], duplicates: dict[int, str]
) -> tuple[Counter[str], Counter[str]]:
    """Writes both folders; the same files again after a kill. Returns rows by split, and rejected ones by code."""
    splits: Counter[str] = Counter()
    rejected: Counter[str] = Counter()

    def rows(*, is_good: bool) -> Iterator[pa.RecordBatch]:
        schema, start = (MANIFEST_SCHEMA if is_good else REJECTED_SCHEMA), 0
        for batch in _staged(output, shards, REJECTED_SCHEMA.names):
            reasons = batch.column("reason").to_pylist()
            reasons = [reason or duplicates.get(number) for number, reason in enumerate(reasons, start)]
            start += batch.num_rows
            complete = batch.set_column(
                REJECTED_SCHEMA.get_field_index("reason"), "reason", pa.array(reasons, pa.string())
            )
            part = complete.filter(pa.array([(reason is None) == is_good for reason in reasons]))
            if is_good:
                splits.update(part.column("split").to_pylist())
            else:
                rejected.update(rejection_code(reason) for reason in part.column("reason").to_pylist())
            yield pa.RecordBatch.from_arrays([part.column(name) for name in schema.names], schema=schema)

    for name, schema, is_good in (("manifest", MANIFEST_SCHEMA, True), ("rejected", REJECTED_SCHEMA, False)):
        for number, table in enumerate(split_rows(rows(is_good=is_good), schema, config.rows_per_file)):
            with output.publish(f"{name}/part-{number:05d}.parquet") as path:
                pq.write_table(table, path)
    return splits, rejected


def _run(config: PrepareConfig, *, console: Console) -> Ending:
    report = prepare(config, console=console)
    splits, rejected = (
        ", ".join(f"{count} {name}" for name, count in counts.items()) or "none"
        for counts in (report.splits, report.rejected)
    )
    done = "nothing to do: this run was finished before\n" if report.was_done else ""
    return Ending(
        said=f"{done}rows: {splits}; rejected: {rejected}\nmanifest: {report.manifest}",
        num_rows=report.num_rows + sum(report.rejected.values()),
        num_rejected=sum(count for code, count in report.rejected.items() if code not in _NOT_UNUSABLE),
        max_rejected=config.max_rejected,
    )


def main() -> int:
    """The job as a command; returns the exit status."""
    return run_command(PrepareConfig, _run, about=__doc__)


if __name__ == "__main__":
    sys.exit(main())
