"""What every test runs under: shape checks, one thread, no telemetry; and the folders that may be absent."""

import os
import sys
from pathlib import Path

# Before torch is loaded: one thread, so that sums are added in the same order on every machine, and
# so that neither Ray workers nor subprocesses started by tests fight over the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

import tests.shape_checks  # so that the hook finds it by name

if any(name.split(".")[0] == "mgie" for name in sys.modules):
    raise RuntimeError("mgie was imported before tests/conftest.py: its shapes would go unchecked")
# For the whole session: every annotated function and record of mgie has its types and shapes checked.
install_import_hook(["mgie"], f"{tests.shape_checks.__name__}.check")

settings.register_profile("mgie", deadline=None, derandomize=False, max_examples=50, print_blob=True)
settings.load_profile("mgie")

SHARED = Path(__file__).resolve().parents[2] / "shared"


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
