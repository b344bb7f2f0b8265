"""The linear map of latents to colours, on a VAE whose answer is known and on the embedded one."""

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from mgie.bundle.bundle import Bundle
from mgie.inference.preview import fit_colors, show_latents
from mgie.model.diffusion import LatentVAE


class LinearVAE(LatentVAE):
    """Latents are a linear function of each block's mean colour, and back."""

    def __init__(self) -> None:
        torch.nn.Module.__init__(self)
        self.mix = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))

    scaling_factor = 0.5
    downsampling = 8

    def condition_latents(self, pixels: Tensor) -> Tensor:
        return torch.einsum("cr,brhw->bchw", self.mix, F.avg_pool2d(pixels, 8)) + 0.25

    def decode(self, latents: Tensor) -> Tensor:
        colors = torch.einsum("rc,bchw->brhw", torch.linalg.pinv(self.mix), latents / 0.5 - 0.25)
        return F.interpolate(colors, scale_factor=8)


def test_a_linear_vae_is_shown_exactly() -> None:
    vae = LinearVAE()
    pixels = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(2)) - 0.5
    latents = vae.condition_latents(pixels) * vae.scaling_factor
    shown = show_latents(latents[0], fit_colors(vae))
    assert torch.allclose(shown, F.avg_pool2d(pixels, 8)[0], atol=5e-3)


@torch.inference_mode()
def test_the_preview_of_the_embedded_vae_is_nearer_to_its_decoding_than_any_single_colour(
    random_bundle: Bundle,
) -> None:
    vae = random_bundle.load_renderer(device="cpu").vae
    coarse = torch.rand(1, 3, 5, 5, generator=torch.Generator().manual_seed(3)) * 2 - 1
    latents = vae.condition_latents(F.interpolate(coarse, (64, 64), mode="bicubic")) * vae.scaling_factor
    decoded = F.avg_pool2d(vae.decode(latents).clamp(-1, 1), vae.downsampling)[0]
    colors = fit_colors(vae)
    assert torch.equal(colors, fit_colors(vae))
    error = (show_latents(latents[0], colors) - decoded).square().mean()
    plain = (decoded - decoded.mean((1, 2), keepdim=True)).square().mean()
    assert error < plain
