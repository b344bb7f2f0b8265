"""The whole inference path in one place: pictures and instructions in, edited pictures out, in batches.

The same conditioner and renderer serve behind HTTP; this is their composition for one process: of `Editor.edit`, of
the command line, of bulk jobs and of the samples of a training run.
"""

import contextlib
import io
import operator
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Literal, TypeVar, Unpack, overload

from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mgie.bundle.bundle import Bundle, open_bundle
from mgie.config import (
    MAX_SEED,
    BundleConfig,
    EditOverrides,
    EditSettings,
    GenerationConfig,
    ImageLimits,
    Sampler,
    check_range,
    random_seed,
)
from mgie.errors import ConfigError, MGIEError
from mgie.images.files import DEFAULT_LIMITS, EditMetadata, output_format, write_image
from mgie.images.masks import check_mask
from mgie.images.pictures import load_image, load_mask
from mgie.inference.batch_failures import bisect_failures
from mgie.inference.conditioner import Conditioner, EditCondition, EditRequest
from mgie.inference.renderer import Renderer, RenderRequest, RenderStep
from mgie.storage.folder import open_folder

Picture = Image.Image | str | Path | bytes | IO[bytes] | io.BufferedIOBase | NDArray[Any] | Tensor
"see `load_image`"
Pictures = Picture | Sequence[Picture]
K = TypeVar("K")
OnStep = Callable[[RenderStep], object]
BATCH_SIZE = 8  # images at a time, unless another number is asked for
_MAX_RESULTS = 10_000  # of one picture; more is a mistake


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
    "settings as used"
    used_fallback: bool
    "the model gave no usable visual tokens; the edit may ignore the words"
    timings_s: Mapping[str, float]
    "seconds in `derive` and `render`; of a batch, its share"
    edit_condition: EditCondition
    "what crossed from words to pixels, with token counts"
    bundle: BundleConfig
    "what made it"

    def metadata(self) -> EditMetadata:
        """What is written into the image file."""
        return EditMetadata(seed=self.seed, bundle=self.edit_condition.bundle)

    def save(self, path: str | Path, *, quality: int | None = None) -> None:
        """Writes the image, with its metadata, in the format of the file name (png, jpg, jpeg or webp), making its folder.

        Args:
            path: The file; it appears complete or not at all.
            quality: 1 to 100 for JPEG and WebP; None = 95 and 90.

        Raises:
            ImageError: The name ends in something else.
            ConfigError: Quality out of range, or given for PNG.
            OSError: The file cannot be written.
        """
        path = Path(path)
        data = write_image(self.image, format=output_format(path), quality=quality, metadata=self.metadata())
        with open_folder(path.parent).publish(path.name) as partial:
            partial.write_bytes(data)


@dataclass(frozen=True, kw_only=True, eq=False)
class CheckedEdit(EditRequest):
    """One picture to be made, which has passed every check that needs no model; from `Editor.check`."""

    settings: EditSettings
    seed: int
    mask: Image.Image | None


class EditOptions(EditOverrides, total=False):
    """Keyword arguments of `Editor.edit`, where they are explained."""

    seed: int | Sequence[int | None] | None
    expressive: str | Sequence[str | None] | None
    mask: Picture | Sequence[Picture | None] | None
    generation: GenerationConfig | None
    limits: ImageLimits
    batch_size: int
    on_step: OnStep | None


