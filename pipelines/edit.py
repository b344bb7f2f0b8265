#!/usr/bin/env python
"""Bulk edits: a folder, a JSONL file or a manifest of (image, instruction) -> edited images and a ledger. A Ray Data job.

    ray job submit --working-dir . -- python pipelines/edit.py photos "make it night" --out edited

Rows are worked on in blocks of `rows_per_commit`. The actor that edits a block also writes it: first the images,
each under the id of its edit, then one file of ledger rows named after the rows. So a kill loses at most the blocks
that actors hold, a block that Ray runs again overwrites its own files, and the same command continues a run that was
interrupted.
"""

import dataclasses
import hashlib
import io
import json
import posixpath
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.exceptions
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mgie.bundle.resolve import locate_bundle
from mgie.config import MAX_SEED, Sampler
from mgie.data.edit_list import parse_edit_list
from mgie.data.ledger import (
    EDITS_SCHEMA,
    IMAGES_FILE,
    images_root,
    list_parquet,
    read_manifest,
    rejection_code,
    row_id,
    to_table,
)
from mgie.errors import ConfigError, DataError, MGIEError
from mgie.images.files import OutputFormat
from mgie.storage.folder import Folder, open_folder
from pipelines.runs.blocks import PendingRows, run_blocks, write_pending
from pipelines.runs.cluster import StageSize, check_cluster, check_shared, start_ray
from pipelines.runs.lease import hold_lease
from pipelines.runs.run_record import RunRecord, claim, fingerprint
from pipelines.stages.fetch import EDIT_ROW_SCHEMA, FetchSources
from pipelines.stages.seeds import row_seed

_IMAGES = "images"
_FETCH_CPUS = 0.25  # waits for storage most of the time
_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".heic", ".heif")


@dataclass(frozen=True, kw_only=True)
class EditConfig:
    """Edits many images."""

    source: Annotated[str, tyro.conf.Positional]
    "folder of images, .jsonl file of objects with image, instruction and optionally expressive and seed, or manifest folder"
    instruction: Annotated[str, tyro.conf.Positional] = ""
    "what to change, for a folder of images; the others name their own"
    out: str = "edited"
    "folder for results and ledger, local or s3://"
    endpoint: str | None = None
    "address of an S3 store that is not Amazon's; default: AWS_ENDPOINT_URL"
    bundle: str = "tiny"
    "embedded name, folder, hub id or s3://bucket/prefix"
    seed: int = 0
    "each row's own seed follows from this one and the row, unless the row names one"
    steps: int | None = None
    "denoising steps; none: the bundle's"
    guidance_scale: float | None = None
    "text guidance; none: the bundle's"
    image_guidance_scale: float | None = None
    "image guidance; none: the bundle's"
    sampler: Sampler | None = None
    "sampling algorithm; none: the bundle's"
    detail_transfer: bool | None = None
    "make the change to the photo's own pixels; none: the bundle's"
    format: OutputFormat = "png"
    "file format of the results"
    device: str = "auto"
    "auto, cpu or cuda"
    dtype: str = "auto"
    "auto, float32, bfloat16 or float16"
    edit: StageSize = field(default_factory=lambda: StageSize(num_cpus=1.0))
    "size of the editing stage"
    rows_per_commit: int = 16
    "rows of one block; a kill loses at most this many for each editing actor"
    retry_failed: bool = False
    "try the rejected rows again, as their next attempt"
    cluster_grows: bool = False
    "the cluster adds nodes on demand: do not refuse to start because it is too small now"

    def __post_init__(self) -> None:
        if self.rows_per_commit < 1:
            raise ConfigError(
                f"rows_per_commit is {self.rows_per_commit}; it must be at least 1", param="rows_per_commit"
            )
        if not 0 <= self.seed <= MAX_SEED:
            raise ConfigError(f"seed is {self.seed}; it must be 0 to {MAX_SEED}", param="seed")

    @property
    def settings(self) -> dict[str, Any]:
        """The sampling settings given."""
        names = ("steps", "guidance_scale", "image_guidance_scale", "sampler", "detail_transfer")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class EditRunResult:
    """What a run did, and where it lies."""

    num_pending: int
    by_status: Counter[str]
    by_reason: Counter[str]
    out: str


