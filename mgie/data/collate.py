"""Editing examples -> training batches: tokenise, mask labels, prepare pixels, collate.

Knows nothing of where examples come from, nor of their order.

Axes: B batch, T tokens, S CLIP image side, H W training image sides.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar, cast

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from transformers import CLIPTokenizer

from mgie.errors import DataError
from mgie.images.geometry import PUBLISHED_SIDE_PX, training_pixels
from mgie.images.pixels import ClipPixels, to_signed
from mgie.model.batch import Conversations, EncoderWords, PixelPair
from mgie.model.prompts import IGNORE, EncodedPrompt, encode_answered
from mgie.model.tokens import Tokenizer
from mgie.model.visual_states import pad, select_start

MAX_LENGTH = 512  # tokens of a training row in the published recipe

_Record = TypeVar("_Record")


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


def pixel_pair(examples: Sequence[EditExample], side_px: int) -> PixelPair:
    """Source and goal images as the VAE is trained on them: the published chain of crops and resizings."""
    return PixelPair(
        source=torch.stack([to_signed(training_pixels(e.source, side_px)) for e in examples]),
        goal=torch.stack([to_signed(training_pixels(e.goal, side_px)) for e in examples]),
    )


def vision_pixels(sources: Sequence[Image.Image], clip_pixels: ClipPixels) -> Float[Tensor, "B 3 S S"]:
    """Source images as the vision tower is trained on them."""
    return clip_pixels([training_pixels(source, PUBLISHED_SIDE_PX) for source in sources])


class ConversationCollator:
    """Makes teacher-forced `Conversations` of words; the images are added by whoever has them.

    Args:
        num_patches: Image features per image (P); 0 = the LLM does not see the image.
        max_length: Longer rows are cut, as in the published training (visual tokens may be lost then).
    """

    def __init__(self, tokenizer: Tokenizer, *, num_patches: int, max_length: int = MAX_LENGTH) -> None:
        self._tokenizer, self._num_patches, self._max_length = tokenizer, num_patches, max_length

    def __call__(
        self,
        words: Sequence[tuple[str, str]],
        *,
        clip_pixels: Float[Tensor, "B 3 S S"] | None = None,
        features: Float[Tensor, "B P d"] | None = None,
    ) -> Conversations:
        """The rows of (instruction, expressive instruction), padded on the right.

        Raises:
            DataError: There are none.
        """
        if not words:
            raise DataError("a batch of 0 examples was asked for; it needs at least 1")
        rows = [
            encode_answered(self._tokenizer, instruction, expressive, self._num_patches, max_length=self._max_length)
            for instruction, expressive in words
        ]
        return self.pad(rows, clip_pixels=clip_pixels, features=features)

    def pad(
        self,
        rows: Sequence[EncodedPrompt],
        *,
        clip_pixels: Float[Tensor, "B 3 S S"] | None = None,
        features: Float[Tensor, "B P d"] | None = None,
    ) -> Conversations:
        """Encoded rows of any conversation as a batch."""
        ids, mask = pad([row.ids for row in rows], self._tokenizer.pad_id)
        labels, _ = pad([row.labels for row in rows], IGNORE)
        num_visual = len(self._tokenizer.visual_ids)
        # Padding not counted: the published code counts it, so a short row without `[IMG0]` would take its states.
        starts = [select_start(len(row.ids), row.visual_start, num_visual) for row in rows]
        # Position t is scored on label t + 1. The last column predicts nothing.
        is_label = torch.nn.functional.pad(labels[:, 1:] != IGNORE, (0, 1)).flatten()
        return Conversations(
            input_ids=ids,
            mask=mask,
            labels=labels,
            label_positions=is_label.nonzero().squeeze(1),
            label_ids=labels[:, 1:][labels[:, 1:] != IGNORE],
            num_shared=self._num_shared([row.ids for row in rows]),
            state_starts=torch.tensor(starts),
            clip_pixels=clip_pixels,
            features=features,
        )

    def _num_shared(self, rows: Sequence[list[int]]) -> int:
        """Tokens before the image that all rows begin with; every row keeps one of its own."""
        low, high = min(rows), max(rows)  # what these two share, all share
        image = self._tokenizer.im_patch_id
        same = itertools.takewhile(lambda pair: pair[0] == pair[1] != image, zip(low, high, strict=False))
        return min(sum(1 for _ in same), min(map(len, rows)) - 1)


class EncoderCollator:
    """Makes `EncoderWords` of texts.

    Args:
        which: The words that the encoder reads. Longer ones than it takes are cut.
    """

    def __init__(self, tokenizer: CLIPTokenizer, *, length: int, which: Literal["instruction", "expressive"]) -> None:
        self._tokenizer, self._length, self._which = tokenizer, length, which

    def __call__(self, words: Sequence[tuple[str, str]]) -> EncoderWords:
        """The rows of (instruction, expressive instruction)."""
        return self.encode([expressive if self._which == "expressive" else brief for brief, expressive in words])

    def encode(self, texts: Sequence[str]) -> EncoderWords:
        """Rows of texts."""
        # split_special_tokens: a user's "<|endoftext|>" stays text.
        ids = self._tokenizer(
            list(texts),
            split_special_tokens=True,
            truncation=True,
            padding="max_length",
            max_length=self._length,
            return_tensors="pt",
        )["input_ids"]
        return EncoderWords(input_ids=ids)


def to_device(record: _Record, device: torch.device) -> _Record:
    """A record of tensors, and of such records, on the device.

    Host memory is pinned first where the device is a GPU, so that the copy waits for nothing.
    """
    if isinstance(record, Tensor):
        host = record.pin_memory() if device.type == "cuda" else record
        return cast(_Record, host.to(device, non_blocking=True))
    if dataclasses.is_dataclass(record) and not isinstance(record, type):
        moved = {f.name: to_device(getattr(record, f.name), device) for f in dataclasses.fields(record)}
        return dataclasses.replace(record, **moved)
    return record
