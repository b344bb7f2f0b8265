"""Edits of a few fixed rows by the model as it is while it trains, as one picture. Plain Python, no Ray.

Knows nothing of when they are made, nor of files.
"""

from collections.abc import Sequence
from typing import cast

from PIL import Image, ImageDraw, ImageFont

from mgie.bundle.bundle import Bundle
from mgie.config import Variant
from mgie.data.collate import EditExample
from mgie.editor import Editor
from mgie.errors import PromptError
from mgie.images.geometry import training_pixels
from mgie.inference.conditioner import Conditioner, MLLMConditioner, TextConditioner
from mgie.inference.renderer import Renderer
from mgie.model.mgie import MGIE, InstructPix2Pix
from mgie.training.variants import TrainingModel

_TEXT_PX, _PAD_PX, _TEXT_WIDTH_PX = 13, 6, 300
_MAX_CHARS = 400


class SampleEditor:
    """Edits fixed examples with the live modules of a model that trains.

    Args:
        made: The model; its weights are used as they are at each call.
        num_steps: Denoising steps.
    """

    def __init__(
        self, bundle: Bundle, made: TrainingModel, variant: Variant, examples: Sequence[EditExample], *, num_steps: int
    ) -> None:
        side_px = made.image_side_px
        self._examples, self._gives_words = examples, variant in ("ft", "fz")
        self._squares = [(training_pixels(e.source, side_px), training_pixels(e.goal, side_px)) for e in examples]
        renderer = Renderer(
            unet=made.model.unet,
            vae=made.model.vae,
            scheduler_config=bundle.scheduler_config(),
            work_area_px=side_px**2,
            multiple_px=made.model.vae.downsampling,
        )
        self._editor = Editor(bundle=bundle.config, conditioner=_conditioner(bundle, made), renderer=renderer)
        self._num_steps = num_steps

    def __call__(self) -> Image.Image:
        """Rows of source, goal, edited image, and the words: instruction and expressive instruction."""
        rows = []
        for seed, (example, (source, goal)) in enumerate(zip(self._examples, self._squares, strict=True)):
            # As in training: some variants are told the expressive instruction, the others find one, or need none.
            expressive = example.expressive if self._gives_words else None
            try:
                result = self._editor.edit(
                    source, example.instruction, seed=seed, expressive=expressive, steps=self._num_steps
                )
            except PromptError as error:
                rows.append(([source, goal], f"{example.instruction}\n\n{error}"))
            else:
                rows.append(([source, goal, result.image], f"{example.instruction}\n\n{result.expressive}"))
        return draw_sheet(rows)


def _conditioner(bundle: Bundle, made: TrainingModel) -> Conditioner:
    if isinstance(made.model, InstructPix2Pix):
        tokenizer, _ = bundle.load_text_encoder()
        return TextConditioner(tokenizer=tokenizer, encoder=made.model.text_encoder, bundle=bundle.identity)
    model = cast(MGIE, made.model)
    return MLLMConditioner(
        tokenizer=bundle.load_tokenizer(),
        clip_pixels=made.clip_pixels,
        mllm=model.mllm,
        edit_head=model.edit_head,
        generation=bundle.config.generation,
        bundle=bundle.identity,
    )


def draw_sheet(rows: Sequence[tuple[Sequence[Image.Image], str]]) -> Image.Image:
    """Rows of up to three images of one size, each with its text at the right."""
    width, height = rows[0][0][0].size
    row_height = max(height, 96) + _PAD_PX
    sheet = Image.new("RGB", (3 * (width + _PAD_PX) + _TEXT_WIDTH_PX, len(rows) * row_height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(_TEXT_PX)
    for y, (images, text) in enumerate(rows):
        for x, image in enumerate(images):
            sheet.paste(image, (x * (width + _PAD_PX), y * row_height))
        lines = [line for part in text[:_MAX_CHARS].split("\n") for line in _wrap(part, font)]
        # What does not fit is cut off at the next row.
        lines = lines[: row_height // (_TEXT_PX + 3)]
        draw.multiline_text((3 * (width + _PAD_PX), y * row_height), "\n".join(lines), fill="black", font=font)
    return sheet


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    """Lines no wider than the column, but for words that are."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= _TEXT_WIDTH_PX - _PAD_PX or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
