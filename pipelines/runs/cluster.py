"""What a job takes of a Ray cluster, and whether the cluster has it: checked before anything starts.

A job whose smallest pools do not fit would hang without a word; here it is refused in seconds, with what to do.
Knows nothing of models, rows or what the stages do.
"""

import logging
import os
import signal
import socket
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.data import ActorPoolStrategy, DataContext
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mgie.bundle.embedded import EMBEDDED
from mgie.config import check_range
from mgie.errors import ConfigError
from mgie.storage.folder import Folder, open_folder

PATIENCE_S = 15.0  # what a killed job held is free again after a few seconds
_PROBE_S = 5.0
_TOLERANCE = 1e-6  # sums of fractions of a CPU


@dataclass(frozen=True, kw_only=True)
class StageSize:
    """How much of the cluster a stage takes."""

    min_actors: int = 1
    "actors at least"
    max_actors: int = 1
    "actors at most"
    num_gpus: float = 0.0
    "GPUs of one actor; may be a fraction"
    num_cpus: float = 0.5
    "CPUs of one actor; may be a fraction"
    batch_size: int = 8
    "rows per model call"

    def __post_init__(self) -> None:
        if not 1 <= self.min_actors <= self.max_actors:
            raise ConfigError(
                f"actors are {self.min_actors} to {self.max_actors}; it must be 1 <= min <= max", param="min_actors"
            )
        check_range("batch_size", self.batch_size, 1, 1_000_000)
        check_range("num_gpus", self.num_gpus, 0.0, 1024.0)
        check_range("num_cpus", self.num_cpus, 0.0, 1024.0)

    def pool(self) -> dict[str, Any]:
        """Arguments of `map_batches` for a stage that takes a block at a time and makes its own model batches."""
        return {
            "batch_size": None,
            "batch_format": "pyarrow",
            # One block is worked on, one waits: more would fill the object store for nothing.
            "compute": ActorPoolStrategy(
                min_size=self.min_actors, max_size=self.max_actors, max_tasks_in_flight_per_actor=2
            ),
            "num_cpus": self.num_cpus,
            "num_gpus": self.num_gpus or None,
        }


def start_ray(say: Callable[[str], None] = lambda _: None) -> None:
    """Joins the cluster that the environment names, else starts one on this machine; keeps Ray's chatter off the screen.

    Args:
        say: Is told of a cluster that is gone.

    Raises:
        ConnectionError: Nothing answers at RAY_ADDRESS.
    """
    if not ray.is_initialized():
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing leaves the machine unasked
        is_main = threading.current_thread() is threading.main_thread()
        on_term = signal.getsignal(signal.SIGTERM)
        ray.init(address=_address(say), log_to_driver=False, logging_level=logging.ERROR)
        if is_main:
            signal.signal(signal.SIGTERM, on_term)  # Ray has put its own in place
    DataContext.get_current().enable_progress_bars = False  # the jobs have one of their own, in rows
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="The maximum number of concurrent tasks", category=UserWarning)


def _address(say: Callable[[str], None]) -> str | None:
    """What to tell Ray of where the cluster is: it would wait for minutes, deaf to signals, for one that is gone."""
    named = os.environ.get("RAY_ADDRESS", "")
    folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"  # noqa: S108  # as Ray itself looks
    file = Path(folder) / "ray" / "ray_current_cluster"
    address = named
    if named in ("", "auto") and file.is_file():
        address = file.read_text().strip()
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not port.isdigit():
        return None  # none, or a word of Ray's own
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_PROBE_S).close()
    except OSError as error:
        if named:
            raise ConnectionError(
                f"RAY_ADDRESS is {named}, but no cluster answers at {address} ({error}); start it, or unset RAY_ADDRESS"
            ) from error
        say(f"the cluster that {file} names ({address}) is gone: starting one on this machine")
        return "local"
    return None


