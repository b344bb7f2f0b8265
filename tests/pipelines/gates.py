"""Gates in a training run: at a closed one it waits, after the step's numbers are written and before its checkpoint."""

import hashlib
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from mgie.storage.folder import Folder
from pipelines.training.tracking import Scalar, TensorBoardTracker

TRACKER = "tests.pipelines.gates:GateTracker"


def _gate(run: Folder, step: int) -> Path:
    """A file that is there while the gate is closed; outside the run's folder, which may be in a store."""
    name = hashlib.sha256(run.url.encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / "mgie-gates" / name / str(step)


def close_gate(run: Folder, step: int) -> None:
    """The run waits when it comes there."""
    _gate(run, step).parent.mkdir(parents=True, exist_ok=True)
    _gate(run, step).touch()


def open_gate(run: Folder, step: int) -> None:
    """The run goes on."""
    _gate(run, step).unlink(missing_ok=True)


class GateTracker(TensorBoardTracker):
    """What a run asks for with `--tracker`."""

    def __init__(self, run: Folder, scratch: Path, *, step: int) -> None:
        super().__init__(run, scratch, step=step)
        self._of = run

    def log(self, step: int, scalars: Mapping[str, Scalar]) -> None:
        """See `Tracker`."""
        super().log(step, scalars)
        while _gate(self._of, step).exists():
            time.sleep(0.02)
