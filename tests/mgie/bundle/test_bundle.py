import dataclasses
import hashlib
import json
import pickle
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from mgie.bundle.bundle import Bundle
from mgie.bundle.devices import resolve_device, resolve_dtype
from mgie.bundle.embedded import ensure_bundle
from mgie.bundle.record import CONFIG_FILE, hash_file, parse_config, required_parts
from mgie.bundle.weights import load_strictly
from mgie.bundle.writer import BundleWriter
from mgie.config import BundleConfig, EditSettings, GenerationConfig, Part, Provenance
from mgie.errors import BundleError, ConfigError
from mgie.inference.conditioner import EditRequest
from mgie.inference.renderer import RenderRequest
from mgie.model.edit_head import EditHead

PICTURE = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
SCHEDULER = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.fixture
def copied(random_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny bundle that a test may damage."""
    return Path(shutil.copytree(random_folder, tmp_path / "copy"))


def rewrite_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads((folder / CONFIG_FILE).read_text())
    change(data)
    (folder / CONFIG_FILE).write_text(json.dumps(data))


def relist(folder: Path) -> None:
    """Lists the files as they are now: damage that sizes and checksums do not show."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != CONFIG_FILE]
    files = {
        path.relative_to(folder).as_posix(): {"sha256": hash_file(path), "size": path.stat().st_size} for path in paths
    }
    rewrite_config(folder, lambda data: data.update(files=files))


def scheduler_config(name: str = "only-scheduler", **fields: Any) -> BundleConfig:
    return BundleConfig(
        **{
            "name": name,
            "parts": ("scheduler",),
            "trained": True,
            "provenance": Provenance(made_by="test", sources=("a", "b"), data="d", licences=("l",)),
        }
        | fields
    )


def write_scheduler(out: Path, config: BundleConfig, *, replace: bool = False, **extra: Any) -> None:
    with BundleWriter(out, config, replace=replace) as writer:
        writer.add_scheduler(SCHEDULER | extra)


# ---- round trip


def test_every_part_comes_back_as_it_was_written(random_bundle: Bundle, tmp_path: Path) -> None:
    tokenizer = random_bundle.load_tokenizer()
    mllm, head = random_bundle.load_mllm(tokenizer), random_bundle.load_edit_head()
    unet, vae = random_bundle.load_unet(), random_bundle.load_vae().autoencoder
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in (mllm, head, unet, vae):  # values that no initialisation gives, norms and biases included
            for parameter in module.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    pixels = json.loads((random_bundle.root / "vision" / "preprocessor_config.json").read_text())
    out = tmp_path / "deep" / "bundle"
    with BundleWriter(out, random_bundle.config) as writer:
        writer.add_tokenizer(tokenizer)
        writer.add_pretrained("vision", mllm.vision.clip)
        writer.add_clip_pixels(pixels)
        writer.add_projector(mllm.projector.state_dict())
        writer.add_pretrained("llm", mllm.llm)
        writer.add_edit_head(head.config, head.state_dict())
        writer.add_pretrained("unet", unet)
        writer.add_pretrained("vae", vae)
        writer.add_scheduler(random_bundle.scheduler_config())

    again = Bundle(out)
    again.verify()
    assert dataclasses.replace(again.config, files={}) == dataclasses.replace(random_bundle.config, files={})
    assert again.scheduler_config() == random_bundle.scheduler_config()
    assert again.load_clip_pixels()([PICTURE]).equal(random_bundle.load_clip_pixels()([PICTURE]))
    assert again.load_tokenizer().added == tokenizer.added
    assert again.load_tokenizer().encode_plain("make it night") == tokenizer.encode_plain("make it night")
    again_mllm, again_head = again.load_mllm(tokenizer), again.load_edit_head()
    for ours, theirs in (
        (again_mllm, mllm),
        (again_head, head),
        (again.load_unet(), unet),
        (again.load_vae().autoencoder, vae),
    ):
        expected = theirs.state_dict()
        assert ours.state_dict().keys() == expected.keys()
        assert all(torch.equal(value, expected[key]) for key, value in ours.state_dict().items())
        assert not ours.training
    assert again_head.config == head.config


def test_what_a_bundle_says_of_itself_comes_back(tmp_path: Path) -> None:
    config = scheduler_config(
        trained=False,
        conditioner="text",
        num_visual_tokens=3,
        vision_select_layer=-1,
        dimensions={"a": 1},
        work_area_px=4096,
        multiple_px=8,
        defaults=EditSettings(sampler="ddim", steps=3, guidance_scale=2.0, image_guidance_scale=1.0, square_crop=True),
        generation=GenerationConfig(max_new_tokens=5, no_repeat_ngram_size=0, stop="eos"),
    )
    write_scheduler(tmp_path / "b", config)
    read = Bundle(tmp_path / "b").config
    assert dataclasses.replace(read, files={}) == config
    assert read.files["scheduler/scheduler_config.json"].size > 0


def test_a_partial_bundle_is_legal_and_says_what_it_lacks(tmp_path: Path) -> None:
    write_scheduler(tmp_path / "b", scheduler_config())
    bundle = Bundle(tmp_path / "b")
    assert bundle.scheduler_config() == SCHEDULER
    with pytest.raises(BundleError, match="has no tokenizer, vision, projector, llm, edit_head; it holds scheduler"):
        bundle.load_conditioner(device="cpu")
    with pytest.raises(BundleError, match="has no unet, vae; it holds scheduler"):
        bundle.load_renderer(device="cpu")
    with pytest.raises(BundleError, match="has no summarizer"):
        bundle.load_summarizer(device="cpu")


def test_an_llm_that_does_not_see_the_image_needs_no_vision_parts(copied: Path, random_bundle: Bundle) -> None:
    for part in ("vision", "projector"):
        shutil.rmtree(copied / part)
    with pytest.raises(BundleError, match="lacks projector/"):
        Bundle(copied).load_conditioner(device="cpu")
    rewrite_config(
        copied,
        lambda data: data.update(
            sees_image=False, parts=[part for part in data["parts"] if part not in ("vision", "projector")]
        ),
    )
    relist(copied)
    bundle = Bundle(copied)
    bundle.verify()
    assert bundle.config.sees_image is False
    assert required_parts(bundle.config) == ("tokenizer", "llm", "edit_head")
    request = EditRequest(image=PICTURE, instruction="make it night")
    [ours] = bundle.load_conditioner(device="cpu").derive([request], GenerationConfig(max_new_tokens=4))
    [theirs] = (
        random_bundle.without_vision()
        .load_conditioner(device="cpu")
        .derive([request], GenerationConfig(max_new_tokens=4))
    )
    assert torch.equal(ours.condition, theirs.condition)
    mgie = bundle.load_mgie(device="cpu")
    assert mgie.mllm.num_patches == 0
    assert {name.split(".")[0] for name, _ in mgie.mllm.named_parameters()} == {"llm"}


def test_a_bundle_that_does_not_say_whether_it_sees_the_image_does(copied: Path) -> None:
    rewrite_config(copied, lambda data: data.pop("sees_image"))
    assert Bundle(copied).config.sees_image is True
    rewrite_config(copied, lambda data: data.update(sees_image="no"))
    with pytest.raises(BundleError, match="sees_image"):
        Bundle(copied)


def text_bundle(out: Path, *, vocab_size: int | None = None) -> None:
    """InstructPix2Pix's conditioner at toy size: CLIP's tokenizer over the 512 byte tokens."""
    letters = sorted(chr(i) for i in (*range(33, 127), *range(161, 173), *range(174, 256)))
    bytes_ = letters + [chr(256 + i) for i in range(256 - len(letters))]
    tokens = bytes_ + [f"{b}</w>" for b in bytes_] + ["<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[])
    torch.manual_seed(0)
    encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocab_size or len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=77,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    with BundleWriter(out, scheduler_config(parts=("text_encoder",), conditioner="text")) as writer:
        writer.add_pretrained("text_encoder", encoder, tokenizer=tokenizer)


def test_a_text_conditioner_comes_back_and_reads_the_words(tmp_path: Path) -> None:
    text_bundle(tmp_path / "b")
    conditioner = Bundle(tmp_path / "b").load_conditioner(device="cpu")
    red, blue, given = conditioner.derive(
        [
            EditRequest(image=PICTURE, instruction="make it red"),
            EditRequest(image=PICTURE, instruction="make it blue"),
            EditRequest(image=PICTURE, instruction="make it red", expressive="make it blue"),
        ]
    )
    assert red.condition.shape == (77, 16)
    assert not torch.allclose(red.condition, blue.condition)
    assert torch.equal(given.condition, blue.condition)
    assert torch.equal(red.null_condition, blue.null_condition)


@pytest.mark.parametrize("damage", ["remove", "other vocabulary", "truncate"])
def test_a_text_tokenizer_that_does_not_fit_is_refused(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "b"
    text_bundle(folder, vocab_size=600 if damage == "other vocabulary" else None)
    for path in (folder / "text_encoder").glob("*token*"):
        if damage == "remove":
            path.unlink()
        elif damage == "truncate":
            path.write_text(path.read_text()[:-30])
    for path in [*(folder / "text_encoder").glob("vocab.*"), *(folder / "text_encoder").glob("merges.*")]:
        if damage == "remove":
            path.unlink()
    relist(folder)
    with pytest.raises(BundleError, match="token"):
        Bundle(folder).load_conditioner(device="cpu")


# ---- each part alone


def test_the_conditioner_loads_where_the_diffusion_parts_are_absent(copied: Path, random_bundle: Bundle) -> None:
    for part in ("unet", "vae", "scheduler"):
        shutil.rmtree(copied / part)
    bundle = Bundle(copied)
    request = EditRequest(image=PICTURE, instruction="make it night")
    [ours] = bundle.load_conditioner(device="cpu").derive([request], GenerationConfig(max_new_tokens=4))
    [whole] = random_bundle.load_conditioner(device="cpu").derive([request], GenerationConfig(max_new_tokens=4))
    assert torch.equal(ours.condition, whole.condition)
    assert ours.bundle == whole.bundle == bundle.identity
    with pytest.raises(BundleError, match=r"lacks scheduler/scheduler_config\.json"):
        bundle.load_renderer(device="cpu")


def test_the_renderer_loads_where_the_conditioner_is_absent(copied: Path, random_bundle: Bundle) -> None:
    [edit_condition] = random_bundle.load_conditioner(device="cpu").derive(
        [EditRequest(image=PICTURE, instruction="make it night", expressive="A dark sky.")]
    )
    for part in ("tokenizer", "vision", "projector", "llm", "edit_head"):
        shutil.rmtree(copied / part)
    bundle = Bundle(copied)
    request = RenderRequest(image=PICTURE, edit_condition=edit_condition, settings=EditSettings(steps=1), seed=3)
    [(_, edited)] = bundle.load_renderer(device="cpu").render([request])
    assert edited.size == PICTURE.size
    with pytest.raises(BundleError, match="lacks "):
        bundle.load_conditioner(device="cpu")


@pytest.mark.parametrize("part", ["tokenizer", "projector", "edit_head", "unet", "vae", "scheduler"])
def test_loading_asks_for_the_parts_it_needs_and_no_others(random_folder: Path, part: Part) -> None:
    asked: list[str] = []
    bundle = Bundle(random_folder, fetch=asked.extend)
    loaders: dict[str, Callable[[], object]] = {
        "tokenizer": bundle.load_tokenizer,
        "projector": lambda: bundle.verify(["projector"]),
        "edit_head": bundle.load_edit_head,
        "unet": bundle.load_unet,
        "vae": bundle.load_vae,
        "scheduler": bundle.scheduler_config,
    }
    loaders[part]()
    assert set(asked) == {part}


# ---- keys and sizes


def drop_first(weights: dict[str, torch.Tensor]) -> str:
    name = min(weights)
    del weights[name]
    return name


def add_one(weights: dict[str, torch.Tensor]) -> str:
    weights["stranger.weight"] = torch.zeros(2)
    return "stranger.weight"


def resize_one(weights: dict[str, torch.Tensor]) -> str:
    name = min(weights)
    weights[name] = torch.zeros(*(side + 1 for side in weights[name].shape))
    return name


@pytest.mark.parametrize("damage", [drop_first, add_one, resize_one])
@pytest.mark.parametrize("part", ["projector", "edit_head", "vision", "llm", "unet", "vae"])
def test_weights_that_do_not_fit_are_refused_by_name(
    copied: Path, part: Part, damage: Callable[[dict[str, torch.Tensor]], str]
) -> None:
    [path] = (copied / part).glob("*.safetensors")
    weights = load_file(path)
    name = damage(weights)
    save_file(weights, path, {"format": "pt"})
    relist(copied)
    with pytest.raises(BundleError) as caught:
        Bundle(copied).load_mgie(device="cpu")
    # transformers leaves its own prefix out of the names it reports.
    assert name.removeprefix("model.").removeprefix("vision_model.") in str(caught.value)
    assert part in str(caught.value)


def test_load_strictly_lists_every_problem() -> None:
    module = torch.nn.Linear(2, 3)
    with pytest.raises(BundleError) as caught:
        load_strictly(module, {"weight": torch.zeros(2, 2), "other": torch.zeros(1)}, "part")
    assert str(caught.value) == (
        "weights of part do not fit: bias is missing; other is unexpected; weight has shape (2, 2), not (3, 2)"
    )


def test_parts_that_do_not_fit_each_other_are_refused(copied: Path) -> None:
    head = EditHead(llm_dim=64, condition_dim=48, width=8, num_queries=2, num_layers=1, feedforward_dim=8)
    (copied / "edit_head" / "config.json").write_text(json.dumps(head.config))
    save_file(head.state_dict(), copied / "edit_head" / "model.safetensors")
    relist(copied)
    with pytest.raises(BundleError, match="edit head is of size 64, the LLM of 192"):
        Bundle(copied).load_conditioner(device="cpu")
    with pytest.raises(BundleError, match="edit head is of size 64, the LLM of 192"):
        Bundle(copied).load_mgie(device="cpu")


def test_a_vocabulary_of_another_size_is_refused(copied: Path) -> None:
    added = json.loads((copied / "tokenizer" / "added_tokens.json").read_text())
    del added["[IMG7]"]
    (copied / "tokenizer" / "added_tokens.json").write_text(json.dumps(added))
    relist(copied)
    with pytest.raises(BundleError, match="tokenizer has 7 visual tokens; bundle 'random' says 8"):
        Bundle(copied).load_tokenizer()
    rewrite_config(copied, lambda data: data.update(num_visual_tokens=7))
    with pytest.raises(BundleError, match="LLM has 711 word embeddings; the tokenizer has 710 tokens"):
        Bundle(copied).load_conditioner(device="cpu")


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("edit_head/config.json", "[]"),
        ("edit_head/config.json", '{"llm_dim": 192}'),
        ("edit_head/config.json", '{"llm_dim": 192, "condition_dim": 64, "stranger": 1}'),
        ("edit_head/config.json", '{"llm_dim": 192, "condition_dim": 64, "width": -8}'),
        ("vision/preprocessor_config.json", "{"),
        ("vision/preprocessor_config.json", '{"do_center_crop": false}'),
        ("vision/preprocessor_config.json", '{"size": {"shortest_edge": 224}, "crop_size": 224}'),  # tower: 112
        ("vision/config.json", '{"model_type": "clip_vision_model", "hidden_size": "wide"}'),
        ("llm/config.json", "nonsense"),
        ("tokenizer/tokenizer.model", "nonsense"),
        ("tokenizer/added_tokens.json", "[1]"),
    ],
)
def test_a_damaged_part_of_the_conditioner_is_a_bundle_error(copied: Path, path: str, content: str) -> None:
    (copied / path).write_text(content)
    relist(copied)
    with pytest.raises(BundleError):
        Bundle(copied).load_conditioner(device="cpu")


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("unet/config.json", "{"),
        ("unet/config.json", '{"_class_name": "UNet2DConditionModel", "block_out_channels": [5, 7]}'),
        ("vae/config.json", "[]"),
        ("scheduler/scheduler_config.json", "[]"),
        ("unet/diffusion_pytorch_model.safetensors", "nonsense"),
    ],
)
def test_a_damaged_part_of_the_renderer_is_a_bundle_error(copied: Path, path: str, content: str) -> None:
    (copied / path).write_text(content)
    relist(copied)
    with pytest.raises(BundleError):
        Bundle(copied).load_renderer(device="cpu")


