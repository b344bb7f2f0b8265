"""Runs -> bundles and published files: exactly the trained weights, from the right checkpoint, over the right base."""

import dataclasses
import functools
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import boto3
import pytest
import torch
from moto.server import ThreadedMotoServer
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaForCausalLM

from mgie.bundle.bundle import Bundle
from mgie.bundle.convert import convert
from mgie.bundle.embedded import ensure_bundle
from mgie.bundle.record import CONFIG_FILE
from mgie.bundle.weights import read_weights
from mgie.bundle.writer import BundleWriter
from mgie.config import GenerationConfig, Sources
from mgie.editor import Editor
from mgie.errors import BundleError, ConfigError, DataError
from mgie.inference.conditioner import EditRequest
from mgie.training.checkpoint import Snapshot, snapshot_name, write_snapshot
from mgie.training.export import Trained, export_bundle, export_published, open_base, read_trained

pytestmark = pytest.mark.slow

PICTURE = Image.linear_gradient("L").resize((64, 48)).convert("RGB")
REQUEST = EditRequest(image=PICTURE, instruction="make it night")
NUM_VISUAL = 8


@pytest.fixture(scope="module")
def text_bundle() -> Bundle:
    return Bundle(ensure_bundle("random-ip2p"))


@functools.cache
def trainable_shapes(root: Path) -> dict[str, torch.Size]:
    """Of all that trains in a bundle, by the names in a training module."""
    bundle = Bundle(root)
    if bundle.config.conditioner == "text":
        return {f"unet.{name}": value.shape for name, value in bundle.load_unet().named_parameters()}
    parameters = bundle.load_mgie(device="cpu").named_parameters()
    return {name: value.shape for name, value in parameters if value.requires_grad}


def new_weights(bundle: Bundle, seed: int) -> dict[str, Tensor]:
    """Random values for all that trains in a bundle."""
    generator = torch.Generator().manual_seed(seed)
    shapes = trainable_shapes(bundle.root)
    return {name: 0.05 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def write_run(run: Path, bundle: Bundle, *, step: int = 50, ema: bool = True, **given: Any) -> Path:
    """The folder of a checkpoint of a run; weights from seed `step`, EMA from seed `step + 1`."""
    trainable = given.pop("trainable", None) or new_weights(bundle, step)
    fields: dict[str, Any] = {
        "variant": "e2e" if bundle.config.conditioner == "mllm" else "ip2p",
        "base": bundle.identity,
        "base_bundle": str(bundle.root),
        "config": {},
        "data": "f00d",
        "data_names": ["flowers", "roads"],
        "metrics": {},
        "ema": new_weights(bundle, step + 1) if ema else None,
        "optimizer": {"step.x": torch.tensor(1.0)},
    }
    folder = run / "checkpoints" / snapshot_name(step)
    write_snapshot(folder, step=step, trainable=trainable, **(fields | given))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, random_bundle: Bundle) -> Path:
    """A run of MGIE with one checkpoint, EMA included."""
    folder = tmp_path_factory.mktemp("run")
    write_run(folder, random_bundle)
    return folder


@pytest.fixture(scope="module")
def trained(run: Path) -> Trained:
    return read_trained(run)


def weights_of(bundle: Bundle) -> dict[str, Tensor]:
    """All that trains in a bundle, as its own loaders give it."""
    weights = {f"unet.{key}": value for key, value in bundle.load_unet().state_dict().items()}
    if bundle.config.conditioner == "mllm":
        mllm, head = bundle.load_mllm(bundle.load_tokenizer()), bundle.load_edit_head()
        weights |= {f"edit_head.{key}": value for key, value in head.state_dict().items()}
        weights["mllm.llm.model.embed_tokens.weight"] = mllm.llm.model.embed_tokens.weight
        weights["mllm.llm.lm_head.weight"] = mllm.llm.lm_head.weight
    return weights


