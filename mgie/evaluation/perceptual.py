"""Networks that metrics look through: CLIP, DINO, LPIPS. Found by local folder or hub id, never substituted.

A CLIP or DINO folder is as transformers saves it. An LPIPS folder holds two files, each `.safetensors` or `.pth`:
`alexnet`, torchvision's AlexNet (its `features.*` are read), and `lpips`, the heads (`lin0.model.1.weight` ...
`lin4.model.1.weight`). Knows nothing of metrics.

Axes: B batch, S side of CLIP pixels, H W image sides, D features.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import CLIPModel, CLIPTokenizer, ViTModel

from mgie.bundle.record import PREPROCESSOR_FILE, read_json
from mgie.bundle.weights import list_misfits, read_weights
from mgie.errors import BundleError
from mgie.evaluation.metrics import NetworkName
from mgie.evaluation.network_files import Network
from mgie.images.pixels import ClipPixels

_DINO_CROP_SHARE = 224 / 256  # of the resized image that DINO's preprocessing keeps
_IMAGENET: Mapping[str, Any] = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
# Of LPIPS, version 0.1: what ImageNet's normalisation is for pixels in [-1, 1].
_LPIPS_SHIFT, _LPIPS_SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
# Convolutions of AlexNet: number in `features`, stride, padding, and whether a max-pooling comes before.
_ALEXNET = ((0, 4, 2, False), (3, 1, 2, True), (6, 1, 1, True), (8, 1, 1, False), (10, 1, 1, False))


class ClipFeatures:
    """Both towers of a CLIP.

    Raises:
        BundleError: The folder does not hold one.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self._model = _load(CLIPModel, folder).to(device)
        self._device = device
        try:
            self._pixels = ClipPixels(read_json(folder / PREPROCESSOR_FILE))
            self._tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except (BundleError, OSError, ValueError) as error:
            raise BundleError(f"{folder} lacks what CLIP needs besides its weights: {error}") from error

    @torch.inference_mode()
    def images(self, images: Sequence[Image.Image]) -> Float[Tensor, "B D"]:
        """Features of length 1."""
        pixels = self._pixels(images).to(self._device)
        features = self._model.visual_projection(self._model.vision_model(pixel_values=pixels).pooler_output)
        return nn.functional.normalize(features, dim=-1).float().cpu()

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> Float[Tensor, "B D"]:
        """Features of length 1; a text that is too long is cut."""
        tokens = self._tokenizer(
            list(texts),
            padding=True,
            truncation=True,
            max_length=self._model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(self._device)
        pooled = self._model.text_model(**tokens).pooler_output
        return nn.functional.normalize(self._model.text_projection(pooled), dim=-1).float().cpu()


class DinoFeatures:
    """A ViT trained by DINO: the state of its class token. Preprocessing as DINO's own, whatever the folder says.

    Raises:
        BundleError: The folder does not hold one.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self._model = _load(ViTModel, folder, add_pooling_layer=False).to(device)
        self._device = device
        side = self._model.config.image_size
        edge = {"shortest_edge": round(side / _DINO_CROP_SHARE)}
        self._pixels = ClipPixels({"size": edge, "crop_size": side, "resample": 3, **_IMAGENET})

    @torch.inference_mode()
    def images(self, images: Sequence[Image.Image]) -> Float[Tensor, "B D"]:
        """Features of length 1."""
        states = self._model(pixel_values=self._pixels(images).to(self._device)).last_hidden_state
        return nn.functional.normalize(states[:, 0], dim=-1).float().cpu()


class Lpips:
    """The learned perceptual distance of AlexNet features, version 0.1.

    Source: Zhang et al. 2018, eq. 1.

    Raises:
        BundleError: The folder (see the module) does not hold its weights.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        features, heads = _find_weights(folder, "alexnet"), _find_weights(folder, "lpips")
        try:
            self._convolutions = [
                (features[f"features.{n}.weight"].to(device), features[f"features.{n}.bias"].to(device), stride, pad, pools)
                for n, stride, pad, pools in _ALEXNET
            ]  # fmt: skip
            self._heads = [heads[f"lin{k}.model.1.weight"].to(device) for k in range(len(_ALEXNET))]
        except KeyError as error:
            raise BundleError(f"the LPIPS weights in {folder} lack {error.args[0]}") from error
        widths = {f"lin{k}.model.1.weight": (1, c[0].shape[0], 1, 1) for k, c in enumerate(self._convolutions)}
        given = {name: tuple(head.shape) for name, head in zip(widths, self._heads, strict=True)}
        if problems := list_misfits(widths, given):
            raise BundleError(f"the LPIPS weights in {folder} do not fit: {'; '.join(problems)}")
        self._device = device

    @torch.inference_mode()
    def __call__(self, one: Float[Tensor, "B 3 H W"], other: Float[Tensor, "B 3 H W"]) -> Float[Tensor, " B"]:
        """Distance of each pair; pixels in [0, 1]."""
        total = torch.zeros(len(one))
        for a, b, head in zip(self._layers(one), self._layers(other), self._heads, strict=True):
            total += nn.functional.conv2d((a - b) ** 2, head).mean((1, 2, 3)).cpu()
        return total

    def _layers(self, pixels: Tensor) -> list[Tensor]:
        """What each convolution sees, of length 1 at every place."""
        shift, scale = (torch.tensor(v, device=self._device)[:, None, None] for v in (_LPIPS_SHIFT, _LPIPS_SCALE))
        x = (pixels.to(self._device) * 2 - 1 - shift) / scale
        layers = []
        for weight, bias, stride, padding, pools in self._convolutions:
            x = nn.functional.relu(
                nn.functional.conv2d(nn.functional.max_pool2d(x, 3, 2) if pools else x, weight, bias, stride, padding)
            )
            layers.append(x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10))
        return layers


@dataclass(frozen=True, kw_only=True)
class Networks:
    """Networks that are at hand."""

    clip: ClipFeatures | None = None
    "for image-image and image-text similarity"
    clip_direction: ClipFeatures | None = None
    "for the direction of the change"
    dino: DinoFeatures | None = None
    lpips: Lpips | None = None


def load_networks(found: Mapping[NetworkName, Network], device: torch.device) -> Networks:
    """Loads the networks given; one that stands for two is loaded once.

    Raises:
        BundleError: One cannot be loaded.
    """
    clip = functools.cache(ClipFeatures)
    kinds: Mapping[NetworkName, Any] = {"clip": clip, "clip_direction": clip, "dino": DinoFeatures, "lpips": Lpips}
    return Networks(**{name: kinds[name](network.folder, device) for name, network in found.items()})


def _load(kind: Any, folder: Path, **arguments: Any) -> Any:
    """A transformers model with all of its weights, float32, not training."""
    try:
        model, info = kind.from_pretrained(
            folder, local_files_only=True, dtype=torch.float32, output_loading_info=True, **arguments
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise BundleError(f"{folder} holds no {kind.__name__}: {error}") from error
    if info["missing_keys"]:
        raise BundleError(f"{folder} holds no {kind.__name__}: it lacks {', '.join(sorted(info['missing_keys'])[:3])}")
    return model.eval()


def _find_weights(folder: Path, stem: str) -> dict[str, Tensor]:
    for path in (folder / f"{stem}.safetensors", folder / f"{stem}.pth"):
        if path.is_file():
            return read_weights(path)
    raise BundleError(f"{folder} holds neither {stem}.safetensors nor {stem}.pth")
