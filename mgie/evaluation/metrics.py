"""Which numbers say how good an edit is, and what each needs; `scorer.py` measures them. Needs no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

NetworkName = Literal["clip", "clip_direction", "dino", "lpips"]
Needs = Literal[
    "",
    "a mask",
    "a goal caption",
    "both captions",
    "a sample of the tiny world",
    "a sample of the tiny world and words of the model",
]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """What a number says."""

    label: str
    is_higher_better: bool
    network: NetworkName | None = None
    "which it looks through"
    needs: Needs = ""
    "what a row must have besides its images"
    decimals: int = 4


METRICS: Mapping[str, Metric] = {
    "l1": Metric(label="L1", is_higher_better=False),
    "l2": Metric(label="L2", is_higher_better=False),
    "psnr": Metric(label="PSNR dB", is_higher_better=True, decimals=2),
    "ssim": Metric(label="SSIM", is_higher_better=True),
    "lpips": Metric(label="LPIPS", is_higher_better=False, network="lpips"),
    "clip_i": Metric(label="CLIP-I (CVS)", is_higher_better=True, network="clip"),
    "clip_t": Metric(label="CLIP-T (CTS)", is_higher_better=True, network="clip", needs="a goal caption"),
    "dino": Metric(label="DINO", is_higher_better=True, network="dino"),
    "direction": Metric(label="CLIP direction", is_higher_better=True, network="clip_direction", needs="both captions"),
    "similarity": Metric(label="CLIP image similarity", is_higher_better=True, network="clip_direction"),
    "inside_l1": Metric(label="L1 inside mask", is_higher_better=False, needs="a mask"),
    "background_l1": Metric(label="L1 outside mask", is_higher_better=False, needs="a mask"),
    "background_l2": Metric(label="L2 outside mask", is_higher_better=False, needs="a mask"),
    "background_psnr": Metric(label="PSNR outside mask dB", is_higher_better=True, needs="a mask", decimals=2),
    "object_check": Metric(label="object check", is_higher_better=True, needs="a sample of the tiny world"),
    "states_change": Metric(
        label="words state the change", is_higher_better=True, needs="a sample of the tiny world and words of the model"
    ),
}
"""The last two are of the tiny world (`mgie.tiny.world`); `Scorer` measures the others.

Inside the mask an edit is compared with the goal, outside with the source. L2 is the mean of squares, as in MagicBrush.
"""