def check_cluster(
    stages: Mapping[str, StageSize], *, task_cpus: float, grows: bool = False, patience_s: float = PATIENCE_S
) -> None:
    """Checks that the smallest pool of every stage, and the tasks around them, fit into what is free.

    Args:
        stages: Stages by the name that their flags begin with.
        task_cpus: CPUs of one task of each kind that runs besides the stages.
        grows: The cluster adds nodes on demand: nothing is refused.
        patience_s: How long to wait for resources that others hold.

    Raises:
        ConfigError: They do not fit; says what is missing and what to do.
    """
    if grows:
        return
    check_size(stages, [node["Resources"] for node in alive_nodes()], task_cpus=task_cpus)
    deadline = time.monotonic() + patience_s
    while problem := _shortage(stages, ray.available_resources(), task_cpus, "the cluster has {there:g} free"):
        if time.monotonic() > deadline:
            raise ConfigError(f"{problem}, or wait until the cluster's other jobs have ended")
        time.sleep(0.5)


def check_size(stages: Mapping[str, StageSize], nodes: Sequence[Mapping[str, float]], *, task_cpus: float) -> None:
    """The part of `check_cluster` that looks at the nodes' sizes alone. Raises ConfigError."""
    for name, stage in stages.items():
        if not any(
            node.get("CPU", 0) + _TOLERANCE >= stage.num_cpus and node.get("GPU", 0) + _TOLERANCE >= stage.num_gpus
            for node in nodes
        ):
            raise ConfigError(
                f"one actor of stage {name} needs {stage.num_cpus:g} CPUs and {stage.num_gpus:g} GPUs on one node; "
                f"no node has them; lower --{name}.num-cpus or --{name}.num-gpus, or add such a node"
            )
    totals = {kind: sum(node.get(kind, 0.0) for node in nodes) for kind in ("CPU", "GPU")}
    if problem := _shortage(stages, totals, task_cpus, "the cluster has {there:g}"):
        raise ConfigError(problem)


def _shortage(
    stages: Mapping[str, StageSize], resources: Mapping[str, float], task_cpus: float, there_is: str
) -> str | None:
    for kind, extra in (("CPU", task_cpus), ("GPU", 0.0)):
        field = f"num_{kind.lower()}s"
        needed = extra + sum(stage.min_actors * getattr(stage, field) for stage in stages.values())
        there = resources.get(kind, 0.0)
        if needed > there + _TOLERANCE:
            flags = " or ".join(f"--{name}.{field.replace('_', '-')}" for name in stages) or "the CPUs of a task"
            return (
                f"the job needs {needed:g} {kind}s at least, {there_is.format(there=there)}; "
                f"lower {flags} or the numbers of actors, or add nodes"
            )
    return None


def alive_nodes() -> list[dict[str, Any]]:
    """Nodes of the cluster, as Ray describes them."""
    return [node for node in ray.nodes() if node["Alive"]]


def check_shared(folders: Mapping[str, Folder]) -> None:
    """Checks that every node sees the local ones of these folders, which exist here.

    Raises:
        ConfigError: A node does not; names it and the folder.
    """
    paths = {name: folder.path for name, folder in folders.items() if folder.is_local}
    nodes = alive_nodes()
    if not paths or len(nodes) < 2:
        return
    unseen = ray.remote(num_cpus=0)(_unseen)
    asked = {
        node["NodeManagerHostname"]: unseen.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote(paths)
        for node in nodes
    }
    for host, answer in asked.items():
        for name in ray.get(answer):
            raise ConfigError(
                f"{name} is {paths[name]}, which node {host} does not see; "
                "give a folder that all nodes share, or an s3:// URL"
            )


def absolute_bundle(name: str) -> str:
    """A bundle's name as tasks and actors can use it, who work in another folder than the one who gave it."""
    path = Path(name).expanduser()
    return str(path.absolute()) if name not in EMBEDDED and path.is_dir() else name


def local_bundles(*names: str) -> dict[str, Folder]:
    """Those of the bundles (`absolute_bundle`) that all nodes must see, by what they are; others they fetch."""
    return {f"bundle {name}": open_folder(name) for name in names if name.startswith("/")}


def _unseen(paths: Mapping[str, str]) -> list[str]:
    return [name for name, path in paths.items() if not Path(path).exists()]
