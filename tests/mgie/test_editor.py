import copy
import io
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mgie.bundle.bundle import Bundle
from mgie.config import MAX_INSTRUCTION_CHARS, MAX_SEED, GenerationConfig, ImageLimits, random_seed
from mgie.editor import Editor
from mgie.errors import (
    BundleError,
    ConfigError,
    EditStoppedError,
    ImageError,
    ImageTooLargeError,
    MaskError,
    MGIEError,
    PromptError,
)
from mgie.images.files import AI_EDITED, output_format, read_metadata
from mgie.images.pictures import load_image, load_mask
from mgie.inference.renderer import RenderStep

WORDS = "make it night"
SHORT = GenerationConfig(max_new_tokens=4)  # what the untrained model writes is of no interest here


@pytest.fixture(scope="module")
def editor(random_folder: Path) -> Editor:
    return Editor.load(random_folder, device="cpu")


def picture(width: int = 80, height: int = 60, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def edit(editor: Editor, image: Any = None, **given: Any) -> Any:
    return editor.edit(
        picture() if image is None else image, WORDS, **{"seed": 1, "steps": 2, "generation": SHORT} | given
    )


def pixels(image: Image.Image) -> Any:
    return np.asarray(image, dtype=np.int64)


# ---- result


@pytest.mark.parametrize("wh", [(80, 60), (61, 83), (101, 37), (17, 16), (16, 128), (240, 30), (300, 301)])
def test_the_result_has_the_size_of_the_source(editor: Editor, wh: tuple[int, int]) -> None:
    result = edit(editor, picture(*wh), steps=1)
    assert result.image.size == wh
    assert result.image.mode == "RGB"


def test_the_words_alone_are_those_of_the_edit(editor: Editor) -> None:
    words = editor.derive(picture(), WORDS, generation=SHORT)
    result = edit(editor)
    assert words.expressive == result.expressive
    assert torch.equal(words.condition, result.edit_condition.condition)
    assert editor.derive(picture(), WORDS, expressive="a dark sky").expressive == "a dark sky"


def test_the_package_has_the_editor_for_who_asks() -> None:
    import mgie

    assert mgie.Editor is Editor
    with pytest.raises(AttributeError, match="Editr"):
        mgie.Editr  # noqa: B018


def test_a_square_crop_gives_the_centre_square(editor: Editor) -> None:
    assert edit(editor, picture(90, 61), square_crop=True).image.size == (61, 61)


def test_the_same_seed_gives_the_same_pixels_and_another_seed_others(editor: Editor) -> None:
    first, again, other = (edit(editor, seed=seed).image for seed in (5, 5, 6))
    assert first.tobytes() == again.tobytes()
    assert np.abs(pixels(first) - pixels(other)).mean() > 1


def test_a_drawn_seed_is_named_and_repeats_the_result(editor: Editor) -> None:
    drawn = edit(editor, seed=None)
    assert 0 <= drawn.seed <= MAX_SEED
    assert edit(editor, seed=drawn.seed).image.tobytes() == drawn.image.tobytes()
    assert len({random_seed() for _ in range(20)}) == 20


def test_the_source_the_words_and_every_setting_matter(editor: Editor) -> None:
    base = edit(editor).image.tobytes()
    assert editor.edit(picture(), "add a red hat", seed=1, steps=2, generation=SHORT).image.tobytes() != base
    assert edit(editor, picture(seed=1)).image.tobytes() != base
    for change in (
        {"steps": 3},
        {"sampler": "ddim"},
        {"sampler": "dpmpp_2m"},
        {"guidance_scale": 2.0},
        {"image_guidance_scale": 3.0},
        {"expressive": "A dark sky with stars."},
    ):
        assert edit(editor, **change).image.tobytes() != base, change


def test_a_given_expressive_instruction_is_used_and_reported(editor: Editor) -> None:
    result = edit(editor, expressive="A dark sky with [IMG0] stars.")
    assert result.expressive == "A dark sky with [IMG0] stars."
    assert result.edit_condition.output_tokens == 0
    assert not result.used_fallback
    derived = edit(editor)
    assert derived.edit_condition.output_tokens == SHORT.max_new_tokens
    assert not np.array_equal(pixels(result.image), pixels(derived.image))


def test_the_result_tells_how_it_came_about(editor: Editor, random_bundle: Bundle) -> None:
    result = edit(editor, seed=7, sampler="ddim")
    assert (result.seed, result.settings.steps, result.settings.sampler) == (7, 2, "ddim")
    assert result.settings.guidance_scale == random_bundle.config.defaults.guidance_scale
    assert result.edit_condition.bundle == random_bundle.identity
    assert result.bundle.trained is False
    assert set(result.timings_s) == {"derive", "render"}
    assert all(seconds > 0 for seconds in result.timings_s.values())
    assert result.edit_condition.image_tokens == 64
    assert result.edit_condition.prompt_tokens > 10


def test_a_fallback_is_reported(editor: Editor) -> None:
    assert edit(editor).used_fallback  # the untrained model writes no [IMG0] in four tokens


def test_on_step_sees_previews_and_its_false_stops_the_edit(editor: Editor) -> None:
    seen: list[tuple[int, int, tuple[int, int]]] = []

    def watch(step: RenderStep) -> bool:
        seen.append((step.done, step.total, step.preview(is_cheap=step.done == 1).size))
        return step.done < 2

    with pytest.raises(EditStoppedError, match="after step 2 of 3"):
        edit(editor, steps=3, on_step=watch)
    assert seen == [(1, 3, (80, 60)), (2, 3, (80, 60))]


# ---- many at once


def test_a_batch_gives_what_each_edit_gives_alone(editor: Editor) -> None:
    images = [picture(80, 60, 0), picture(60, 80, 1), picture(40, 30, 2), picture(80, 60, 3), picture(64, 48, 4)]
    words = [WORDS, "make it winter", WORDS, "add a hat", "a longer instruction than the others, with more words"]
    spoken = [None, None, "A dark sky.", None, "It is winter."]
    mask = Image.new("L", (60, 80))
    mask.paste(255, (0, 0, 30, 80))
    steps: list[int] = []
    together = editor.edit(
        images,
        words,
        seed=[1, 2, 3, 4, 5],
        expressive=spoken,
        mask=[None, mask, None, None, None],
        steps=2,
        generation=SHORT,
        batch_size=3,
        on_step=lambda step: steps.append(step.index),
    )
    assert [result.seed for result in together] == [1, 2, 3, 4, 5]
    assert sorted(steps) == sorted([0, 1, 2, 3, 4] * 2)
    for i, result in enumerate(together):
        own = {"expressive": spoken[i], "mask": mask if i == 1 else None}
        alone = editor.edit(images[i], words[i], seed=i + 1, steps=2, generation=SHORT, **own)
        assert result.expressive == alone.expressive
        assert result.image.size == images[i].size
        assert np.abs(pixels(result.image) - pixels(alone.image)).max() <= 2


def test_one_value_holds_for_all_of_a_list_and_words_are_derived_once(editor: Editor) -> None:
    by_seed = editor.edit(picture(), WORDS, seed=[7, 8, 9], steps=1, generation=SHORT)
    by_number = editor.edit(picture(), WORDS, seed=7, n=3, steps=1, generation=SHORT)
    assert [result.seed for result in by_seed] == [result.seed for result in by_number] == [7, 8, 9]
    for one, other in zip(by_seed, by_number, strict=True):
        assert one.image.tobytes() == other.image.tobytes()
        assert one.edit_condition is by_seed[0].edit_condition
    two = editor.edit([picture(), picture(seed=1)], [WORDS, "make it winter"], n=2, seed=5, steps=1, generation=SHORT)
    assert [result.seed for result in two] == [5, 6, 5, 6]
    assert two[0].edit_condition is two[1].edit_condition is not two[2].edit_condition
    file = io.BytesIO()
    picture().save(file, "PNG")
    file.seek(0)  # a file can be read only once
    assert len(editor.edit(file, [WORDS, "make it winter"], steps=1, generation=SHORT)) == 2
    assert editor.edit([], WORDS) == []
    assert [result.seed >= 0 for result in editor.edit([picture()], WORDS, steps=1, generation=SHORT)] == [True]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"image": [picture(), b"nothing"]}, "picture 2 of 2: image has an unknown format"),
        ({"image": [picture(), picture()], "instruction": ["x", " "]}, "picture 2 of 2: prompt is empty"),
        ({"instruction": ["x", "\U0001f600" * 3000]}, "picture 2 of 2: prompt has"),
        ({"expressive": ["x", "\U0001f600" * 3000]}, "picture 2 of 2: prompt and expressive instruction have"),
        ({"image": [picture()] * 3, "mask": [None, Image.new("L", (3, 3), 255), None]}, "picture 2 of 3: mask"),
        ({"seed": [1, -1]}, "picture 2 of 2: seed is -1"),
        ({"image": [picture()] * 3, "seed": [1, 2]}, "lists have lengths {'image': 3, 'seed': 2}"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"steps": 1000, "sampler": "dpmpp_2m"}, "steps is 1000; dpmpp_2m with timestep_spacing"),
    ],
)
def test_what_is_bad_of_many_is_named_before_any_work(editor: Editor, given: dict[str, Any], message: str) -> None:
    idle = copy.copy(editor)
    idle._run = None  # type: ignore[assignment, method-assign]  # what begins the work
    with pytest.raises(MGIEError, match=re.escape(message)):
        idle.edit(**{"image": picture(), "instruction": WORDS} | given)


