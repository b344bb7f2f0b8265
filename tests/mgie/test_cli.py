import functools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import mgie.cli
from mgie.bundle.bundle import Bundle, open_bundle
from mgie.bundle.record import CONFIG_FILE
from mgie.editor import Editor, EditResult
from mgie.images.files import read_metadata
from mgie.training.checkpoint import write_snapshot

pytestmark = pytest.mark.slow

FAST = ("--bundle", "random", "--steps", "1", "--device", "cpu")


@dataclass(frozen=True)
class Outcome:
    """What a run of the command left."""

    status: int
    out: str
    err: str


Run = Callable[..., Outcome]

_load = Editor.load
_load_once = functools.cache(Editor.load)


def _load_embedded_once(bundle: str, *, device: str, dtype: str) -> Editor:
    """As `Editor.load`: of a bundle that no test changes, it is the one that was loaded before."""
    return (_load_once if bundle in ("random", "tiny") else _load)(bundle, device=device, dtype=dtype)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Runs `mgie` in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(Editor, "load", staticmethod(_load_embedded_once))

    def call(*arguments: str | Path) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["mgie", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            mgie.cli.main()
        captured = capsys.readouterr()
        assert isinstance(caught.value.code, int)
        return Outcome(caught.value.code, captured.out, captured.err)

    return call


def load_picture(path: Path) -> tuple[str | None, tuple[int, int], bytes]:
    """Format, size and pixels."""
    with Image.open(path) as image:
        return image.format, image.size, image.tobytes()


def save_picture(path: Path, wh: tuple[int, int] = (48, 32)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.linear_gradient("L").resize(wh).convert("RGB").save(path)
    return path


# ---- edit


def test_one_image_is_edited_and_the_result_is_named(run: Run, tmp_path: Path, random_bundle: Bundle) -> None:
    photo = save_picture(tmp_path / "in" / "photo.jpg", (50, 34))
    done = run("edit", photo, "make it night", "--seed", "4", *FAST)
    assert done.status == 0
    assert done.out.startswith("photo-edited.png  seed 4")
    content = (tmp_path / "photo-edited.png").read_bytes()
    assert load_picture(tmp_path / "photo-edited.png")[:2] == ("PNG", (50, 34))
    assert read_metadata(content)["seed"] == "4"
    assert read_metadata(content)["bundle"] == random_bundle.identity
    assert "untrained" in done.err


def test_settings_reach_the_edit(run: Run, tmp_path: Path) -> None:
    photo = save_picture(tmp_path / "photo.png", (50, 34))
    variants = {
        "base": (),
        "sampler": ("--sampler", "ddim"),
        "text": ("--guidance-scale", "2"),
        "image": ("--image-guidance-scale", "3"),
        "words": ("--expressive", "A dark [red] sky."),
        "seed": ("--seed", "2"),
        "square": ("--square-crop",),
    }
    outputs = {}
    for name, flags in variants.items():
        done = run("edit", photo, "make it night", "--out", f"{name}.webp", "--seed", "1", *FAST, *flags)
        assert done.status == 0, done.err
        outputs[name] = load_picture(tmp_path / f"{name}.webp")
        if name == "words":
            assert "A dark [red] sky." in done.out  # brackets are no markup
    assert len(set(outputs.values())) == len(variants)
    assert outputs["square"][:2] == ("WEBP", (34, 34))


def test_a_folder_is_edited_into_a_folder(run: Run, tmp_path: Path) -> None:
    for name in ("a.png", "a.jpg", "b.webp"):
        save_picture(tmp_path / "photos" / name)
    (tmp_path / "photos" / "notes.txt").write_text("not an image")
    done = run("edit", tmp_path / "photos", "make it night", "--out", "results", "--format", "jpeg", *FAST)
    assert done.status == 0
    assert sorted(p.name for p in (tmp_path / "results").iterdir()) == [
        "a-edited-2.jpeg",
        "a-edited.jpeg",
        "b-edited.jpeg",
    ]
    assert done.out.count("seed ") == 3
    assert all(load_picture(p)[0] == "JPEG" for p in (tmp_path / "results").iterdir())


def test_what_of_a_folder_is_skipped_is_said(run: Run, tmp_path: Path) -> None:
    for name in ("a.png", "b.JPE"):
        save_picture(tmp_path / "photos" / name.lower())
    (tmp_path / "photos" / "sub").mkdir()
    for name in ("notes.txt", "._a.jpg", ".DS_Store", *(f"{i:02d}.txt" for i in range(20))):
        (tmp_path / "photos" / name).write_text("not an image")
    done = run("edit", tmp_path / "photos", "make", "it", "night", *FAST)
    assert done.status == 0
    assert sorted(p.name for p in (tmp_path / "edited").iterdir()) == ["a-edited.png", "b-edited.png"]
    [line] = [line for line in done.err.splitlines() if line.startswith("skipped")]
    assert line == f"skipped no images: {', '.join(f'{i:02d}.txt' for i in range(10))}, and 12 more; hidden files: 2"


def test_a_folder_that_was_interrupted_goes_on(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "abcd":
        save_picture(tmp_path / "photos" / f"{name}.png")
    save = EditResult.save

    def save_and_interrupt(result: EditResult, path: Path, **options: Any) -> None:
        save(result, path, **options)
        if path.name == "b-edited.png":
            signal.raise_signal(signal.SIGINT)

    arguments = ("edit", "photos", "make it night", "--seed", "1", "--batch-size", "2", *FAST)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background ignores it
    with monkeypatch.context() as patched:
        patched.setattr(EditResult, "save", save_and_interrupt)
        stopped = run(*arguments)
    signal.signal(signal.SIGINT, before)
    assert stopped.status == 130
    assert [line for line in stopped.err.splitlines() if "untrained" not in line] == [
        "stopped: 1 of 4 results are made; the same command goes on"
    ]
    made = {path.name: path.read_bytes() for path in (tmp_path / "edited").iterdir()}
    assert set(made) == {"a-edited.png", "b-edited.png"}
    rest = run(*arguments)
    assert (rest.status, rest.out.count("seed 1")) == (0, 2)
    assert "skipped 2 results that are there; --overwrite makes them again" in rest.err
    assert {name: (tmp_path / "edited" / name).read_bytes() for name in made} == made
    nothing = run(*arguments)
    assert (nothing.status, nothing.out) == (0, "")
    assert "skipped 4 results" in nothing.err
    again = run(*arguments, "--overwrite")
    assert (again.status, again.out.count("seed 1")) == (0, 4)


def test_mask_number_quality_and_largest_image(run: Run, tmp_path: Path) -> None:
    photo = save_picture(tmp_path / "photo.png", (60, 40))
    mask = Image.new("RGBA", (60, 40), "black")
    mask.paste((0, 0, 0, 0), (0, 0, 20, 40))
    mask.save(tmp_path / "mask.png")
    flags = ("--mask", "mask.png", "--n", "3", "--seed", "5", *FAST)
    done = run("edit", photo, "make it night", "--out", "new/night.png", *flags)
    assert done.status == 0, done.err
    names = ["night.png", "night-2.png", "night-3.png"]
    assert [line.split("  ")[:2] for line in done.out.splitlines() if "seed" in line] == [
        [f"new/{name}", f"seed {5 + i} (no visual tokens came: the words may have had no effect)"]
        for i, name in enumerate(names)
    ]
    right = {
        Image.open(path).convert("RGB").crop((20, 0, 60, 40)).tobytes()
        for path in (photo, *(tmp_path / "new" / name for name in names))
    }
    assert len(right) == 1
    (tmp_path / "new" / "night-2.png").unlink()
    assert run("edit", photo, "make it night", "--out", "new/night.png", *flags).status == 2
    sizes = []
    for quality in ("0", "100"):
        done = run("edit", photo, "x", "--out", f"{quality}.jpg", "--output-compression", quality, "--seed", "1", *FAST)
        assert done.status == 0, done.err
        sizes.append((tmp_path / f"{quality}.jpg").stat().st_size)
    assert sizes[0] < sizes[1]
    assert "at most 100 are allowed" in run("edit", photo, "x", "--max-pixels", "100", "--out", "a.png", *FAST).err
    assert run("edit", photo, "x", "--max-pixels", "2400", "--out", "new", *FAST).status == 0
    assert (tmp_path / "new" / "photo-edited.png").is_file()


def test_a_bad_edit_of_several_fails_alone(run: Run, tmp_path: Path) -> None:
    save_picture(tmp_path / "x" / "good.png")
    (tmp_path / "x" / "bad.png").write_text("not an image")
    rows = [
        {"image": "x/good.png", "instruction": "make it night", "seed": 3},
        {"image": "x/missing.png", "instruction": "make it night"},
        {"image": "x/bad.png", "instruction": "make it night"},
        {"image": "x/good.png", "instruction": " "},
        {"image": "x/good.png", "instruction": "make it night", "seed": -1},
        {"image": "x/good.png", "instruction": "add a hat \u2028 here", "expressive": "A hat [/red]."},
    ]
    (tmp_path / "edits.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n")
    done = run("edit", tmp_path / "edits.jsonl", "--seed", "9", *FAST)
    assert done.status == 1
    assert sorted(p.name for p in (tmp_path / "edited").iterdir()) == ["good-edited-4.png", "good-edited.png"]
    assert "4 of 6 edits failed" in done.err
    for text in ("missing.png cannot be read: No such file", "unknown format", "prompt is empty", "seed is -1"):
        assert done.err.count(text) == 1, text
    # The row's own seed and words come before those of the command line.
    assert "good-edited.png  seed 3" in done.out
    assert "good-edited-4.png  seed 9" in done.out
    assert "A hat [/red]." in done.out
    assert "Traceback" not in done.err


def test_results_are_not_overwritten_unless_asked(run: Run, tmp_path: Path) -> None:
    photo = save_picture(tmp_path / "photo.png")
    (tmp_path / "photo-edited.png").write_text("precious")
    done = run("edit", photo, "make it night", *FAST)
    assert done.status == 2
    assert "photo-edited.png exists; choose another --out or give --overwrite" in done.err
    assert (tmp_path / "photo-edited.png").read_text() == "precious"
    assert run("edit", photo, "make it night", "--overwrite", *FAST).status == 0
    assert load_picture(tmp_path / "photo-edited.png")[1] == (48, 32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("edit", "none.png", "x"), "none.png is neither a file nor a folder"),
        (("edit", "text.png", "x"), "image has an unknown format"),
        (("edit", "photo.png", "x", "--steps", "0"), "steps is 0; it must be 1 to 1000"),
        (("edit", "photo.png", "x", "--seed", "-1"), "seed is -1"),
        (("edit", "photo.png", "x", "--guidance-scale", "nan"), "guidance_scale is nan"),
        (("edit", "photo.png", " "), "instruction is empty"),
        (("edit", "photo.png"), "instruction is empty"),
        (("edit", "photo.png", "x", "--bundle", "nonsense"), "bundle 'nonsense' does not exist"),
        (("edit", "photo.png", "x", "--bundle", "acme/none[/x]"), "bundle 'acme/none[/x]'"),
        (("edit", "photo.png", "x", "--bundle", "random-summarizer"), "has no tokenizer"),
        (("edit", "photo.png", "x", "--device", "abacus"), "device is 'abacus'"),
        (("edit", "photo.png", "x", "--dtype", "int8"), "dtype is 'int8'"),
        (("edit", "photo.png", "x", "--out", "a.gif"), "a.gif does not end in one of"),
        (("edit", "empty", "x"), "empty holds no image"),
        (("edit", "photos", "x", *FAST, "--steps", "1000", "--sampler", "dpmpp_2m"), "steps is 1000; dpmpp_2m with"),
        (("edit", "photo.png", "x", "--n", "0"), "n is 0; it must be 1 to 10"),
        (("edit", "photo.png", "x", "--batch-size", "0"), "batch_size is 0"),
        (("edit", "photo.png", "x", "--mask", "text.png"), "mask cannot be used: image has an unknown format"),
        (("edit", "photo.png", "x", "--mask", "none.png"), "none.png cannot be read: No such file"),
        (("edit", "photo.png", "x", "--output-compression", "80"), "png is lossless and takes none"),
        (("edit", "photo.png", "x", "--out", "a.jpg", "--output-compression", "101"), "output_compression is 101"),
        (("edit", "photo.png", "x", "--out", "photo.png/a.png"), "photo.png is a file; --out must be a folder here"),
        (("edit", "photo.png", "x", "--out", "/proc/a.png"), "/proc cannot be written to"),
        (("edit", "photos", "x", "--out", "photos"), "the folder of the photos; it must be another one"),
        (("edit", "none.jsonl"), "none.jsonl cannot be read"),
        (("edit", "odd.jsonl"), "odd.jsonl, line 2 is not JSON"),
        (("edit", "odd.jsonl", "x"), "an instruction was given beside a .jsonl file"),
        (("edit", "field.jsonl"), "line 1 must be an object with image, instruction"),
        (("edit", "type.jsonl"), "seed is True; it must be a int"),
        (("info", "nonsense"), "bundle 'nonsense' does not exist"),
        (("info", "empty"), "empty is not a bundle"),
        (("parity", "empty"), "empty is not a reference folder"),
        (("convert", "out", "--llava", "empty"), "sources given: llava"),
        (("convert", "out", "--stable-diffusion", "empty"), "empty lacks unet/config.json"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_status_two(
    run: Run, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    save_picture(tmp_path / "photo.png")
    save_picture(tmp_path / "photos" / "a.png")
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "empty").mkdir()
    good = '{"image": "photo.png", "instruction": "x"}\n'
    (tmp_path / "odd.jsonl").write_text(good + "{")
    (tmp_path / "field.jsonl").write_text('{"image": "photo.png", "instruction": "x", "steps": 3}')
    (tmp_path / "type.jsonl").write_text('{"image": "photo.png", "instruction": "x", "seed": true}')
    before = sorted(tmp_path.rglob("*"))
    done = run(*arguments)
    lines = [line for line in done.err.splitlines() if line.strip() and "untrained" not in line]
    assert done.status == 2
    assert len(lines) == 1, done.err
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert done.out == ""
    assert sorted(tmp_path.rglob("*")) == before  # nothing was written


@pytest.mark.parametrize(
    "flags",
    [
        ("--steps", "0"),
        ("--guidance-scale", "99"),
        ("--out", "/proc/a.png"),
        ("--mask", "none.png"),
    ],
)
def test_what_can_be_refused_is_before_anything_is_loaded(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, str]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("the bundle was loaded")

    monkeypatch.setattr(Editor, "load", fail)
    done = run("edit", save_picture(tmp_path / "photo.png"), "x", *flags)
    assert (done.status, done.err.count("\n")) == (2, 1), done.err


@pytest.mark.parametrize(("flag", "value"), [("--steps", "abc"), ("--seed", "1.5"), ("--guidance-scale", "high")])
def test_a_number_that_is_none_is_said_without_types(run: Run, tmp_path: Path, flag: str, value: str) -> None:
    done = run("edit", save_picture(tmp_path / "photo.png"), "x", flag, value)
    assert done.status == 2
    assert flag in done.err
    assert repr(value) in done.err
    assert "None" not in done.err


def test_the_version_is_told(run: Run) -> None:
    assert run("--version").out == f"mgie {mgie.__version__}\n"


def test_a_sampler_that_is_not_known_is_refused_with_the_ones_that_are(run: Run, tmp_path: Path) -> None:
    done = run("edit", save_picture(tmp_path / "photo.png"), "x", "--sampler", "magic")
    assert done.status == 2
    for name in ("magic", "euler_ancestral", "ddim", "dpmpp_2m"):
        assert name in done.out + done.err


# ---- info


def test_info_tells_what_a_bundle_holds(run: Run, random_bundle: Bundle) -> None:
    done = run("info", "random")
    assert done.status == 0
    for text in (
        "random",
        random_bundle.identity,
        "no: random weights",
        "euler_ancestral",
        *random_bundle.config.parts,
    ):
        assert text in done.out
    assert "\x1b" not in done.out


def test_info_as_json_is_bundle_json_with_the_identity(run: Run, random_bundle: Bundle) -> None:
    data = json.loads(run("info", "random", "--json").out)
    assert data.pop("identity") == random_bundle.identity
    assert data == json.loads((random_bundle.root / CONFIG_FILE).read_text())


def test_info_verify_finds_a_flipped_byte(run: Run, tmp_path: Path, random_folder: Path) -> None:
    folder = Path(shutil.copytree(random_folder, tmp_path / "copy"))
    done = run("info", folder, "--verify")
    assert (done.status, "every file is as listed" in done.out) == (0, True)
    content = bytearray((folder / "vae" / "diffusion_pytorch_model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(content)
    assert run("info", folder).status == 0
    done = run("info", folder, "--verify")
    assert done.status == 2
    assert "vae/diffusion_pytorch_model.safetensors has sha256" in done.err


def test_text_in_a_bundle_is_shown_as_it_is(run: Run, tmp_path: Path, random_folder: Path) -> None:
    folder = Path(shutil.copytree(random_folder, tmp_path / "copy"))
    data = json.loads((folder / CONFIG_FILE).read_text())
    data["provenance"]["data"] = "[red]warm[/red] [/x]"
    (folder / CONFIG_FILE).write_text(json.dumps(data))
    assert "[red]warm[/red] [/x]" in run("info", folder).out


# ---- export


def test_a_run_is_exported_by_command_and_the_bundle_edits(run: Run, tmp_path: Path) -> None:
    bundle = open_bundle("random-ip2p")
    weights = {f"unet.{name}": value for name, value in bundle.load_unet().state_dict().items()}
    write_snapshot(
        tmp_path / "run" / "checkpoints" / "step-00000003", step=3, variant="ip2p", base=bundle.identity,
        base_bundle="random-ip2p", config={}, data="", data_names=["photos"], metrics={}, trainable=weights, ema=None,
        optimizer={},
    )  # fmt: skip
    done = run("export", "run", "--out", "mine")
    assert (done.status, done.err) == (0, "")
    assert done.out.splitlines()[0].startswith("mine  bundle mine, identity ")
    assert "step 3, raw weights" in done.out
    shown = json.loads(run("info", "./mine", "--json").out)
    assert (shown["trained"], shown["provenance"]["data"]) == (True, "photos")
    save_picture(tmp_path / "photo.png")
    assert run("edit", "photo.png", "make it night", "--bundle", "./mine", *FAST).status == 0
    assert load_picture(tmp_path / "photo-edited.png")[1] == (48, 32)
    again = run("export", "run", "--out", "mine", "--name", "new", "--replace")
    assert "bundle new" in again.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nothing", "--out", "b"), "nothing holds no complete checkpoint"),
        (("run", "--out", "b", "--weights", "ema"), "give --weights raw"),
        (("run", "--out", "b", "--step", "4"), "step-00000004 is no checkpoint"),
        (("run", "--out", "b", "--base", "random"), "say by --base where that lies now"),
        (("run", "--out", "b", "--base", "random-ip2p", "--published"), "the published layout holds"),
    ],
)
def test_what_cannot_be_exported_is_said(run: Run, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    write_snapshot(
        tmp_path / "run" / "checkpoints" / "step-00000003", step=3, variant="fz",
        base=open_bundle("random-ip2p").identity, base_bundle="random-ip2p", config={}, data="", data_names=[], metrics={},
        trainable={}, ema=None, optimizer={},
    )  # fmt: skip
    done = run("export", *arguments)
    assert done.status == 2
    assert message in done.err
    assert not (tmp_path / "b").exists()


# ---- parity and convert


def test_convert_then_info_then_edit_with_published_layouts(run: Run, tmp_path: Path, reference_dir: Path) -> None:
    sources: tuple[Any, ...] = ()
    for flag, name in (
        ("llava", "llava"),
        ("clip", "clip"),
        ("stable-diffusion", "stable-diffusion"),
        ("mgie", "mgie"),
    ):
        sources += (f"--{flag}", reference_dir / name)
    done = run("convert", "my-bundle", *sources, "--name", "mine")
    assert done.status == 0, done.err
    assert done.out.startswith(f"my-bundle  bundle mine, identity {Bundle(tmp_path / 'my-bundle').identity}")
    assert "untrained" not in done.err
    again = run("convert", "my-bundle", *sources)
    assert (again.status, "my-bundle exists" in again.err) == (2, True)
    assert run("convert", "my-bundle", *sources, "--replace").status == 0
    photo = save_picture(tmp_path / "photo.png")
    assert run("edit", photo, "make it night", "--bundle", "my-bundle", "--seed", "1", *FAST).status == 0
    fresh = run("convert", "fresh", *sources[:-2], "--num-visual-tokens", "4")
    assert fresh.status == 0
    assert "untrained" in fresh.err
    assert Bundle(tmp_path / "fresh").config.num_visual_tokens == 4


@pytest.mark.slow
def test_parity_passes_by_command(run: Run, reference_dir: Path) -> None:
    done = run("parity", reference_dir, "--json")
    data = json.loads(done.out)
    assert (done.status, data["passed"]) == (0, True)
    assert done.err == ""
    assert set(data["groups"][0]) == {"name", "compared", "worst", "tolerance", "verdict", "reason"}
    table = run("parity", reference_dir)
    assert table.status == 0
    assert table.out.splitlines()[-1] == "passed"
    for group in data["groups"]:
        assert any(line.split("  ")[0].strip() == group["name"] for line in table.out.splitlines()), group["name"]
    # In lines of their own: readable also where the width is 80 columns.
    assert sum(line.startswith("by design: ") for line in table.out.splitlines()) == 2


def test_parity_that_fails_has_status_one(run: Run, reference_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mgie.evaluation.parity import Group, Report

    bad = Group("labels", 0.0)
    bad.equal("row '[IMG0]' [/x]", 1, 2)
    monkeypatch.setattr(
        "mgie.evaluation.parity.compare", lambda _folder, progress: [progress("labels"), Report((bad,))][1]
    )
    done = run("parity", reference_dir)
    assert done.status == 1
    assert "fail: labels: row '[IMG0]' [/x] is 1, recorded 2" in done.out
    assert done.out.splitlines()[-1] == "failed"


# ---- as a program


def program(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-c", "from mgie.cli import main; main()", *map(str, arguments)],
        cwd=cwd, env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_the_command_edits_and_prints_only_what_is_worth_reading(tmp_path: Path, random_folder: Path) -> None:
    photo = save_picture(tmp_path / "photo.png")
    done = program("edit", photo, "make it night", "--seed", "1", *FAST, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "photo-edited.png").is_file()
    assert "\x1b" not in done.stdout + done.stderr  # no colours or cursor movements in a pipe
    assert done.stdout.splitlines()[0].startswith("photo-edited.png  seed 1")
    assert len([line for line in done.stderr.splitlines() if line.strip()]) == 1, done.stderr  # untrained


@pytest.mark.slow
def test_a_wrong_command_is_answered_with_the_right_ones(tmp_path: Path) -> None:
    done = program("paint", cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "edit" in done.stdout + done.stderr
