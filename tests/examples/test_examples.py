"""Every file of examples/, run as a reader would, against a real service."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mgie.images.files import read_image, read_metadata
from mgie.tiny.world import make_sample
from tests.live import listening, open_backend, usual_api

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("kept")
    with open_backend("tiny") as backend, listening(usual_api(backend, folder)) as started:
        yield started


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with `photo.jpg`, 256 x 192 px."""
    make_sample(11, "test", 37, side_px=256).source.crop((0, 32, 256, 224)).save(tmp_path / "photo.jpg", quality=95)
    return tmp_path


def environment(address: str) -> dict[str, str]:
    return os.environ | {"OPENAI_BASE_URL": f"{address}/v1", "OPENAI_API_KEY": "unused", "MGIE": address}


@pytest.fixture
def client(address: str, folder: Path) -> Run:
    def run(*args: str, code: int = 0) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, str(EXAMPLES / "client.py"), *args]
        done = subprocess.run(
            command, cwd=folder, env=environment(address), capture_output=True, text=True, check=False
        )
        assert done.returncode == code, done.stderr
        return done

    return run


def pixels(path: Path) -> np.ndarray:
    return np.asarray(read_image(path.read_bytes()), dtype=int)


def test_the_client_edits(client: Run, folder: Path) -> None:
    done = client("edit", "photo.jpg", "make it night", "--n", "2", "--seed", "7", "--steps", "4", "--out", "night.png")
    assert re.search(r"expressive instruction: .*night", done.stdout)
    assert "seed 7, 4 steps" in done.stdout
    first, second = (folder / name for name in ("night.png", "night-2.png"))
    assert read_metadata(first.read_bytes())["seed"] == "7"
    assert (pixels(first) != pixels(second)).any()
    assert pixels(first).mean() < pixels(folder / "photo.jpg").mean() - 20
    own = client(
        "edit", "photo.jpg", "make it night", "--expressive", "Make it sepia.", "--seed", "7", "--out", "own.png"
    )
    assert "expressive instruction: Make it sepia." in own.stdout
    assert (pixels(folder / "own.png") != pixels(first)).any()


def test_the_client_streams(client: Run, folder: Path) -> None:
    client("stream", "photo.jpg", "make it night", "--out", "night.png")
    partials = sorted(folder.glob("night-partial-*.png"))
    assert 1 <= len(partials) <= 3
    assert pixels(folder / "night.png").shape == (192, 256, 3)


def test_the_client_edits_a_part(client: Run, folder: Path) -> None:
    source = Image.open(folder / "photo.jpg")
    source.save(folder / "photo.png")  # whose pixels are the same for both sides
    client("mask", "photo.png", "make it night", "--box", "0", "0", "100", "192", "--seed", "1", "--out", "part.png")
    before, after = pixels(folder / "photo.png"), pixels(folder / "part.png")
    assert (before[:, 100:] == after[:, 100:]).all()
    assert abs(before[:, :100] - after[:, :100]).mean() > 5


def test_the_client_edits_a_folder_once_and_says_what_failed(client: Run, folder: Path) -> None:
    photos = folder / "photos"
    photos.mkdir()
    for i in range(3):
        make_sample(11, "test", i, side_px=96).source.save(photos / f"{i}.png")
    client("batch", "photos", "make it night", "--out", "night")
    made = {path: path.stat().st_mtime_ns for path in (folder / "night").iterdir()}
    assert {path.name for path in made} == {"0.png.png", "1.png.png", "2.png.png"}
    (photos / "bad.jpg").write_bytes(b"no picture")
    done = client("batch", "photos", "make it night", "--out", "night", code=1)
    assert "3 of 4 photos are edited" in done.stdout
    assert "bad.jpg: Error code: 415" in done.stderr
    assert {path: path.stat().st_mtime_ns for path in (folder / "night").iterdir()} == made
    empty = client("batch", "night/..", "x", "--out", "none", code=0)  # photo.jpg
    assert "1 of 1" in empty.stdout


def test_the_client_says_what_is_wrong(client: Run) -> None:
    assert "missing.jpg" in client("edit", "missing.jpg", "make it night", code=1).stderr
    assert "steps" in client("edit", "photo.jpg", "make it night", "--steps", "0", code=1).stderr


