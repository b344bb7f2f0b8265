"""Editing examples -> training batches: tokenise, mask labels, prepare pixels, collate.

Knows nothing of where examples come from, nor of their order.

Axes: B batch, T tokens, S CLIP image side, H W training image sides.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from mgie.errors import DataError
from mgie.generation import pad
from mgie.images import PUBLISHED_SIDE_PX, ClipPixels, to_signed, training_pixels
from mgie.model import TrainingBatch, training_state_start
from mgie.prompts import IGNORE, encode_answered
from mgie.tokens import Tokenizer

MAX_LENGTH = 512  # tokens of a training row in the published recipe


@dataclass(frozen=True, kw_only=True)
class EditExample:
    """One training triplet with its label text."""

    source: Image.Image
    "RGB"
    goal: Image.Image
    "RGB"
    instruction: str
    "the user's words"
    expressive: str
    "the label: the expressive instruction"


class Collator:
    """Makes a `TrainingBatch` of examples.

    Args:
        num_patches: Image features per image (P). image_side_px: Side of the square training images.
        max_length: Longer rows are cut, as in the published training (visual tokens may be lost then).
    """

    def __init__(
        self,
        *,
        tokenizer: Tokenizer,
        clip_pixels: ClipPixels,
        num_patches: int,
        image_side_px: int,
        max_length: int = MAX_LENGTH,
    ) -> None:
        self._tokenizer, self._clip_pixels = tokenizer, clip_pixels
        self._num_patches, self._image_side_px, self._max_length = num_patches, image_side_px, max_length

    def __call__(self, examples: Sequence[EditExample]) -> TrainingBatch:
        """The batch, padded on the right.

        Raises:
            DataError: There are no examples.
        """
        if not examples:
            raise DataError("a batch of 0 examples was asked for; it needs at least 1")
        rows = [
            encode_answered(
                self._tokenizer, e.instruction, e.expressive, self._num_patches, max_length=self._max_length
            )
            for e in examples
        ]
        ids, mask = pad([row.ids for row in rows], self._tokenizer.pad_id)
        labels, _ = pad([row.labels for row in rows], IGNORE)
        num_visual = len(self._tokenizer.visual_ids)
        starts = [training_state_start(len(row.ids), row.visual_start, num_visual) for row in rows]
        return TrainingBatch(
            input_ids=ids,
            mask=mask,
            labels=labels,
            state_starts=torch.tensor(starts),
            clip_pixels=self._clip_pixels([training_pixels(e.source, PUBLISHED_SIDE_PX) for e in examples]),
            source_pixels=torch.stack([to_signed(training_pixels(e.source, self._image_side_px)) for e in examples]),
            goal_pixels=torch.stack([to_signed(training_pixels(e.goal, self._image_side_px)) for e in examples]),
        )
