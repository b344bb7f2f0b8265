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
import json
import posixpath
import sys
from dataclasses import dataclass, field
from typing import Annotated, Any

import pyarrow as pa
import tyro
from rich.console import Console

from mgie.bundle.resolve import locate_bundle
from mgie.data.edit_list import parse_edit_list
from mgie.data.ledger import EDITS_SCHEMA, IMAGES_FILE, images_root, read_latest, read_manifest, row_id, to_table
from mgie.errors import ConfigError, DataError
from mgie.images.files import IMAGE_SUFFIXES, OutputFormat
from mgie.storage.folder import Folder, open_folder
from pipelines.runs.blocks import PendingRows, figures_of, figures_table, ids_key, stage_blocks, write_part, write_to_do
from pipelines.runs.cluster import StageSize, absolute_bundle, local_bundles
from pipelines.runs.command import Ending, run_command
from pipelines.runs.progress import say
from pipelines.runs.run import open_run
from pipelines.runs.run_record import make_record
from pipelines.runs.settings import EditSettings
from pipelines.stages.fetch import EDIT_ROW_SCHEMA, FetchSources
from pipelines.stages.seeds import row_seed

_IMAGES = "images"
_FETCH_CPUS = 0.25  # waits for storage most of the time


@dataclass(frozen=True, kw_only=True)
class EditConfig(EditSettings):
    """Edits many images."""

    source: Annotated[str, tyro.conf.Positional]
    "folder of images, .jsonl file of objects with image, instruction and optionally expressive and seed, or manifest folder"
    instruction: Annotated[str, tyro.conf.Positional] = ""
    "what to change, for a folder of images; the others name their own"
    out: str = "edited"
    "folder for results and ledger, local or s3://"
    format: OutputFormat = "png"
    "file format of the results"
    edit: StageSize = field(default_factory=lambda: StageSize(num_cpus=1.0))
    "size of the editing stage"


def edit(config: EditConfig, *, console: Console | None = None) -> Ending:
    """Runs the job to its end.

    Raises:
        ConfigError: The output holds another run or has another writer, a setting is not allowed, or the cluster
            is too small.
        DataError: The source cannot be read.
        ImageError: A folder holds no images.
        OSError: A store is in trouble.
    """
    say(console, f"reading {config.source} ...")
    config = dataclasses.replace(config, bundle=absolute_bundle(config.bundle))
    bundle = locate_bundle(config.bundle)
    bundle.config.defaults.override(**config.sampling)  # refuses bad settings before anything starts
    out = open_folder(config.out, endpoint=config.endpoint)
    images, rows = _read_source(config)
    decides = {
        "bundle_identity": bundle.identity,
        "settings": config.sampling,
        "seed": config.seed,
        "format": config.format,
        "dtype": config.dtype,
        "rows": hashlib.sha256(json.dumps([row["id"] for row in rows]).encode()).hexdigest()[:16],
    }
    with open_run(out, make_record("edit", config, decides), config, console) as run:
        pending = _plan(config, out, rows)
        run.say(f"{pending.num_rows} edits to do; results: {out.url}")
        shared = {"the folder of the images": images, **local_bundles(config.bundle)}
        sources = FetchSources(images, column="image", schema=EDIT_ROW_SCHEMA)
        run.work(
            pending,
            lambda: stage_blocks(pending, sources, _Edit, config, out, size=config.edit, num_cpus=_FETCH_CPUS),
            {"edit": config.edit},
            shared,
            task_cpus=_FETCH_CPUS,
        )
        figures = figures_of(read_latest(out, EDITS_SCHEMA, columns=["id", "attempt", "status", "reason"]))
        run.finish({"status": figures["status"], "reasons": figures["reasons"]})
    num_ok, num_rejected = (figures["status"][name] for name in ("ok", "rejected"))
    reasons = ", ".join(f"{count} {code}" for code, count in sorted(figures["reasons"].items()))
    return Ending(
        said=f"{num_ok} edited, {num_rejected} rejected{f' ({reasons})' if reasons else ''}; "
        f"results and ledger: {out.url}",
        report=figures,
        num_rows=num_ok + num_rejected,
        num_rejected=num_rejected,
        max_rejected=config.max_rejected,
    )


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
            names = [entry.name for entry in folder.list() if entry.name.lower().endswith(IMAGE_SUFFIXES)]
            if not names:
                raise DataError(f"{folder.url} holds neither a manifest nor images ({', '.join(IMAGE_SUFFIXES)})")
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


def _plan(config: EditConfig, out: Folder, rows: list[dict[str, Any]]) -> PendingRows:
    """Writes the edits still to do."""
    latest = read_latest(out, EDITS_SCHEMA, columns=["id", "attempt", "status"])
    return write_to_do(
        out, rows, EDITS_SCHEMA, latest=latest, retry_failed=config.retry_failed, rows_per_block=config.rows_per_commit
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
            settings=config.sampling,
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
        write_part(self._out, finished, ids_key(finished))
        return figures_table(figures_of(finished))


def main() -> int:
    """The job as a command; returns the exit status."""
    return run_command(EditConfig, edit, about=__doc__)


if __name__ == "__main__":
    sys.exit(main())
