"""`mgie.bundle.convert` on the recorded checkpoints, and on tiny ones made here in the published layouts."""

import io
import json
import pickle
import shutil
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from mgie.bundle.bundle import Bundle
from mgie.bundle.convert import append_token_rows, convert
from mgie.config import Sources
from mgie.errors import BundleError, ConfigError, ConversionError
from mgie.inference.conditioner import MLLMConditioner, TextConditioner
from mgie.model.edit_head import EditHead

pytestmark = pytest.mark.slow

LLM_DIM, CLIP_DIM, CONDITION_DIM, NUM_VISUAL = 32, 16, 24, 4
IMAGE_TOKENS = ("<im_patch>", "<im_start>", "<im_end>")
SENTENCES = (
    "make it night",
    "turn the sky into a storm",
    "the lake is frozen and white",
    "add a red boat",
    "warm light",
)
SCHEDULER = {
    "_class_name": "PNDMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000, "steps_offset": 1, "skip_prk_steps": True, "set_alpha_to_one": False, "trained_betas": None,
}  # fmt: skip

StateDict = dict[str, Tensor]


# --- tiny checkpoints in the published layouts ----------------------------------------------------------------


@pytest.fixture(scope="session")
def pieces() -> bytes:
    """A sentencepiece model."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 4), model_writer=model, model_type="bpe", vocab_size=60,
        unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=2, num_threads=1,
    )  # fmt: skip
    return model.getvalue()


def random_like(module: nn.Module, seed: int, dtype: torch.dtype = torch.float32) -> StateDict:
    """Random values of the module's shapes: norms too, so that a swapped or missing tensor shows."""
    generator = torch.Generator().manual_seed(seed)
    return {
        key: (torch.randn(value.shape, generator=generator) * 0.1).to(dtype) if value.is_floating_point() else value
        for key, value in module.state_dict().items()
    }


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))