def test_each_half_has_its_own_dtype(random_bundle: Bundle, editor: Editor) -> None:
    full = edit(editor, steps=1)
    for half in ("mllm", "diffusion"):
        other = edit(Editor.load(random_bundle, device="cpu", **{f"{half}_dtype": "bfloat16"}), steps=1)
        is_same = torch.equal(other.edit_condition.condition, full.edit_condition.condition)
        assert is_same == (half == "diffusion")
        assert other.image.tobytes() != full.image.tobytes()


@pytest.mark.parametrize(
    ("name", "format_name"), [("a.png", "PNG"), ("a.JPG", "JPEG"), ("a.jpeg", "JPEG"), ("a.webp", "WEBP")]
)
def test_saving_writes_metadata_that_reads_back(editor: Editor, tmp_path: Path, name: str, format_name: str) -> None:
    result = edit(editor, seed=11)
    result.save(tmp_path / name)
    content = (tmp_path / name).read_bytes()
    assert Image.open(io.BytesIO(content)).format == format_name
    metadata = read_metadata(content)
    assert metadata["seed"] == "11"
    assert metadata["bundle"] == result.edit_condition.bundle
    assert metadata["description"] == AI_EDITED
    assert metadata["software"]
    if format_name == "PNG":
        assert Image.open(io.BytesIO(content)).tobytes() == result.image.tobytes()


