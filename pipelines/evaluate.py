#!/usr/bin/env python
"""Ledger -> scores: edits every row, compares with its goal, writes a table with intervals. A Ray Data job.

    ray job submit --working-dir . -- pipelines/evaluate.py --ledger s3://bucket/ledger --out s3://bucket/scores

Rows are worked on in blocks of `rows_per_commit`. The actor that scores a block also writes it: first the edited
images, then one file of score rows named after the rows. So a kill loses at most the blocks that actors hold, and the
same command continues a run that was interrupted. The report is made of what was written, at the end of each call: the
same command with another `--by` groups the same scores anew.
"""

import dataclasses
import hashlib
import io
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.exceptions
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mgie.bundle.record import BundleRecord
from mgie.bundle.resolve import locate_bundle
from mgie.config import MAX_SEED, Sampler
from mgie.data.ledger import images_root, list_parquet, to_table
from mgie.errors import ConfigError, MGIEError
from mgie.evaluation.metrics import METRICS, NetworkName
from mgie.evaluation.network_files import Network, find_network
from mgie.storage.folder import Folder, open_folder
from pipelines.reports.evaluate import REPORT_HTML, ReportPlan, write_report
from pipelines.runs.blocks import PendingRows, run_blocks, write_pending
from pipelines.runs.cluster import StageSize, cause_of, check_cluster, check_shared, start_ray
from pipelines.runs.lease import hold_lease
from pipelines.runs.run_record import RunRecord, claim, fingerprint, read_run
from pipelines.stages.score_rows import (
    EDITED,
    PLANNED_SCHEMA,
    SCORES_SCHEMA,
    FetchPictures,
    Protocol,
    ScoringPlan,
    add_results,
    read_rows,
)

