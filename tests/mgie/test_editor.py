import io
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
from mgie.errors import BundleError, ConfigError, ImageError, ImageTooLargeError, PromptError
from mgie.images.files import AI_EDITED, output_format, read_metadata
from mgie.images.pictures import load_image

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


def test_on_step_counts_every_step(editor: Editor) -> None:
    seen: list[tuple[int, int]] = []
    edit(editor, steps=3, on_step=lambda step: seen.append((step.done, step.total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


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


def test_bytes_path_and_image_give_the_same_source(tmp_path: Path) -> None:
    image = picture()
    image.save(tmp_path / "a.png")
    expected = image.tobytes()
    for source in (image, tmp_path / "a.png", str(tmp_path / "a.png"), (tmp_path / "a.png").read_bytes()):
        loaded = load_image(source)
        assert (loaded.mode, loaded.size, loaded.tobytes()) == ("RGB", image.size, expected)


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
