"""The whole inference path in one place: image and instruction in, edited image out.

The same conditioner and renderer serve behind HTTP; this is their composition for one process.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from mgie.bundle.bundle import Bundle, open_bundle
from mgie.config import (
    MAX_SEED,
    SOFTWARE,
    BundleConfig,
    EditSettings,
    GenerationConfig,
    ImageLimits,
    check_range,
    random_seed,
)
from mgie.errors import ImageError
from mgie.images.files import DEFAULT_LIMITS, EditMetadata, output_format, read_image, to_rgb, write_image
from mgie.images.masks import check_mask
from mgie.inference.conditioner import Conditioner, EditCondition, EditRequest
from mgie.inference.renderer import Renderer, RenderRequest


@dataclass(frozen=True, kw_only=True)
class EditResult:
    """An edited image and how it came about."""

    image: Image.Image
    "RGB, of the source's size"
    expressive: str
    "what the model understood"
    seed: int
    "give it again for the same result"
    settings: EditSettings
    "as used"
    used_fallback: bool
    "the model gave no usable visual tokens; the edit may ignore the words"
    timings_s: Mapping[str, float]
    "seconds in `derive` and `render`"
    edit_condition: EditCondition
    "what crossed from words to pixels, with token counts"
    bundle: BundleConfig
    "what made it"

    def metadata(self) -> EditMetadata:
        """What is written into the image file."""
        return EditMetadata(seed=self.seed, bundle=self.edit_condition.bundle, software=SOFTWARE)

    def save(self, path: str | Path) -> None:
        """Writes the image, with its metadata, in the format of the file name (png, jpg, jpeg or webp).

        Raises:
            ImageError: The name ends in something else.
        """
        path = Path(path)
        path.write_bytes(write_image(self.image, format=output_format(path), metadata=self.metadata()))


@dataclass(frozen=True, kw_only=True)
class Derivation:
    """What the model makes of the words alone."""

    expressive: str
    "what the model understood"
    used_fallback: bool
    "the model gave no usable visual tokens; an edit may ignore the words"
    edit_condition: EditCondition
    "what crosses from words to pixels, with token counts"


class Editor:
    """Edits images with one bundle in this process.

        editor = Editor.load("tiny")
        editor.edit(photo, "make it night", seed=1).save("night.png")

    Args:
        bundle: Its configuration. conditioner, renderer: Its two halves.
    """

    def __init__(self, *, bundle: BundleConfig, conditioner: Conditioner, renderer: Renderer) -> None:
        self.bundle, self._conditioner, self._renderer = bundle, conditioner, renderer

    @classmethod
    def load(cls, bundle: str | Path | Bundle = "tiny", *, device: str = "auto", dtype: str = "auto") -> "Editor":
        """Loads a bundle: `tiny`, a folder, a hub id or `s3://...`.

        Raises:
            BundleError: It is missing, damaged, or holds no part of an editor.
            ConfigError: The device or dtype is not there.
        """
        opened = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
        return cls(
            bundle=opened.config,
            conditioner=opened.load_conditioner(device=device, dtype=dtype),
            renderer=opened.load_renderer(device=device, dtype=dtype),
        )

    def derive(
        self,
        image: Image.Image | bytes | str | Path,
        instruction: str,
        *,
        expressive: str | None = None,
        generation: GenerationConfig | None = None,
    ) -> Derivation:
        """Derives what an edit would be guided by, without making it; arguments and errors as those of `edit`."""
        request = EditRequest(image=load_source(image), instruction=instruction, expressive=expressive)
        [condition] = self._conditioner.derive([request], generation)
        return Derivation(
            expressive=condition.expressive, used_fallback=condition.used_fallback, edit_condition=condition
        )

    def edit(
        self,
        image: Image.Image | bytes | str | Path,
        instruction: str,
        *,
        seed: int | None = None,
        expressive: str | None = None,
        mask: Image.Image | bytes | str | Path | None = None,
        generation: GenerationConfig | None = None,
        on_step: Callable[[int, int], None] | None = None,
        **settings: Any,
    ) -> EditResult:
        """Edits one image.

        Args:
            image: A PIL image, encoded bytes, or a file's path.
            instruction: What to change, in a few words.
            seed: 0 to 2**63 - 1; None draws one, which the result names.
            expressive: Your own expressive instruction, used in place of a derived one.
            mask: Where the picture may change: an image of the source's size, white = edit, black = keep each pixel
                as it is. None = everywhere.
            generation: How the expressive instruction is written; None = the bundle's way.
            on_step: Called after each denoising step with the steps done and their total.
            settings: Fields of `EditSettings`, over the bundle's defaults.

        Raises:
            ImageError: The image or mask cannot be read, is outside the limits, or they do not fit each other.
            PromptError: A text is blank or too long.
            ConfigError: A setting is unknown or out of range.
        """
        source = load_source(image)
        used = self.bundle.defaults.override(**settings)
        seed = random_seed() if seed is None else seed
        check_range("seed", seed, 0, MAX_SEED)  # here, because the MLLM would have worked in vain
        allowed = None if mask is None else load_source(mask).convert("L")
        if allowed is not None:  # here, too
            check_mask(allowed, self._renderer.framing(source.size, used))
        started = time.perf_counter()
        words = self.derive(source, instruction, expressive=expressive, generation=generation)
        derived = time.perf_counter()
        render = RenderRequest(
            image=source, edit_condition=words.edit_condition, settings=used, seed=seed, mask=allowed
        )
        [(_, edited)] = self._renderer.render([render], on_step=on_step)
        return EditResult(
            image=edited,
            expressive=words.expressive,
            seed=seed,
            settings=used,
            used_fallback=words.used_fallback,
            timings_s={"derive": derived - started, "render": time.perf_counter() - derived},
            edit_condition=words.edit_condition,
            bundle=self.bundle,
        )


def load_source(image: Image.Image | bytes | str | Path, limits: ImageLimits = DEFAULT_LIMITS) -> Image.Image:
    """The source as an upright RGB image within the limits.

    Raises:
        ImageError: It cannot be read, or is outside the limits.
    """
    if isinstance(image, Image.Image):
        return to_rgb(image, limits=limits)
    if isinstance(image, bytes):
        return read_image(image, limits=limits)
    try:
        data = Path(image).read_bytes()
    except OSError as error:
        raise ImageError(f"{image} cannot be read: {error.strerror}", param="image") from error
    return read_image(data, limits=limits)