def test_a_file_name_without_a_format_is_refused_before_anything_is_written(editor: Editor, tmp_path: Path) -> None:
    result = edit(editor, steps=1)
    for name in ("a.gif", "a", "a.png.exe"):
        with pytest.raises(ImageError, match=r"does not end in one of \.png") as caught:
            result.save(tmp_path / name)
        assert caught.value.param == "out"
    assert list(tmp_path.iterdir()) == []
    assert output_format(Path("X.WebP")) == "webp"


def test_quality_is_for_those_formats_that_have_it(editor: Editor, tmp_path: Path) -> None:
    result = edit(editor, steps=1)
    for name in ("low.jpg", "high.jpg"):
        result.save(tmp_path / "new" / name, quality=20 if name == "low.jpg" else 95)
    assert (tmp_path / "new" / "low.jpg").stat().st_size < (tmp_path / "new" / "high.jpg").stat().st_size
    with pytest.raises(ConfigError, match="png is lossless"):
        result.save(tmp_path / "a.png", quality=90)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


# ---- what is refused


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"steps": 0}, "steps"),
        ({"steps": 1001}, "steps"),
        ({"guidance_scale": -1.0}, "guidance_scale"),
        ({"guidance_scale": float("nan")}, "guidance_scale"),
        ({"image_guidance_scale": 51.0}, "image_guidance_scale"),
        ({"seed": -1}, "seed"),
        ({"seed": MAX_SEED + 1}, "seed"),
        ({"n": 0}, "n"),
        ({"seed": MAX_SEED, "n": 2}, "seed"),
    ],
)
def test_a_wrong_setting_is_refused_by_name_before_any_work(
    random_bundle: Bundle, editor: Editor, given: dict[str, Any], param: str
) -> None:
    class Untouched:
        """A conditioner and renderer that must not be reached."""

        def __getattr__(self, name: str) -> Any:
            raise AssertionError(f"{name} was asked for")

    idle = Editor.__new__(Editor)
    idle.__dict__.update(bundle=random_bundle.config, _conditioner=Untouched(), renderer=Untouched())
    with pytest.raises(ConfigError) as caught:
        edit(idle, **given)
    assert caught.value.param == param