def save_weights(folder: Path, weights: StateDict, *, layout: str = "safetensors", stem: str = "model") -> None:
    """Writes `weights` whole or in two shards: safetensors, bin (zip), legacy (the pickles of torch < 1.6)."""
    folder.mkdir(parents=True, exist_ok=True)
    form, _, sharded = layout.partition("-")
    if form != "safetensors" and stem == "model":
        stem = "pytorch_model"
    suffix = "safetensors" if form == "safetensors" else "bin"

    def save(part: StateDict, path: Path) -> None:
        if form == "safetensors":
            save_file(part, path, metadata={"format": "pt"})
        else:
            torch.save(part, path, _use_new_zipfile_serialization=form == "bin")

    if not sharded:
        save(weights, folder / f"{stem}.{suffix}")
        return
    keys = sorted(weights)
    halves = [keys[: len(keys) // 2], keys[len(keys) // 2 :]]
    weight_map = {}
    for i, half in enumerate(halves, start=1):
        name = f"{stem}-{i:05d}-of-00002.{suffix}"
        save({key: weights[key] for key in half}, folder / name)
        weight_map |= dict.fromkeys(half, name)
    write_json(folder / f"{stem}.{suffix}.index.json", {"metadata": {}, "weight_map": weight_map})


def write_llava(
    folder: Path, pieces: bytes, *, layout: str = "bin-sharded", dtype: torch.dtype = torch.float32
) -> StateDict:
    """LLaVA-7B-v1's layout; returns what was written."""
    config = {
        "model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"], "_name_or_path": "/home/someone/llava",
        "hidden_act": "silu", "hidden_size": LLM_DIM, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "vocab_size": 63,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False, "torch_dtype": "float16",
        "mm_vision_tower": "openai/clip-vit-large-patch14", "mm_hidden_size": CLIP_DIM, "mm_vision_select_layer": -2,
        "mm_use_im_start_end": True,
    }  # fmt: skip
    write_json(folder / "config.json", config)
    (folder / "tokenizer.model").write_bytes(pieces)
    write_json(folder / "added_tokens.json", {token: 60 + i for i, token in enumerate(IMAGE_TOKENS)})
    llama = {
        key: config[key]
        for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    }
    weights = random_like(LlamaForCausalLM(LlamaConfig(**llama)), 1, dtype)
    generator = torch.Generator().manual_seed(2)
    weights["model.mm_projector.weight"] = torch.randn(LLM_DIM, CLIP_DIM, generator=generator).to(dtype)
    weights["model.mm_projector.bias"] = torch.randn(LLM_DIM, generator=generator).to(dtype)
    for layer in range(2):  # a buffer that old versions stored
        weights[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.rand(4, generator=generator)
    save_weights(folder, weights, layout=layout)
    return weights


def write_clip(folder: Path, *, whole: bool = False, layout: str = "safetensors") -> StateDict:
    """CLIP's layout; the vision tower's tensors under their published names are returned."""
    vision = {
        "hidden_size": CLIP_DIM,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 28,
        "patch_size": 14,
    }
    weights = random_like(CLIPVisionModel(CLIPVisionConfig(**vision)), 3)
    weights = {"vision_model." + key.removeprefix("vision_model."): value for key, value in weights.items()}
    stored = {**weights, "vision_model.embeddings.position_ids": torch.arange(5)[None]}
    if whole:
        write_json(folder / "config.json", CLIPConfig(vision_config=vision, text_config={"hidden_size": 8}).to_dict())
        stored |= {
            "text_model.final_layer_norm.weight": torch.ones(8),
            "logit_scale": torch.tensor(4.6),
            "visual_projection.weight": torch.ones(2, 2),
        }
    else:
        write_json(folder / "config.json", {"model_type": "clip_vision_model", **vision})
    write_json(
        folder / "preprocessor_config.json",
        {"crop_size": 28, "size": 28, "do_center_crop": True, "do_normalize": True, "do_resize": True,
         "image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28], "resample": 3},
    )  # fmt: skip
    save_weights(folder, stored, layout=layout)
    return weights


def write_diffusion(folder: Path, *, channels: int, layout: str = "bin", words: bool = False) -> dict[str, StateDict]:
    """Stable Diffusion's layout, with the VAE's attention under its old names; returns modern names."""
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=channels, out_channels=4, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=CONDITION_DIM, attention_head_dim=2,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(4, 4, 8), layers_per_block=1, norm_num_groups=2, down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3, latent_channels=4, sample_size=32,
    )  # fmt: skip
    weights = {"unet": random_like(unet, 4), "vae": random_like(vae, 5)}
    unet.save_config(folder / "unet")
    vae.save_config(folder / "vae")
    save_weights(folder / "unet", weights["unet"], layout=layout, stem="diffusion_pytorch_model")
    old = {}
    for key, value in weights["vae"].items():
        if "attentions" in key:
            for modern, legacy in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
                key = key.replace(f".{modern}.", f".{legacy}.")  # noqa: PLW2901
        old[key] = value
    assert old.keys() != weights["vae"].keys()
    save_weights(folder / "vae", old, layout=layout, stem="diffusion_pytorch_model")
    write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    (folder / "safety_checker").mkdir()  # is there in the real folder, and of no interest
    (folder / "safety_checker" / "pytorch_model.bin").write_bytes(b"not looked at")
    if words:
        text = {
            "hidden_size": CONDITION_DIM,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "vocab_size": 54,
            "max_position_embeddings": 16,
        }
        encoder = random_like(CLIPTextModel(CLIPTextConfig(**text)), 6)
        weights["text_encoder"] = {
            "text_model." + key.removeprefix("text_model."): value for key, value in encoder.items()
        }
        write_json(
            folder / "text_encoder" / "config.json",
            {"model_type": "clip_text_model", "eos_token_id": 53, "bos_token_id": 52, **text},
        )
        stored = {**weights["text_encoder"], "text_model.embeddings.position_ids": torch.arange(16)[None]}
        save_weights(folder / "text_encoder", stored, layout=layout)
        letters = "abcdefghijklmnopqrstuvwxyz"
        vocab = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
        write_json(folder / "tokenizer" / "vocab.json", {token: i for i, token in enumerate(vocab)})
        (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
        write_json(
            folder / "tokenizer" / "tokenizer_config.json",
            {"tokenizer_class": "CLIPTokenizer", "model_max_length": 16, "bos_token": "<|startoftext|>",
             "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
        )  # fmt: skip
    return weights


def write_mgie(folder: Path, unet: StateDict, *, emb: bool = True) -> StateDict:
    """mgie_7b's layout; returns mllm.pt."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(7)
    head = EditHead(
        llm_dim=LLM_DIM, condition_dim=CONDITION_DIM, width=16, num_queries=5, num_layers=2, feedforward_dim=24
    )
    rows = 63 + NUM_VISUAL
    weights = {"edit_head." + key: value for key, value in random_like(head, 8).items()}
    weights["model.embed_tokens.weight"] = torch.randn(rows, LLM_DIM, generator=generator)
    weights["lm_head.weight"] = torch.randn(rows, LLM_DIM, generator=generator)
    if emb:
        weights["emb"] = weights["model.embed_tokens.weight"][-NUM_VISUAL:][None].clone()
    torch.save(weights, folder / "mllm.pt")
    torch.save({key: value + 1 for key, value in unet.items()}, folder / "unet.pt")
    return weights


def write_t5(folder: Path, *, tied: bool) -> StateDict:
    """Flan-T5's layout (`tied` False: an output matrix of its own), with the duplicates that old files have."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 4), model_writer=model, model_type="unigram", vocab_size=40, hard_vocab_limit=False,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2, num_threads=1,
    )  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "spiece.model").write_bytes(model.getvalue())
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "T5Tokenizer",
            "extra_ids": 0,
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "pad_token": "<pad>",
        },
    )
    sizes = {
        "vocab_size": 48,
        "d_model": 16,
        "d_kv": 4,
        "d_ff": 24,
        "num_layers": 2,
        "num_heads": 4,
        "feed_forward_proj": "gated-gelu",
    }
    write_json(
        folder / "config.json", {"model_type": "t5", **sizes, "tie_word_embeddings": tied, "decoder_start_token_id": 0}
    )
    weights = random_like(T5ForConditionalGeneration(T5Config(**sizes)), 9)
    shared = {key: value for key, value in weights.items() if "embed_tokens" not in key and key != "lm_head.weight"}
    if not tied:
        shared["lm_head.weight"] = weights["lm_head.weight"]
    save_weights(
        folder, {**shared, "encoder.embed_tokens.weight": shared["shared.weight"].clone()}, layout="bin-sharded"
    )
    return shared


