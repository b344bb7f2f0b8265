"""The random draws of training, each keyed by (seed, epoch, sample): a step is a function of its samples.

So a run is the same whatever the number of workers, the micro-batches, or the kills in between. Drawn on the
CPU in float32, so a seed means the same on every device. Knows nothing of what the draws are used for but their
shapes.

Axes: B batch, c latent channels, h w latent sides.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mgie.data.order import key_bits
from mgie.model.batch import TrainingDraws

VALIDATION_EPOCH = -1  # validation samples have the same draws each time


@dataclass(frozen=True)
class SampleKey:
    """What a sample's draws follow from: which row, and for the how-manieth time it is seen."""

    epoch: int
    id: int


def generator(seed: int, key: SampleKey, purpose: str) -> torch.Generator:
    """A generator on the CPU for one purpose of one sample."""
    bits = key_bits(seed, key.epoch, key.id, purpose) & (2**63 - 1)
    return torch.Generator().manual_seed(bits)


def training_draws(
    seed: int, keys: Sequence[SampleKey], *, latent_shape: tuple[int, int, int], num_timesteps: int
) -> TrainingDraws:
    """Draws of a batch.

    Args:
        latent_shape: c, h, w.
        num_timesteps: Timesteps are drawn uniformly from 0 to num_timesteps - 1.
    """
    generators = [generator(seed, key, "diffusion") for key in keys]
    return TrainingDraws(
        noise=torch.stack([torch.randn(latent_shape, generator=g) for g in generators]),
        posterior_noise=torch.stack([torch.randn(latent_shape, generator=g) for g in generators]),
        timesteps=torch.cat([torch.randint(num_timesteps, (1,), generator=g) for g in generators]),
        dropout_u=torch.cat([torch.rand(1, generator=g) for g in generators]),
    )
