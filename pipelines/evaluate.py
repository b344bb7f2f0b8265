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
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import pyarrow as pa
from rich.console import Console

from mgie.bundle.record import BundleRecord
from mgie.bundle.resolve import locate_bundle
from mgie.data.ledger import images_root, read_latest, to_table
from mgie.errors import ConfigError
from mgie.evaluation.metrics import NetworkName
from mgie.evaluation.network_files import Network, find_network
from mgie.storage.folder import Folder, open_folder
from pipelines.reports.evaluate import REPORT_HTML, ReportPlan, write_report
from pipelines.runs.blocks import PendingRows, figures_table, ids_key, stage_blocks, write_part, write_to_do
from pipelines.runs.cluster import StageSize, absolute_bundle, local_bundles
from pipelines.runs.command import Ending, run_command
from pipelines.runs.progress import say
from pipelines.runs.run import open_run
from pipelines.runs.run_record import make_record, read_run
from pipelines.runs.settings import EditSettings
from pipelines.stages.score_rows import (
    EDITED,
    PLANNED_SCHEMA,
    SCORES_SCHEMA,
    FetchPictures,
    Protocol,
    ScoringPlan,
    add_results,
    metrics_of,
    read_rows,
    scores_schema,
)

RESULT_VERSION = 1  # another number when the same rows get other scores: old runs are not continued then
_IMAGES = "images"
_FETCH_CPUS = 0.25  # waits for storage most of the time


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(EditSettings):
    """Scores edits against the goals of a ledger."""

    ledger: str
    "ledger or manifest folder whose rows have goals, local or s3://"
    out: str
    "folder for scores, edited images and report, local or s3://"
    images: str | None = None
    "where the images lie, if not where the ledger says"
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
    scorer: str | None = None
    "module:callable that makes a mgie.evaluation.metrics.RowScorer, which knows more of the rows"
    square_crop: bool | None = None
    "crop to the centre square; none: the bundle's"
    by: tuple[str, ...] = ()
    "also group by these: columns of the manifest, or names in the rows' provenance"
    rank_by: str = "l1"
    "metric that chooses the best, median and worst pictures"
    num_pictures: int = 4
    "number of pictures of each of the three"
    score: StageSize = field(default_factory=lambda: StageSize(num_cpus=1.0))
    "size of the stage that edits and scores"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_rows", "num_pictures"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1", param=name)
        if self.rank_by not in (metrics := metrics_of(self.scorer)):
            raise ConfigError(f"rank_by is {self.rank_by!r}; it must be one of {', '.join(metrics)}", param="rank_by")
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
        return self.sampling | {
            "sweep_image_guidance": self.sweep_image_guidance,
            "give_expressive": self.give_expressive,
        }

    @property
    def sampling(self) -> dict[str, Any]:
        """The sampling settings given."""
        return super().sampling | {"square_crop": self.square_crop}

    @property
    def settings(self) -> dict[str, dict[str, Any]]:
        """Sampling settings by the name of the setting."""
        if not self.sweep_image_guidance:
            return {EDITED: self.sampling}
        scales = dict.fromkeys(self.sweep_image_guidance)
        return {f"image guidance {scale:g}": self.sampling | {"image_guidance_scale": scale} for scale in scales}

    @property
    def networks(self) -> dict[NetworkName, str]:
        """Where each network given is."""
        given: dict[NetworkName, str | None] = {
            "clip": self.clip, "clip_direction": self.clip_direction, "dino": self.dino, "lpips": self.lpips,
        }  # fmt: skip
        return {name: where for name, where in given.items() if where is not None}


def evaluate(config: EvaluateConfig, *, console: Console | None = None) -> Ending:
    """Runs the job to its end.

    Raises:
        ConfigError: The output holds another run or has another writer, a setting is not allowed, or the cluster
            is too small.
        DataError: The ledger or the results cannot be read, or no row could be scored.
        BundleError: The bundle or a network cannot be used.
        OSError: A store is in trouble.
    """
    say(console, f"reading {config.ledger} ...")
    config = dataclasses.replace(config, bundle=absolute_bundle(config.bundle))
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
    if config.scorer:
        about["scorer"] = config.scorer
    with open_run(out, make_record("evaluate", config, about), config, console) as run:
        pending = _plan(config, out, rows)
        run.say(f"{pending.num_rows} rows to score; results: {out.url}")
        # A network of the hub is fetched by every node for itself.
        local = [one for one in networks.values() if one.where == str(one.folder)]
        shared = {"the folder of the images": images, "the folder of results": results, **local_bundles(config.bundle)}
        shared |= {f"network {one.identity}": open_folder(one.folder) for one in local}
        pictures = FetchPictures(images, results)
        run.work(
            pending,
            lambda: stage_blocks(pending, pictures, _Score, plan, out, size=config.score, num_cpus=_FETCH_CPUS),
            {"score": config.score},
            shared,
            task_cpus=_FETCH_CPUS,
        )
        run.say("making the report ...")
        scores = read_latest(out, scores_schema(plan.metrics), key=("id", "setting")).to_pylist()
        report = write_report(out, images, results, scores, _report_plan(config, plan, about))
        run.finish(report["rows"])
    num_compared, num_left_out, reasons = (report["rows"][name] for name in ("compared", "left_out", "reasons"))
    why = ", ".join(f"{count} {code}" for code, count in reasons.items())
    left_out = f"{num_left_out} left out{f' ({why})' if why else ''}"
    return Ending(
        said=f"{num_compared} rows compared, {left_out}; report: {out.url}/{REPORT_HTML}",
        report=report,
        num_rows=num_compared + num_left_out,
        num_rejected=num_left_out,
        max_rejected=config.max_rejected,
    )


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
        scorer=config.scorer,
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
        metrics=plan.metrics,
    )


def _plan(config: EvaluateConfig, out: Folder, rows: Sequence[dict[str, Any]]) -> PendingRows:
    """Writes the rows still to score."""
    columns = ["id", "setting", "attempt", "status"]
    latest = read_latest(out, SCORES_SCHEMA, columns=columns, key=("id", "setting"))
    return write_to_do(
        out,
        rows,
        PLANNED_SCHEMA,
        latest=latest,
        retry_failed=config.retry_failed,
        rows_per_block=config.rows_per_commit,
    )


class _Score:
    """Scores a block and writes it; returns its figures."""

    def __init__(self, plan: ScoringPlan, out: Folder) -> None:
        from pipelines.stages.score import (
            ScoreEdits,  # here, because it needs torch, which the driver and the tasks that fetch do without
        )

        self._score, self._out, self._schema = ScoreEdits(plan), out, scores_schema(plan.metrics)

    def __call__(self, table: pa.Table) -> pa.Table:
        rows = []
        for row, data in self._score(table):
            if data is not None:
                row["edited"] = f"{_IMAGES}/{row['id']:016x}-{row['setting'].replace(' ', '-')}.png"
                self._out.write(row["edited"], data)
            rows.append(row)
        write_part(self._out, to_table(rows, self._schema), ids_key(table))
        return figures_table({"rows": table.num_rows})


def main() -> int:
    """The job as a command; returns the exit status."""
    return run_command(EvaluateConfig, evaluate, about=__doc__)


if __name__ == "__main__":
    sys.exit(main())
