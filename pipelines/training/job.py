"""A training run from its folder's claim to its report: rows, workers that may die, checkpoints, numbers."""

import contextlib
import dataclasses
import functools
import json
import statistics
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray.exceptions
from ray.train.v2.api.config import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError
from ray.train.v2.torch.torch_trainer import TorchTrainer
from rich.console import Console

from mgie.bundle.bundle import Bundle, open_bundle
from mgie.errors import MGIEError
from mgie.storage.folder import Folder, open_folder
from mgie.training.variants import check_variant, open_caches, training_side_px
from pipelines.reports.train import plot_run
from pipelines.runs.cluster import StageSize, absolute_bundle, local_bundles
from pipelines.runs.command import Ending, FaultError, causes
from pipelines.runs.progress import say
from pipelines.runs.run import Run, open_run
from pipelines.runs.run_record import RunRecord, make_record
from pipelines.training.checkpoints import CHECKPOINTS, repair_checkpoints
from pipelines.training.config import TrainConfig
from pipelines.training.rows import FrozenRows, freeze_rows, open_rows
from pipelines.training.tracking import RunMetrics, read_last, read_metrics
from pipelines.training.worker import SCORE, TrainingJob, cache_kinds, train_worker

METRICS_FILE, PLOT_FILE = "metrics.jsonl", "summary.svg"
_LOCAL_POLL_S, _STORE_POLL_S = 0.5, 5.0


def run_training(config: TrainConfig, console: Console | None) -> Ending:
    """The job; see `pipelines.train.train`."""
    say(console, f"opening bundle {config.init} and the ledgers ...")
    init = absolute_bundle(config.init)
    bundle = open_bundle(init)
    check_variant(bundle, config.training.variant)
    out, *ledgers = (open_folder(url, endpoint=config.endpoint) for url in (config.out, *config.ledger))
    record = _run_record(config, ledgers, bundle)
    with open_run(out, record, config, console, is_done_once=True, may_grow="training.steps") as run:
        if run.is_finished:
            said = "the run was finished before; more --training.steps continue it, another run needs another --out\n"
            return _ending(run, run.found.report or {}, said)
        run.say("reading the rows ...")
        rows = freeze_rows(
            out,
            ledgers,
            images=config.images,
            validation_share=config.validation_share,
            needs_expressive=config.training.variant != "ip2p",
        )
        job = _job(config, out, rows, init=init, bundle=bundle)
        _check_cache(job, bundle)
        run.say(f"{rows.num_train} rows to train on, {rows.num_validation} to validate on; run: {out.url}")
        _join(config, job, run)
        started = time.monotonic()
        num_failures = _fit_patiently(config, job, run)
        report = _finish(job, seconds=time.monotonic() - started, num_failures=num_failures)
        run.finish(report)
    return _ending(run, report)


def _ending(run: Run, report: Mapping[str, Any], said: str = "") -> Ending:
    final = "".join(f", {name} {value:.4f}" for name, value in report.get("final", {}).items() if value is not None)
    again = f", {num} of them repeated" if (num := report.get("repeated_steps")) else ""
    done = f"{report.get('steps', 0)} steps{again} in {report.get('seconds', 0):.0f} s{final}; run: {run.out.url}"
    return Ending(said=f"{said}{done}\nmgie export {run.out.url} --out FOLDER makes a bundle of it", report=report)


def _join(config: TrainConfig, job: TrainingJob, run: Run) -> None:
    size = config.workers
    stage = StageSize(
        min_actors=size.num, max_actors=max(size.num, size.max), num_cpus=size.num_cpus, num_gpus=size.num_gpus
    )
    shared = {f"the folder of the images {k}": images for k, images in enumerate(job.images)}
    shared |= local_bundles(job.init)
    if job.cache:
        shared["the cache"] = job.cache
    run.join({"workers": stage}, shared, task_cpus=0)


def _run_record(config: TrainConfig, ledgers: list[Folder], bundle: Bundle) -> RunRecord:
    """What must not change while a run goes on: all that decides its numbers, but for the rounding."""
    decides = {
        "training": dataclasses.asdict(config.training),
        "init": bundle.identity,
        "ledger": [ledger.url for ledger in ledgers],
        "weights": list(config.weights),
        "validation_share": config.validation_share,
    }
    return make_record("train", config, decides)


def _job(config: TrainConfig, out: Folder, rows: FrozenRows, *, init: str, bundle: Bundle) -> TrainingJob:
    roots = config.images or tuple(ledger.images for ledger in rows.ledgers)
    return TrainingJob(
        out=out,
        settings=config,
        rows=rows,
        images=tuple(open_folder(root, endpoint=config.endpoint) for root in roots),
        cache=open_folder(config.cache, endpoint=config.endpoint) if config.cache else None,
        init=init,
        identity=bundle.identity,
    )


def _check_cache(job: TrainingJob, bundle: Bundle) -> None:
    """Matches a local cache with bundle and rows; one in a store is matched by each worker when it has copied it."""
    cache = job.cache
    if cache is None:
        return
    kinds = cache_kinds(cache, job.config)
    if cache.is_local and job.out.is_local:
        rows = open_rows(job.out, job.images, Path())
        side_px = training_side_px(bundle, job.config)
        open_caches(
            lambda kind: Path(cache.path) if kind in kinds else None, bundle, [*rows.train, *rows.validation], side_px
        )


