"""Small random networks for metrics, written as users have them on disk."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig, ViTConfig, ViTModel

from mgie.bundle.embedded import ensure_bundle

CLIP_SIDE_PX, DINO_SIDE_PX, DIM = 32, 28, 16
LPIPS_WIDTHS = (4, 6, 8, 6, 6)
_KERNELS = (11, 5, 3, 3, 3)
_LAYER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
_CLIP_PIXELS = {
    "do_resize": True,
    "size": {"shortest_edge": CLIP_SIDE_PX},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": CLIP_SIDE_PX,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.48, 0.46, 0.41],
    "image_std": [0.27, 0.26, 0.28],
}


def write_clip(folder: Path, *, seed: int = 0) -> Path:
    """As transformers saves it, with the tokenizer of the embedded InstructPix2Pix."""
    text_folder = ensure_bundle("random-ip2p") / "text_encoder"
    tokenizer = CLIPTokenizer.from_pretrained(text_folder, local_files_only=True)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = CLIPTextConfig(**_LAYER, vocab_size=len(tokenizer), max_position_embeddings=20, **ids)
    vision = CLIPVisionConfig(**_LAYER, image_size=CLIP_SIDE_PX, patch_size=8)
    torch.manual_seed(seed)
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=DIM)
    CLIPModel(config).save_pretrained(folder)
    for path in text_folder.iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            shutil.copy(path, folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(_CLIP_PIXELS))
    return folder


def write_dino(folder: Path) -> Path:
    """As transformers saves it."""
    torch.manual_seed(1)
    config = ViTConfig(**_LAYER, image_size=DINO_SIDE_PX, patch_size=7)
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


def lpips_weights() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """AlexNet (torchvision's names, narrower) and heads (no negative weights)."""
    generator = torch.Generator().manual_seed(2)
    features, heads, width = {}, {}, 3
    for k, (number, after, kernel) in enumerate(zip((0, 3, 6, 8, 10), LPIPS_WIDTHS, _KERNELS, strict=True)):
        features[f"features.{number}.weight"] = torch.randn(after, width, kernel, kernel, generator=generator) / kernel
        features[f"features.{number}.bias"] = torch.randn(after, generator=generator) / 10
        heads[f"lin{k}.model.1.weight"] = torch.rand(1, after, 1, 1, generator=generator)
        width = after
    return features, heads


def write_lpips(folder: Path, ending: str = "safetensors") -> Path:
    """Both files."""
    folder.mkdir(parents=True, exist_ok=True)
    for stem, weights in zip(("alexnet", "lpips"), lpips_weights(), strict=True):
        if ending == "pth":
            torch.save(weights, folder / f"{stem}.pth")
        else:
            save_file(weights, folder / f"{stem}.safetensors")
    return folder
