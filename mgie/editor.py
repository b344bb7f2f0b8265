"""The whole inference path in one place: image and instruction in, edited image out.

The same conditioner and renderer serve behind HTTP; this is their composition for one process.
"""

import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from mgie.bundles import open_bundle
from mgie.checkpoint import Bundle
from mgie.conditioner import Conditioner, EditRequest, Guidance
from mgie.config import MAX_SEED, BundleConfig, EditSettings, GenerationConfig, ImageLimits, check_range
from mgie.errors import ImageError
from mgie.images import DEFAULT_LIMITS, EditMetadata, OutputFormat, read_image, to_rgb, write_image
from mgie.masks import check_mask
from mgie.renderer import Renderer, RenderRequest

SOFTWARE = "MGIE"
_MAX_RANDOM_SEED = 2**32  # short enough to read out and type in again


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
    guidance: Guidance
    "what crossed from words to pixels, with token counts"
    bundle: BundleConfig
    "what made it"

    def metadata(self) -> EditMetadata:
        """What is written into the image file."""
        return EditMetadata(seed=self.seed, bundle=self.guidance.bundle, software=SOFTWARE)

    def save(self, path: str | Path) -> None:
        """Writes the image, with its metadata, in the format of the file name (png, jpg, jpeg or webp).

        Raises:
            ImageError: The name ends in something else.
        """
        path = Path(path)
        path.write_bytes(write_image(self.image, format=output_format(path), metadata=self.metadata()))


def output_format(path: Path) -> OutputFormat:
    """The image format that a file name asks for.

    Raises:
        ImageError: It ends in none of .png, .jpg, .jpeg, .webp.
    """
    known: dict[str, OutputFormat] = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
    if path.suffix.lower() not in known:
        raise ImageError(f"{path.name} does not end in one of {', '.join(known)}", param="out")
    return known[path.suffix.lower()]


def random_seed() -> int:
    """A seed for an edit that gave none."""
    return secrets.randbelow(_MAX_RANDOM_SEED)


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
        request = EditRequest(image=source, instruction=instruction, expressive=expressive)
        [guidance] = self._conditioner.derive([request], generation)
        derived = time.perf_counter()
        render = RenderRequest(image=source, guidance=guidance, settings=used, seed=seed, mask=allowed)
        [(_, edited)] = self._renderer.render([render], on_step=on_step)
        return EditResult(
            image=edited,
            expressive=guidance.expressive,
            seed=seed,
            settings=used,
            used_fallback=guidance.used_fallback,
            timings_s={"derive": derived - started, "render": time.perf_counter() - derived},
            guidance=guidance,
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
