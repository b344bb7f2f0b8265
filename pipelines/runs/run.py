"""The course of every run: claim the folder, hold its lease, join Ray, check, work with a bar, record."""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from mgie.storage.folder import Folder
from pipelines.runs.blocks import PendingRows
from pipelines.runs.cluster import StageSize, check_cluster, check_shared, start_ray
from pipelines.runs.config_file import write_config
from pipelines.runs.lease import HeldLease, hold_lease
from pipelines.runs.progress import Bar, say
from pipelines.runs.run_record import RunRecord, claim
from pipelines.runs.settings import ClusterSettings


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run that holds its folder."""

    out: Folder
    record: RunRecord
    found: RunRecord
    "what the folder held: the same, as an earlier call left it"
    config: Any
    "dataclass of all settings"
    console: Console
    lease: HeldLease

    @property
    def is_finished(self) -> bool:
        """Whether it was finished before."""
        return self.found.is_finished

    def say(self, text: str) -> None:
        """Prints a line: what is begun now, and may take a while."""
        say(self.console, text)

    def begin(self) -> None:
        """Notes the settings beside the output: something will be done. Raises OSError."""
        write_config(self.out, self.config)

    def join(self, stages: Mapping[str, StageSize], shared: Mapping[str, Folder], *, task_cpus: float) -> None:
        """Joins or starts a cluster that has what the run needs.

        Args:
            stages: Stages by the name that their flags begin with.
            shared: Folders that all nodes must see beside the run's, by what they are.
            task_cpus: CPUs of the tasks that run besides the stages.

        Raises:
            ConfigError: The cluster is too small, or a node does not see a folder.
            OSError: There is no cluster where one should be.
        """
        self.begin()
        self.say("joining or starting Ray, which may take half a minute ...")
        start_ray(self.say)
        grows = isinstance(self.config, ClusterSettings) and self.config.cluster_grows
        check_cluster(stages, task_cpus=task_cpus, grows=grows)
        check_shared({"the output folder": self.out, **shared})

    def work(
        self,
        pending: PendingRows,
        blocks: Callable[[], Iterator[dict[str, Any]]],
        *needs: Any,
        task_cpus: float,
        each: Callable[[dict[str, Any]], None] = lambda _: None,
    ) -> None:
        """Does what is pending.

        Args:
            blocks: Starts the work on a cluster that has been joined; yields the figures of each block (its `rows`,
                and more) when it is written.
            needs, task_cpus: Arguments of `join`.
            each: Is given the figures of each block.
        """
        if pending.num_rows:
            self.join(*needs, task_cpus=task_cpus)
            self.say("starting the stages: each actor loads its models first ...")
            with self.bar("rows", pending.num_rows) as bar:
                for block in blocks():
                    bar.show(bar.done + block["rows"])
                    each(block)
                    self.lease.check()
        pending.delete()

    def bar(self, what: str, total: int, *, done: int = 0) -> Bar:
        """A progress bar on the run's console."""
        return Bar(self.console, what, total, done=done)

    def finish(self, report: Mapping[str, Any]) -> None:
        """Notes that the run is done, and what it gave, unless the folder says so already."""
        if not (self.is_finished and self.found.report == json.loads(json.dumps(report))):
            dataclasses.replace(self.record, is_finished=True, report=report).write(self.out)


@contextlib.contextmanager
def open_run(
    out: Folder,
    record: RunRecord,
    config: Any,
    console: Console | None,
    *,
    is_done_once: bool = False,
    may_grow: str = "",
) -> Iterator[Run]:
    """Claims the folder for the run, or continues it there, and holds its lease for the duration of the block.

    Args:
        is_done_once: A run that was finished before is left alone: its lease is not held.
        may_grow: See `claim`.

    Raises:
        ConfigError: The folder holds something else, or has another writer.
        OSError: A store is in trouble.
    """
    console = console or Console(quiet=True)
    found, lease = claim(out, record, may_grow=may_grow), HeldLease(out)
    with contextlib.ExitStack() as stack:
        if not (is_done_once and found.is_finished):
            lease = stack.enter_context(hold_lease(out))
            found = claim(out, record)  # another process may have finished it just before
        yield Run(out=out, record=record, found=found, config=config, console=console, lease=lease)