@pytest.fixture(scope="session")
def published_template(tmp_path_factory: pytest.TempPathFactory, pieces: bytes) -> Path:
    root = tmp_path_factory.mktemp("published")
    write_llava(root / "llava", pieces)
    write_clip(root / "clip")
    unet = write_diffusion(root / "sd", channels=8)["unet"]
    write_mgie(root / "mgie", unet)
    return root


@pytest.fixture
def published(tmp_path: Path, published_template: Path) -> Sources:
    """All four sources of a published MGIE, in tmp_path/in."""
    root = Path(shutil.copytree(published_template, tmp_path / "in"))
    return Sources(llava=root / "llava", clip=root / "clip", stable_diffusion=root / "sd", mgie=root / "mgie")


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory, published_template: Path) -> Bundle:
    """The bundle of `published`."""
    root = published_template
    sources = Sources(llava=root / "llava", clip=root / "clip", stable_diffusion=root / "sd", mgie=root / "mgie")
    return convert(tmp_path_factory.mktemp("converted") / "out", sources)


def assert_equal(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        assert got[key].dtype == value.dtype, key
        assert torch.equal(got[key], value), key


def files_of(bundle: Bundle, part: str) -> StateDict:
    """All tensors of a part, as stored."""
    return {key: value for path in (bundle.root / part).glob("*.safetensors") for key, value in load_file(path).items()}


def llama_tensors(llava: StateDict) -> StateDict:
    return {key: value for key, value in llava.items() if "inv_freq" not in key and "mm_projector" not in key}


# --- the recorded checkpoints ---------------------------------------------------------------------------------


def test_recorded_checkpoint_converts_to_equal_values_and_every_part_loads_strictly(
    reference_dir: Path, tmp_path: Path
) -> None:
    ref = reference_dir
    sources = Sources(
        llava=ref / "llava", clip=ref / "clip", stable_diffusion=ref / "stable-diffusion", mgie=ref / "mgie"
    )
    bundle = convert(tmp_path / "out", sources, name="recorded", trained=False)
    bundle.verify()
    shards = [torch.load(path, weights_only=True) for path in sorted((ref / "llava").glob("*.bin"))]
    llava = shards[0] | shards[1]
    mllm = torch.load(ref / "mgie" / "mllm.pt", weights_only=True)

    mgie = bundle.load_mgie()  # loads every part of this bundle
    expected = llama_tensors(llava) | {key: mllm[key] for key in ("model.embed_tokens.weight", "lm_head.weight")}
    assert_equal(mgie.mllm.llm.state_dict(), expected)
    assert_equal(
        mgie.mllm.projector.state_dict(), {key: llava[f"model.mm_projector.{key}"] for key in ("weight", "bias")}
    )
    assert_equal(
        mgie.edit_head.state_dict(), {key[10:]: value for key, value in mllm.items() if key.startswith("edit_head.")}
    )
    assert_equal(mgie.unet.state_dict(), torch.load(ref / "mgie" / "unet.pt", weights_only=True))
    assert_equal(
        mgie.vae.autoencoder.state_dict(),
        load_file(ref / "stable-diffusion" / "vae" / "diffusion_pytorch_model.safetensors"),
    )
    assert_equal(files_of(bundle, "vision"), load_file(ref / "clip" / "model.safetensors"))
    assert bundle.scheduler_config() == json.loads(
        (ref / "stable-diffusion" / "scheduler" / "scheduler_config.json").read_text()
    )
    assert bundle.load_clip_pixels().side_px == 56
    assert isinstance(bundle.load_conditioner(device="cpu"), MLLMConditioner)
    bundle.load_renderer(device="cpu")

    config = bundle.config
    assert (config.name, config.trained, config.num_visual_tokens, config.conditioner) == ("recorded", False, 8, "mllm")
    assert (config.work_area_px, config.multiple_px, config.vision_select_layer) == (64 * 64, 16, -2)
    assert config.dimensions["vocabulary"] == 611
    assert bundle.load_tokenizer().visual_ids == tuple(range(603, 611))


# --- combinations ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layout", ["bin-sharded", "bin", "safetensors-sharded", "safetensors", "legacy", "legacy-sharded"]
)
def test_every_weight_file_layout_gives_the_same_llava(tmp_path: Path, pieces: bytes, layout: str) -> None:
    llava = write_llava(tmp_path / "llava", pieces, layout=layout, dtype=torch.float16)
    clip = write_clip(tmp_path / "clip", layout=layout)
    bundle = convert(tmp_path / "out", Sources(llava=tmp_path / "llava", clip=tmp_path / "clip"))
    assert set(bundle.config.parts) == {"tokenizer", "vision", "projector", "llm"}
    assert bundle.config.num_visual_tokens == 0
    assert bundle.config.trained
    assert_equal(files_of(bundle, "llm"), llama_tensors(llava))
    assert_equal(files_of(bundle, "vision"), clip)
    mllm = bundle.load_mllm(bundle.load_tokenizer(), torch.float16)
    assert_equal(mllm.llm.state_dict(), llama_tensors(llava))
    assert json.loads((bundle.root / "llm" / "config.json").read_text())["dtype"] == "float16"