# ---- files


def test_a_truncated_file_is_refused_when_its_part_is_loaded(copied: Path) -> None:
    [path] = (copied / "unet").glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BundleError, match=r"unet/.*safetensors has \d+ bytes; bundle.json says"):
        Bundle(copied).load_renderer(device="cpu")
    Bundle(copied).load_conditioner(device="cpu")  # the other half is whole


def test_a_flipped_byte_is_found_by_verify(copied: Path) -> None:
    path = copied / "projector" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    Bundle(copied).verify(hashes=False)
    Bundle(copied).verify(["unet"])
    with pytest.raises(BundleError, match=r"projector/model\.safetensors has sha256"):
        Bundle(copied).verify()


def test_a_missing_file_is_named(copied: Path) -> None:
    (copied / "vae" / "config.json").unlink()
    with pytest.raises(BundleError, match=r"lacks vae/config\.json"):
        Bundle(copied).verify()


class Bomb:
    """Unpickled, it leaves a file behind."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.write_text, (self.trace, "ran"))


def test_the_bomb_of_the_next_tests_goes_off_when_unpickled(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(tmp_path / "trace")))
    assert (tmp_path / "trace").exists()


@pytest.mark.parametrize("part", ["llm", "vision", "unet", "vae", "projector", "edit_head"])
def test_a_pickle_in_place_of_weights_is_not_unpickled(copied: Path, tmp_path: Path, part: Part) -> None:
    [path] = (copied / part).glob("*.safetensors")
    path.write_bytes(pickle.dumps(Bomb(tmp_path / "trace")))
    relist(copied)
    bundle = Bundle(copied)
    with pytest.raises(BundleError):
        bundle.load_mgie(device="cpu")
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("part", ["llm", "vision", "unet", "vae"])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "diffusion_pytorch_model.bin"])
def test_an_unlisted_pickle_is_not_loaded_where_weights_are_missing(
    copied: Path, tmp_path: Path, part: Part, name: str
) -> None:
    [path] = (copied / part).glob("*.safetensors")
    path.unlink()
    relist(copied)  # the bundle does not say that weights are missing
    torch.save({"weight": Bomb(tmp_path / "trace")}, copied / part / name)
    with pytest.raises(BundleError):
        Bundle(copied).load_mgie(device="cpu")
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize(
    "name",
    [
        "llm/pytorch_model.bin", "unet/unet.pt", "llm/weights.pkl", "llm/modeling.py", "unet/config.json.exe",
        "../outside.json", "/etc/passwd.json", "llm/../../outside.json", "llm\\..\\outside.json", "llm/x",
    ],
)  # fmt: skip
def test_a_listed_file_of_another_kind_or_outside_the_bundle_is_refused(copied: Path, name: str) -> None:
    rewrite_config(copied, lambda data: data["files"].update({name: {"sha256": "0" * 64, "size": 1}}))
    with pytest.raises(BundleError, match=r"lists .*; only \.safetensors"):
        Bundle(copied)


# ---- bundle.json


def test_a_folder_without_bundle_json_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"is not a bundle: bundle.json cannot be read \(No such file"):
        Bundle(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(stranger=1), "stranger"),
        (lambda d: d.pop("name"), "name"),
        (lambda d: d.pop("parts"), "parts"),
        (lambda d: d.pop("provenance"), "provenance"),
        (lambda d: d.update(parts=["llm", "engine"]), "engine"),
        (lambda d: d.update(parts=[]), "known parts"),
        (lambda d: d.update(parts=[{}]), "parts"),
        (lambda d: d.update(conditioner="magic"), "magic"),
        (lambda d: d.update(format_version=2), "format version 2; this program reads 1"),
        (lambda d: d.update(format_version=2, new_field=3), "format version 2; this program reads 1"),
        (lambda d: d.update(format_version="1"), "format version '1'"),
        (lambda d: d.update(trained="no"), "trained"),
        (lambda d: d.update(num_visual_tokens="8"), "num_visual_tokens"),
        (lambda d: d.update(work_area_px=None), "work_area_px"),
        (lambda d: d["defaults"].update(steps=0), "steps is 0"),
        (lambda d: d["defaults"].update(strength=1), "strength"),
        (lambda d: d["generation"].update(stop="never"), "stop"),
        (lambda d: d["provenance"].update(made_by=5), "made_by"),
        (lambda d: d["files"]["unet/config.json"].update(size="big"), "size"),
        (lambda d: d["files"]["unet/config.json"].pop("sha256"), "sha256"),
        (lambda d: d.update(files=[]), "bundle.json"),
        (lambda d: d.update(defaults=None), "bundle.json"),
    ],
)
def test_a_wrong_field_of_bundle_json_is_named(
    copied: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    rewrite_config(copied, change)
    with pytest.raises(BundleError) as caught:
        Bundle(copied)
    assert message in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"3", b'"x"', b"\xff\xfe", b"{}"])
def test_what_is_no_bundle_json_is_refused(content: bytes) -> None:
    with pytest.raises(BundleError, match=r"bundle\.json cannot be read"):
        parse_config(content)


def test_the_identity_is_stable_and_follows_the_content(tmp_path: Path) -> None:
    identities = []
    for name, eps in (("a", 0), ("b", 0), ("c", 1)):
        write_scheduler(tmp_path / name, scheduler_config(), steps_offset=eps)
        identities.append(Bundle(tmp_path / name).identity)
    assert identities[0] == identities[1] != identities[2]
    assert identities[0] == hashlib.sha256((tmp_path / "a" / CONFIG_FILE).read_bytes()).hexdigest()[:16]


def test_a_copy_has_the_same_identity(copied: Path, random_bundle: Bundle) -> None:
    assert Bundle(copied).identity == random_bundle.identity


# ---- writing


def test_an_error_while_writing_leaves_nothing_behind(tmp_path: Path) -> None:
    def write() -> None:
        with BundleWriter(tmp_path / "b", scheduler_config()) as writer:
            writer.add_scheduler(SCHEDULER)
            raise RuntimeError("halfway")

    with pytest.raises(RuntimeError, match="halfway"):
        write()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("parts", [("scheduler", "unet"), ("unet",)])
def test_parts_that_are_not_those_of_the_configuration_are_refused(tmp_path: Path, parts: tuple[Part, ...]) -> None:
    with pytest.raises(BundleError, match=r"parts written are \['scheduler'\]"):
        write_scheduler(tmp_path / "b", scheduler_config(parts=parts))
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_could_not_be_read_back_is_not_written(tmp_path: Path) -> None:
    def write() -> None:
        with BundleWriter(tmp_path / "b", scheduler_config()) as writer:
            writer.add_scheduler(SCHEDULER)
            (writer.folder("scheduler") / "run.py").write_text("")

    with pytest.raises(BundleError, match=r"scheduler/run\.py cannot be part of a bundle"):
        write()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("replace", [False, True])
def test_a_folder_that_is_no_bundle_is_never_replaced(tmp_path: Path, replace: bool) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.txt").write_text("ten years of work")
    with pytest.raises(BundleError, match=r"exists.*; choose another output folder"):
        BundleWriter(tmp_path / "b", scheduler_config(), replace=replace)
    assert (tmp_path / "b" / "thesis.txt").read_text() == "ten years of work"


def test_an_older_bundle_is_replaced_only_when_asked(tmp_path: Path) -> None:
    write_scheduler(tmp_path / "b", scheduler_config("old"))
    with pytest.raises(BundleError, match="exists"):
        write_scheduler(tmp_path / "b", scheduler_config("new"))
    assert Bundle(tmp_path / "b").config.name == "old"
    with pytest.raises(BundleError, match="parts written"):  # an error keeps the old one
        write_scheduler(tmp_path / "b", scheduler_config("bad", parts=("unet",)), replace=True)
    assert Bundle(tmp_path / "b").config.name == "old"
    write_scheduler(tmp_path / "b", scheduler_config("new"), replace=True)
    assert Bundle(tmp_path / "b").config.name == "new"
    Bundle(tmp_path / "b").verify()
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_a_bundle_that_appeared_while_writing_is_not_taken_away(tmp_path: Path) -> None:
    def write() -> None:
        with BundleWriter(tmp_path / "b", scheduler_config("late")) as writer:
            writer.add_scheduler(SCHEDULER)
            write_scheduler(tmp_path / "b", scheduler_config("early"))

    with pytest.raises(BundleError, match="cannot be put in place"):
        write()
    assert Bundle(tmp_path / "b").config.name == "early"
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


# ---- device and dtype


def test_auto_is_a_device_that_is_there() -> None:
    expected = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    assert resolve_device("auto").type == expected
    assert resolve_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("device", ["gpu", "", "cuda:x", "cuda:99", "mps:0", "meta", "xpu:0"])
def test_a_device_that_is_not_there_is_refused(device: str) -> None:
    if device == "mps:0" and torch.backends.mps.is_available():
        pytest.skip("this machine has MPS")
    with pytest.raises(ConfigError) as caught:
        resolve_device(device)
    assert caught.value.param == "device"
    assert repr(device) in str(caught.value)


@pytest.mark.parametrize(
    ("capability", "dtype"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)]
)
def test_auto_is_bfloat16_where_the_named_gpu_computes_in_it(
    capability: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus = {torch.device("cuda:0"): (9, 0), torch.device("cuda:1"): capability}
    monkeypatch.setattr("torch.cuda.get_device_capability", gpus.__getitem__)
    assert resolve_dtype("auto", torch.device("cuda:1")) == dtype


def test_dtypes_by_name() -> None:
    cpu = torch.device("cpu")
    assert resolve_dtype("auto", cpu) == torch.float32
    assert resolve_dtype("bfloat16", cpu) == torch.bfloat16
    with pytest.raises(ConfigError, match="dtype is 'int8'; it must be one of auto, float32") as caught:
        resolve_dtype("int8", cpu)
    assert caught.value.param == "dtype"


def test_float16_is_refused_for_t5() -> None:
    bundle = Bundle(ensure_bundle("random-summarizer"))
    with pytest.raises(ConfigError, match="float16; T5 overflows") as caught:
        bundle.load_summarizer(device="cpu", dtype="float16")
    assert caught.value.param == "dtype"
    assert bundle.load_summarizer(device="cpu", dtype="bfloat16")[0].dtype == torch.bfloat16


def test_an_edit_runs_in_bfloat16_near_to_float32(random_bundle: Bundle) -> None:
    request = EditRequest(image=PICTURE, instruction="make it night", expressive="A dark sky.")
    [full] = random_bundle.load_conditioner(device="cpu", dtype="float32").derive([request])
    [half] = random_bundle.load_conditioner(device="cpu", dtype="bfloat16").derive([request])
    assert half.condition.dtype == torch.bfloat16
    difference = (half.condition.float() - full.condition).abs().max() / full.condition.abs().max()
    assert 0 < difference < 0.05
    renderer = random_bundle.load_renderer(device="cpu", dtype="bfloat16")
    assert renderer.vae.autoencoder.dtype == torch.float32  # half precision shows as banding
    settings = EditSettings(steps=1)
    [(_, edited)] = renderer.render([RenderRequest(image=PICTURE, edit_condition=half, settings=settings, seed=0)])
    assert edited.size == PICTURE.size


def test_bundles_may_be_loaded_by_several_threads(random_bundle: Bundle) -> None:
    def load(number: int) -> bool:
        part = random_bundle.load_unet() if number % 2 else random_bundle.load_edit_head()
        return all(not parameter.is_meta for parameter in part.parameters())

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(load, range(24)))
