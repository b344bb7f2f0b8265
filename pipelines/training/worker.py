"""What each worker of a training job does: open the run, go on from its newest checkpoint, train, save, show.

Runs inside Ray Train. A worker that is killed at any point leaves a run that another one continues bit by bit: what a
step does follows from (seed, epoch, id), and a checkpoint counts only when all of it is there.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import logging
import math
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import ray.train
import ray.train.torch
import torch
from PIL import Image
from ray.train import Checkpoint, CheckpointUploadMode

from mgie.bundle.bundle import Bundle, open_bundle
from mgie.config import CacheKind, TrainingConfig
from mgie.data.examples import Examples
from mgie.data.latent_cache import fetch_cache
from mgie.data.latent_reader import LatentCache
from mgie.data.loader import BatchMaker, MicroBatch, StepLoader
from mgie.data.order import MixedOrder, Place
from mgie.errors import BundleError, DataError
from mgie.storage.folder import Folder
from mgie.training.checkpoint import Snapshot, snapshot_name, tensor_file, write_snapshot
from mgie.training.distributed import broadcast
from mgie.training.trainer import StepRecord, Trainer, TrainerState, compute_in
from mgie.training.variants import load_training_model, open_caches, training_side_px
from pipelines.training.checkpoints import complete_snapshots, fetch_snapshot, upload_snapshot
from pipelines.training.config import TrainConfig
from pipelines.training.rows import FrozenRows, OpenRows, open_rows
from pipelines.training.sample_sheet import SampleEditor
from pipelines.training.tracking import FileTracker, Scalar, Tracker, Trackers, open_tracker

_MAX_UPLOADS = 2  # checkpoints on the local disk at once, one of them being written
_MEETING_STEPS = 10  # between questions to the cluster and to the clock, at which all workers meet
_MAX_SAVING = 0.05  # of the time, where checkpoints are made by the clock
_SAVING, _CACHES = "saving-", "caches"
_log = logging.getLogger(__name__)
SCORE = "score"
"The metric of a checkpoint by which the best are kept, least is best: its validation loss, else its training loss."


@dataclass(frozen=True, kw_only=True)
class TrainingJob:
    """All that a worker is told."""

    out: Folder
    "folder of the run"
    settings: TrainConfig
    rows: FrozenRows
    images: tuple[Folder, ...]
    "roots of the images, one per ledger"
    cache: Folder | None
    init: str
    "path of the bundle that training begins from"
    identity: str
    "identity of that bundle"

    @property
    def config(self) -> TrainingConfig:
        """What is trained, and how."""
        return self.settings.training

    @property
    def num_steps(self) -> int:
        """Steps to train; 0 where nothing trains."""
        return 0 if self.config.variant == "fz" else self.config.steps


def train_worker(job: TrainingJob) -> None:
    """The run, from its newest checkpoint to its end.

    Raises:
        MGIEError: It cannot go on: see the parts' errors.
        OSError: A store is in trouble.
    """
    # So that sums are made in the same order in every attempt.
    torch.set_num_threads(job.settings.threads or max(1, int(job.settings.workers.num_cpus)))
    torch.manual_seed(job.config.seed)
    with _scratch(job.out) as scratch:
        _Worker(job, scratch).run()


@contextlib.contextmanager
def _scratch(out: Folder) -> Iterator[Path]:
    """This worker's local folder, the same in each attempt: what a killed one left is removed."""
    name = hashlib.sha256(out.url.encode()).hexdigest()[:16]
    rank = ray.train.get_context().get_local_rank()
    folder = Path(tempfile.gettempdir()) / "mgie-train" / name / str(rank)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    yield folder
    # All workers have passed the last report. What is still to be uploaded is removed by Ray.
    for path in [*folder.iterdir(), *([folder.parent / _CACHES] if rank == 0 else [])]:
        if not path.name.startswith(_SAVING):
            shutil.rmtree(path, ignore_errors=True)


