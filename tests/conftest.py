"""What every test runs under: shape checks, one thread, no telemetry; which tests share a process of several; and
the folders that may be absent."""

import functools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

# Before torch is loaded: one thread, so that sums are added in the same order on every machine, and
# so that neither Ray workers nor subprocesses started by tests fight over the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Nor does what is left of Ray Serve in this process start another Ray when the tests' own has ended.
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")

import pytest
from hypothesis import HealthCheck, settings
from xdist.scheduler import LoadScopeScheduling

from tests.shape_checks import install

# For the whole session: every annotated function and record of mgie has its types and shapes checked.
install("mgie")

# Nothing that depends on the machine's speed: neither a deadline nor a complaint that examples are made slowly.
settings.register_profile(
    "mgie",
    deadline=None,
    derandomize=False,
    max_examples=50,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("mgie")

if TYPE_CHECKING:  # Ray is not for tests that need none
    from mgie.storage.folder import Folder
    from tests.ray_cluster import ServiceHost

# Which fixture a test has that uses the shared service, in the order in which they run: those without Ray come first,
# then who sees the stages asleep, then who wants the service as it is, and last who may put another in its place.
SERVICE_ORDER = ("asleep", "service", "service_host")
TESTS = Path(__file__).resolve().parent
SHARED = TESTS.parents[1] / "shared"


@functools.cache
def _group(file: str) -> str:
    """Files of a group run in one process: those that share a cluster, or the browser's service. Else each file alone.

    Told by the file, not by `xdist_group`: of the marks, what shares the work out sees nothing under pytest 9.
    """
    folder = file.split("/")[1]
    if "pytest.mark.ray" in (TESTS.parent / file).read_text(encoding="utf-8"):
        return "pipelines" if folder == "pipelines" else "serve"
    return "browser" if folder == "browser" else file


class _ByGroup(LoadScopeScheduling):
    def _split_scope(self, nodeid: str) -> str:
        return _group(nodeid.partition("::")[0])


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> LoadScopeScheduling:
    return _ByGroup(config, log)


def _folder_or_skip(folder: Path, what: str) -> Path:
    if not folder.is_dir():
        pytest.skip(f"{what} are not on this machine (looked for ../shared/{folder.relative_to(SHARED)})")
    return folder


@pytest.fixture(scope="session")
def reference_dir() -> Path:
    """Tiny checkpoints in the published layouts, with recorded vectors of the original model."""
    return _folder_or_skip(SHARED / "fixtures" / "reference", "the recorded reference vectors")


@pytest.fixture(scope="session")
def sample_photos() -> Path:
    """Real photos: `demo_inputs/` (ten, with instructions.json) and `ipr2pr/` (source and goal pairs)."""
    return _folder_or_skip(SHARED / "data", "the sample photos")


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """Address of a server of S3 on loopback, for all tests of this process."""
    from tests.object_store import serve_objects

    with serve_objects() as address:
        yield address


@pytest.fixture
def s3(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """URL of an empty bucket; the environment leads there and to nobody else's store."""
    from tests.object_store import make_bucket

    return make_bucket(s3_server, monkeypatch)


@pytest.fixture(scope="module")
def module_s3(s3_server: str) -> Iterator[str]:
    """The same for all tests of a module."""
    from tests.object_store import make_bucket

    with pytest.MonkeyPatch.context() as patch:
        yield make_bucket(s3_server, patch)


@pytest.fixture(params=["local", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> "Folder":
    """The same claims hold for both stores."""
    from mgie.storage.folder import open_folder

    if request.param == "local":
        return open_folder(tmp_path / "a folder")
    return open_folder(f"{request.getfixturevalue('s3')}/a folder")


@pytest.fixture(scope="session")
def service_host() -> "Iterator[ServiceHost]":
    """A private Ray cluster, the same for all tests of the run, and what is served on it."""
    from tests.ray_cluster import open_service_host

    with open_service_host() as opened:
        yield opened


@pytest.fixture
def service(service_host: "ServiceHost") -> str:
    """Address of the usual service on the shared cluster: one replica of each stage, awake, of the random bundle."""
    return service_host.serve_awake()


@pytest.fixture
def asleep(service_host: "ServiceHost") -> str:
    """Address of the usual service before its first edit."""
    return service_host.serve_asleep()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Files all of whose tests are deselected are not even imported: some need seconds for that alone."""
    if not collection_path.name.startswith("test_"):
        return None
    left_out = set(re.findall(r"not (\w+)", config.getoption("markexpr")))
    return bool(left_out & _marks(collection_path)) or None


def _marks(file: Path) -> set[str]:
    """The marks of a whole file."""
    marks = re.search(r"^pytestmark = (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
    return set(re.findall(r"pytest\.mark\.(\w+)", marks[1])) if marks else set()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Groups come first: they are what takes longest, and nothing is left to do beside the last of them."""

    def place(item: pytest.Item) -> tuple[bool, int]:
        fixtures = getattr(item, "fixturenames", ())
        order = next((number for number, name in enumerate(SERVICE_ORDER) if name in fixtures), -1)
        return _group(item.nodeid.partition("::")[0]) not in {"pipelines", "serve", "browser"}, order

    items.sort(key=place)