class Editor:
    """Edits images with one bundle in this process.

        editor = Editor.load("tiny")
        editor.edit(photo, "make it night", seed=1).save("night.png")

    Args:
        bundle: Its configuration. conditioner, renderer: Its two halves.
    """

    def __init__(self, *, bundle: BundleConfig, conditioner: Conditioner, renderer: Renderer) -> None:
        self.bundle, self.renderer, self._conditioner = bundle, renderer, conditioner

    @classmethod
    def load(
        cls,
        bundle: str | Path | Bundle = "tiny",
        *,
        device: str = "auto",
        dtype: str = "auto",
        mllm_device: str | None = None,
        mllm_dtype: str | None = None,
        diffusion_device: str | None = None,
        diffusion_dtype: str | None = None,
    ) -> "Editor":
        """Loads a bundle: `tiny`, a folder, a hub id or `s3://...`.

        Args:
            bundle: Its name or place, or one that is open.
            device: auto, cpu, mps, cuda or cuda:N.
            dtype: auto, float32, bfloat16 or float16.
            mllm_device, mllm_dtype: The same for the half that reads the words (MLLM or text encoder) alone.
            diffusion_device, diffusion_dtype: The same for the half that makes the picture (UNet and VAE) alone.

        Raises:
            BundleError: It is missing, damaged, or holds no part of an editor.
            ConfigError: The device or dtype is not there.
        """
        opened = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
        return cls(
            bundle=opened.config,
            conditioner=opened.load_conditioner(device=mllm_device or device, dtype=mllm_dtype or dtype),
            renderer=opened.load_renderer(device=diffusion_device or device, dtype=diffusion_dtype or dtype),
        )

    def derive(
        self,
        image: Picture,
        instruction: str,
        *,
        expressive: str | None = None,
        generation: GenerationConfig | None = None,
        limits: ImageLimits = DEFAULT_LIMITS,
    ) -> EditCondition:
        """Derives what an edit would be guided by, without making it; arguments and errors as those of `edit`."""
        request = EditRequest(image=load_image(image, limits), instruction=instruction, expressive=expressive)
        return self._conditioner.derive([request], generation)[0]

    @overload
    def edit(  # type: ignore[overload-overlap]  # a path is a sequence of paths, to the type checker
        self, image: Picture, instruction: str, *, n: Literal[1] = 1, **options: Unpack[EditOptions]
    ) -> EditResult: ...

    @overload
    def edit(
        self, image: Pictures, instruction: str | Sequence[str], *, n: int = 1, **options: Unpack[EditOptions]
    ) -> list[EditResult]: ...

    def edit(
        self,
        image: Pictures,
        instruction: str | Sequence[str],
        *,
        n: int = 1,
        seed: int | Sequence[int | None] | None = None,
        expressive: str | Sequence[str | None] | None = None,
        mask: Picture | Sequence[Picture | None] | None = None,
        steps: int | None = None,
        guidance_scale: float | None = None,
        image_guidance_scale: float | None = None,
        sampler: Sampler | None = None,
        square_crop: bool | None = None,
        detail_transfer: bool | None = None,
        generation: GenerationConfig | None = None,
        limits: ImageLimits = DEFAULT_LIMITS,
        batch_size: int = BATCH_SIZE,
        on_step: OnStep | None = None,
    ) -> EditResult | list[EditResult]:
        """Edits one picture, or many: `image`, `instruction`, `expressive`, `mask` and `seed` may each be a list.

        Lists are of one length, and what is no list holds for each of their items. All is checked before any work is
        done. Then pictures that the model sees at the same size run as batches, with the results that each has alone
        but for rounding (at most 2 of 255 levels).

        Args:
            image: A PIL image, a path, encoded bytes, a binary file, a numpy array or a tensor, see `load_image`.
            instruction: What to change, in a few words.
            n: Results of each picture.
            seed: 0 to 2**63 - 1, of the first result of a picture; result i has seed + i. None draws one, which the
                result names.
            expressive: Your own expressive instruction, used in place of a derived one.
            mask: Where the picture may change: a picture of the source's size. If it has transparent pixels, they are
                edited; else white = edit, black = keep each pixel as it is. None = everywhere.
            steps, guidance_scale, image_guidance_scale, sampler, square_crop, detail_transfer: As in `EditSettings`;
                None = the bundle's.
            generation: How the expressive instruction is written; None = the bundle's way.
            limits: What a picture may be.
            batch_size: Images that are made at a time.
            on_step: Called after each denoising step of each image with a `RenderStep`: `index` of the result, steps
                `done` of `total`, `preview()`. If it returns False, `edit` stops and raises EditStoppedError.

        Returns:
            One result for one picture; for a list, or for n > 1, a list of them, picture by picture.

        Raises:
            ImageError: An image or mask cannot be read, is outside the limits, or they do not fit each other.
            PromptError: A text is blank or too long.
            ConfigError: A setting is out of range, or the lists are of several lengths.
            EditStoppedError: `on_step` returned False.
            MGIEError: Of one picture among many, the message begins with its number.
        """
        settings = self.bundle.defaults.override(
            steps=steps,
            guidance_scale=guidance_scale,
            image_guidance_scale=image_guidance_scale,
            sampler=sampler,
            square_crop=square_crop,
            detail_transfer=detail_transfer,
        )
        given = {"image": image, "instruction": instruction, "expressive": expressive, "mask": mask, "seed": seed}
        lengths = {name: len(values) for name, values in given.items() if isinstance(values, list | tuple)}
        if len(set(lengths.values())) > 1:
            raise ConfigError(f"lists have lengths {lengths}; they must be equal", param=next(iter(lengths)))
        count = next(iter(lengths.values()), 1)
        images = _each(image, count, lambda one: load_image(one, limits))
        masks = _each(mask, count, lambda one: None if one is None else load_mask(one, limits))
        words, own, seeds = (_each(one, count) for one in (instruction, expressive, seed))
        edits: list[CheckedEdit] = []
        for i in range(count):
            with _naming(i, count):
                edits += self.check(
                    images[i], words[i], settings=settings, expressive=own[i], mask=masks[i], seed=seeds[i], n=n
                )
        self.renderer.schedule(settings)  # refuses what does not fit the bundle
        results: dict[int, EditResult] = {}
        stream = self.stream(enumerate(edits), generation=generation, batch_size=batch_size, on_step=on_step)
        for number, result in stream:
            with _naming(number // n, count):
                if isinstance(result, Exception):
                    raise result
            results[number] = result
        if not lengths and n == 1:
            return results[0]
        return [results[number] for number in range(len(edits))]

    def check(
        self,
        image: Image.Image,
        instruction: str,
        *,
        settings: EditSettings,
        expressive: str | None = None,
        mask: Image.Image | None = None,
        seed: int | None = None,
        n: int = 1,
    ) -> list[CheckedEdit]:
        """One edit of `n` results, for `stream`; arguments and errors as those of `edit`.

        Args:
            image: RGB, as `load_image` gives it. mask: Greyscale, as `load_mask` gives it.
        """
        if mask is not None:
            check_mask(mask, self.renderer.framing(image.size, settings))
        check_range("n", n, 1, _MAX_RESULTS)
        check_range("seed", 0 if seed is None else seed, 0, MAX_SEED - n + 1)
        first = random_seed() if seed is None else operator.index(seed)
        edit = CheckedEdit(
            image=image, instruction=instruction, expressive=expressive, settings=settings, seed=first, mask=mask
        )
        self._conditioner.num_prompt_tokens(edit)  # refuses texts that do not fit
        return [replace(edit, seed=first + i) for i in range(n)]

    def stream(
        self,
        edits: Iterable[tuple[K, CheckedEdit]],
        *,
        generation: GenerationConfig | None = None,
        batch_size: int = BATCH_SIZE,
        on_step: OnStep | None = None,
    ) -> Iterator[tuple[K, EditResult | Exception]]:
        """Makes pictures as their edits come, in batches of one working size; yields each with the key of its edit.

        At most twice `batch_size` edits are held back until a batch is full. A batch that fails is halved, down to
        the edit at fault, whose result is the exception. `on_step` gets the key as `index`.
        """
        check_range("batch_size", batch_size, 1, _MAX_RESULTS)
        waiting: dict[tuple[int, int], list[tuple[K, CheckedEdit]]] = defaultdict(list)
        for key, edit in edits:
            size = self.renderer.work_size(edit.image.size, edit.settings)
            waiting[size].append((key, edit))
            if sum(map(len, waiting.values())) >= 2 * batch_size:
                size = max(waiting, key=lambda one: len(waiting[one]))
            elif len(waiting[size]) < batch_size:
                continue
            yield from self._run(waiting.pop(size), generation, on_step)
        for batch in waiting.values():
            yield from self._run(batch, generation, on_step)

    def _run(
        self, batch: Sequence[tuple[K, CheckedEdit]], generation: GenerationConfig | None, on_step: OnStep | None
    ) -> Iterator[tuple[K, EditResult | Exception]]:
        conditions: dict[Any, EditCondition] = {}  # each of them is derived once, for all seeds

        def work(part: Sequence[tuple[K, CheckedEdit]]) -> list[EditResult]:
            edits = [edit for _, edit in part]
            started = time.perf_counter()
            words = [(id(edit.image), edit.instruction, edit.expressive) for edit in edits]
            new = {one: edit for one, edit in zip(words, edits, strict=True) if one not in conditions}
            conditions.update(zip(new, self._conditioner.derive(list(new.values()), generation), strict=True))
            derived = time.perf_counter()
            requests = [
                RenderRequest(
                    image=edit.image,
                    edit_condition=conditions[one],
                    settings=edit.settings,
                    seed=edit.seed,
                    mask=edit.mask,
                )
                for one, edit in zip(words, edits, strict=True)
            ]
            tell = None if on_step is None else lambda step: on_step(replace(step, index=part[step.index][0]))
            images = dict(self.renderer.render(requests, on_step=tell))
            seconds = {"derive": derived - started, "render": time.perf_counter() - derived}
            return [
                EditResult(
                    image=images[i],
                    expressive=request.edit_condition.expressive,
                    seed=request.seed,
                    settings=request.settings,
                    used_fallback=request.edit_condition.used_fallback,
                    timings_s={name: value / len(edits) for name, value in seconds.items()},
                    edit_condition=request.edit_condition,
                    bundle=self.bundle,
                )
                for i, request in enumerate(requests)
            ]

        results = bisect_failures(work, batch)
        yield from zip((key for key, _ in batch), results, strict=True)


def _each(given: Any, count: int, load: Callable[[Any], Any] = lambda one: one) -> list[Any]:
    """One value per picture; what is no list is loaded once and holds for all."""
    if not isinstance(given, list | tuple):
        return [load(given)] * count
    loaded = []
    for i, one in enumerate(given):
        with _naming(i, count):
            loaded.append(load(one))
    return loaded


@contextlib.contextmanager
def _naming(index: int, count: int) -> Iterator[None]:
    """Says of which picture among many an error is."""
    try:
        yield
    except MGIEError as error:
        if count > 1:
            error.args = (f"picture {index + 1} of {count}: {error}",)
        raise
