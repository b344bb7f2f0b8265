"""What a training run shows: numbers of each step and pictures, to files and to TensorBoard.

    metrics/<attempt>-<first step>.jsonl   one line per step and kind; an attempt is one start of the workers
    samples/step-<step>.png                pictures
    tensorboard/                           event files

A step that a kill undid is trained again, and written again by a later attempt: `read_metrics` takes the last one.
Knows nothing of Ray, nor of what the numbers mean.
"""

import json
import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from mgie.storage.folder import Folder
from pipelines.runs.settings import load_named

Scalar = float | bool | None

METRICS, SAMPLES, TENSORBOARD = "metrics", "samples", "tensorboard"
_PART_LINES = 400  # a part is written whole each time: some 200 KB


class Tracker(Protocol):
    """Where the numbers and pictures of a run go."""

    def log(self, step: int, scalars: Mapping[str, Scalar]) -> None:
        """Numbers of a step, by name; `None` = not a finite number, or not known."""
        ...

    def picture(self, step: int, name: str, image: Image.Image) -> None:
        """A picture made after a step."""
        ...

    def flush(self) -> None:
        """Makes all of it visible to others: before each checkpoint. Raises OSError."""
        ...

    def close(self) -> None:
        """The same, for the last time. Raises OSError."""
        ...


class FileTracker:
    """JSON lines and PNG files in the run's folder: always there.

    Args:
        flush_every_s: Numbers become visible after so many seconds at most.

    Raises:
        OSError: The store is in trouble.
    """

    def __init__(self, run: Folder, *, flush_every_s: float) -> None:
        self._run, self._flush_every_s = run, flush_every_s
        self._attempt = 1 + max((number for number, _ in _parts(run)), default=0)
        self._part = ""
        self._lines: list[str] = []
        self._num_written = 0
        self._flushed_at = time.monotonic()

    def log(self, step: int, scalars: Mapping[str, Scalar]) -> None:
        """See `Tracker`. Raises OSError."""
        if len(self._lines) == self._num_written >= _PART_LINES:
            self._lines, self._num_written, self._part = [], 0, ""
        self._part = self._part or f"{METRICS}/{self._attempt:06d}-{step:08d}.jsonl"
        finite = {n: v if v is None or math.isfinite(v) else None for n, v in scalars.items()}
        self._lines.append(json.dumps({"step": step, **finite}))
        if time.monotonic() - self._flushed_at >= self._flush_every_s:
            self.flush()

    def picture(self, step: int, name: str, image: Image.Image) -> None:
        """See `Tracker`. Raises OSError."""
        buffer = BytesIO()
        image.save(buffer, "PNG")
        self._run.write(f"{SAMPLES}/{name}-{step:08d}.png", buffer.getvalue())

    def flush(self) -> None:
        """See `Tracker`."""
        if len(self._lines) > self._num_written:
            self._run.write(self._part, ("\n".join(self._lines) + "\n").encode())
            self._num_written = len(self._lines)
        self._flushed_at = time.monotonic()

    close = flush


class TensorBoardTracker:
    """TensorBoard event files.

    Args:
        scratch: Local folder to write to where the run lies in a store; copied there at each flush.
        step: The run goes on from here: what an earlier attempt wrote of later steps is hidden.
    """

    def __init__(self, run: Folder, scratch: Path, *, step: int) -> None:
        self._run = run
        self._local = Path(run.at(TENSORBOARD)) if run.is_local else scratch / TENSORBOARD
        self._writer = SummaryWriter(str(self._local), purge_step=step + 1)

    def log(self, step: int, scalars: Mapping[str, Scalar]) -> None:
        """See `Tracker`."""
        for name, value in scalars.items():
            if value is not None:
                self._writer.add_scalar(name, float(value), step)

    def picture(self, step: int, name: str, image: Image.Image) -> None:
        """See `Tracker`."""
        self._writer.add_image(name, np.asarray(image), step, dataformats="HWC")

    def flush(self) -> None:
        """See `Tracker`."""
        self._writer.flush()
        if not self._run.is_local:
            for path in self._local.iterdir():
                with self._run.publish(f"{TENSORBOARD}/{path.name}") as copy:
                    shutil.copyfile(path, copy)

    def close(self) -> None:
        """See `Tracker`."""
        self._writer.close()
        self.flush()


def open_tracker(name: str, run: Folder, scratch: Path, *, step: int) -> Tracker | None:
    """The tracker beside the files.

    Args:
        name: `tensorboard`; `none`; or `module:callable` that makes one of (run, scratch, step).
        scratch: A local folder to write to on the way to a store.
        step: Steps done when this attempt begins.

    Raises:
        ConfigError: There is no such callable.
    """
    if name == "none":
        return None
    if name == "tensorboard":
        return TensorBoardTracker(run, scratch, step=step)
    tracker: Tracker = load_named(name, param="tracker", others="tensorboard, none, or ")(run, scratch, step=step)
    return tracker


class Trackers:
    """Several as one."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = trackers

    def log(self, step: int, scalars: Mapping[str, Scalar]) -> None:
        """See `Tracker`."""
        for tracker in self._trackers:
            tracker.log(step, scalars)

    def picture(self, step: int, name: str, image: Image.Image) -> None:
        """See `Tracker`."""
        for tracker in self._trackers:
            tracker.picture(step, name, image)

    def flush(self) -> None:
        """See `Tracker`."""
        for tracker in self._trackers:
            tracker.flush()

    def close(self) -> None:
        """See `Tracker`."""
        for tracker in self._trackers:
            tracker.close()


# ---- reading


@dataclass(frozen=True)
class RunMetrics:
    """The numbers of a run as if nothing had happened to it."""

    steps: Mapping[int, Mapping[str, Scalar]]
    "numbers by step, ascending: what the last attempt that came so far wrote"
    num_repeated: int
    "steps whose numbers were written once more, by a later attempt"


def read_metrics(run: Folder) -> RunMetrics:
    """All numbers of a run. Raises OSError."""
    attempts: dict[int, dict[int, dict[str, Scalar]]] = {}  # by step and attempt
    for attempt, line in read_lines(run):
        step = line.pop("step")
        attempts.setdefault(step, {}).setdefault(attempt, {}).update(line)
    return RunMetrics(
        steps={step: attempts[step][max(attempts[step])] for step in sorted(attempts)},
        num_repeated=sum(len(by_attempt) - 1 for by_attempt in attempts.values()),
    )


def read_lines(run: Folder) -> Iterator[tuple[int, dict[str, Any]]]:
    """Every line that was written, in order, with the number of its attempt. Raises OSError."""
    for attempt, name in _parts(run):
        for line in run.read(name).splitlines():
            yield attempt, json.loads(line)


def read_last(run: Folder) -> Mapping[str, Any]:
    """The newest line of the newest attempt with a `loss`; empty where there is none yet. Raises OSError."""
    for _, name in reversed(_parts(run)):
        for line in map(json.loads, reversed(run.read(name).splitlines())):
            if "loss" in line:
                return dict(line)
    return {}


def _parts(run: Folder) -> list[tuple[int, str]]:
    """Attempt and name of each part, in the order in which they were begun."""
    names = [entry.name for entry in run.list(METRICS) if entry.name.endswith(".jsonl")]
    return [(int(name.partition("-")[0]), f"{METRICS}/{name}") for name in names]
