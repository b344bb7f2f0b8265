"""The real stages with the embedded bundle, in this process, behind the real HTTP application."""

import io
import json
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from mgie.bundle.embedded import ensure_bundle
from serving.edits.in_process import InProcessBackend
from serving.stages.diffusion import DiffusionStage
from serving.stages.mllm import MLLMStage
from tests.live import api_over


@pytest.fixture(scope="session")
def random_bundle() -> Path:
    return ensure_bundle("random")


@pytest.fixture(scope="session")
def mllm(random_bundle: Path) -> Iterator[MLLMStage]:
    stage = MLLMStage(str(random_bundle), device="cpu", cache_bytes=0)
    yield stage
    stage.close()


@pytest.fixture(scope="session")
def diffusion(random_bundle: Path) -> Iterator[DiffusionStage]:
    stage = DiffusionStage(str(random_bundle), device="cpu")
    yield stage
    stage.close()


@pytest.fixture(scope="session")
def client(mllm: MLLMStage, diffusion: DiffusionStage) -> TestClient:
    api = api_over(InProcessBackend(mllm, diffusion))
    return TestClient(api, raise_server_exceptions=False)


@pytest.fixture(scope="session")
def photo() -> Callable[..., bytes]:
    """Encoded smooth noise of a given size and seed."""

    def make(width: int = 96, height: int = 64, *, seed: int = 0, file_type: str = "PNG") -> bytes:
        coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        out = io.BytesIO()
        Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(out, file_type)
        return out.getvalue()

    return make


@pytest.fixture(scope="session")
def mask() -> Callable[..., bytes]:
    """A PNG that is transparent in a box (left, top, right, bottom) and opaque around it."""

    def make(box: tuple[int, int, int, int], *, size: tuple[int, int] = (96, 64)) -> bytes:
        image, out = Image.new("RGBA", size, (9, 9, 9, 255)), io.BytesIO()
        image.paste((200, 0, 0, 0), box)
        image.save(out, "PNG")
        return out.getvalue()

    return make


@pytest.fixture(scope="session")
def renamed_bundle(random_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded bundle under another name: same weights, another identity."""
    copy = tmp_path_factory.mktemp("bundles") / "renamed"
    shutil.copytree(random_bundle, copy)
    config = json.loads((copy / "bundle.json").read_text())
    (copy / "bundle.json").write_text(json.dumps(config | {"name": "renamed"}))
    return copy


@pytest.fixture(scope="session")
def png_header() -> Callable[[int, int], bytes]:
    """A PNG that claims a size and holds no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    def make(width: int, height: int) -> bytes:
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")

    return make
