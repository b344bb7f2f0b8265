"""What the tests and the benchmark of killed training runs share: a drawn ledger, the job, its numbers, its kills."""

import os
import resource
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import pyarrow.parquet as pq
from PIL import Image

from mgie.data.ledger import LEDGER_SCHEMA, row_id, to_table, write_images_root
from mgie.errors import DataError
from mgie.storage.folder import Folder
from mgie.training.checkpoint import SNAPSHOT_FILE, snapshot_name
from pipelines.training.checkpoints import CHECKPOINTS, complete_snapshots
from pipelines.training.tracking import read_last, read_lines
from tests.pipelines.chaos import ROOT, Cluster, Job
from tests.pipelines.gates import TRACKER, close_gate, open_gate

Victim = Literal["driver", "worker", "controller", "upload", "disk"]

TRAIN = ROOT / "pipelines" / "train.py"
EXACT = ("loss", "instruction", "edit", "grad_norm")
_WORDS = ["make it night", "add a red balloon above the house", "winter", "turn the day into dusk, and warm"]


def write_ledger(folder: Folder, num_rows: int, *, seed: int = 0, side_px: int = 48, **changed: Any) -> None:
    """Rows of different lengths, each with its own photo; `changed` are columns that all rows have instead."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(num_rows):
        encoded = []
        for name in ("source", "goal"):
            buffer = BytesIO()
            pixels = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((side_px + i % 3 * 8, side_px)).save(buffer, "PNG")
            folder.write(f"images/{i}-{name}.png", buffer.getvalue())
            encoded.append(buffer.getvalue())
        instruction = _WORDS[i % len(_WORDS)]
        row = {
            "id": row_id(*encoded, instruction, "forward"),
            "dataset": "drawn",
            "split": "train",
            "source": f"images/{i}-source.png",
            "goal": f"images/{i}-goal.png",
            "instruction": instruction,
            "provenance": "{}",
            "expressive": "The sky would be dark. " * (i % 4 + 1),
            "status": "ok",
            "attempt": 1,
        }
        rows.append(row | changed)
    with folder.publish("part-0.parquet") as path:
        pq.write_table(to_table(rows, LEDGER_SCHEMA), path)
    write_images_root(folder, ".")


# ---- the job


def train_flags(ledger: Folder, *, steps: int, checkpoint_every: int) -> list[str]:
    """Flags of a small run on the random bundle that shows each step at once."""
    return [
        "--init", "random", "--ledger", ledger.url, "--training.steps", str(steps), "--checkpoint-every", str(checkpoint_every),
        "--training.global-batch", "4", "--training.micro-batch", "2", "--training.image-side-px", "64",
        "--validation-share", "0.2", "--validate-every", str(checkpoint_every), "--sample-every", "0",
        "--log-every-s", "0", "--checkpoint-every-s", "0",
    ]  # fmt: skip


def start(flags: Sequence[str], cluster: Cluster, cwd: Path) -> Job:
    """The job in the background."""
    return Job(list(flags), cluster.env, cwd=cwd, script=TRAIN)


def run_undisturbed(flags: Sequence[str], cluster: Cluster, out: Folder, cwd: Path) -> str:
    """Runs the job to its end; returns what it said."""
    with start([*flags, "--out", out.url], cluster, cwd) as job:
        status, output = job.finish()
    assert status == 0, output
    return output


# ---- its numbers


def numbers(out: Folder) -> dict[int, list[tuple[float, ...]]]:
    """What every attempt measured, by step."""
    found: dict[int, list[tuple[float, ...]]] = {}
    for _, line in read_lines(out):
        if "loss" in line:
            found.setdefault(line["step"], []).append(tuple(line[name] for name in EXACT))
    return found


def differing_steps(
    found: Mapping[int, list[tuple[float, ...]]], reference: Mapping[int, list[tuple[float, ...]]]
) -> list[int]:
    """Steps that any attempt measured otherwise than the reference, bit by bit, or did not measure."""
    return [step for step, [expected] in reference.items() if set(found.get(step, [])) != {expected}]


def tensor_hashes(out: Folder, step: int) -> dict[str, str]:
    """Of a checkpoint's files."""
    snapshot = complete_snapshots(out)[snapshot_name(step)]
    return {name: entry.sha256 for name, entry in snapshot.files.items()}


# ---- killing


@dataclass(frozen=True)
class Kill:
    """A fault, in most cases a SIGKILL."""

    victim: Victim
    "upload: the worker, while it copies a checkpoint; disk: none, but the worker's disk takes no more large files"
    step: int
    "when so many steps have been made, more than at any fault before"
    checkpoint: int = 0
    "and the checkpoint of this step is complete; 0 = whatever is"

    def is_due(self, out: Folder) -> bool:
        """Whether the run waits for it."""
        try:
            is_there = not self.checkpoint or snapshot_name(self.checkpoint) in complete_snapshots(out)
            return step_of(out) >= self.step and is_there
        except (OSError, DataError):
            return False  # one that was listed has been deleted before it was read


def run_with_kills(flags: Sequence[str], cluster: Cluster, out: Folder, kills: Sequence[Kill], cwd: Path) -> list[str]:
    """Runs the job to its end through the faults, each of which must hit; returns what each command said.

    The run waits at the step of each fault until that has come, however slow the machine is.
    """
    outputs, waiting = [], list(kills)
    for kill in kills:
        close_gate(out, kill.step)
    try:
        while True:
            with start([*flags, "--out", out.url, "--tracker", TRACKER], cluster, cwd) as job:
                expected = 0
                while waiting:
                    kill = waiting.pop(0)
                    job.wait_until(lambda kill=kill: kill.is_due(out), f"step {kill.step}")
                    if kill.victim == "driver":
                        job.kill()
                        cluster.settle()
                        open_gate(out, kill.step)
                        break
                    strike(cluster, out, kill)
                    if kill.victim == "disk":
                        expected = 3
                        break
                if job.is_running():
                    status, output = job.finish()
                    assert status == expected, output
                outputs.append(job.output())
                if not waiting and "makes a bundle of it" in outputs[-1]:
                    return outputs
    finally:
        for kill in kills:
            open_gate(out, kill.step)


def step_of(out: Folder) -> int:
    """The last step whose numbers are written."""
    return int(read_last(out).get("step", 0))


def strike(cluster: Cluster, out: Folder, kill: Kill) -> None:
    """Does it to a process of the run that waits at the fault's gate, and opens that."""
    pids = cluster.workers("ray::TrainController" if kill.victim == "controller" else "ray::RayTrainWorker")
    assert pids, f"there is no {kill.victim}"
    if kill.victim == "disk":
        resource.prlimit(pids[0], resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        open_gate(out, kill.step)
        return
    under_way: list[Path] = []
    if kill.victim == "upload":
        open_gate(out, kill.step)
    while kill.victim == "upload" and not under_way:
        assert psutil.pid_exists(pids[0]), "the run ended before an upload was seen"
        under_way = _under_way(out)
        time.sleep(0.0005)
    os.kill(pids[0], signal.SIGKILL)
    assert not any((folder / SNAPSHOT_FILE).exists() for folder in under_way), "the kill came after the upload"
    open_gate(out, kill.step)


def _under_way(out: Folder) -> list[Path]:
    """Checkpoints that are being copied."""
    folders = (Path(out.path) / CHECKPOINTS).glob("step-*")
    return [folder for folder in folders if not (folder / SNAPSHOT_FILE).exists()]