def test_a_whole_clip_gives_the_same_vision_tower_as_its_vision_model(tmp_path: Path, pieces: bytes) -> None:
    write_llava(tmp_path / "llava", pieces)
    expected = write_clip(tmp_path / "clip", whole=True, layout="bin")
    bundle = convert(tmp_path / "out", Sources(llava=tmp_path / "llava", clip=tmp_path / "clip"))
    assert_equal(files_of(bundle, "vision"), expected)
    tower = bundle.load_mllm(bundle.load_tokenizer()).vision
    assert tower(torch.zeros(1, 3, 28, 28)).shape == (1, 4, CLIP_DIM)


def test_a_vision_tower_saved_by_a_newer_library_is_the_same(tmp_path: Path, pieces: bytes) -> None:
    write_llava(tmp_path / "llava", pieces)
    expected = write_clip(tmp_path / "clip")
    stored = {key.removeprefix("vision_model."): value for key, value in expected.items()}
    save_file(stored, tmp_path / "clip" / "model.safetensors")
    bundle = convert(tmp_path / "out", Sources(llava=tmp_path / "llava", clip=tmp_path / "clip"))
    assert_equal(files_of(bundle, "vision"), expected)


def test_published_mgie_takes_rows_head_and_unet_from_the_mgie_folder(published: Sources, converted: Bundle) -> None:
    bundle = converted
    mllm = torch.load(published.mgie / "mllm.pt", weights_only=True)
    mgie = bundle.load_mgie()
    assert torch.equal(mgie.mllm.llm.get_input_embeddings().weight, mllm["model.embed_tokens.weight"])
    assert torch.equal(mgie.mllm.llm.lm_head.weight, mllm["lm_head.weight"])
    assert_equal(
        mgie.edit_head.state_dict(), {key[10:]: value for key, value in mllm.items() if key.startswith("edit_head.")}
    )
    assert_equal(mgie.unet.state_dict(), torch.load(published.mgie / "unet.pt", weights_only=True))
    assert bundle.config.trained
    assert bundle.config.num_visual_tokens == NUM_VISUAL
    assert bundle.config.work_area_px == 32 * 32  # sample size 8 x VAE factor 4
    assert bundle.config.multiple_px == 8  # VAE factor 4 x UNet factor 2


def test_legacy_vae_attention_names_are_read(converted: Bundle, tmp_path: Path) -> None:
    expected = write_diffusion(tmp_path / "other", channels=8)["vae"]
    assert_equal(converted.load_vae().autoencoder.state_dict(), expected)


def test_mllm_without_emb_is_fine(published: Sources, tmp_path: Path) -> None:
    shutil.rmtree(published.mgie)
    write_mgie(published.mgie, load_unet(published), emb=False)
    assert convert(tmp_path / "out", published).config.num_visual_tokens == NUM_VISUAL


def load_unet(sources: Sources) -> StateDict:
    return torch.load(sources.stable_diffusion / "unet" / "diffusion_pytorch_model.bin", weights_only=True)


def test_fresh_mgie_widens_the_unet_adds_rows_and_says_it_is_untrained(tmp_path: Path, pieces: bytes) -> None:
    llava = write_llava(tmp_path / "llava", pieces, dtype=torch.float16)
    write_clip(tmp_path / "clip")
    unet = write_diffusion(tmp_path / "sd", channels=4)["unet"]
    sources = Sources(llava=tmp_path / "llava", clip=tmp_path / "clip", stable_diffusion=tmp_path / "sd")
    bundle = convert(tmp_path / "out", sources, num_visual_tokens=5, seed=3)

    assert not bundle.config.trained
    assert any("untrained" in source for source in bundle.config.provenance.sources)
    assert bundle.load_tokenizer().visual_ids == (63, 64, 65, 66, 67)
    widened = bundle.load_unet().state_dict()
    assert widened["conv_in.weight"].shape == (8, 8, 3, 3)
    assert torch.equal(widened["conv_in.weight"][:, :4], unet["conv_in.weight"])
    assert not widened["conv_in.weight"][:, 4:].any()
    assert torch.equal(widened["conv_in.bias"], unet["conv_in.bias"])
    assert_equal(
        {k: v for k, v in widened.items() if k != "conv_in.weight"},
        {k: v for k, v in unet.items() if k != "conv_in.weight"},
    )
    llm = files_of(bundle, "llm")
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        assert llm[key].shape == (68, LLM_DIM)
        assert llm[key].dtype == torch.float16
        assert torch.equal(llm[key][:63], llava[key])
        assert len(llm[key][63:].unique(dim=0)) == 5  # the new tokens differ
    embeddings, head = (
        (llm[key][63:].float() - llava[key].float().mean(0)) / llava[key].float().std(0)
        for key in ("model.embed_tokens.weight", "lm_head.weight")
    )
    assert abs(torch.corrcoef(torch.stack([embeddings.flatten(), head.flatten()]))[0, 1]) < 0.5  # each its own noise
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        expected = EditHead(llm_dim=LLM_DIM, condition_dim=CONDITION_DIM)
    assert_equal(bundle.load_edit_head().state_dict(), expected.state_dict())
    assert expected.config["num_queries"] == bundle.config.dimensions["condition_tokens"] == 77

    again = convert(tmp_path / "again", sources, num_visual_tokens=5, seed=3, name="out")
    assert again.config == bundle.config  # sha256 of every file included: the seed decides all


