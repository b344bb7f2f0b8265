"""The one Ray cluster of these tests."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from pipelines.runs import lease
from tests.object_store import CREDENTIALS
from tests.pipelines.chaos import PATIENCE, Cluster, private_cluster
from tests.pipelines.jobs import leave_ray_out

NUM_CPUS = 2


@pytest.fixture(autouse=True)
def _lease(monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer is believed at once, and never counts as gone because the machine is slow."""
    monkeypatch.setattr(lease, "SETTLE_S", 0.01)
    monkeypatch.setattr(lease, "WATCH_S", 1800.0)


@pytest.fixture(scope="session")
def lone_cluster() -> Iterator[Cluster]:
    """The one cluster, for jobs that are processes of their own. Its workers inherit the credentials of `s3`."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in CREDENTIALS.items():
            patch.setenv(name, value)
        with private_cluster(NUM_CPUS) as started:
            yield started


_joined = pytest.MonkeyPatch()


@pytest.fixture(scope="module")
def cluster(lone_cluster: Cluster) -> Cluster:
    """The one cluster, which this process has joined: jobs that are called in it run there, as parts of one Ray job.

    So its workers serve all tests. Those of `serving/`, which may run in this process later, start clusters of their own.
    """
    if not ray.is_initialized():
        for name, value in (PATIENCE | {"RAY_AUTH_MODE": "disabled"}).items():
            _joined.setenv(name, value)
        ray.init(address=lone_cluster.env["RAY_ADDRESS"], log_to_driver=False, logging_level=logging.ERROR)
    return lone_cluster


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Leaves the cluster after the last test below this folder."""
    here = Path(__file__).parent
    if ray.is_initialized() and (nextitem is None or here not in nextitem.path.parents):
        ray.shutdown()
        _joined.undo()


@pytest.fixture(params=["here", pytest.param("cluster", marks=[pytest.mark.ray, pytest.mark.endure])])
def ray_or_not(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The claim is about what a job does with its rows: its stages run in this process; as a long proof, on Ray."""
    if request.param == "here":
        leave_ray_out(monkeypatch)
    else:
        request.getfixturevalue("cluster")