RESULT_VERSION = 1  # another number when the same rows get other scores: old runs are not continued then
_IMAGES = "images"
_FETCH_CPUS = 0.25  # waits for storage most of the time


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Scores edits against the goals of a ledger."""

    ledger: str
    "ledger or manifest folder whose rows have goals, local or s3://"
    out: str
    "folder for scores, edited images and report, local or s3://"
    images: str | None = None
    "where the images lie, if not where the ledger says"
    endpoint: str | None = None
    "address of an S3 store that is not Amazon's; default: AWS_ENDPOINT_URL"
    bundle: str = "tiny"
    "who edits: embedded name, folder, hub id or s3://bucket/prefix"
    results: str | None = None
    "score the results in this folder of pipelines/edit.py instead"
    protocol: Protocol = "single-turn"
    "multi-turn: the turns of each session one after the other, from the result of the one before; the last is scored"
    sweep_image_guidance: tuple[float, ...] = ()
    "score the edits of each of these image guidance scales, and plot direction against similarity"
    split: Literal["all", "train", "val", "test"] = "all"
    "which rows"
    max_rows: int | None = None
    "at most so many, chosen at random (of multi-turn: sessions)"
    give_expressive: bool = False
    "give the ledger's expressive instructions to the model instead of letting it find some"
    ceiling: bool = True
    "score the goals as the bundle's VAE gives them back, too: no edit by it can be nearer"
    clip: str | None = None
    "CLIP for CLIP-I and CLIP-T, folder or hub id; MagicBrush: openai/clip-vit-base-patch32"
    clip_direction: str | None = None
    "CLIP for direction and image similarity, folder or hub id; InstructPix2Pix: openai/clip-vit-large-patch14"
    dino: str | None = None
    "DINO, folder or hub id; MagicBrush: facebook/dino-vits16"
    lpips: str | None = None
    "folder with the weights of AlexNet and of LPIPS's heads"
    seed: int = 0
    "each row's own seed follows from this one and the row; also that of the intervals"
    steps: int | None = None
    "denoising steps; none: the bundle's"
    guidance_scale: float | None = None
    "text guidance; none: the bundle's"
    image_guidance_scale: float | None = None
    "image guidance; none: the bundle's"
    sampler: Sampler | None = None
    "sampling algorithm; none: the bundle's"
    square_crop: bool | None = None
    "crop to the centre square; none: the bundle's"
    detail_transfer: bool | None = None
    "make the change to the source's own pixels; none: the bundle's"
    by: tuple[str, ...] = ()
    "also group by these: columns of the manifest, or names in the rows' provenance"
    rank_by: str = "l1"
    "metric that chooses the best, median and worst pictures"
    num_pictures: int = 4
    "of each of the three"
    device: str = "auto"
    "auto, cpu or cuda"
    dtype: str = "auto"
    "auto, float32, bfloat16 or float16; metrics are float32"
    score: StageSize = field(default_factory=lambda: StageSize(num_cpus=1.0))
    "size of the stage that edits and scores"
    rows_per_commit: int = 16
    "rows of one block; a kill loses at most this many for each actor"
    retry_failed: bool = False
    "try the rejected rows again, as their next attempt"
    cluster_grows: bool = False
    "the cluster adds nodes on demand: do not refuse to start because it is too small now"

    def __post_init__(self) -> None:
        for name in ("rows_per_commit", "max_rows", "num_pictures"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1", param=name)
        if not 0 <= self.seed <= MAX_SEED:
            raise ConfigError(f"seed is {self.seed}; it must be 0 to {MAX_SEED}", param="seed")
        if self.rank_by not in METRICS:
            raise ConfigError(f"rank_by is {self.rank_by!r}; it must be one of {', '.join(METRICS)}", param="rank_by")
        if self.sweep_image_guidance and self.image_guidance_scale is not None:
            raise ConfigError(
                "a sweep of image guidance was asked for, and one scale of it", param="image_guidance_scale"
            )
        refused = [name for name, value in self._editing.items() if value]
        if self.results is not None and (refused or self.protocol == "multi-turn"):
            what = refused[0] if refused else "protocol"
            raise ConfigError(f"{what} is given, but the results are there already", param=what)

    @property
    def _editing(self) -> dict[str, Any]:
        """What has no effect on results that are there already."""
        return self._sampling | {
            "sweep_image_guidance": self.sweep_image_guidance,
            "give_expressive": self.give_expressive,
        }

    @property
    def _sampling(self) -> dict[str, Any]:
        names = ("steps", "guidance_scale", "image_guidance_scale", "sampler", "square_crop", "detail_transfer")
        return {name: getattr(self, name) for name in names}

    @property
    def settings(self) -> dict[str, dict[str, Any]]:
        """Sampling settings by the name of the setting."""
        if not self.sweep_image_guidance:
            return {EDITED: self._sampling}
        scales = dict.fromkeys(self.sweep_image_guidance)
        return {f"image guidance {scale:g}": self._sampling | {"image_guidance_scale": scale} for scale in scales}

    @property
    def networks(self) -> dict[NetworkName, str]:
        """Where each network given is."""
        given: dict[NetworkName, str | None] = {
            "clip": self.clip, "clip_direction": self.clip_direction, "dino": self.dino, "lpips": self.lpips,
        }  # fmt: skip
        return {name: where for name, where in given.items() if where is not None}


@dataclass(frozen=True)
class EvaluateResult:
    """What a run did."""

    num_pending: int
    num_rejected: int
    "rows that the report leaves out"
    report: Mapping[str, Any]
    "content of report.json"
    out: str


def evaluate(config: EvaluateConfig, *, console: Console | None = None) -> EvaluateResult:
    """Runs the job to its end.

    Raises:
        ConfigError: The output holds another run or has another writer, a setting is not allowed, or the cluster
            is too small.
        DataError: The ledger or the results cannot be read, or no row could be scored.
        BundleError: The bundle or a network cannot be used.
        OSError: A store is in trouble.
    """
    console = console or Console(quiet=True)
    ledger, out = (open_folder(where, endpoint=config.endpoint) for where in (config.ledger, config.out))
    images = open_folder(images_root(ledger, moved_to=config.images), endpoint=config.endpoint)
    results = open_folder(config.results, endpoint=config.endpoint) if config.results else out
    rows = read_rows(
        ledger,
        split=config.split,
        max_rows=config.max_rows,
        protocol=config.protocol,
        gives_expressive=config.give_expressive,
    )
    known = {name for row in rows for name in json.loads(row["facts"])}
    if unknown := [name for name in config.by if name not in known]:
        raise ConfigError(f"by is {unknown[0]!r}; the rows have {', '.join(sorted(known))}", param="by")
    if config.results:
        rows = add_results(rows, results)
    bundle = None if config.results else locate_bundle(config.bundle)
    networks = {name: find_network(where) for name, where in config.networks.items()}
    plan = _scoring_plan(config, bundle, networks)
    about = {
        "version": RESULT_VERSION,
        "edited_by": f"{bundle.config.name} {bundle.identity}" if bundle else _who_edited(results),
        "settings": plan.settings,
        "protocol": config.protocol,
        "give_expressive": config.give_expressive,
        "ceiling": plan.has_ceiling,
        "networks": {name: network.identity for name, network in networks.items()},
        "seed": config.seed,
        "dtype": config.dtype,
        "rows": hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:16],
    }  # no paths: it is the same wherever things lie
    run = RunRecord(job="evaluate", fingerprint=fingerprint(about), config=dataclasses.asdict(config) | about)
    claim(out, run)
    with hold_lease(out) as lease:
        pending = _plan(config, out, rows)
        console.print(f"{pending.num_rows} rows to score; results: {out.url}", soft_wrap=True)
        if pending.num_rows:
            console.print("joining or starting Ray, which may take half a minute ...")
            start_ray()
            check_cluster({"score": config.score}, task_cpus=_FETCH_CPUS, grows=config.cluster_grows)
            shared = {"the output folder": out, "the folder of the images": images, "the folder of results": results}
            # One of the hub is fetched by every node for itself.
            local = [one for one in networks.values() if one.where == str(one.folder)]
            check_shared(shared | {f"network {one.identity}": open_folder(one.folder) for one in local})
            blocks = _stream(config, plan, out, FetchPictures(images, results), pending)
            for _ in _with_bar(blocks, pending.num_rows, console):
                lease.check()
        pending.delete()
        report = write_report(out, images, results, _latest(out), _report_plan(config, plan, about))
        dataclasses.replace(run, is_finished=True, report=report["rows"]).write(out)
    return EvaluateResult(pending.num_rows, report["rows"]["left_out"], report, out.url)


def _who_edited(results: Folder) -> str:
    run = read_run(results)
    return f"run {run.fingerprint if run else 'unknown'} of pipelines/edit.py"


def _scoring_plan(
    config: EvaluateConfig, bundle: BundleRecord | None, networks: Mapping[NetworkName, Network]
) -> ScoringPlan:
    """Raises ConfigError for bad settings, before anything starts."""
    settings = config.settings
    if bundle is not None:
        defaults = bundle.config.defaults
        settings = {name: dataclasses.asdict(defaults.override(**given)) for name, given in settings.items()}
    return ScoringPlan(
        bundle=config.bundle if bundle else None,
        settings=settings,
        has_ceiling=config.ceiling and bundle is not None,
        networks={name: network.where for name, network in networks.items()},
        seed=config.seed,
        batch_size=config.score.batch_size,
        device=config.device,
        dtype=config.dtype,
    )


def _report_plan(config: EvaluateConfig, plan: ScoringPlan, about: Mapping[str, Any]) -> ReportPlan:
    is_sweep = bool(config.sweep_image_guidance)
    return ReportPlan(
        about=about,
        settings=plan.names,
        sweep={name: given["image_guidance_scale"] for name, given in plan.settings.items()} if is_sweep else {},
        networks=tuple(plan.networks),
        by=config.by,
        rank_by=config.rank_by,
        num_pictures=config.num_pictures,
        seed=config.seed,
    )


def _with_bar(blocks: Iterator[int], num_rows: int, console: Console) -> Iterator[int]:
    columns = (TextColumn("rows"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("rows", total=num_rows)
        for num_done in blocks:
            bar.update(task, advance=num_done)
            yield num_done


def _latest(out: Folder) -> list[dict[str, Any]]:
    """The score rows of each id's highest attempt."""
    rows: list[dict[str, Any]] = []
    for path in list_parquet(out):
        rows += pq.read_table(path, schema=SCORES_SCHEMA, filesystem=out.filesystem).to_pylist()
    last: dict[int, int] = {}
    for row in rows:
        last[row["id"]] = max(last.get(row["id"], 0), row["attempt"])
    return [row for row in rows if row["attempt"] == last[row["id"]]]


