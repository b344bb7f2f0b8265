import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer, ViTModel

from mgie.errors import BundleError
from mgie.evaluation.network_files import Network, find_network
from mgie.evaluation.perceptual import ClipFeatures, DinoFeatures, Lpips, load_networks
from tests.mgie.networks import (
    CLIP_SIDE_PX,
    DINO_SIDE_PX,
    LPIPS_WIDTHS,
    lpips_weights,
    write_clip,
    write_dino,
    write_lpips,
)

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def _pictures(count: int = 3) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    sizes = [(70, 50), (40, 90), (64, 64)]
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes[:count]]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("networks") / "clip")


def test_clip_features_are_those_of_transformers(clip_folder: Path) -> None:
    model = CLIPModel.from_pretrained(clip_folder).eval()
    clip = ClipFeatures(clip_folder, CPU)
    pixels = CLIPImageProcessorPil.from_pretrained(clip_folder)(images=_pictures(), return_tensors="pt")
    texts = ["a house at night", "it is " + "very " * 40 + "dark", "x"]
    tokens = CLIPTokenizer.from_pretrained(clip_folder)(
        texts, padding=True, truncation=True, max_length=20, return_tensors="pt"
    )
    with torch.no_grad():
        output = model(**pixels, **tokens)
    torch.testing.assert_close(clip.images(_pictures()), output.image_embeds, rtol=0, atol=1e-6)
    torch.testing.assert_close(clip.texts(texts), output.text_embeds, rtol=0, atol=1e-6)
    assert pixels["pixel_values"].shape[-1] == CLIP_SIDE_PX


def test_dino_features_are_of_the_class_token_after_its_own_preprocessing(tmp_path: Path) -> None:
    folder = write_dino(tmp_path / "dino")
    [picture] = _pictures(1)  # 70 x 50 -> shortest edge 32, of which the middle 28 are seen
    small = picture.resize((44, 32), Image.Resampling.BICUBIC).crop((8, 2, 8 + DINO_SIDE_PX, 2 + DINO_SIDE_PX))
    unit = torch.from_numpy(np.array(small)).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(v)[:, None, None] for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    with torch.no_grad():
        states = ViTModel.from_pretrained(folder, add_pooling_layer=False).eval()(((unit - mean) / std)[None])
    expected = nn.functional.normalize(states.last_hidden_state[:, 0], dim=-1)
    torch.testing.assert_close(DinoFeatures(folder, CPU).images([picture]), expected, rtol=0, atol=1e-6)