class _Worker:
    """One of the workers, from start to end."""

    def __init__(self, job: TrainingJob, scratch: Path) -> None:
        context = ray.train.get_context()
        self._rank, self._world_size = context.get_world_rank(), context.get_world_size()
        self._job, self._scratch = job, scratch
        self._rows = open_rows(job.out, job.images, scratch)
        self._bundle = open_base(job)
        self._made = load_training_model(self._bundle, job.config, device=str(ray.train.torch.get_device()))
        self._caches = _open_caches(job, self._bundle, self._rows, scratch)
        self._trainer = Trainer(self._made.model, job.config, self._loader(), on_step=self._log)
        self._losses: list[float] = []  # since the last checkpoint, finite ones
        self._loss = 0.0  # their mean at the last one that had any
        self._validation: dict[str, float] = {}
        self._uploads = threading.Semaphore(_MAX_UPLOADS)
        self._is_warned = False
        self._saved_at, self._save_s = time.monotonic(), 0.0
        self._restore()
        self._tracker: Tracker = Trackers(
            [
                FileTracker(job.out, flush_every_s=job.settings.log_every_s),
                *filter(None, [open_tracker(job.settings.tracker, job.out, scratch, step=self._trainer.step)]),
            ]
            if self._rank == 0
            else []
        )
        self._sample = self._sample_editor()

    def run(self) -> None:
        """Trains to the end."""
        job, last = self._job, self._job.num_steps
        if last == 0:
            self._look(0, is_last=True, is_judged=True)
            self._save(0)
        with contextlib.closing(self._tracker):
            for step in self._trainer.run(last):
                saves = step % job.settings.checkpoint_every == 0 or step == last or self._is_due(step)
                began = time.monotonic()
                self._look(step, is_last=step == last, is_judged=saves and job.settings.keep_by == "loss")
                if saves:
                    self._save(step)
                    self._saved_at = time.monotonic()
                    self._save_s = self._saved_at - began

    def _is_due(self, step: int) -> bool:
        """Whether to save between times: much was trained since, or the cluster has begun to take a node away."""
        if step % _MEETING_STEPS:
            return False
        every_s = self._job.settings.checkpoint_every_s
        is_late = every_s > 0 and time.monotonic() - self._saved_at > max(every_s, self._save_s / _MAX_SAVING)
        if not self._is_warned and ray.train.get_preemption_info() is not None:  # the same on all workers
            self._is_warned = True
            return True
        return broadcast(is_late)  # clocks differ

    # ---- data

    def _maker(self, rows: list[Examples]) -> BatchMaker:
        return self._made.batch_maker(
            rows, self._job.config, moments=self._caches.get("vae_moments"), features=self._caches.get("clip_features")
        )

    def _loader(self) -> StepLoader:
        config = self._job.config
        order = MixedOrder(
            [len(rows) for rows in self._rows.train],
            seed=config.seed,
            weights=self._job.settings.weights or None,
            shard_rows=self._job.rows.shard_rows,
        )
        return StepLoader(
            self._maker(self._rows.train),
            order,
            global_batch=config.global_batch,
            micro_batch=config.micro_batch,
            rank=self._rank,
            world_size=self._world_size,
            num_threads=self._job.settings.loader_threads,
            ahead=4 * self._job.settings.loader_threads,
        )

    def _validation_batches(self) -> Iterator[MicroBatch]:
        """This worker's share of the validation rows: evenly chosen, the same ones each time."""
        places = [Place(k, 0, row) for k, rows in enumerate(self._rows.validation) for row in range(len(rows))]
        if len(places) > self._job.settings.num_validation:
            chosen = np.linspace(0, len(places) - 1, self._job.settings.num_validation).astype(int)
            places = [places[i] for i in chosen]
        if self._job.config.sharding == "fully_shard":
            # All workers must run the same number of forward passes: of too few rows each runs all.
            places = places[: len(places) // self._world_size * self._world_size] or [
                place for place in places for _ in range(self._world_size)
            ]
        own = places[self._rank :: self._world_size]
        maker, size = self._maker(self._rows.validation), self._job.config.micro_batch
        for i in range(0, len(own), size):
            yield maker(own[i : i + size], is_validation=True)

    # ---- seeing it

    def _log(self, record: StepRecord) -> None:
        if math.isfinite(record.loss):
            self._losses.append(record.loss)
        self._tracker.log(record.step, scalars_of(record))

    def _look(self, step: int, *, is_last: bool, is_judged: bool) -> None:
        """Validates and draws, where it is time; a checkpoint that is to be judged is always validated."""
        job = self._job
        due = is_last or is_judged or (job.settings.validate_every and step % job.settings.validate_every == 0)
        if job.settings.validate_every and job.rows.num_validation and due:
            means = self._trainer.validate(self._validation_batches())
            self._validation = {f"validation/{name}": value for name, value in means.items()}
            self._tracker.log(step, self._validation)
        if self._sample and (is_last or step % job.settings.sample_every == 0):
            with (
                self._trainer.averaged_weights(),
                compute_in(job.config.dtype, self._made.model.vae.autoencoder.device),
            ):
                sheet = self._sample()
            self._tracker.picture(step, "step", sheet)

    def _sample_editor(self) -> Callable[[], Image.Image] | None:
        job = self._job
        # Sharded weights are whole only where all workers run.
        if not job.settings.sample_every or (self._rank and job.config.sharding != "fully_shard"):
            return None
        sources = self._rows.validation if job.rows.num_validation else self._rows.train
        first = itertools.islice(((rows, row) for rows in sources for row in rows.rows()), job.settings.num_samples)
        examples = [rows.read(row) for rows, row in first]
        return SampleEditor(self._bundle, self._made, job.config.variant, examples, num_steps=job.settings.sample_steps)

    # ---- checkpoints

    def _restore(self) -> None:
        found = self._newest() if self._rank == 0 else None
        name = broadcast(found[0].folder.name if found else None)
        if name is None:
            return
        snapshot, state = found or self._load(name)
        if snapshot.data != (rows := self._job.rows.fingerprint):
            raise DataError(f"checkpoint {name} was trained on rows {snapshot.data}; the run's are {rows}")
        self._trainer.restore(state)
        self._loss = snapshot.metrics["loss"]
        self._validation = {k: v for k, v in snapshot.metrics.items() if k.startswith("validation/")}

    def _newest(self) -> tuple[Snapshot, TrainerState] | None:
        """The newest checkpoint whose content is what it should be. Older ones are there for this."""
        for name in reversed(complete_snapshots(self._job.out)):
            try:
                return self._load(name)
            except DataError as error:
                _log.warning("checkpoint %s is left out: %s", name, error)
        return None

    def _load(self, name: str) -> tuple[Snapshot, TrainerState]:
        snapshot = fetch_snapshot(self._job.out, name, self._scratch)
        try:
            return snapshot, state_of(snapshot)
        finally:
            if not self._job.out.is_local:
                shutil.rmtree(snapshot.folder)

    def _save(self, step: int) -> None:
        """Writes a checkpoint and hands it to the uploading thread."""
        job, name = self._job, snapshot_name(step)
        state = self._trainer.state()
        self._tracker.flush()  # a run that goes on from here has all numbers before it
        if self._losses:
            self._loss, self._losses = statistics.fmean(self._losses), []
        metrics = {
            "step": step,
            "loss": self._loss,
            **self._validation,
            SCORE: self._validation.get("validation/loss", self._loss),
            "num_skipped": state.num_skipped,
            "num_skipped_in_row": state.num_skipped_in_row,
        }
        checkpoint = None
        if self._rank == 0:
            self._uploads.acquire()
            folder = self._scratch / f"{_SAVING}{name}"
            write_snapshot(
                folder,
                step=step,
                variant=job.config.variant,
                base=job.identity,
                base_bundle=job.init,
                config=dataclasses.asdict(dataclasses.replace(job.config, image_side_px=self._made.image_side_px)),
                data=job.rows.fingerprint,
                data_names=job.rows.datasets,
                metrics=metrics,
                trainable=state.weights,
                ema=state.average or None,
                optimizer=state.moments,
            )
            checkpoint = Checkpoint.from_directory(folder)
        ray.train.report(
            metrics,
            checkpoint=checkpoint,
            checkpoint_dir_name=name,
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            checkpoint_upload_fn=self._upload,
        )

    def _upload(self, checkpoint: Checkpoint, name: str) -> Checkpoint:
        try:
            folder = upload_snapshot(Path(checkpoint.path), self._job.out, name)
            return Checkpoint(folder.path, folder.filesystem)
        finally:
            self._uploads.release()