def _plan(config: EvaluateConfig, out: Folder, rows: Sequence[dict[str, Any]]) -> PendingRows:
    """Writes the rows still to score."""
    found = _latest(out)
    done = {row["id"]: row["attempt"] for row in found}
    pending = [row for row in rows if row["id"] not in done]
    if config.retry_failed:
        failed = {row["id"] for row in found if row["status"] == "rejected"}
        pending += [row | {"attempt": done[row["id"]] + 1} for row in rows if row["id"] in failed]
    return write_pending(
        out, to_table(pending, PLANNED_SCHEMA).to_batches(), PLANNED_SCHEMA, rows_per_block=config.rows_per_commit
    )


class _Score:
    """Scores a block and writes it; returns its figures."""

    def __init__(self, plan: ScoringPlan, out: Folder) -> None:
        from pipelines.stages.score import (
            ScoreEdits,  # here, because it needs torch, which the driver and the tasks that fetch do without
        )

        self._score, self._out = ScoreEdits(plan), out

    def __call__(self, table: pa.Table) -> pa.Table:
        rows = []
        for row, data in self._score(table):
            if data is not None:
                row["edited"] = f"{_IMAGES}/{row['id']:016x}-{row['setting'].replace(' ', '-')}.png"
                self._out.write(row["edited"], data)
            rows.append(row)
        buffer = io.BytesIO()
        pq.write_table(to_table(rows, SCORES_SCHEMA), buffer)
        keys = list(zip(table.column("id").to_pylist(), table.column("attempt").to_pylist(), strict=True))
        name = hashlib.sha256(json.dumps(keys).encode()).hexdigest()[:20]
        self._out.write(f"part-{name}.parquet", buffer.getvalue())
        return pa.table({"rows": [table.num_rows]})


