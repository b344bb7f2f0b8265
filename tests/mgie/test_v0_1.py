"""Files of version 0.1.0, read by the code as it is now: bundles, ledgers, a cache, and what editors made of photos."""

import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pyarrow import fs as pafs

from mgie.bundle.bundle import Bundle, open_bundle
from mgie.bundle.embedded import UNTRAINED, EmbeddedName
from mgie.bundle.record import encoder_identity
from mgie.data.latent_cache import CacheKind
from mgie.data.latent_reader import LatentCache
from mgie.data.ledger import count_ledger, images_root, read_edits, read_ledger, read_manifest, rejection_code
from mgie.editor import Editor
from mgie.errors import BundleError, DataError
from mgie.images.files import read_image
from mgie.images.geometry import PUBLISHED_SIDE_PX, training_pixels
from mgie.images.pixels import to_signed
from mgie.storage.folder import open_folder
from mgie.training.checkpoint import TensorSet, read_snapshot
from tests.v0_1 import DATA, assert_same_picture, computes_alike, draw_mask, draw_photo, recorded

LOCAL = pafs.LocalFileSystem()
EDITS: list[dict[str, Any]] = recorded("pictures.json")["edits"]

IDENTITIES: dict[EmbeddedName, str] = {
    "tiny": "2143b0b35c112d6e",
    "tiny-llava": "e2e19acb4f3f844d",
    "tiny-summarizer": "5da5c212ab259fe9",
    "random": "5242df45c112e361",
    "random-ip2p": "519f7cf2d3f84726",
    "random-summarizer": "09d8cc3f6ca32804",
}
ENCODERS = ("b7c7231c642fbc60", "4d6785a8196cc819")  # of the stored bundle: VAE and vision tower
SETS: tuple[TensorSet, ...] = ("trainable", "ema", "optimizer")
NUM_PARAMETERS, NUM_TRAINABLE = 56_503, 30_884


# ---- bundles


@pytest.mark.parametrize("name", IDENTITIES)
def test_an_embedded_bundle_is_the_one_that_ledgers_and_runs_name(name: EmbeddedName) -> None:
    if name in UNTRAINED and not computes_alike():
        pytest.skip("untrained bundles are built here, by another torch or CPU than those that are recorded")
    assert open_bundle(name).identity == IDENTITIES[name]


def test_a_bundle_is_read_with_all_that_its_record_says() -> None:
    bundle = Bundle(DATA / "bundle")
    bundle.verify()
    config = bundle.config
    assert bundle.identity == "61cd045a70e924d1"
    assert (config.name, config.trained, config.conditioner, config.format_version) == ("smallest", False, "mllm", 1)
    assert config.parts == ("tokenizer", "vision", "projector", "llm", "edit_head", "unet", "vae", "scheduler")
    assert (config.num_visual_tokens, config.vision_select_layer, config.work_area_px, config.multiple_px) == (
        4,
        -2,
        1024,
        16,
    )
    assert config.dimensions["vocabulary"] == 407 == bundle.load_tokenizer().vocab_size
    assert (config.defaults.steps, config.defaults.sampler, config.generation.max_new_tokens) == (
        4,
        "euler_ancestral",
        16,
    )
    assert len(config.files) == 16
    assert (encoder_identity(bundle, "vae_moments"), encoder_identity(bundle, "clip_features")) == ENCODERS
    mgie = bundle.load_mgie(device="cpu")
    assert sum(parameter.numel() for parameter in mgie.parameters()) == NUM_PARAMETERS


# ---- editors


@pytest.fixture(scope="module")
def editors() -> dict[str, Editor]:
    """Those of the pictures, once loaded."""
    return {}