@pytest.mark.parametrize("words", ["", "  \n", "x" * (MAX_INSTRUCTION_CHARS + 1), "\ud800"])
def test_words_that_cannot_be_used_are_refused(editor: Editor, words: str) -> None:
    with pytest.raises(PromptError) as caught:
        editor.edit(picture(), words, seed=1, steps=1)
    assert caught.value.param == "prompt"
    with pytest.raises(PromptError) as caught:
        edit(editor, expressive=words)
    assert caught.value.param == "expressive"


def test_a_bundle_that_is_no_editor_is_refused() -> None:
    with pytest.raises(BundleError, match="has no tokenizer"):
        Editor.load("random-summarizer", device="cpu")
    with pytest.raises(ConfigError):
        Editor.load("random", device="abacus")


# ---- sources


def encoded(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def saved(image: Image.Image, folder: Path) -> Path:
    image.save(folder / "a.png")
    return folder / "a.png"


def tensor(image: Image.Image) -> torch.Tensor:
    array = torch.from_numpy(np.array(image))
    return array.permute(2, 0, 1) if array.ndim == 3 else array[None]


# Name -> what is made of a picture, given a folder to write to.
WAYS: dict[str, Callable[[Image.Image, Path], Any]] = {
    "PIL image": lambda image, _: image,
    "PIL image with alpha": lambda image, _: image.convert("RGBA"),
    "path": saved,
    "name": lambda image, folder: str(saved(image, folder)),
    "bytes": lambda image, _: encoded(image),
    "buffered file": lambda image, _: io.BufferedReader(io.BytesIO(encoded(image))),  # as `open` gives
    "file in memory": lambda image, _: io.BytesIO(encoded(image)),
    "array of bytes": lambda image, _: np.asarray(image),
    "array of floats": lambda image, _: np.asarray(image, dtype=np.float32) / 255,
    "tensor, channels first": lambda image, _: tensor(image),
    "tensor of half floats": lambda image, _: (tensor(image).double() / 255).requires_grad_(),
    "tensor, channels last": lambda image, _: torch.from_numpy(np.array(image)),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_picture_and_a_mask_may_be_given_in_many_ways(editor: Editor, tmp_path: Path, way: str) -> None:
    image, mask = picture(), Image.new("L", (80, 60))
    mask.paste(255, (20, 10, 60, 40))
    expected = edit(editor, image, mask=mask, steps=1)
    (tmp_path / "mask").mkdir()
    given = edit(editor, WAYS[way](image, tmp_path), mask=WAYS[way](mask, tmp_path / "mask"), steps=1)
    assert given.image.tobytes() == expected.image.tobytes()
    outside = np.asarray(mask) == 0
    assert (pixels(given.image)[outside] == pixels(image)[outside]).all()
    words = editor.derive(WAYS[way](image, tmp_path), WORDS, generation=SHORT)
    assert torch.equal(words.condition, given.edit_condition.condition)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"a": 1}, "image is a dict; it must be a PIL image, a path"),
        (io.StringIO("text"), "image is a file that gives str"),
        (np.zeros((3, 20, 20), np.uint8), "image has shape (3, 20, 20)"),
        (np.zeros((2, 20, 20, 3), np.uint8), "image has shape (2, 20, 20, 3)"),
        (np.zeros((0, 20, 3), np.uint8), "image has shape (0, 20, 3)"),
        (np.full((20, 20, 3), 255.0), "image has floats 255 to 255; they must be 0 to 1"),
        (np.full((20, 20), np.nan), "image has floats nan to nan"),
        (torch.full((3, 20, 20), -1.0), "image has floats -1 to -1"),
        (np.zeros((20, 20, 3), np.int64), "image is of int64"),
        ("a\0b", "cannot be read"),
    ],
)
def test_what_is_no_picture_is_said(given: Any, message: str) -> None:
    with pytest.raises(ImageError, match=re.escape(message)) as caught:
        load_image(given)
    assert caught.value.param == "image"
    with pytest.raises(MaskError, match=re.escape(f"mask cannot be used: {message}"[:20])) as caught:
        load_mask(given)
    assert caught.value.param == "mask"