# ---- fitting


def _fit_patiently(config: TrainConfig, job: TrainingJob, run: Run) -> int:
    """Trains to the end, again and again where workers or the controller die; returns how often they did.

    Ray Train could replace workers by itself, but would also try again what can only fail again.
    """
    num_failures = num_in_place = 0
    newest = None
    while True:
        snapshots = repair_checkpoints(job.out, score=SCORE if config.keep_by == "loss" else None)
        if snapshots and newest != (newest := list(snapshots)[-1]):
            num_in_place = 0
        if newest:
            run.say(f"going on from {newest}")
        try:
            _fit(config, job, run, first=snapshots[newest].step if newest else 0)
        except (TrainingFailedError, ray.exceptions.RayError) as error:
            for cause in _causes(error):
                if isinstance(cause, MGIEError):  # it would happen again
                    raise cause from error
            num_failures += 1
            num_in_place += 1
            said = _describe(error)
            if num_in_place > config.max_failures:
                raise FaultError(f"{said}; {config.max_failures} failures without progress are allowed") from error
            run.say(f"failure {num_in_place} of {config.max_failures} allowed without progress: {said}")
        else:
            return num_failures


def _fit(config: TrainConfig, job: TrainingJob, run: Run, *, first: int) -> None:
    size = config.workers
    trainer = TorchTrainer(
        functools.partial(train_worker, job),
        scaling_config=ScalingConfig(
            num_workers=(size.num, size.max) if size.max else size.num,
            use_gpu=size.num_gpus > 0,
            resources_per_worker={"CPU": size.num_cpus, "GPU": size.num_gpus},
            elastic_resize_monitor_interval_s=config.elastic_check_s,
        ),
        run_config=RunConfig(
            name=CHECKPOINTS,
            storage_path=job.out.path,
            storage_filesystem=job.out.filesystem,
            checkpoint_config=CheckpointConfig(
                num_to_keep=config.keep,
                checkpoint_score_attribute=SCORE if config.keep_by == "loss" else None,
                checkpoint_score_order="min",
            ),
            failure_config=FailureConfig(max_failures=0),
        ),
    )
    failed: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:  # noqa: BLE001  # it is raised again in the thread that waits
            failed.append(error)

    # In a thread, so that this one can show how far it is and leave at once when it is interrupted.
    thread = threading.Thread(target=fit, name="fit", daemon=True)
    thread.start()
    with run.bar("steps", job.num_steps, done=first) as bar:
        while thread.is_alive():
            thread.join(_LOCAL_POLL_S if job.out.is_local else _STORE_POLL_S)
            run.lease.check()
            last: Mapping[str, Any] = {}
            with contextlib.suppress(OSError):  # it is only shown
                last = read_last(job.out)
            if last:
                said = f"loss {last['loss'] or float('nan'):.4f}, {last['samples_per_s']:.1f} samples/s"
                bar.show(last["step"], said)
        if failed:
            raise failed[0]
        bar.show(job.num_steps)


def _causes(error: BaseException) -> list[BaseException]:
    """What happened to the workers that failed, or to the controller."""
    failures = list(error.worker_failures.values()) if isinstance(error, WorkerGroupError) else [error]
    # What Ray Train wraps around an error of a worker's function, and around the death of a worker.
    inner = (getattr(f, "_base_exc", None) or getattr(f, "health_check_failure", None) or f for f in failures)
    return [causes(failure)[-1] for failure in inner]


def _describe(error: BaseException) -> str:
    """One line for who died of what."""
    who = f"worker {min(error.worker_failures)}" if isinstance(error, WorkerGroupError) else "Ray's controller"
    cause = _causes(error)[0]
    what = str(cause).strip() or "no message"
    return f"{who} failed, {type(cause).__name__}: {what.splitlines()[0]}"


def _finish(job: TrainingJob, *, seconds: float, num_failures: int) -> dict[str, Any]:
    """Writes what is read when all is over; returns the report."""
    metrics = read_metrics(job.out)
    lines = (json.dumps({"step": step, **scalars}) for step, scalars in metrics.steps.items())
    job.out.write(METRICS_FILE, ("\n".join(lines) + "\n").encode())
    job.out.write(PLOT_FILE, plot_run(metrics.steps).encode())
    return _report(job, metrics, seconds=seconds, num_failures=num_failures)


def _report(job: TrainingJob, metrics: RunMetrics, *, seconds: float, num_failures: int) -> dict[str, Any]:
    speeds = [speed for scalars in metrics.steps.values() if (speed := scalars.get("samples_per_s"))]
    final = metrics.steps[max(metrics.steps)] if metrics.steps else {}
    return {
        "steps": job.num_steps,
        "rows": job.rows.num_train,
        "seconds": round(seconds, 1),
        "failures": num_failures,
        "repeated_steps": metrics.num_repeated,
        "skipped_steps": sum(scalars.get("is_finite") is False for scalars in metrics.steps.values()),
        "samples_per_s": round(statistics.median(speeds), 3) if speeds else None,
        "final": {name: final.get(name) for name in ("loss", "validation/loss") if name in final},
    }