@pytest.mark.parametrize("edit", EDITS, ids=[f"{edit['bundle']}-{edit['file'][:2]}" for edit in EDITS])
def test_a_seeded_edit_gives_the_pixels_that_it_gave(edit: dict[str, Any], editors: dict[str, Editor]) -> None:
    name = edit["bundle"]
    if open_bundle(name).identity != IDENTITIES[name]:
        pytest.skip(f"{name} is built here, by another torch or CPU than those that are recorded")
    if name not in editors:
        editors[name] = Editor.load(name, device="cpu", dtype="float32")
    wh = (edit["photo_wh"][0], edit["photo_wh"][1])
    result = editors[name].edit(
        draw_photo(wh, edit["photo"]),
        edit["instruction"],
        seed=edit["seed"],
        expressive=edit["given"],
        mask=draw_mask(wh) if edit["has_mask"] else None,
        **edit["settings"],
    )
    assert result.expressive == edit["expressive"]
    assert list(result.image.size) == edit["wh"]
    assert_same_picture(result.image, DATA / "pictures" / edit["file"], edit["pixels_sha256"])


def test_the_recorded_edits_differ_in_all_that_decides_an_edit() -> None:
    assert len({edit["pixels_sha256"] for edit in EDITS}) == len(EDITS) == 10
    samplers = Counter(edit["settings"].get("sampler", "default") for edit in EDITS)
    assert set(samplers) == {"default", "euler_ancestral", "ddim", "dpmpp_2m"}
    assert Counter(edit["bundle"] for edit in EDITS) == {"tiny": 5, "random": 5}
    assert sum(edit["has_mask"] for edit in EDITS) == 2


# ---- rows


def test_a_manifest_gives_its_rows() -> None:
    rows = [row for batch in read_manifest(open_folder(DATA / "manifest" / "manifest")) for row in batch.to_pylist()]
    assert len(rows) == 12
    assert rows[0] == {
        "id": 5700366702183069559, "dataset": "drawn", "split": "train", "source": "photos/00-source.png",
        "goal": "photos/00-goal.png", "mask": None, "instruction": "make it night", "source_caption": None,
        "goal_caption": None, "turn": None, "session": None, "licence": None,
        "provenance": '{"file":"rows.jsonl","goal_wh":[48,48],"row":0,"source_wh":[48,48]}',
    }  # fmt: skip
    for name in ("manifest/manifest", "ledger"):
        assert images_root(open_folder(DATA / name)) == "s3://v0-1/raw"
        assert images_root(open_folder(DATA / name), moved_to=str(DATA / "raw")) == str(DATA / "raw")


def test_a_ledger_gives_the_words_that_were_written_for_its_rows() -> None:
    folder = str(DATA / "ledger")
    columns = ["id", "status", "reason", "attempt", "instruction", "verbose", "expressive", "summarize_revision"]
    batches = read_ledger(open_folder(folder), status=None, columns=columns)
    rows = {row["id"]: row for batch in batches for row in batch.to_pylist()}
    assert Counter(row["status"] for row in rows.values()) == {"ok": 11, "rejected": 1}
    assert rows[3535263765658503230] == {
        "id": 3535263765658503230, "status": "ok", "reason": None, "attempt": 1,
        "instruction": "add a red balloon above the house, softly",
        "verbose": "If the picture were edited in this way, the red house would have appeared on the right. "
        "The rest would stay as it is.",
        "expressive": "Put a red house into the picture on the right.",
        "summarize_revision": IDENTITIES["tiny-summarizer"],
    }  # fmt: skip
    lost = rows[553569178372446955]
    assert (lost["status"], rejection_code(lost["reason"]), lost["expressive"]) == ("rejected", "missing_file", None)
    counts = count_ledger(open_folder(folder))
    assert (counts.num_rows, counts.num_ids, counts.num_repeated) == (12, 12, 0)
    assert sum(len(batch) for batch in read_edits(open_folder(folder), columns=["id", "expressive"])) == 11


# ---- a cache


def _ids() -> list[int]:
    batches = read_edits(open_folder(DATA / "ledger"), columns=["id"])
    return [number for batch in batches for number in batch.column("id").to_pylist()]


def _open(folder: Path, kind: CacheKind, encoder: str, ids: list[int]) -> LatentCache:
    side_px = 32 if kind == "vae_moments" else PUBLISHED_SIDE_PX
    return LatentCache.open(folder, kind=kind, encoder=encoder, image_side_px=side_px, ids=np.array(ids))