def test_instruct_pix2pix_alone_becomes_a_text_bundle(tmp_path: Path) -> None:
    weights = write_diffusion(tmp_path / "sd", channels=8, words=True)
    bundle = convert(tmp_path / "out", Sources(stable_diffusion=tmp_path / "sd"))
    assert set(bundle.config.parts) == {"text_encoder", "unet", "vae", "scheduler"}
    assert bundle.config.conditioner == "text"
    assert_equal(bundle.load_unet().state_dict(), weights["unet"])
    assert_equal(bundle.load_vae().autoencoder.state_dict(), weights["vae"])
    assert_equal(files_of(bundle, "text_encoder"), weights["text_encoder"])
    conditioner = bundle.load_conditioner(device="cpu", dtype="float32")
    assert isinstance(conditioner, TextConditioner)
    bundle.load_renderer(device="cpu")


@pytest.mark.parametrize("tied", [False, True])
def test_t5_alone_gives_the_logits_of_its_source(tmp_path: Path, tied: bool) -> None:
    weights = write_t5(tmp_path / "t5", tied=tied)
    bundle = convert(tmp_path / "out", Sources(summarizer=tmp_path / "t5"), max_shard_bytes=3000)
    assert bundle.config.parts == ("summarizer",)
    assert_equal(files_of(bundle, "summarizer"), weights)
    model, tokenizer = bundle.load_summarizer(device="cpu", dtype="float32")
    config = T5Config.from_dict(json.loads((tmp_path / "t5" / "config.json").read_text()))
    source = T5ForConditionalGeneration(config).eval()
    output = weights["shared.weight"] if tied else weights["lm_head.weight"]
    embed = dict.fromkeys(("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"), weights["shared.weight"])
    # Not tied by transformers here: each matrix is set by itself.
    source.lm_head.weight = nn.Parameter(output.clone())
    source.load_state_dict(weights | embed | {"lm_head.weight": output})
    ids = torch.tensor([tokenizer("make it night").input_ids])
    assert ids[0, -1] == 1
    start = torch.zeros(1, 1, dtype=torch.long)
    with torch.inference_mode():
        got, expected = (net(input_ids=ids, decoder_input_ids=start).logits for net in (model, source))
    torch.testing.assert_close(
        got, expected, rtol=1e-5, atol=1e-7
    )  # one file is mapped, the other is not: other kernels


def test_a_summarizer_goes_beside_another_model(tmp_path: Path, pieces: bytes) -> None:
    write_llava(tmp_path / "llava", pieces)
    write_clip(tmp_path / "clip")
    write_t5(tmp_path / "t5", tied=False)
    bundle = convert(
        tmp_path / "out", Sources(llava=tmp_path / "llava", clip=tmp_path / "clip", summarizer=tmp_path / "t5")
    )
    assert set(bundle.config.parts) == {"tokenizer", "vision", "projector", "llm", "summarizer"}
    bundle.load_summarizer(device="cpu")


# --- how it is written ----------------------------------------------------------------------------------------


def test_large_parts_are_written_in_shards_that_transformers_loads(
    published: Sources, converted: Bundle, tmp_path: Path
) -> None:
    limit = 10_000
    bundle, whole = convert(tmp_path / "out", published, max_shard_bytes=limit), converted
    shards = sorted((bundle.root / "llm").glob("model-*.safetensors"))
    assert len(shards) > 3
    assert [path.name for path in shards] == [
        f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)
    ]
    for path in shards:
        tensors = load_file(path)
        assert len(tensors) == 1 or sum(value.nbytes for value in tensors.values()) <= limit
    assert_equal(files_of(bundle, "llm"), files_of(whole, "llm"))
    assert_equal(bundle.load_mgie().mllm.state_dict(), whole.load_mgie().mllm.state_dict())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_another_dtype_is_a_plain_cast(published: Sources, converted: Bundle, tmp_path: Path, dtype: str) -> None:
    cast = convert(tmp_path / "cast", published, dtype=dtype)
    for part in ("llm", "unet", "vae", "vision", "projector", "edit_head"):
        kept = files_of(converted, part)
        assert_equal(files_of(cast, part), {key: value.to(getattr(torch, dtype)) for key, value in kept.items()})
    cast.load_mgie()


def test_the_bundle_names_no_machine_path(published_template: Path, converted: Bundle) -> None:
    for path in converted.root.rglob("*.json"):
        text = path.read_text()
        assert str(published_template) not in text, path
        assert "/home/someone" not in text, path