def commands_of(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


def run_commands(commands: list[str], folder: Path, address: str) -> str:
    """What they print, where all of them succeed."""
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    script = "set -euo pipefail\n" + "\n".join(f"echo '== {i}'\n{command}" for i, command in enumerate(commands))
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=folder,
        env=environment(address),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_first_commands_of_the_page_on_jobs_bring_one_to_its_end(address: str, folder: Path) -> None:
    command, *_ = commands_of("docs/jobs.md", "bash")
    said = run_commands([command.replace("http://localhost:8000", address)], folder, address)
    events = [json.loads(line.removeprefix("data: ")) for line in said.splitlines() if line.startswith("data: ")]
    assert (events[-1]["status"], events[-1]["result"]["mgie"]["trained"]) == ("done", True)
    assert '"code":"job_ended"' in said


def test_every_command_of_the_shell_page_does_what_it_says(address: str, folder: Path) -> None:
    mask = Image.new("RGBA", (256, 192), "black")
    mask.paste((0, 0, 0, 0), (0, 0, 100, 192))
    mask.save(folder / "mask.png")
    commands = commands_of("examples/curl.md", "sh")
    assert len(commands) > 8
    said = run_commands(commands, folder, address)
    answers = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
    assert set(answers) == {"answer", "own-words", "kept", "second-turn", "part", "cancelled", "json"}
    assert answers.pop("cancelled")["error"]["code"] == "cancelled"
    assert all("mgie" in answer for answer in answers.values())
    assert answers["own-words"]["data"][0]["revised_prompt"].startswith("Dark blue sky")
    assert (answers["own-words"]["mgie"]["steps"], answers["own-words"]["mgie"]["guidance_scale"]) == (12, 2)
    assert answers["answer"]["data"][0]["revised_prompt"] in said
    assert pixels(folder / "night.png").shape == pixels(folder / "kept.png").shape == (192, 256, 3)
    assert ': expressive "' in said
    assert "event: image_edit.completed" in said


def test_the_notebook_runs_from_top_to_bottom() -> None:
    cells = json.loads((EXAMPLES / "editor.ipynb").read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert all(not cell.get("outputs") for cell in cells)
    names: dict[str, Any] = {}
    for i, source in enumerate(code):
        exec(compile(source, f"cell {i}", "exec"), names)
    assert names["result"].image.size == (512, 512)
    assert names["own"].expressive.startswith("Make it a sepia")
    assert all(one.expressive for one in names["understood"].values())
    sheet = np.asarray(names["sheet"], dtype=int)
    assert sheet.shape == (576, 576, 3)
    tiles = {sheet[y : y + 192, x : x + 192].tobytes() for y in range(0, 576, 192) for x in range(0, 576, 192)}
    assert len(tiles) == 9
    source, part = (np.asarray(names[name] if name == "photo" else names[name].image) for name in ("photo", "part"))
    assert (source[:, 256:] == part[:, 256:]).all()


def gradio_python() -> str:
    """An interpreter with Gradio: this one, or that of $GRADIO_PYTHON, since Gradio has its own demands on packages."""
    for python in (sys.executable, os.environ.get("GRADIO_PYTHON")):
        if (
            python
            and subprocess.run([python, "-c", "import gradio, openai"], capture_output=True, check=False).returncode
            == 0
        ):
            return python
    pytest.skip("no Gradio here; point $GRADIO_PYTHON at an interpreter that has gradio and openai")


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_the_gradio_page_edits_by_instruction_and_by_ones_own_words(address: str, folder: Path) -> None:
    python = gradio_python()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    more = {"GRADIO_SERVER_PORT": str(port), "GRADIO_ANALYTICS_ENABLED": "False"}
    server = subprocess.Popen([python, str(EXAMPLES / "gradio_ui.py")], cwd=folder, env=environment(address) | more)
    ask = """
import json, sys
from gradio_client import Client, handle_file
client = Client(f"http://127.0.0.1:{sys.argv[1]}", verbose=False)
numbers = [3, 4, 1.5]
first = client.predict(handle_file("photo.jpg"), "make it night", *numbers, api_name="/edit")
again = client.predict(handle_file("photo.jpg"), "make it night", "Make it sepia.", *numbers, api_name="/again")
print(json.dumps([first, again]))
"""
    try:
        while not _answers(port):
            assert server.poll() is None
            time.sleep(0.1)
        done = subprocess.run([python, "-c", ask, str(port)], cwd=folder, capture_output=True, text=True, check=False)
    finally:
        server.terminate()
        server.wait()
    assert done.returncode == 0, done.stderr
    (first, words, seed), (again, own, _) = json.loads(done.stdout.splitlines()[-1])
    assert "night" in words
    assert (seed, own) == (3, "Make it sepia.")
    assert read_image(Path(first).read_bytes()).size == (256, 192)
    assert Path(first).read_bytes() != Path(again).read_bytes()
