"""How far a training run depends on the number of its workers: 1, 2 and 4 at the same global batch.

    python benchmarks/jobs/train_workers.py                    50 steps, tiny bundle, gloo on this machine; no Ray
    python benchmarks/jobs/train_workers.py --steps 10

Every step's losses are compared with those of one worker: in float64, where only an error could differ by more than
1e-9, and in float32, where rounding drifts. Also: a run that begins with 2 workers and goes on with 4 from a snapshot in
the middle, and one with its weights sharded over 2. Exits with an error where float64 differs by more than 1e-9.
"""

import argparse
import json
import multiprocessing
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mgie.bundle.bundle import open_bundle
from mgie.config import OptimizerConfig, TrainingConfig
from mgie.training.checkpoint import read_snapshot, write_snapshot
from mgie.training.trainer import StepRecord, TrainerState
from tests.mgie.training_rows import draw_rows, make_trainer, open_rows

TOLERANCE = 1e-9
Losses = list[tuple[float, float, float]]


@dataclass(frozen=True)
class Leg:
    """Part of a run: `workers` train from step `first` to `end`."""

    workers: int
    first: int
    end: int


def _work(rank: int, leg: Leg, config: TrainingConfig, folder: Path, results: Any) -> None:
    torch.set_num_threads(1)
    if leg.workers > 1:
        meeting = f"file://{folder}/meeting-{leg.workers}-{leg.first}"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=leg.workers)
    records: list[StepRecord] = []
    rows = open_rows(folder / "rows")
    trainer = make_trainer(
        open_bundle("random"), rows, config, rank=rank, world_size=leg.workers, on_step=records.append
    )
    saved = folder / "snapshot"
    if leg.first:
        snapshot = read_snapshot(saved)
        sets = {"weights": "trainable", "average": "ema", "moments": "optimizer"}
        tensors: dict[str, Any] = {name: snapshot.load(file) for name, file in sets.items()}  # type: ignore[arg-type]
        trainer.restore(TrainerState(step=leg.first, num_skipped=0, num_skipped_in_row=0, **tensors))
    list(trainer.run(leg.end))
    state = trainer.state()
    if rank == 0:
        write_snapshot(
            saved, step=leg.end, variant="e2e", base="", base_bundle="", config={}, data="", data_names=[], metrics={},
            trainable=state.weights, ema=state.average, optimizer=state.moments,
        )  # fmt: skip
        results.put([(r.loss, r.instruction, r.edit) for r in records])
    if leg.workers > 1:
        dist.barrier()
        dist.destroy_process_group()


def run(legs: Sequence[Leg], config: TrainingConfig, rows: Path) -> Losses:
    """Losses of each step of a run in several legs."""
    context = multiprocessing.get_context("spawn")
    losses: Losses = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "rows").symlink_to(rows)
        for leg in legs:
            results = context.Queue()
            arguments = [(rank, leg, config, folder, results) for rank in range(leg.workers)]
            workers = [context.Process(target=_work, args=each) for each in arguments]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
                assert worker.exitcode == 0, f"a worker of {leg} ended with {worker.exitcode}"
            losses += results.get(timeout=10)
    return losses


def difference(ours: Losses, reference: Losses) -> float:
    """Largest relative difference of any step's losses."""
    assert len(ours) == len(reference) > 0
    return max(
        abs(a - b) / abs(b)
        for mine, theirs in zip(ours, reference, strict=True)
        for a, b in zip(mine, theirs, strict=True)
    )


def main() -> None:
    """Runs, prints, asserts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--global-batch", type=int, default=8)
    args = parser.parse_args()
    steps, half = args.steps, args.steps // 2
    kinds: dict[str, tuple[list[Leg], dict[str, Any]]] = {
        "2 workers": ([Leg(2, 0, steps)], {}),
        "4 workers": ([Leg(4, 0, steps)], {}),
        "2 workers, then 4": ([Leg(2, 0, half), Leg(4, half, steps)], {}),
        "2 workers, sharded weights": ([Leg(2, 0, steps)], {"sharding": "fully_shard"}),
    }
    worst = 0.0
    with tempfile.TemporaryDirectory() as name:
        rows = draw_rows(Path(name), 40)
        for dtype in ("float64", "float32"):
            config = TrainingConfig(
                steps=steps,
                global_batch=args.global_batch,
                micro_batch=4,
                image_side_px=32,
                dtype=dtype,
                optimizer=OptimizerConfig(lr_unet=5e-4),
            )
            alone = run([Leg(1, 0, steps)], config, rows)
            print(f"{dtype}: loss of one worker {alone[0][0]:.4f} -> {alone[-1][0]:.4f}")
            for kind, (legs, changes) in kinds.items():
                found = difference(run(legs, replace(config, **changes), rows), alone)
                print(f"{dtype}: {kind}: losses differ by {found:.1e} at most")
                worst = max(worst, found) if dtype == "float64" else worst
    assert worst < TOLERANCE
    result = {
        "name": f"training, 1, 2 and 4 workers, {steps} steps, float64: largest relative difference of a loss",
        "unit": "relative",
        "ours": worst,
        "reference": TOLERANCE,
        "ratio": TOLERANCE / worst if worst else float("inf"),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