def open_base(job: TrainingJob) -> Bundle:
    """The bundle that training began from.

    Raises:
        BundleError: On this machine it is another one, or cannot be used.
    """
    bundle = open_bundle(job.init)
    if bundle.identity != job.identity:
        raise BundleError(f"bundle {job.init} has identity {bundle.identity} here; the run began from {job.identity}")
    return bundle


def _open_caches(job: TrainingJob, bundle: Bundle, rows: OpenRows, scratch: Path) -> dict[CacheKind, LatentCache]:
    cache = job.cache
    if cache is None:
        return {}
    kinds = cache_kinds(cache, job.config)

    def folder_of(kind: CacheKind) -> Path | None:
        if kind not in kinds:
            return None
        if cache.is_local:
            return Path(cache.path)
        return fetch_cache(cache, scratch.parent / _CACHES, kind=kind)

    side_px = training_side_px(bundle, job.config)
    return open_caches(folder_of, bundle, [*rows.train, *rows.validation], side_px)


def cache_kinds(cache: Folder, config: TrainingConfig) -> list[CacheKind]:
    """The caches in a folder that this training reads.

    Raises:
        DataError: There are none.
    """
    useful: tuple[CacheKind, ...] = ("vae_moments", "clip_features") if config.variant == "e2e" else ("vae_moments",)
    found = [kind for kind in useful if cache.list(kind)]
    if not found:
        raise DataError(f"cache folder {cache.url} holds no {' or '.join(useful)}; make them with pipelines/cache.py")
    return found


def scalars_of(record: StepRecord) -> dict[str, Scalar]:
    """A step's numbers by name."""
    values = dataclasses.asdict(record)
    del values["step"]
    rates = values.pop("learning_rates")
    return values | {f"learning_rate/{part}": rate for part, rate in rates.items()}


def state_of(snapshot: Snapshot) -> TrainerState:
    """What the trainer goes on from. Raises DataError: a file is damaged."""
    has_average = tensor_file("ema") in snapshot.files
    return TrainerState(
        step=snapshot.step,
        num_skipped=snapshot.metrics["num_skipped"],
        num_skipped_in_row=snapshot.metrics["num_skipped_in_row"],
        weights=snapshot.load("trainable"),
        average=snapshot.load("ema") if has_average else {},
        moments=snapshot.load("optimizer"),
    )
