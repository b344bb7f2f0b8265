"""What each patch of a picture shows: dense labels, by which a vision tower learns to see from few pictures.

Of the thing that covers most of a patch: its kind, its colour, and whether it is lit. Axes: B batch, P patches.
"""

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mgie.tiny.world.draw import draw_regions
from mgie.tiny.world.samples import Sample
from mgie.tiny.world.scene import COLORS, KINDS, Scene
from mgie.tiny.world.things import FIRST_THING_REGION, thing_of

GRID = 8  # patches per side
NUM_CLASSES = (len(KINDS) + 1, len(COLORS) + 1, 3)  # kind, colour, lit; 0 = nothing there, or it cannot be lit
_MIN_SHARE = 0.06  # of a patch that a thing must cover
_KINDS = {kind: number for number, kind in enumerate(KINDS, start=1)}
_COLORS = {color: number for number, color in enumerate(COLORS, start=1)}


def patch_labels(sample: Sample) -> npt.NDArray[np.uint8]:
    """Labels of the source's patches, row by row, [GRID * GRID, 3]; all 0 for a photo."""
    labels = np.zeros((GRID * GRID, len(NUM_CLASSES)), dtype=np.uint8)
    scene = sample.edit.source
    if not isinstance(scene, Scene):
        return labels
    side = sample.side_px // GRID
    regions = draw_regions(scene, sample.side_px)[: side * GRID, : side * GRID]
    patches = regions.reshape(GRID, side, GRID, side).transpose(0, 2, 1, 3).reshape(GRID * GRID, -1)
    things = {thing.id: thing for thing in scene.things}
    for number, patch in enumerate(patches):
        shown = np.bincount(thing_of(patch[patch >= FIRST_THING_REGION]), minlength=1)
        if shown.max() >= _MIN_SHARE * patch.size:
            thing = things[int(shown.argmax())]
            lit = 1 + thing.is_lit if KINDS[thing.kind].can_shine else 0
            labels[number] = (_KINDS[thing.kind], _COLORS[thing.color], lit)
    return labels


class PatchReader(nn.Module):
    """Reads the labels off a vision tower's features; only used in training.

    Args:
        width: Width of the features.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList([nn.Linear(width, num) for num in NUM_CLASSES])

    def loss(self, features: Float[Tensor, "B P d"], labels: Int[Tensor, "B P 3"]) -> Float[Tensor, ""]:
        """Mean cross entropy of the three, in float32."""
        losses = [
            nn.functional.cross_entropy(head(features).float().flatten(0, 1), labels[..., i].flatten())
            for i, head in enumerate(self.heads)
        ]
        return torch.stack(losses).mean()
