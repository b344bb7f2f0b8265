"""What a job shows while it works: how far it is, and when it will be done. Knows nothing of Ray."""

import datetime as dt
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINE_EVERY_S = 30.0
_ESTIMATED_OVER_S = 3600.0  # blocks may take minutes: rich's half a minute would see none


def say(console: Console | None, text: str) -> None:
    """Prints a line, if there is somebody to read it: what is begun now, and may take a while."""
    if console:
        console.print(text, soft_wrap=True, highlight=False)


class Bar:
    """A progress bar with an estimate, drawn from the start; where there is no terminal, a line now and then.

    Args:
        what: What is counted: "edits".
        total: How many there are. done: How many of them were done before.
    """

    def __init__(self, console: Console, what: str, total: int, *, done: int = 0) -> None:
        self._console, self._what, self._total, self.done = console, what, total, done
        self._before, self._began = done, time.monotonic()
        columns = (
            TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"),
            TimeRemainingColumn(), TextColumn("{task.fields[said]}"),
        )  # fmt: skip
        self._progress = Progress(
            *columns, console=console, disable=not console.is_terminal, speed_estimate_period=_ESTIMATED_OVER_S
        )
        self._task = self._progress.add_task(what, total=total, completed=done, said="")

    def __enter__(self) -> Self:
        self._progress.start()
        self._tell("")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
        if self.done != self._told and error is None:
            self._tell("")

    def show(self, done: int, said: str = "") -> None:
        """Shows that so many are done in all, and what is said beside the bar."""
        self.done = done
        self._progress.update(self._task, completed=done, said=said)
        if time.monotonic() - self._told_at >= LINE_EVERY_S:
            self._tell(said)

    def _tell(self, said: str) -> None:
        self._told, self._told_at = self.done, time.monotonic()
        if self._console.is_terminal:
            return
        num_new = self.done - self._before
        left_s = (self._told_at - self._began) * (self._total - self.done) / num_new if num_new else None
        left = [] if left_s is None else [f"{dt.timedelta(seconds=round(left_s))} left"]
        self._console.print(
            ", ".join([f"{self._what}: {self.done} of {self._total}", *left, *([said] if said else [])]), soft_wrap=True
        )
