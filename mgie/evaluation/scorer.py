"""Scores edits by the metrics of the papers (`metrics.py` lists them), on pixels and on what networks see.

An edited image of another size than the goal is first resized to it (MagicBrush). Pixels are RGB in [0, 1].

Axes: B batch, H W image sides, D features.
"""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor, nn

from mgie.evaluation.perceptual import Networks
from mgie.images.geometry import resize

MAX_PSNR_DB = 100.0  # of equal images, whose PSNR is infinite: a mean must stay a number
Item = TypeVar("Item", Image.Image, str)


def l1(one: Float[Tensor, "B 3 H W"], other: Float[Tensor, "B 3 H W"]) -> Float[Tensor, " B"]:
    """Mean of absolute differences."""
    return (one - other).abs().mean((1, 2, 3))


def l2(one: Float[Tensor, "B 3 H W"], other: Float[Tensor, "B 3 H W"]) -> Float[Tensor, " B"]:
    """Mean of squared differences."""
    return (one - other).square().mean((1, 2, 3))


def psnr(mean_square: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
    """Peak signal-to-noise ratio in dB, of `l2`; at most `MAX_PSNR_DB`."""
    return (-10 * torch.log10(mean_square)).clamp(max=MAX_PSNR_DB)


def ssim(one: Float[Tensor, "B 3 H W"], other: Float[Tensor, "B 3 H W"]) -> Float[Tensor, " B"]:
    """Structural similarity (Wang et al. 2004): Gaussian window of 11 px and deviation 1.5, reflected at borders."""
    # Here, because it takes a second and nothing else needs it.
    from torchmetrics.functional.image import structural_similarity_index_measure

    found = structural_similarity_index_measure(one, other, data_range=1.0, reduction="none")
    assert isinstance(found, Tensor)  # it gives more when asked for more
    return found.reshape(-1)


def masked_mean(errors: Float[Tensor, "B 3 H W"], where: Bool[Tensor, "B H W"]) -> Float[Tensor, " B"]:
    """Mean over the pixels of `where`; NaN where there are none."""
    weights = where[:, None].to(errors.dtype)
    return (errors * weights).sum((1, 2, 3)) / (3 * weights.sum((1, 2, 3)))


def cosine(one: Float[Tensor, "B D"], other: Float[Tensor, "B D"]) -> Float[Tensor, " B"]:
    """Cosine of the angle between features."""
    return (one * other).sum(-1)


def direction(
    source: Float[Tensor, "B D"],
    edited: Float[Tensor, "B D"],
    source_text: Float[Tensor, "B D"],
    goal_text: Float[Tensor, "B D"],
) -> Float[Tensor, " B"]:
    """Whether the image changes as its description does: cos(i1 - i0, t1 - t0); 0 where one does not change at all.

    Source: Gal et al. 2022, in the form that InstructPix2Pix evaluates with.
    """
    return nn.functional.cosine_similarity(edited - source, goal_text - source_text, dim=-1)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """An edited image and what it is measured by; images are RGB."""

    source: Image.Image
    goal: Image.Image
    edited: Image.Image
    mask: Image.Image | None = None
    "white where the edit is"
    source_caption: str | None = None
    goal_caption: str | None = None


class Scorer:
    """Measures batches of edits by every metric that there is a network for.

    Args:
        batch_size: Images per call of a network.
    """

    def __init__(self, networks: Networks, *, batch_size: int = 16) -> None:
        self._networks, self._batch_size = networks, batch_size

    def __call__(self, edits: Sequence[Comparison]) -> list[dict[str, float]]:
        """Scores by name of the metric; without those that cannot be measured for the edit."""
        if not edits:
            return []
        found: list[dict[str, float]] = [{} for _ in edits]
        edited = [_at_goal_size(edit.edited, edit.goal) for edit in edits]
        self._by_pixels(edits, edited, found)
        self._by_features(edits, edited, found)
        return found

    def _by_pixels(
        self, edits: Sequence[Comparison], edited: Sequence[Image.Image], found: list[dict[str, float]]
    ) -> None:
        sizes: dict[Hashable, list[int]] = defaultdict(list)
        for i, edit in enumerate(edits):
            sizes[edit.goal.size, edit.mask is not None].append(i)
        for alike in sizes.values():
            for start in range(0, len(alike), self._batch_size):
                part = alike[start : start + self._batch_size]
                goals, results = (_unit([images[i] for i in part]) for images in ([e.goal for e in edits], edited))
                square = l2(results, goals)
                columns = {"l1": l1(results, goals), "l2": square, "psnr": psnr(square), "ssim": ssim(results, goals)}
                if self._networks.lpips is not None:
                    columns["lpips"] = self._networks.lpips(results, goals)
                if edits[part[0]].mask is not None:
                    sources = _unit([_at_goal_size(edits[i].source, edits[i].goal) for i in part])
                    columns |= _by_mask(_masks([edits[i] for i in part]), sources, goals, results)
                _fill(found, part, columns)

    def _by_features(
        self, edits: Sequence[Comparison], edited: Sequence[Image.Image], found: list[dict[str, float]]
    ) -> None:
        every = list(range(len(edits)))
        goals, sources = [edit.goal for edit in edits], [edit.source for edit in edits]
        if self._networks.dino is not None:
            states = self._features(self._networks.dino.images, [*goals, *edited])
            _fill(found, every, {"dino": cosine(*states.chunk(2))})
        if (clip := self._networks.clip) is not None:
            goal, result = self._features(clip.images, [*goals, *edited]).chunk(2)
            _fill(found, every, {"clip_i": cosine(result, goal)})
            told = [i for i in every if edits[i].goal_caption]
            if told:
                words = self._features(clip.texts, [edits[i].goal_caption or "" for i in told])
                _fill(found, told, {"clip_t": cosine(result[told], words)})
        if (clip := self._networks.clip_direction) is not None:
            source, result = self._features(clip.images, [*sources, *edited]).chunk(2)
            _fill(found, every, {"similarity": cosine(source, result)})
            told = [i for i in every if edits[i].source_caption and edits[i].goal_caption]
            if told:
                captions = [edits[i].source_caption or "" for i in told] + [edits[i].goal_caption or "" for i in told]
                before, after = self._features(clip.texts, captions).chunk(2)
                _fill(found, told, {"direction": direction(source[told], result[told], before, after)})

    def _features(self, encode: Callable[[Sequence[Item]], Tensor], items: Sequence[Item]) -> Tensor:
        """[N, D]; what is there more than once (the same picture for several settings) is encoded once."""
        keys = [item if isinstance(item, str) else id(item) for item in items]
        unique = dict(zip(keys, items, strict=True))
        place = {key: number for number, key in enumerate(unique)}
        once = torch.cat([encode(part) for part in _batches(list(unique.values()), self._batch_size)])
        return once[[place[key] for key in keys]]


def _by_mask(
    inside: Bool[Tensor, "B H W"],
    sources: Float[Tensor, "B 3 H W"],
    goals: Float[Tensor, "B 3 H W"],
    results: Float[Tensor, "B 3 H W"],
) -> dict[str, Tensor]:
    square = masked_mean((results - sources).square(), ~inside)
    return {
        "inside_l1": masked_mean((results - goals).abs(), inside),
        "background_l1": masked_mean((results - sources).abs(), ~inside),
        "background_l2": square,
        "background_psnr": psnr(square),
    }


def _batches(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _fill(found: list[dict[str, float]], rows: Sequence[int], columns: Mapping[str, Tensor]) -> None:
    """Adds the values of `rows`; NaN is no value."""
    for name, values in columns.items():
        for i, value in zip(rows, values.tolist(), strict=True):
            if value == value:  # noqa: PLR0124  # not NaN
                found[i][name] = value


def _at_goal_size(image: Image.Image, goal: Image.Image) -> Image.Image:
    """The same object where nothing is to be done."""
    return image if image.size == goal.size else resize(image, goal.size)


def _unit(images: Sequence[Image.Image]) -> Float[Tensor, "B 3 H W"]:
    pixels = np.stack([np.asarray(image, dtype=np.float32) for image in images]) / np.float32(255)
    return torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())


def _masks(edits: Sequence[Comparison]) -> Bool[Tensor, "B H W"]:
    masks = []
    for edit in edits:
        assert edit.mask is not None
        # Nearest, so that nothing lies half inside.
        grey = edit.mask.convert("L").resize(edit.goal.size, Image.Resampling.NEAREST)
        masks.append(np.asarray(grey) > 127)
    return torch.from_numpy(np.stack(masks))
