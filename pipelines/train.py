#!/usr/bin/env python
"""Ledger -> trained weights: MGIE or one of the paper's variants, on one CPU, one GPU or a cluster. A Ray Train job.

    ray job submit --working-dir . -- python pipelines/train.py --ledger s3://bucket/ledger --out s3://bucket/run

The run's folder holds all that it needs: its own copy of the rows' words, checkpoints, numbers and pictures. The same
command continues an interrupted run from the newest checkpoint, and what comes out is what would have come out
without the interruption, bit by bit where the number of workers is the same and they are CPUs. Workers and Ray's
controller that die are replaced at once. `mgie export RUN --out BUNDLE` makes a bundle of the run.
"""

import sys

from rich.console import Console

from pipelines.runs.command import Ending, run_command
from pipelines.runs.progress import say
from pipelines.training.config import TrainConfig


def train(config: TrainConfig, *, console: Console | None = None) -> Ending:
    """Runs the job to its end.

    Raises:
        ConfigError: A setting does not fit the bundle, the folder holds another run or has another writer, or the
            cluster is too small.
        BundleError: The bundle cannot be used.
        DataError: The ledgers or the cache cannot be used, an image cannot be read, or a checkpoint not be written.
        TrainingError: Losses or gradients stayed not finite.
        OSError: A store is in trouble.
        FaultError: Workers or the controller died too often.
        RayError: The cluster is in trouble.
    """
    say(console, "loading torch and Ray Train ...")
    from pipelines.training.job import run_training  # here, because they take seconds to load

    return run_training(config, console)


def main() -> int:
    """The job as a command; returns the exit status."""
    return run_command(TrainConfig, train, about=__doc__)


if __name__ == "__main__":
    sys.exit(main())
