"""Packed bundles come back byte by byte, and are smaller by what they share."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mgie.bundle.bundle import Bundle
from mgie.bundle.shipped import pack, unpack
from mgie.errors import BundleError


@pytest.fixture(scope="module")
def packed(random_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "shipped"
    pack({"one": random_bundle, "other": random_bundle}, out)
    return out


def test_an_unpacked_bundle_is_the_packed_one_in_float16(packed: Path, random_bundle: Bundle, tmp_path: Path) -> None:
    unpack(packed, "one", tmp_path / "bundle")
    bundle = Bundle(tmp_path / "bundle")
    bundle.verify()
    assert bundle.config.name == "one"
    assert bundle.config.parts == random_bundle.config.parts
    assert bundle.config.generation == random_bundle.config.generation
    for file in random_bundle.config.files:
        if file.endswith(".safetensors"):
            before, after = load_file(random_bundle.root / file), load_file(bundle.root / file)
            assert before.keys() == after.keys()
            assert all(torch.equal(after[key], before[key].half()) for key in before)
        else:
            assert (bundle.root / file).read_bytes() == (random_bundle.root / file).read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_tensors_that_bundles_share_are_packed_once(packed: Path) -> None:
    index = json.loads((packed / "index.json").read_text())
    assert index["one"] == index["other"]
    num = {start: torch.Size(shape).numel() for file in index["one"].values() for shape, start in file.values()}
    assert (packed / "weights.npz").stat().st_size < 2 * sum(num.values())


def test_damage_and_absence_are_told(packed: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="'third' cannot be read"):
        unpack(packed, "third", tmp_path / "bundle")
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in packed.rglob("*"):
        if path.is_file():
            (broken / path.relative_to(packed)).parent.mkdir(parents=True, exist_ok=True)
            (broken / path.relative_to(packed)).write_bytes(path.read_bytes())
    index = (broken / "index.json").read_text()
    (broken / "index.json").write_text(index.replace(",0]", ",1]"))
    with pytest.raises(BundleError):
        unpack(broken, "one", tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
    assert not list(tmp_path.glob(".bundle*"))