def edit(config: EditConfig, *, console: Console | None = None) -> EditRunResult:
    """Runs the job to its end.

    Raises:
        ConfigError: The output holds another run or has another writer, a setting is not allowed, or the cluster
            is too small.
        DataError: The source cannot be read.
        ImageError: A folder holds no images.
        OSError: A store is in trouble.
    """
    console = console or Console(quiet=True)
    bundle = locate_bundle(config.bundle)
    bundle.config.defaults.override(**config.settings)  # refuses bad settings before anything starts
    out = open_folder(config.out, endpoint=config.endpoint)
    images, rows = _read_source(config)
    decides = {
        "bundle_identity": bundle.identity,
        "settings": config.settings,
        "seed": config.seed,
        "format": config.format,
        "dtype": config.dtype,
        "rows": _hash_ids(rows),
    }
    run = RunRecord(job="edit", fingerprint=fingerprint(decides), config=dataclasses.asdict(config) | decides)
    claim(out, run)
    console.print("joining or starting Ray, which may take half a minute ...")
    start_ray()
    check_cluster({"edit": config.edit}, task_cpus=_FETCH_CPUS, grows=config.cluster_grows)
    check_shared({"the output folder": out, "the folder of the images": images})
    by_status, by_reason = Counter[str](), Counter[str]()
    with hold_lease(out) as lease:
        pending = _plan(config, out, rows)
        console.print(f"{pending.num_rows} edits to do; results: {out.url}", soft_wrap=True)
        if pending.num_rows:
            bar = Progress(
                TextColumn("edits"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console
            )
            with bar:
                task = bar.add_task("edits", total=pending.num_rows)
                for block in _stream(config, out, images, pending):
                    by_status.update(block["status"])
                    by_reason.update(block["reasons"])
                    bar.update(task, completed=by_status.total())
                    lease.check()
        pending.delete()
        dataclasses.replace(run, is_finished=True, report={"status": by_status, "reasons": by_reason}).write(out)
    return EditRunResult(pending.num_rows, by_status, by_reason, out.url)


def _read_source(config: EditConfig) -> tuple[Folder, list[dict[str, Any]]]:
    """The folder that image URIs are relative to, and the edits asked for."""
    if config.source.endswith(".jsonl"):
        folder = open_folder(posixpath.dirname(config.source) or ".", endpoint=config.endpoint)
        asked = _read_list(folder, posixpath.basename(config.source))
    else:
        folder = open_folder(config.source, endpoint=config.endpoint)
        if folder.exists(IMAGES_FILE):
            asked = [
                {"image": row["source"], "instruction": row["instruction"]}
                for batch in read_manifest(folder, columns=["source", "instruction"])
                for row in batch.to_pylist()
            ]
            folder = open_folder(images_root(folder), endpoint=config.endpoint)
        else:
            names = [entry.name for entry in folder.list() if entry.name.lower().endswith(_IMAGE_SUFFIXES)]
            if not names:
                raise DataError(f"{folder.url} holds neither a manifest nor images ({', '.join(_IMAGE_SUFFIXES)})")
            asked = [{"image": name, "instruction": config.instruction} for name in names]
            if not config.instruction.strip():
                raise ConfigError("an instruction is needed for a folder of images", param="instruction")
            return folder, _edits(config, asked)
    if config.instruction:
        raise ConfigError("an instruction was given, but the source names its own", param="instruction")
    return folder, _edits(config, asked)


def _read_list(folder: Folder, name: str) -> list[dict[str, Any]]:
    try:
        content = folder.read(name)
    except OSError as error:
        raise DataError(f"{folder.url}/{name} cannot be read: {error}") from error
    return parse_edit_list(content, name)


def _edits(config: EditConfig, asked: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of `EDITS_SCHEMA` that nothing has been done for yet; an edit asked for twice is one."""
    rows: dict[int, dict[str, Any]] = {}
    for row in asked:
        given = row.get("expressive")
        key = json.dumps([row["image"], given, row.get("seed")]).encode()
        number = row_id(key, b"", row["instruction"], "forward")
        rows[number] = {
            "id": number,
            "image": row["image"],
            "instruction": row["instruction"],
            "given": given,
            "seed": row["seed"] if row.get("seed") is not None else row_seed(config.seed, number),
            "attempt": 1,
            "status": "rejected",  # until it is ok
        }
    return list(rows.values())


def _hash_ids(rows: list[dict[str, Any]]) -> str:
    return hashlib.sha256(json.dumps([row["id"] for row in rows]).encode()).hexdigest()[:16]


def _plan(config: EditConfig, out: Folder, rows: list[dict[str, Any]]) -> PendingRows:
    """Writes the edits still to do."""
    last: dict[int, tuple[int, str]] = {}
    for path in list_parquet(out):
        table = pq.read_table(path, columns=["id", "attempt", "status"], filesystem=out.filesystem)
        for number, attempt, status in zip(*(column.to_pylist() for column in table.columns), strict=True):
            last[number] = max(last.get(number, (0, "")), (attempt, status))
    pending = [row for row in rows if row["id"] not in last]
    if config.retry_failed:
        failed = {number: attempt for number, (attempt, status) in last.items() if status == "rejected"}
        pending += [row | {"attempt": failed[row["id"]] + 1} for row in rows if row["id"] in failed]
    return write_pending(
        out, to_table(pending, EDITS_SCHEMA).to_batches(), EDITS_SCHEMA, rows_per_block=config.rows_per_commit
    )


class _Edit:
    """Edits a block and writes it; returns its figures."""

    def __init__(self, config: EditConfig, out: Folder) -> None:
        from pipelines.stages.edit import (
            EditImages,  # here, because it needs torch, which the driver and the tasks that fetch do without
        )

        self._out, self._format = out, config.format
        self._edit = EditImages(
            config.bundle,
            settings=config.settings,
            output_format=config.format,
            batch_size=config.edit.batch_size,
            device=config.device,
            dtype=config.dtype,
        )

    def __call__(self, table: pa.Table) -> pa.Table:
        rows = self._edit(table).to_pylist()
        for row in rows:
            if row["data"] is not None:
                name = posixpath.splitext(posixpath.basename(row["image"]))[0][:100]
                row["edited"] = f"{_IMAGES}/{name}-edited-{row['id']:016x}.{self._format}"
                self._out.write(row["edited"], row["data"])
        finished = to_table([{name: row[name] for name in EDITS_SCHEMA.names} for row in rows], EDITS_SCHEMA)
        buffer = io.BytesIO()
        pq.write_table(finished, buffer)
        name = hashlib.sha256(json.dumps([(row["id"], row["attempt"]) for row in rows]).encode()).hexdigest()[:20]
        self._out.write(f"part-{name}.parquet", buffer.getvalue())
        figures = {
            "status": Counter(row["status"] for row in rows),
            "reasons": Counter(rejection_code(row["reason"]) for row in rows if row["reason"]),
        }
        return pa.table({"block": [json.dumps(figures)]})


def _stream(config: EditConfig, out: Folder, images: Folder, pending: PendingRows) -> Iterator[dict[str, Any]]:
    """Runs the blocks; yields the figures of each when it is written."""
    sources = FetchSources(images, column="image", schema=EDIT_ROW_SCHEMA)
    written = pending.fetch(sources, num_cpus=_FETCH_CPUS).map_batches(
        _Edit, fn_constructor_args=(config, out), **config.edit.pool()
    )
    yield from map(json.loads, run_blocks(written, "block"))


def main() -> int:
    """Entry point; returns the exit status: 0 every edit was done, 1 some were rejected, 2 the job could not run."""
    console = Console()
    try:
        outcome = edit(tyro.cli(EditConfig), console=console)
    except (MGIEError, OSError, ray.exceptions.RayError) as error:
        Console(stderr=True).print(f"error: {error}", markup=False, soft_wrap=True)
        return 2
    reasons = ", ".join(f"{count} {code}" for code, count in sorted(outcome.by_reason.items()))
    done = f"{outcome.by_status['ok']} edited, {outcome.by_status['rejected']} rejected"
    console.print(f"{done}{f' ({reasons})' if reasons else ''}; results and ledger: {outcome.out}", soft_wrap=True)
    return 1 if outcome.by_status["rejected"] else 0


if __name__ == "__main__":
    sys.exit(main())
