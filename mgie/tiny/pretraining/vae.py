"""Pictures <-> latents: the VAE of the tiny editor.

The pictures are cut into 4 x 4 blocks first, whose 48 values are the channels of a plain `AutoencoderKL` that halves
the sides once more: most of the work is done at few positions.
"""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from jaxtyping import Float
from numpy.random import Generator
from torch import Tensor, nn

from mgie.model.diffusion import LatentVAE
from mgie.tiny.pretraining.corpus import Corpus
from mgie.tiny.pretraining.loop import LoopConfig, fit

LOOP = LoopConfig(steps=3500, batch=16, lr=1.5e-3, seed=11, weight_decay=0.0)
_KL_WEIGHT, _EDGE_WEIGHT = 1e-5, 1.0
_SCALE_SAMPLES = 512


def new_vae() -> AutoencoderKL:
    """The VAE, with random weights."""
    return AutoencoderKL(
        in_channels=48,
        out_channels=48,
        block_out_channels=(96, 160),
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=8,
        scaling_factor=1.0,
        norm_num_groups=16,
        sample_size=32,
    )


def learn_vae(corpus: Corpus, state_file: Path, *, loop: LoopConfig = LOOP, log: Path | None = None) -> AutoencoderKL:
    """Trains a VAE on sources and goals; each channel of its latents has mean 0 and variance 1 over the corpus."""
    torch.manual_seed(loop.seed)
    vae = new_vae()
    latent_vae = LatentVAE(vae)

    def loss(rng: Generator) -> dict[str, Tensor]:
        pixels = _pictures(corpus, rng, loop.batch)
        with torch.autocast("cpu", torch.bfloat16):
            mean, logvar = latent_vae.moments(pixels)
            latents = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
            made = latent_vae.decode(latents * latent_vae.scaling_factor)
        made, mean, logvar = made.float(), mean.float(), logvar.float()
        difference = made - pixels
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        absolute, edges = difference.abs().mean(), _edges(difference)
        return {"loss": absolute + _EDGE_WEIGHT * edges + _KL_WEIGHT * kl, "l1": absolute, "edges": edges, "kl": kl}

    fit(vae, loop, loss, state_file, log=log)
    with torch.no_grad():
        numbers = np.linspace(0, corpus.num_samples - 1, _SCALE_SAMPLES).astype(np.int64)
        means = [latent_vae.moments(to_signed_batch(corpus.sources(part)))[0] for part in np.array_split(numbers, 16)]
        _standardize(vae, torch.cat(means))
    return vae


@torch.no_grad()
def _standardize(vae: AutoencoderKL, means: Float[Tensor, "B c h w"]) -> None:
    """Folds shift and scale of each latent channel into the 1 x 1 convolutions on either side of it.

    So a scaling factor of 1 fits, and the UNet sees source and noisy latents of one size.
    """
    shift, scale = means.mean(dim=(0, 2, 3)), means.std(dim=(0, 2, 3))
    before, after, c = vae.quant_conv, vae.post_quant_conv, len(scale)
    after.bias += (after.weight[:, :, 0, 0] * shift).sum(1)
    after.weight *= scale[None, :, None, None]
    before.weight[:c] /= scale[:, None, None, None]
    before.bias[:c] = (before.bias[:c] - shift) / scale
    before.bias[c:] -= 2 * scale.log()


def to_signed_batch(pictures: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> Float[Tensor, "B 3 H W"]:
    """Pixels in [-1, 1] of [B, H, W, 3]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def _pictures(corpus: Corpus, rng: Generator, count: int) -> Float[Tensor, "B 3 H W"]:
    """Sources and goals at random, mirrored or turned as chance will have it."""
    numbers = rng.integers(corpus.num_samples, size=count)
    half = count // 2
    pixels = to_signed_batch(np.concatenate([corpus.sources(numbers[:half]), corpus.goals(numbers[half:])]))
    pixels = pixels.flip(3) if rng.random() < 0.5 else pixels
    return pixels.flip(2) if rng.random() < 0.15 else pixels


def _edges(difference: Float[Tensor, "B 3 H W"]) -> Float[Tensor, ""]:
    """How much neighbours differ in error: what blurring costs and a shift of all alike does not."""
    loss: Tensor = nn.functional.l1_loss(difference[..., 1:], difference[..., :-1])
    return loss + nn.functional.l1_loss(difference[..., 1:, :], difference[..., :-1, :])