def test_progress_ends_at_its_total(published: Sources, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    convert(tmp_path / "out", published, progress=lambda done, total: calls.append((done, total)))
    assert calls == sorted(calls)
    assert calls[-1][0] == calls[-1][1] > 100_000


def test_new_rows_stay_near_the_mean_and_leave_old_rows_alone() -> None:
    weight = torch.randn(500, 64, generator=torch.Generator().manual_seed(0)) * 3 + 1
    grown = append_token_rows(weight, num_rows=2000, seed=5)
    assert torch.equal(grown[:500], weight)
    new = grown[500:]
    torch.testing.assert_close(new.mean(0), weight.mean(0), rtol=0, atol=0.05)
    torch.testing.assert_close(new.std(0), 0.1 * weight.std(0), rtol=0.1, atol=0)
    assert torch.equal(append_token_rows(weight, num_rows=2000, seed=5), grown)
    assert not torch.equal(append_token_rows(weight, num_rows=2000, seed=6)[500:], new)


def test_a_header_is_padded_and_its_offsets_end_at_the_end_of_the_file(converted: Bundle) -> None:
    content = (converted.root / "llm" / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    assert length % 8 == 0
    header = json.loads(content[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt"}
    assert len(content) == 8 + length + max(entry["data_offsets"][1] for entry in header.values())


# --- refusals -------------------------------------------------------------------------------------------------


class Runs:
    """A pickle of this calls `touch`."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return (Path.touch, (self.target,))


@pytest.mark.parametrize("form", ["zip", "legacy", "plain"])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(
    published: Sources, tmp_path: Path, form: str
) -> None:
    target = tmp_path / "was-here"
    content = {"edit_head.query": Runs(target)}
    if form == "plain":
        (published.mgie / "mllm.pt").write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, published.mgie / "mllm.pt", _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(ConversionError, match=r"mgie/mllm.pt is (refused: its pickle calls|damaged)"):
        convert(tmp_path / "out", published)
    assert not target.exists()
    torch.load(published.mgie / "mllm.pt", weights_only=False) if form != "plain" else pickle.loads(
        pickle.dumps(content, protocol=2)
    )
    assert target.exists()  # the trap was a real one


def edit_json(path: Path, **changes: Any) -> None:
    data = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not ...}))


def edit_pickle(path: Path, **changes: Any) -> None:
    data = torch.load(path, weights_only=True) | changes
    torch.save({key: value for key, value in data.items() if value is not ...}, path)


def second_shard(sources: Sources) -> Path:
    return sources.llava / "pytorch_model-00002-of-00002.bin"


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


WEIGHT = torch.zeros(2, 2)
FAULTS: dict[str, tuple[Callable[[Sources], object], str]] = {
    "no config": (lambda s: (s.llava / "config.json").unlink(), r"llava lacks config\.json"),
    "no tokenizer": (
        lambda s: [(s.llava / name).unlink() for name in ("tokenizer.model", "added_tokens.json")],
        r"llava lacks tokenizer\.model, added_tokens\.json",
    ),
    "broken config": (lambda s: (s.llava / "config.json").write_text("{"), r"llava/config\.json cannot be read"),
    "list as config": (lambda s: (s.llava / "config.json").write_text("[]"), r"holds a list; it must be an object"),
    "no preprocessor": (lambda s: (s.clip / "preprocessor_config.json").unlink(), r"clip lacks preprocessor_config\.json"),
    "no weights": (lambda s: (s.clip / "model.safetensors").unlink(), r"clip has no weights; looked for model\.safetensors"),
    "no mllm.pt": (lambda s: (s.mgie / "mllm.pt").unlink(), r"mgie lacks mllm\.pt$"),
    "several": (
        lambda s: [(s.mgie / "mllm.pt").unlink(), (s.llava / "config.json").unlink(), shutil.rmtree(s.clip)],
        r"llava lacks config\.json; .*clip is not a folder; .*mgie lacks mllm\.pt$",
    ),
    "no unet.pt": (lambda s: (s.mgie / "unet.pt").unlink(), r"mgie lacks unet\.pt"),
    "no folder": (lambda s: shutil.rmtree(s.stable_diffusion), r"sd is not a folder"),
    "no scheduler": (lambda s: shutil.rmtree(s.stable_diffusion / "scheduler"), r"sd lacks scheduler/scheduler_config\.json"),
    "missing shard": (lambda s: second_shard(s).unlink(), r"llava lacks pytorch_model-00002-of-00002\.bin"),
    "truncated shard": (lambda s: truncate(second_shard(s)), r"llava/pytorch_model-00002-of-00002\.bin is damaged"),
    "empty shard": (lambda s: second_shard(s).write_bytes(b""), r"llava/pytorch_model-00002-of-00002\.bin is damaged"),
    "garbage shard": (lambda s: second_shard(s).write_bytes(b"garbage" * 99), r"pytorch_model-00002-of-00002\.bin is damaged"),
    "truncated safetensors": (lambda s: truncate(s.clip / "model.safetensors"), r"clip/model\.safetensors is damaged"),
    "shard elsewhere": (
        lambda s: edit_json(s.llava / "pytorch_model.bin.index.json", weight_map={"a": "../../etc/x.bin"}),
        r"lists '\.\./\.\./etc/x\.bin'; shards must lie beside it",
    ),
    "index without map": (lambda s: edit_json(s.llava / "pytorch_model.bin.index.json", weight_map=...), r"has no weight_map"),
    "missing key": (
        lambda s: edit_pickle(second_shard(s), **{"model.norm.weight": ..., "model.layers.1.mlp.up_proj.weight": ...}),
        r"llava does not fit: model\.layers\.1\.mlp\.up_proj\.weight is missing; model\.norm\.weight is missing$",
    ),
    "extra key": (lambda s: edit_pickle(second_shard(s), surprise=WEIGHT), r"llava does not fit: surprise is unexpected$"),
    "doubled key": (
        lambda s: edit_pickle(second_shard(s), **{"lm_head.weight": WEIGHT}),
        r"lm_head\.weight is in both pytorch_model-00001-of-00002\.bin and pytorch_model-00002-of-00002\.bin",
    ),
    "wrong size": (
        lambda s: edit_pickle(second_shard(s), **{"model.norm.weight": torch.ones(31)}),
        r"llava does not fit: model\.norm\.weight has shape \(31,\), not \(32,\)$",
    ),
    "not tensors": (lambda s: torch.save({"state_dict": {}}, second_shard(s)), r"is not a plain state dict"),
    "vocabulary": (
        lambda s: edit_json(s.llava / "config.json", vocab_size=64),
        r"tokenizer in llava has 63 tokens; its config\.json says 64",
    ),
    "added tokens": (lambda s: edit_json(s.llava / "added_tokens.json", **{"[PAD]": 63}), r"llava: added tokens .*\[PAD\]"),
    "another model": (lambda s: edit_json(s.llava / "config.json", model_type="llama"), r"model_type 'llama' must be 'llava'"),
    "no start and end": (lambda s: edit_json(s.llava / "config.json", mm_use_im_start_end=False), r"mm_use_im_start_end is false"),
    "no sizes": (lambda s: edit_json(s.llava / "config.json", num_hidden_layers=...), r"config\.json lacks num_hidden_layers"),
    "select layer": (lambda s: edit_json(s.llava / "config.json", mm_vision_select_layer=-9), r"-9; clip has 4 hidden states"),
    "projector": (
        lambda s: edit_pickle(second_shard(s), **{"model.mm_projector.weight": torch.zeros(LLM_DIM, 20)}),
        r"projector in llava maps 20 -> 32; vision tower \(clip\) and LLM need 16 -> 32",
    ),
    "not a clip": (lambda s: edit_json(s.clip / "config.json", model_type="siglip"), r"clip: model_type is 'siglip'"),
    "crop size": (lambda s: edit_json(s.clip / "preprocessor_config.json", crop_size=30), r"crops to 30 px; the model takes 28 px"),
    "emb": (lambda s: edit_pickle(s.mgie / "mllm.pt", emb=torch.zeros(1, NUM_VISUAL, LLM_DIM)), r"`emb` .* is not the last 4 rows"),
    "emb size": (lambda s: edit_pickle(s.mgie / "mllm.pt", emb=torch.zeros(1, 3, LLM_DIM)), r"`emb` .* is not the last 4 rows"),
    "rows": (
        lambda s: edit_pickle(s.mgie / "mllm.pt", **dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), torch.zeros(63, LLM_DIM))),
        r"mllm\.pt has 63 token rows; the tokenizer in llava alone has 63",
    ),
    "uneven rows": (
        lambda s: edit_pickle(s.mgie / "mllm.pt", **{"lm_head.weight": torch.zeros(66, LLM_DIM)}),
        r"mgie/mllm\.pt does not fit: lm_head\.weight has shape \(66, 32\), not \(67, 32\)",
    ),
    "no rows": (
        lambda s: edit_pickle(s.mgie / "mllm.pt", **{"model.embed_tokens.weight": ...}),
        r"model\.embed_tokens\.weight is missing",
    ),
    "no head": (lambda s: edit_pickle(s.mgie / "mllm.pt", **{"edit_head.query": ...}), r"the edit head in mgie/mllm\.pt cannot be used"),
    "head size": (
        lambda s: edit_pickle(s.mgie / "mllm.pt", **{"edit_head.llm2hid.weight": torch.zeros(16, 31)}),
        r"edit head in mgie/mllm\.pt maps 31 -> 24; LLM and UNet need 32 -> 24",
    ),
    "head key": (lambda s: edit_pickle(s.mgie / "mllm.pt", **{"edit_head.hid2feat.bias": ...}), r"edit_head\.hid2feat\.bias is missing"),
    "unet channels": (
        lambda s: edit_pickle(s.mgie / "unet.pt", **{"conv_in.weight": torch.zeros(8, 9, 3, 3)}),
        r"UNet in mgie/unet\.pt takes 9 input channels; it must take 8",
    ),
    "unet key": (lambda s: edit_pickle(s.mgie / "unet.pt", **{"conv_out.bias": ...}), r"mgie/unet\.pt does not fit: conv_out\.bias is missing"),
    "no conv_in": (lambda s: edit_pickle(s.mgie / "unet.pt", **{"conv_in.weight": ...}), r"takes \? input channels"),
    "vae key": (
        lambda s: edit_pickle(s.stable_diffusion / "vae" / "diffusion_pytorch_model.bin", **{"quant_conv.bias": ...}),
        r"vae/diffusion_pytorch_model\.bin does not fit: quant_conv\.bias is missing",
    ),
    "no working size": (
        lambda s: edit_json(s.stable_diffusion / "unet" / "config.json", sample_size=None),
        r"sd/unet/config\.json has no sample_size",
    ),
    "vae config": (
        lambda s: edit_json(s.stable_diffusion / "vae" / "config.json", down_block_types=["Nonsense"]),
        r"the configuration of vae cannot be used",
    ),
    "prediction type": (
        lambda s: edit_json(s.stable_diffusion / "scheduler" / "scheduler_config.json", prediction_type="flow"),
        r"sd/scheduler does not describe a noise schedule: prediction type is 'flow'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_a_source_is_named_and_nothing_is_left_behind(
    published: Sources, tmp_path: Path, fault: str
) -> None:
    plant, message = FAULTS[fault]
    plant(published)
    with pytest.raises(ConversionError, match=message):
        convert(tmp_path / "out", published)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_summarizer_that_is_no_t5_is_refused(tmp_path: Path) -> None:
    write_t5(tmp_path / "t5", tied=False)
    edit_json(tmp_path / "t5" / "config.json", model_type="bart")
    with pytest.raises(ConversionError, match="summarizer: model_type is 'bart'; it must be 't5'"):
        convert(tmp_path / "out", Sources(summarizer=tmp_path / "t5"))


def test_many_problems_are_cut_off_with_their_number(published: Sources, tmp_path: Path) -> None:
    edit_pickle(second_shard(published), **{f"extra{i}": WEIGHT for i in range(50)})
    with pytest.raises(ConversionError, match=r"extra19 is unexpected; and 30 more$"):
        convert(tmp_path / "out", published)


@pytest.mark.parametrize(
    "given",
    [(), ("llava",), ("clip",), ("mgie",), ("llava", "mgie"), ("llava", "clip", "mgie"), ("clip", "stable_diffusion")],
)
def test_a_combination_that_makes_no_bundle_is_refused(tmp_path: Path, given: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="sources given: "):
        convert(tmp_path / "out", Sources(**{name: tmp_path / name for name in given}))


def test_stable_diffusion_itself_is_no_editor(tmp_path: Path) -> None:
    write_diffusion(tmp_path / "sd", channels=4, words=True)
    with pytest.raises(
        ConversionError, match=r"takes 4 input channels; it must take 8: give the folder of InstructPix2Pix"
    ):
        convert(tmp_path / "out", Sources(stable_diffusion=tmp_path / "sd"))


def test_settings_that_do_not_fit_are_refused(published: Sources, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="fresh MGIE only"):
        convert(tmp_path / "out", published, num_visual_tokens=8)
    fresh = Sources(llava=published.llava, clip=published.clip, stable_diffusion=published.stable_diffusion)
    with pytest.raises(ConfigError, match="num_visual_tokens is 0"):
        convert(tmp_path / "out", fresh, num_visual_tokens=0)
    with pytest.raises(ConfigError, match="T5 overflows"):
        convert(tmp_path / "out", Sources(summarizer=tmp_path), dtype="float16")


def test_values_too_large_for_the_dtype_are_refused_and_nothing_is_left(published: Sources, tmp_path: Path) -> None:
    edit_pickle(second_shard(published), **{"model.norm.weight": torch.full((LLM_DIM,), 1e5)})
    with pytest.raises(ConversionError, match=r"model\.norm\.weight has values that are too large for torch\.float16"):
        convert(tmp_path / "out", published, dtype="float16")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_full_disk_is_noticed_before_anything_is_written(
    published: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(100, 99, 2**20))
    with pytest.raises(ConversionError, match=r"has 0\.00 GB free; the bundle needs 0\.02 GB"):
        convert(tmp_path / "deep" / "er" / "out", published)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_disk_that_fills_up_on_the_way_leaves_nothing(published: Sources, tmp_path: Path) -> None:
    def fail(done: int, total: int) -> None:
        if done > total // 2:
            raise OSError(28, "No space left on device")

    with pytest.raises(ConversionError, match="No space left on device"):
        convert(tmp_path / "out", published, progress=fail)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_out_that_exists_is_replaced_only_if_asked_and_a_bundle(
    published: Sources, converted: Bundle, tmp_path: Path
) -> None:
    shutil.copytree(converted.root, tmp_path / "out")
    with pytest.raises(BundleError, match="exists"):
        convert(tmp_path / "out", published)
    second = convert(tmp_path / "out", published, name="second", replace=True)
    assert second.config.name == "second"
    assert second.config.files == converted.config.files
    with pytest.raises(BundleError, match="is not a bundle"):
        convert(published.llava, published, replace=True)
    assert (published.llava / "config.json").exists()
