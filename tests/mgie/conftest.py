"""The embedded tiny bundle, built once per session."""

from pathlib import Path

import pytest

from mgie.checkpoint import Bundle
from mgie.tiny import ensure_bundle


@pytest.fixture(scope="session")
def tiny_folder() -> Path:
    return ensure_bundle("random")


@pytest.fixture(scope="session")
def tiny_bundle(tiny_folder: Path) -> Bundle:
    return Bundle(tiny_folder)