def _slow_lpips(one: Tensor, other: Tensor) -> float:
    """AlexNet as a list of layers, places and channels one by one; pixels [3, H, W] in [0, 1]."""
    features, heads = lpips_weights()
    a, b, c, d, e = LPIPS_WIDTHS
    layers = nn.Sequential(
        nn.Conv2d(3, a, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Conv2d(a, b, 5, 1, 2), nn.ReLU(),
        nn.MaxPool2d(3, 2), nn.Conv2d(b, c, 3, 1, 1), nn.ReLU(), nn.Conv2d(c, d, 3, 1, 1), nn.ReLU(),
        nn.Conv2d(d, e, 3, 1, 1), nn.ReLU(),
    )  # fmt: skip
    layers.load_state_dict({name.removeprefix("features."): value for name, value in features.items()})

    def states(pixels: Tensor) -> list[Tensor]:
        shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
        x = ((2 * pixels - 1 - shift[:, None, None]) / scale[:, None, None])[None]
        seen = []
        for number, layer in enumerate(layers):
            x = layer(x)
            if number in (1, 4, 7, 9, 11):
                seen.append(x[0])
        return seen

    total = 0.0
    with torch.no_grad():
        for k, (x, y) in enumerate(zip(states(one), states(other), strict=True)):
            weights, places = heads[f"lin{k}.model.1.weight"].flatten(), []
            for i in range(x.shape[1]):
                for j in range(x.shape[2]):
                    u, v = (s[:, i, j] / (s[:, i, j].norm() + 1e-10) for s in (x, y))
                    places.append(float((weights * (u - v) ** 2).sum()))
            total += sum(places) / len(places)
    return total


@pytest.mark.parametrize("ending", ["safetensors", "pth"])
def test_lpips_is_its_formula(tmp_path: Path, ending: str) -> None:
    lpips = Lpips(write_lpips(tmp_path / "lpips", ending), CPU)
    one, other = torch.rand(2, 2, 3, 70, 64, generator=torch.Generator().manual_seed(0))
    expected = [_slow_lpips(a, b) for a, b in zip(one, other, strict=True)]
    assert min(expected) > 0.01
    torch.testing.assert_close(lpips(one, other), torch.tensor(expected), rtol=1e-5, atol=0)
    assert torch.equal(lpips(one, one), torch.zeros(2))


def test_the_identity_follows_from_the_content(tmp_path: Path) -> None:
    folder = write_lpips(tmp_path / "a" / "lpips")
    before = find_network(str(folder))
    assert before.identity.startswith("lpips ")
    assert find_network(str(shutil.copytree(folder, tmp_path / "b" / "lpips"))).identity == before.identity
    weights = load_file(folder / "lpips.safetensors")
    weights["lin0.model.1.weight"][0, 0] += 1
    save_file(weights, folder / "lpips.safetensors")
    assert find_network(str(folder)).identity != before.identity


def test_a_hub_id_is_named_with_its_commit(clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "models--acme--clip"
    shutil.copytree(clip_folder, repo / "snapshots" / COMMIT)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    for where in ("acme/clip", "acme/clip@main", f"acme/clip@{COMMIT}"):
        found = find_network(where)
        assert found.identity == found.where == f"acme/clip@{COMMIT}"
        ClipFeatures(found.folder, CPU)
    with pytest.raises(
        BundleError, match="network 'acme/other' is no folder here, and as a hub id: the hub cannot be reached"
    ):
        find_network("acme/other")


@pytest.mark.parametrize("where", ["gone", "./gone/folder", "/gone"])
def test_a_folder_that_is_not_there_is_told(where: str) -> None:
    with pytest.raises(BundleError, match=f"network '{where}' does not exist"):
        find_network(where)


def test_a_folder_with_another_network_is_refused(clip_folder: Path, tmp_path: Path) -> None:
    dino, lpips = write_dino(tmp_path / "dino"), write_lpips(tmp_path / "lpips")
    with pytest.raises(BundleError, match="holds no CLIPModel"):
        ClipFeatures(dino, CPU)
    with pytest.raises(BundleError, match="holds no ViTModel"):
        DinoFeatures(clip_folder, CPU)
    with pytest.raises(BundleError, match="holds no CLIPModel"):
        ClipFeatures(lpips, CPU)
    with pytest.raises(BundleError, match=r"neither alexnet\.safetensors nor alexnet\.pth"):
        Lpips(dino, CPU)
    (bare := tmp_path / "bare").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(clip_folder / name, bare)
    with pytest.raises(BundleError, match="lacks what CLIP needs besides its weights"):
        ClipFeatures(bare, CPU)


def test_lpips_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    folder = write_lpips(tmp_path / "lpips")
    features, heads = lpips_weights()
    save_file({name: value for name, value in features.items() if name != "features.6.bias"}, folder / "alexnet.safetensors")  # fmt: skip
    with pytest.raises(BundleError, match=r"lack features\.6\.bias"):
        Lpips(folder, CPU)
    save_file(features, folder / "alexnet.safetensors")
    save_file(heads | {"lin2.model.1.weight": torch.ones(1, 5, 1, 1)}, folder / "lpips.safetensors")
    with pytest.raises(BundleError, match=r"lin2\.model\.1\.weight has shape \(1, 5, 1, 1\), not \(1, 8, 1, 1\)"):
        Lpips(folder, CPU)


def test_one_clip_for_two_metrics_is_loaded_once(clip_folder: Path) -> None:
    network = Network(where="x", folder=clip_folder, identity="x")
    found = load_networks({"clip": network, "clip_direction": network}, CPU)
    assert found.clip is not None
    assert found.clip is found.clip_direction
    assert found.dino is None