def test_a_cache_holds_what_the_bundle_encodes_of_the_photos() -> None:
    bundle, ids = Bundle(DATA / "bundle"), _ids()
    columns = ["id", "source", "goal"]
    rows = [row for batch in read_edits(open_folder(DATA / "ledger"), columns=columns) for row in batch.to_pylist()]

    def squares(column: str, side_px: int) -> list[Image.Image]:
        return [training_pixels(read_image((DATA / "raw" / row[column]).read_bytes()), side_px) for row in rows]

    moments = _open(DATA / "cache", "vae_moments", ENCODERS[0], ids).moments(ids)
    vae = bundle.load_vae()
    source, goal = (torch.stack(list(map(to_signed, squares(name, 32)))) for name in ("source", "goal"))
    with torch.no_grad():
        mean, logvar = vae.moments(goal)
        features = bundle.load_vision()(bundle.load_clip_pixels()(squares("source", PUBLISHED_SIDE_PX)))
        torch.testing.assert_close(moments.source_mean, vae.condition_latents(source), rtol=0, atol=5e-6)
    torch.testing.assert_close(moments.goal_mean, mean, rtol=0, atol=5e-6)
    torch.testing.assert_close(moments.goal_logvar, logvar, rtol=0, atol=5e-6)
    found = _open(DATA / "cache", "clip_features", ENCODERS[1], ids).features(ids)
    torch.testing.assert_close(found, features, rtol=0, atol=5e-6)
    assert moments.goal_mean.shape == (11, 4, 4, 4)
    assert found.shape == (11, 4, 8)


def test_a_cache_of_other_files_is_refused(tmp_path: Path) -> None:
    folder = shutil.copytree(DATA / "cache", tmp_path / "cache")
    with pytest.raises(DataError, match="encoder is"):
        _open(folder, "vae_moments", ENCODERS[1], _ids())
    with pytest.raises(DataError):
        _open(folder, "vae_moments", ENCODERS[0], [*_ids(), 1])
    index = min((folder / "vae_moments").glob("part-*.ids"))
    index.write_bytes(index.read_bytes()[:-8])
    with pytest.raises(DataError):
        _open(folder, "vae_moments", ENCODERS[0], _ids())


# ---- a checkpoint


def test_a_checkpoint_of_a_run_is_read_with_all_that_its_record_says() -> None:
    snapshot = read_snapshot(DATA / "run" / "checkpoints" / "step-00000004")
    assert (snapshot.step, snapshot.variant, snapshot.data_names) == (4, "e2e", ("drawn",))
    assert (snapshot.base, snapshot.base_bundle) == ("61cd045a70e924d1", "s3://v0-1/bundle")
    assert (snapshot.config["global_batch"], snapshot.config["optimizer"]["ema_decay"]) == (4, 0.9)
    trainable, ema, optimizer = (snapshot.load(name) for name in SETS)
    assert trainable.keys() == ema.keys()
    assert sum(tensor.numel() for tensor in trainable.values()) == NUM_TRAINABLE
    assert len(optimizer) > len(trainable)


def test_a_checkpoint_that_was_altered_is_refused(tmp_path: Path) -> None:
    folder = shutil.copytree(DATA / "run" / "checkpoints" / "step-00000004", tmp_path / "step-00000004")
    file = folder / "trainable.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(DataError, match="it was altered"):
        read_snapshot(folder).load("trainable")


def test_a_bundle_that_was_altered_is_refused(tmp_path: Path) -> None:
    folder = shutil.copytree(DATA / "bundle", tmp_path / "bundle")
    file = folder / "projector" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(BundleError, match="projector"):
        Bundle(folder).verify()


# ---- nothing that names a place in the code or on a machine


def test_no_stored_file_names_a_module_or_a_machines_folder() -> None:
    """Modules move; what a file says must mean the same when they have."""
    files = [path for path in DATA.rglob("*") if path.is_file() and path.name != "README.md"]
    assert len(files) > 80
    for path in files:
        found = re.findall(rb"(?:mgie|pipelines|serving)\.[a-z_]+|/(?:home|root|tmp|work|Users)/", path.read_bytes())
        assert found == [], path
