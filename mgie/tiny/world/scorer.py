"""Scores of edits of the tiny world, as `pipelines/evaluate.py --scorer` takes them."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from mgie.errors import DataError
from mgie.evaluation.metrics import Metric
from mgie.images.geometry import resize
from mgie.tiny.world.answers import states_change
from mgie.tiny.world.checker import check_edit
from mgie.tiny.world.samples import make_sample

METRICS: Mapping[str, Metric] = {
    "object_check": Metric(label="object check", is_higher_better=True, needs="what the scorer looks for"),
    "states_change": Metric(label="words state the change", is_higher_better=True, needs="what the scorer looks for"),
}


class WorldScorer:
    """Checks whether the right thing changed and nothing else, and whether the words state the change.

    A row is a sample of the tiny world where its facts have `tiny_world`, the arguments of `make_sample`.
    """

    metrics = METRICS

    def __call__(
        self, facts: Mapping[str, Any], instruction: str, image: Image.Image, expressive: str | None
    ) -> dict[str, float]:
        """See `RowScorer`."""
        if "tiny_world" not in facts:
            return {}
        sample = make_sample(**facts["tiny_world"])
        if sample.instruction != instruction:
            raise DataError(f"sample {facts['tiny_world']} of the tiny world is another edit in this version")
        pixels = np.asarray(resize(image, (sample.side_px, sample.side_px)))
        scores = {"object_check": float(check_edit(sample, pixels).is_right)}
        if expressive:
            scores["states_change"] = float(states_change(expressive, sample.edit))
        return scores