def test_a_bool_array_is_black_and_white() -> None:
    where = np.zeros((20, 30), dtype=bool)
    where[:, :10] = True
    assert (np.asarray(load_mask(where)) == where * 255).all()


def test_a_large_file_is_not_read_whole(tmp_path: Path) -> None:
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(ImageTooLargeError, match="image is 20971521 bytes"):
        load_image(tmp_path / "huge.png")


def translucent(mode: str) -> Image.Image:
    """Left half transparent, right half opaque; black or red below."""
    image = Image.new("RGBA", (40, 20), (200, 0, 0, 255))
    image.paste((0, 0, 0, 0), (0, 0, 20, 20))
    if mode == "P":
        return image.quantize(8)
    if mode == "RGB":  # a colour key
        keyed = image.convert("RGB")
        keyed.info["transparency"] = (0, 0, 0)
        return keyed
    return image.convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_transparency_of_an_image_object_is_composited_over_white_as_in_a_file(mode: str) -> None:
    image = translucent(mode)
    before = (image.mode, dict(image.info), image.tobytes())
    loaded = load_image(image)
    assert loaded.getpixel((5, 5)) == (255, 255, 255)
    assert loaded.getpixel((35, 5)) != (255, 255, 255)
    assert (image.mode, dict(image.info), image.tobytes()) == before  # the caller's image stays as it is
    file = io.BytesIO()
    image.save(file, "PNG")
    assert load_image(file.getvalue()).tobytes() == loaded.tobytes()


def grey(image: Image.Image) -> Image.Image:
    return image.convert("L")


def sixteen_bit(image: Image.Image) -> Image.Image:
    return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)


def cmyk(image: Image.Image) -> Image.Image:
    return image.convert("CMYK")


def black_and_white(image: Image.Image) -> Image.Image:
    return image.convert("1")


@pytest.mark.parametrize("change", [grey, sixteen_bit, cmyk, black_and_white])
def test_an_image_object_of_any_mode_is_taken(change: Callable[[Image.Image], Image.Image]) -> None:
    image = picture()
    loaded = load_image(change(image))
    expected = image if change is cmyk else image.convert("1" if change is black_and_white else "L").convert("RGB")
    assert loaded.tobytes() == expected.tobytes()


def test_an_image_object_is_turned_upright_as_a_file_is(tmp_path: Path) -> None:
    image = picture(40, 20)
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as opened:
        loaded = load_image(opened)
    assert loaded.size == (20, 40)
    assert loaded.tobytes() == load_image(tmp_path / "a.png").tobytes()
    assert not loaded.info
    assert not loaded.getexif()


def test_limits_hold_for_every_kind_of_source(tmp_path: Path) -> None:
    limits = ImageLimits(max_side_px=50, min_side_px=16)
    large, small = picture(60, 40), picture(15, 40)
    for image, kind in ((large, ImageTooLargeError), (small, ImageError)):
        image.save(tmp_path / "a.png")
        for source in (image, tmp_path / "a.png", (tmp_path / "a.png").read_bytes()):
            with pytest.raises(kind, match="each side must be 16 to 50 px"):
                load_image(source, limits)


def test_what_cannot_be_read_is_an_image_error(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("not an image")
    picture().save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:300])
    for source in (tmp_path / "none.png", tmp_path, tmp_path / "a.png", b"", tmp_path / "cut.png"):
        with pytest.raises(ImageError) as caught:
            load_image(source)
        assert caught.value.param == "image"
    with Image.open(tmp_path / "cut.png") as opened, pytest.raises(ImageError):
        load_image(opened)


def test_a_seed_that_is_no_whole_number_in_range_is_refused_by_name(random_folder: Path) -> None:
    # In a process of its own: the tests' type checker would be faster.
    program = """
import sys
import numpy as np
from PIL import Image
from mgie.editor import Editor
from mgie.errors import ConfigError
editor, photo = Editor.load(sys.argv[1], device="cpu"), Image.new("RGB", (64, 48))
for seed in (1.5, "1", True, -1, 2**63):
    try:
        editor.edit(photo, "x", seed=seed)
    except ConfigError as error:
        assert error.param == "seed" and str(error).startswith(f"seed is {seed!r}; it must be "), error
    else:
        raise AssertionError(seed)
assert editor.edit(photo, "x", seed=np.int64(3), steps=1).seed == 3
"""
    subprocess.run([sys.executable, "-c", program, str(random_folder)], check=True)
