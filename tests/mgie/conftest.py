"""The embedded random bundle, built once per session."""

from pathlib import Path

import pytest

from mgie.bundle.bundle import Bundle
from mgie.bundle.embedded import ensure_bundle


@pytest.fixture(scope="session")
def random_folder() -> Path:
    return ensure_bundle("random")


@pytest.fixture(scope="session")
def random_bundle(random_folder: Path) -> Bundle:
    return Bundle(random_folder)
