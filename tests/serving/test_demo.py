"""The demo: its pictures, and what it says; tests/test_readme.py has a whole run."""

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from PIL import ImageFont

from mgie.errors import ImageError
from mgie.images.files import read_image
from serving.args import ServingArgs
from serving.demo import DemoConfig, before_after, draw_landscape, main, who_has, wrap
from serving.edits.in_process import InProcessBackend
from serving.local_cluster import HOST, free_port
from serving.stages.diffusion import DiffusionStage
from serving.stages.mllm import MLLMStage
from tests.live import api_over, listening

pytestmark = pytest.mark.slow


def test_the_landscape_is_an_image_of_many_colours_and_always_the_same() -> None:
    image = read_image(draw_landscape())
    assert image.size == (512, 512)
    assert len(image.getcolors(100_000) or []) > 50
    assert draw_landscape() == draw_landscape()


def test_before_and_after_stand_side_by_side_above_the_words() -> None:
    short = read_image(before_after(draw_landscape(), draw_landscape(), "make it night", "dark"))
    long = read_image(before_after(draw_landscape(), draw_landscape(), "make it night", "dark " * 100))
    assert short.width == long.width == 2 * 512 + 3 * 16
    assert long.height > short.height
    left, right = short.crop((16, 40, 528, 552)), short.crop((544, 40, 1056, 552))
    assert left.tobytes() == right.tobytes()


def test_wrapped_lines_hold_all_words_and_keep_the_width() -> None:
    font = ImageFont.load_default(16)
    text = "some words and a very-long-word-that-does-not-fit-at-all in between"
    lines = wrap(text, font, 120)
    assert " ".join(lines) == text
    assert all(font.getlength(line) <= 120 or " " not in line for line in lines)


def test_a_free_port_is_free_and_a_taken_one_is_said_to_be() -> None:
    port = free_port(prefer_usual=False)
    with socket.socket() as taken:
        taken.bind((HOST, port))
        taken.listen()
        with pytest.raises(OSError, match="in use"):
            main(DemoConfig(port=port, bundle="random"))


def test_a_second_service_tells_what_the_first_one_is_and_serves(
    mllm: MLLMStage, diffusion: DiffusionStage, tmp_path: Path
) -> None:
    port = free_port(prefer_usual=False)
    with listening(api_over(InProcessBackend(mllm, diffusion), tmp_path), port=port):
        assert who_has(port).startswith(f"a service runs already at http://{HOST}:{port} and serves random")

    async def other(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"[]"})

    with listening(other) as address:
        assert "something else" in who_has(int(address.rpartition(":")[2]))


def test_a_file_that_is_no_photo_fails_before_a_cluster_is_started(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no photo")
    with pytest.raises(ImageError):
        main(DemoConfig(photo=tmp_path / "notes.txt"))
    with pytest.raises(FileNotFoundError):
        main(DemoConfig(photo=tmp_path / "missing.png"))


def test_with_keep_the_service_is_named_and_stays_until_it_is_stopped(
    mllm: MLLMStage,
    diffusion: DiffusionStage,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With a service in this process in the place of the cluster."""
    seen: list[tuple[str, str]] = []

    @contextlib.contextmanager
    def local_service(args: ServingArgs, *, port: int) -> Iterator[str]:
        with listening(api_over(InProcessBackend(mllm, diffusion), tmp_path), port=port) as address:
            seen.append((args.bundle, address))
            yield address

    def pause() -> None:
        [(_, address)] = seen
        said = capsys.readouterr().out
        assert f"serving at {address}  (page: {address}/ " in said
        assert "UNTRAINED" in said
        assert httpx2.get(f"{address}/readyz", timeout=None).status_code == 200
        raise KeyboardInterrupt

    monkeypatch.setattr("serving.demo.local_service", local_service)
    monkeypatch.setattr("signal.pause", pause)
    port = free_port(prefer_usual=False)
    with pytest.raises(KeyboardInterrupt):
        main(DemoConfig(keep=True, bundle="random", port=port))
    assert seen == [("random", f"http://{HOST}:{port}")]
