"""The demo: its pictures, and one whole run on a cluster of its own."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import ImageFont

from mgie.errors import ImageError
from mgie.images import read_image, read_metadata
from serving.demo import HOST, DemoConfig, before_after, draw_landscape, free_port, main, wrap


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


def test_a_file_that_is_no_photo_fails_before_a_cluster_is_started(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no photo")
    with pytest.raises(ImageError):
        main(DemoConfig(photo=tmp_path / "notes.txt"))
    with pytest.raises(FileNotFoundError):
        main(DemoConfig(photo=tmp_path / "missing.png"))


@pytest.mark.ray
@pytest.mark.slow
def test_the_demo_edits_over_http_writes_the_pictures_and_leaves_nothing_running(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "serving.demo", "--instruction", "make it night", "--out", str(tmp_path / "out")]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr
    assert "UNTRAINED" not in done.stdout
    assert "make it night" in done.stdout
    edited = (tmp_path / "out" / "edited.png").read_bytes()
    assert read_image(edited).size == (512, 512)
    assert read_metadata(edited)["seed"] == "0"
    assert read_image((tmp_path / "out" / "before_after.png").read_bytes()).width > 1000
    port = int(done.stdout.split(f"http://{HOST}:")[1].split("/")[0])
    with socket.socket() as probe:
        assert probe.connect_ex((HOST, port)) != 0  # nobody answers any more