def _stream(
    config: EvaluateConfig, plan: ScoringPlan, out: Folder, pictures: FetchPictures, pending: PendingRows
) -> Iterator[int]:
    """Runs the blocks; yields the number of rows of each when it is written."""
    written = pending.fetch(pictures, num_cpus=_FETCH_CPUS).map_batches(
        _Score, fn_constructor_args=(plan, out), **config.score.pool()
    )
    yield from run_blocks(written, "rows")


def main() -> int:
    """Entry point; returns the exit status: 0 every row was scored, 1 some were not, 2 the job could not run."""
    console, errors = Console(), Console(stderr=True, style="red", soft_wrap=True, markup=False, highlight=False)
    try:
        outcome = evaluate(tyro.cli(EvaluateConfig), console=console)
    except MGIEError as error:
        errors.print(f"error: {error}")
        return 2
    except (OSError, ray.exceptions.RayError) as error:
        cause = cause_of(error)
        errors.print(f"error: {type(cause).__name__}: {cause}\nthe same command continues the run")
        return 2
    reasons = ", ".join(f"{count} {code}" for code, count in outcome.report["rows"]["reasons"].items())
    left_out = f"{outcome.num_rejected} left out{f' ({reasons})' if reasons else ''}"
    console.print(
        f"{outcome.report['rows']['compared']} rows compared, {left_out}; report: {outcome.out}/{REPORT_HTML}",
        soft_wrap=True,
    )
    return 1 if outcome.num_rejected else 0


if __name__ == "__main__":
    sys.exit(main())