def assert_equal(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    assert len(got) > 0
    assert [name for name in expected if not torch.equal(got[name], expected[name])] == []


# ---- a bundle


@pytest.mark.parametrize(("weights", "seed"), [(None, 51), ("ema", 51), ("raw", 50)])
def test_a_bundle_holds_exactly_the_trained_weights(
    run: Path, tmp_path: Path, random_bundle: Bundle, weights: Any, seed: int
) -> None:
    trained = read_trained(run, weights=weights)
    assert trained.kind == (weights or "ema")
    bundle = export_bundle(trained, open_base(trained.snapshot), tmp_path / "b")
    bundle.verify()
    assert_equal(weights_of(bundle), new_weights(random_bundle, seed))


def test_what_did_not_train_is_copied_byte_by_byte(trained: Trained, tmp_path: Path, random_bundle: Bundle) -> None:
    files = export_bundle(trained, random_bundle, tmp_path / "b").config.files
    assert files.keys() == random_bundle.config.files.keys()
    changed = sorted(name for name, entry in files.items() if entry != random_bundle.config.files[name])
    assert changed == [
        "edit_head/model.safetensors", "llm/model.safetensors", "unet/diffusion_pytorch_model.safetensors",
    ]  # fmt: skip
    old, new = (load_file(root / "llm/model.safetensors") for root in (random_bundle.root, tmp_path / "b"))
    assert [key for key in old if not torch.equal(old[key], new[key])] == [
        "lm_head.weight", "model.embed_tokens.weight",
    ]  # fmt: skip


def test_a_bundle_says_what_it_is_and_edits(trained: Trained, tmp_path: Path, random_bundle: Bundle) -> None:
    bundle = export_bundle(trained, random_bundle, tmp_path / "mine")
    config = bundle.config
    assert (config.name, config.trained, config.sees_image) == ("mine", True, True)
    assert config.provenance.made_by == "mgie export"
    assert config.provenance.sources == (
        f"base: random ({random_bundle.identity})",
        "run: e2e, 50 steps, ema weights",
    )
    assert config.provenance.data == "flowers, roads"
    assert config.provenance.licences == random_bundle.config.provenance.licences
    assert (config.defaults, config.dimensions) == (random_bundle.config.defaults, random_bundle.config.dimensions)
    assert export_bundle(trained, random_bundle, tmp_path / "x", name="other").config.name == "other"
    ours, theirs = (
        Editor.load(opened, device="cpu").edit(PICTURE, "make it night", seed=1, steps=2, expressive="Dark.")
        for opened in (bundle, random_bundle)
    )
    assert ours.edit_condition.bundle == bundle.identity
    assert not torch.allclose(ours.edit_condition.condition, theirs.edit_condition.condition, atol=1e-3)


def test_a_base_that_was_trained_keeps_its_data_in_the_record(
    run: Path, trained: Trained, tmp_path: Path, random_bundle: Bundle
) -> None:
    first = export_bundle(trained, random_bundle, tmp_path / "first")
    write_run(tmp_path / "run", first, data_names=["photos"])
    again = read_trained(tmp_path / "run")
    assert export_bundle(again, first, tmp_path / "b").config.provenance.data == "flowers, roads, photos"


def test_a_base_in_shards_and_of_half_precision_keeps_its_layout(tmp_path: Path, random_bundle: Bundle) -> None:
    """Only the files that hold a trained tensor are written anew, each tensor in the dtype that it had."""
    with BundleWriter(tmp_path / "base", dataclasses.replace(random_bundle.config, name="halved")) as writer:
        for part in random_bundle.config.parts:
            if part == "llm":
                llm = LlamaForCausalLM.from_pretrained(random_bundle.root / "llm", dtype=torch.bfloat16)
                llm.save_pretrained(writer.folder(part), max_shard_size="600KB")
            else:
                shutil.copytree(random_bundle.root / part, writer.folder(part), dirs_exist_ok=True)
    base = Bundle(tmp_path / "base")
    write_run(tmp_path / "run", base, ema=False)
    bundle = export_bundle(read_trained(tmp_path / "run"), base, tmp_path / "b")
    index = json.loads((base.root / "llm/model.safetensors.index.json").read_text())["weight_map"]
    expected = {f"llm/{index[name]}" for name in ("lm_head.weight", "model.embed_tokens.weight")}
    llm_files = {name for name in base.config.files if name.startswith("llm/")}
    assert len(llm_files) > len(expected) + 2
    assert {name for name in llm_files if bundle.config.files[name] != base.config.files[name]} == expected
    rows = bundle.load_mllm(bundle.load_tokenizer(), torch.bfloat16).llm.model.embed_tokens.weight
    given = new_weights(base, 50)["mllm.llm.model.embed_tokens.weight"]
    assert torch.equal(rows, given.to(torch.bfloat16))


def test_of_a_text_bundle_only_the_unet_is_replaced(tmp_path: Path, text_bundle: Bundle) -> None:
    write_run(tmp_path / "run", text_bundle)
    bundle = export_bundle(read_trained(tmp_path / "run", weights="raw"), text_bundle, tmp_path / "b")
    assert_equal(weights_of(bundle), new_weights(text_bundle, 50))
    changed = [name for name, entry in bundle.config.files.items() if entry != text_bundle.config.files[name]]
    assert changed == ["unet/diffusion_pytorch_model.safetensors"]
    assert bundle.config.provenance.sources[1] == "run: ip2p, 50 steps, raw weights"
    assert Editor.load(bundle, device="cpu").edit(PICTURE, "make it night", seed=1, steps=1).image.size == (64, 48)


@pytest.mark.parametrize(("variant", "step"), [("fz", 50), ("ip2p", 0)])
def test_where_nothing_trained_the_base_comes_out_as_it_was(
    tmp_path: Path, text_bundle: Bundle, variant: str, step: int
) -> None:
    stored = {"unet.x": torch.zeros(1)} if variant == "fz" else None
    write_run(tmp_path / "run", text_bundle, step=step, variant=variant, ema=False, trainable=stored)
    bundle = export_bundle(read_trained(tmp_path / "run"), text_bundle, tmp_path / "b")
    assert bundle.config.files == text_bundle.config.files
    assert bundle.config.trained is False
    assert bundle.config.provenance.data == "none: not trained"


def test_an_lgie_run_gives_a_bundle_that_does_not_see_the_image(tmp_path: Path, random_bundle: Bundle) -> None:
    write_run(tmp_path / "run", random_bundle, variant="lgie", ema=False)
    bundle = export_bundle(read_trained(tmp_path / "run"), random_bundle, tmp_path / "b")
    assert bundle.config.sees_image is False
    assert bundle.config.parts == ("tokenizer", "llm", "edit_head", "unet", "vae", "scheduler")
    assert "image_patches" not in bundle.config.dimensions
    assert not (tmp_path / "b" / "vision").exists()
    assert_equal(weights_of(bundle), new_weights(random_bundle, 50))
    short = GenerationConfig(max_new_tokens=4)
    ours, other = (
        bundle.load_conditioner(device="cpu").derive([dataclasses.replace(REQUEST, image=image)], short)[0]
        for image in (PICTURE, Image.new("RGB", (32, 32), "red"))
    )
    assert ours.image_tokens == 0
    assert torch.equal(ours.condition, other.condition)
    assert Editor.load(bundle, device="cpu").edit(PICTURE, "make it night", seed=1, steps=1).image.size == (64, 48)


# ---- refusals


def test_another_base_is_refused_by_both_identities(trained: Trained, tmp_path: Path, random_bundle: Bundle) -> None:
    other = shutil.copytree(random_bundle.root, tmp_path / "other")
    content = json.loads((other / CONFIG_FILE).read_text())
    (other / CONFIG_FILE).write_text(json.dumps(content | {"name": "other"}))
    with pytest.raises(BundleError) as caught:
        open_base(trained.snapshot, other)
    for word in (Bundle(other).identity, random_bundle.identity, str(other), str(random_bundle.root)):
        assert word in str(caught.value)
    gone: Snapshot = dataclasses.replace(trained.snapshot, base_bundle="./gone")
    with pytest.raises(BundleError, match=r"bundle './gone' does not exist; .* say by --base where that lies now"):
        open_base(gone)
    moved = shutil.copytree(random_bundle.root, tmp_path / "moved")
    assert open_base(trained.snapshot, moved).root == moved


def test_a_damaged_base_is_refused_and_nothing_is_left(trained: Trained, tmp_path: Path, random_bundle: Bundle) -> None:
    base = shutil.copytree(random_bundle.root, tmp_path / "base")
    path = base / "vae" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(BundleError, match=r"vae/diffusion_pytorch_model.safetensors has sha256"):
        export_bundle(trained, open_base(trained.snapshot, base), tmp_path / "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("missing", r"edit_head\.query is missing"),
        ("unexpected", r"unet\.novelty is unexpected"),
        ("shape", r"unet\.conv_in\.bias has shape \(3,\), not \(48,\)"),
        ("frozen", r"mllm\.projector\.bias is unexpected"),
    ],
)
def test_weights_that_do_not_fit_the_base_are_refused_by_name(
    trained: Trained, tmp_path: Path, random_bundle: Bundle, damage: str, message: str
) -> None:
    tensors = dict(trained.tensors)
    if damage == "missing":
        del tensors["edit_head.query"]
    else:
        name = {"unexpected": "unet.novelty", "shape": "unet.conv_in.bias", "frozen": "mllm.projector.bias"}[damage]
        tensors[name] = torch.zeros(3)
    with pytest.raises(BundleError, match=message):
        export_bundle(dataclasses.replace(trained, tensors=tensors), random_bundle, tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


def test_a_text_run_does_not_fit_an_mllm_bundle(tmp_path: Path, text_bundle: Bundle, random_bundle: Bundle) -> None:
    write_run(tmp_path / "run", text_bundle, ema=False)
    with pytest.raises(BundleError, match=r"mllm\.llm\.lm_head\.weight is missing"):
        export_bundle(read_trained(tmp_path / "run"), random_bundle, tmp_path / "b")


def test_a_bundle_that_is_there_is_replaced_only_on_request(
    trained: Trained, tmp_path: Path, random_bundle: Bundle
) -> None:
    export_bundle(trained, random_bundle, tmp_path / "b")
    with pytest.raises(BundleError, match="exists"):
        export_bundle(trained, random_bundle, tmp_path / "b")
    assert export_bundle(trained, random_bundle, tmp_path / "b", name="new", replace=True).config.name == "new"


# ---- which checkpoint


def small_run(folder: Path, *steps: int, ema: bool = True) -> Path:
    """A run of nothing in particular; the value of its tensor is the step, of its average the step and a half."""
    for step in steps:
        write_snapshot(
            folder / "checkpoints" / snapshot_name(step),
            step=step,
            variant="e2e",
            base="b",
            base_bundle="random",
            config={},
            data="d",
            data_names=[],
            metrics={},
            trainable={"x": torch.tensor(float(step))},
            ema={"x": torch.tensor(step + 0.5)} if ema else None,
            optimizer={"o": torch.zeros(1000)},
        )
    return folder


def test_the_newest_complete_checkpoint_is_taken_unless_a_step_is_named(tmp_path: Path) -> None:
    run = small_run(tmp_path, 9, 10, 100)
    checkpoint = run / "checkpoints" / "step-00000010"
    assert read_trained(run).tensors["x"] == 100.5
    assert read_trained(run, weights="raw").tensors["x"] == 100
    assert read_trained(run, step=9).tensors["x"] == 9.5
    assert read_trained(checkpoint).tensors["x"] == 10.5
    assert read_trained(str(checkpoint), step=10).snapshot.step == 10
    (run / "checkpoints" / "step-00000100" / "optimizer.safetensors").unlink()
    assert read_trained(run).tensors["x"] == 10.5
    with pytest.raises(DataError, match="is the checkpoint of step 10, not of step 9"):
        read_trained(checkpoint, step=9)
    with pytest.raises(DataError, match=r"step-00000100/optimizer\.safetensors is missing"):
        read_trained(run, step=100)
    with pytest.raises(DataError, match="step-00000011 is no checkpoint"):
        read_trained(run, step=11)


def test_without_averages_the_last_weights_are_taken(tmp_path: Path) -> None:
    run = small_run(tmp_path, 9, ema=False)
    assert (read_trained(run).kind, read_trained(run).tensors["x"]) == ("raw", 9)
    with pytest.raises(ConfigError, match="give --weights raw"):
        read_trained(run, weights="ema")


def test_damaged_checkpoints_and_folders_without_one_are_refused(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run", 9)
    path = run / "checkpoints" / "step-00000009" / "ema.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(DataError, match=r"ema\.safetensors has sha256"):
        read_trained(run)
    assert read_trained(run, weights="raw").tensors["x"] == 9
    path.write_bytes(b"")
    with pytest.raises(DataError, match=r"ema\.safetensors has 0 bytes"):
        read_trained(path.parent)
    for folder in (run, tmp_path / "nothing"):
        with pytest.raises(DataError, match=f"{folder} holds no complete checkpoint"):
            read_trained(folder)


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A client of an empty store with the bucket `runs`."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3")
    client.create_bucket(Bucket="runs")
    yield client
    server.stop()


@pytest.mark.parametrize("prefix", ["a/b/", ""])
def test_a_run_in_s3_is_read_and_only_as_far_as_needed(s3: Any, tmp_path: Path, prefix: str) -> None:
    run = small_run(tmp_path / "run", 9, 100)
    for path in run.rglob("*.*"):
        s3.upload_file(str(path), "runs", prefix + path.relative_to(run).as_posix())
    url = f"s3://runs/{prefix}"
    assert read_trained(url).tensors["x"] == 100.5
    assert read_trained(url, step=9, weights="raw").tensors["x"] == 9
    assert read_trained(f"s3://runs/{prefix}checkpoints/step-00000009").tensors["x"] == 9.5
    key = f"{prefix}checkpoints/step-00000100/optimizer.safetensors"
    size = s3.head_object(Bucket="runs", Key=key)["ContentLength"]
    s3.put_object(Bucket="runs", Key=key, Body=bytes(size))  # never looked into
    assert read_trained(url).snapshot.step == 100
    s3.put_object(Bucket="runs", Key=key, Body=b"cut off")
    assert read_trained(url).snapshot.step == 9
    with pytest.raises(DataError, match="holds no complete checkpoint"):
        read_trained(url, step=100)
    key = f"{prefix}checkpoints/step-00000009/ema.safetensors"
    size = s3.head_object(Bucket="runs", Key=key)["ContentLength"]
    s3.put_object(Bucket="runs", Key=key, Body=bytes(size))
    with pytest.raises(DataError, match=r"ema\.safetensors has sha256"):
        read_trained(url)


@pytest.mark.parametrize("url", ["s3://runs/none", "s3://gone/x"])
def test_an_s3_folder_without_a_checkpoint_is_refused(s3: Any, url: str) -> None:
    for step in (None, 3):
        with pytest.raises(DataError, match=f"{url} holds no complete checkpoint"):
            read_trained(url, step=step)
    with pytest.raises(DataError, match=r"s3://gone/\.\./x cannot be read"):
        read_trained("s3://gone/../x")


# ---- the published layout


def write_sources(folder: Path, bundle: Bundle) -> Sources:
    """The bundle's parts in the layouts of the published checkpoints that MGIE is made of."""
    tokenizer, llava = bundle.load_tokenizer(), folder / "llava"
    num_plain = tokenizer.vocab_size - NUM_VISUAL
    llava.mkdir(parents=True)
    tokenizer.with_visual_tokens(0).save(llava)
    config = json.loads((bundle.root / "llm/config.json").read_text())
    config |= {"model_type": "llava", "vocab_size": num_plain, "mm_vision_select_layer": -2}
    (llava / "config.json").write_text(json.dumps(config))
    weights = load_file(bundle.root / "llm/model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = weights[name][:num_plain].clone()
    projector = load_file(bundle.root / "projector/model.safetensors")
    torch.save(weights | {f"model.mm_projector.{key}": v for key, v in projector.items()}, llava / "pytorch_model.bin")
    return Sources(llava=llava, clip=bundle.root / "vision", stable_diffusion=bundle.root, mgie=folder / "mgie")


def test_the_published_layout_converts_back_to_the_trained_weights(
    run: Path, trained: Trained, tmp_path: Path, random_bundle: Bundle
) -> None:
    export_published(trained, random_bundle, tmp_path / "mgie")
    assert sorted(path.name for path in (tmp_path / "mgie").iterdir()) == ["mllm.pt", "unet.pt"]
    mllm, unet = (read_weights(tmp_path / "mgie" / name) for name in ("mllm.pt", "unet.pt"))
    assert {key.split(".")[0] for key in mllm} == {"model", "lm_head", "edit_head", "emb"}
    assert {value.dtype for value in (*mllm.values(), *unet.values())} == {torch.float16}
    assert torch.equal(mllm["emb"], mllm["model.embed_tokens.weight"][-NUM_VISUAL:])
    assert mllm["emb"].untyped_storage().nbytes() < mllm["model.embed_tokens.weight"].untyped_storage().nbytes()

    bundle = convert(tmp_path / "b", write_sources(tmp_path, random_bundle))
    rounded = {name: tensor.half().float() for name, tensor in new_weights(random_bundle, 51).items()}
    assert_equal(weights_of(bundle), rounded)
    assert bundle.load_tokenizer().added == random_bundle.load_tokenizer().added
    # And as a whole it is the model of the exported bundle, but for rounding.
    ours, exported = (
        opened.load_conditioner(device="cpu", dtype="float32").derive(
            [dataclasses.replace(REQUEST, expressive="A dark sky.")]
        )[0]
        for opened in (bundle, export_bundle(trained, random_bundle, tmp_path / "e"))
    )
    torch.testing.assert_close(ours.condition, exported.condition, rtol=0, atol=2e-2)


def test_published_files_are_replaced_only_on_request(trained: Trained, tmp_path: Path, random_bundle: Bundle) -> None:
    out = tmp_path / "mgie"
    export_published(trained, random_bundle, out)
    with pytest.raises(BundleError, match="mgie exists; choose another"):
        export_published(trained, random_bundle, out)
    export_published(trained, random_bundle, out, replace=True)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(BundleError, match="mgie exists and holds other files"):
        export_published(trained, random_bundle, out, replace=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mgie"]


def test_what_the_published_layout_cannot_hold_is_refused(
    trained: Trained, tmp_path: Path, random_bundle: Bundle, text_bundle: Bundle
) -> None:
    for variant, base in (("lgie", random_bundle), ("ip2p", text_bundle), ("e2e", random_bundle.without_vision())):
        snapshot: Snapshot = dataclasses.replace(trained.snapshot, variant=variant)
        with pytest.raises(ConfigError, match=f"the run's variant is {variant}; the published layout holds"):
            export_published(dataclasses.replace(trained, snapshot=snapshot), base, tmp_path / "mgie")
    large = dict(trained.tensors) | {"unet.conv_in.bias": torch.full((48,), 1e6)}
    with pytest.raises(BundleError, match=r"unet\.conv_in\.bias has values that are too large for torch\.float16"):
        export_published(dataclasses.replace(trained, tensors=large), random_bundle, tmp_path / "mgie")
    block = {"mllm.llm.model.layers.0.mlp.up_proj.weight": torch.zeros(1)}
    with pytest.raises(ConfigError, match="trained the language model"):
        export_published(
            dataclasses.replace(trained, tensors={**trained.tensors, **block}), random_bundle, tmp_path / "mgie"
        )
    assert list(tmp_path.iterdir()) == []
