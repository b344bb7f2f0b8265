"""Published weights -> bundle: which folders make which bundle, and how their files are laid out.

    llava/             config.json (`model_type: llava`), tokenizer.model, added_tokens.json, weights
    clip/              config.json, preprocessor_config.json, weights (a whole CLIP or its vision tower)
    stable-diffusion/  diffusers layout: unet/ vae/ scheduler/, for InstructPix2Pix alone text_encoder/ tokenizer/
    mgie/              mllm.pt, unet.pt
    t5/                transformers layout with its tokenizer

Weights are `.safetensors` or torch pickles, whole or in shards; pickles are read with `weights_only`, so
nothing in them runs. Everything is checked before anything is written. Tensors then go from file to file one
by one: the anonymous memory needed is about one tensor (one shard for pickles older than torch 1.6, which
cannot be mapped; UNet and VAE, small beside an LLM, as a whole when they are cast to another dtype). Values and dtypes are kept unless another dtype is asked for.

Knows nothing of how bundles are loaded (`bundle.py`).
"""

import functools
import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from huggingface_hub.errors import StrictDataclassError
from jaxtyping import Float
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from mgie.bundle.bundle import Bundle
from mgie.bundle.devices import DTYPES
from mgie.bundle.record import PART_CONFIG_FILE, PREPROCESSOR_FILE, SCHEDULER_FILE, read_json
from mgie.bundle.weights import Report, TensorPlan, Weights, list_misfits, read_weights, write_sharded
from mgie.bundle.writer import BundleWriter
from mgie.config import BundleConfig, KeptDtype, Part, Provenance, Sources, check_choice
from mgie.errors import BundleError, ConfigError, ConversionError
from mgie.images.pixels import ClipPixels
from mgie.model.diffusion import NoiseSchedule, widen_input
from mgie.model.edit_head import EditHead
from mgie.model.tokens import ADDED_FILE, IMAGE_TOKENS, MODEL_FILE, Tokenizer

Progress = Callable[[int, int], None]
_Write = Callable[[BundleWriter, Report], None]

DEFAULT_NUM_VISUAL_TOKENS = 8  # the paper's N: fewer than 4 hurt, more than 8 do not help
DEFAULT_SHARD_BYTES = 2 * 10**9

_EMBEDDINGS, _LM_HEAD, _CONV_IN = "model.embed_tokens.weight", "lm_head.weight", "conv_in.weight"
_PROJECTOR, _EDIT_HEAD = "model.mm_projector.", "edit_head."
_MLLM_FILE, _UNET_FILE = "mllm.pt", "unet.pt"
_read_json = functools.partial(read_json, failure=ConversionError)

# The only keys that a source may have beside those that its model needs.
_TOLERATED: dict[Part, tuple[str, ...]] = {
    "llm": (r"\.rotary_emb\.inv_freq$",),  # a buffer that follows from the configuration
    "vision": (
        r"\.position_ids$",  # a buffer: 0, 1, 2, ...
        r"^(text_model\.|text_projection\.|visual_projection\.|logit_scale$)",  # the other half of a whole CLIP
    ),
    "text_encoder": (r"\.position_ids$",),
    "summarizer": (
        r"^(encoder|decoder)\.embed_tokens\.weight$",  # copies of shared.weight
        r"^decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight$",  # old T5; never used
    ),
}
# Attention of a VAE written by diffusers before 0.18 (2023), as Stable Diffusion's is.
_LEGACY_VAE_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}

_LICENCES = {
    "llava": "LLaVA-7B-v1, Vicuna, LLaMA: LLaMA licence, non-commercial research only; check with the source",
    "clip": "CLIP: MIT; see its model card",
    "stable_diffusion": "Stable Diffusion 1.5 and models made from it: CreativeML OpenRAIL-M, use restrictions are passed on",
    "mgie": "MGIE: CC BY-NC for the weight differences, non-commercial",
    "summarizer": "summarizer: see its model card (Flan-T5: Apache-2.0)",
}
_MAX_LISTED = 20  # problems named in one message


def convert(
    out: Path,
    sources: Sources,
    *,
    name: str | None = None,
    replace: bool = False,
    trained: bool | None = None,
    num_visual_tokens: int | None = None,
    seed: int = 0,
    dtype: KeptDtype = "keep",
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Progress | None = None,
) -> Bundle:
    """Writes a bundle made from published weights. On an error nothing is left at `out`.

    Args:
        out: The bundle's folder; must not exist, unless `replace` and it is a bundle.
        sources: The folders to read; they stay as they are.
        name: Short name of the bundle; None = the name of `out`.
        trained: Whether the weights are trained; None = yes, except for a fresh MGIE (its edit head is not).
        num_visual_tokens: N of a fresh MGIE, 1 or more (None = 8). The published one has its own.
        seed: Seed of what a fresh MGIE draws: new token rows and edit head.
        dtype: Number format of the weights written; `keep` = as in the sources.
        max_shard_bytes: Upper size of one file of a large part (a larger tensor gets a file of its own).
        progress: Called with (bytes written, bytes in all) as the work goes on.

    Raises:
        ConfigError: The sources are no combination that makes a bundle, or a setting does not fit them.
        ConversionError: A file is missing, unreadable or refused; keys are missing or unexpected; sizes do not
            fit; the disk is too full.
        BundleError: `out` is taken.
    """
    _check_combination(sources)
    is_fresh = sources.llava is not None and sources.stable_diffusion is not None and sources.mgie is None
    if num_visual_tokens is not None and not is_fresh:
        raise ConfigError("num_visual_tokens can be chosen for a fresh MGIE only", param="num_visual_tokens")
    if num_visual_tokens is not None and num_visual_tokens < 1:
        raise ConfigError(f"num_visual_tokens is {num_visual_tokens}; it must be 1 or more", param="num_visual_tokens")
    check_choice("dtype", dtype, ("keep", *DTYPES))
    if dtype == "float16" and sources.summarizer is not None:
        raise ConfigError("dtype is float16; T5 overflows in it: use keep, bfloat16 or float32", param="dtype")
    conversion = _Conversion(dtype=DTYPES.get(dtype), max_shard_bytes=max_shard_bytes, seed=seed)
    try:
        conversion.plan(sources, num_visual_tokens or DEFAULT_NUM_VISUAL_TOKENS)
        _check_space(out, conversion.num_bytes)
        config = BundleConfig(
            name=name or out.resolve().name,
            parts=tuple(conversion.parts),
            trained=not is_fresh if trained is None else trained,
            provenance=Provenance(
                made_by="mgie convert",
                sources=tuple(f"{field}: {path.resolve().name}" for field, path in sources.given().items())
                + (("edit head and visual token rows: random, untrained",) if is_fresh else ()),
                licences=tuple(_LICENCES[field] for field in sources.given()),
            ),
            conditioner="text" if "text_encoder" in conversion.parts else "mllm",
            dimensions=conversion.dimensions,
            **conversion.settings,
        )
        with BundleWriter(out, config, replace=replace) as writer:
            done = 0

            def report(num_bytes: int) -> None:
                nonlocal done
                done += num_bytes
                if progress is not None:
                    progress(done, conversion.num_bytes)

            for write in conversion.parts.values():
                write(writer, report)
    except OSError as error:
        raise ConversionError(f"cannot convert to {out}: {error}") from error
    return Bundle(out)


class _Conversion:
    """What will be written: gathered and checked by `plan`, which writes nothing."""

    def __init__(self, *, dtype: torch.dtype | None, max_shard_bytes: int, seed: int) -> None:
        self._dtype, self._max_shard_bytes, self._seed = dtype, max_shard_bytes, seed
        self.parts: dict[Part, _Write] = {}
        self.num_bytes = 0
        self.dimensions: dict[str, int] = {}
        self.settings: dict[str, Any] = {}

    def plan(self, sources: Sources, num_visual_tokens: int) -> None:
        """Reads the layouts and checks that all fits together; fills `parts`."""
        _check_files(sources)
        condition_dim: int | None = None
        if sources.stable_diffusion is not None:
            condition_dim = self._diffusion(sources.stable_diffusion, sources)
            if sources.llava is None:
                self._text_encoder(sources.stable_diffusion, condition_dim)
        if sources.llava is not None and sources.clip is not None:
            self._llava(sources.llava, sources.clip, sources.mgie, condition_dim, num_visual_tokens)
        if sources.summarizer is not None:
            self._summarizer(sources.summarizer)

    def _diffusion(self, folder: Path, sources: Sources) -> int:
        """Plans `unet`, `vae` and `scheduler`; returns the width C of the condition."""
        vae_config, scheduler = (
            _read_json(folder / "vae" / PART_CONFIG_FILE),
            _read_json(folder / "scheduler" / SCHEDULER_FILE),
        )
        try:
            NoiseSchedule(scheduler)
        except (BundleError, TypeError, ValueError, NotImplementedError) as error:
            raise ConversionError(f"{folder.name}/scheduler does not describe a noise schedule: {error}") from error
        vae_weights = Weights.find(folder / "vae")
        vae_weights.rename(_modern_vae_name)
        vae = _on_meta(AutoencoderKL.from_config, vae_config, "vae")
        self._module("vae", vae, vae_weights, lambda module: module)

        if sources.mgie is not None:
            unet_weights = Weights([sources.mgie / _UNET_FILE])
        else:
            unet_weights = Weights.find(folder / "unet")
        latents = int(vae.config.latent_channels)
        channels = unet_weights.shape(_CONV_IN)[1:2]
        # Stable Diffusion's own UNet takes noisy latents only; it is widened where it will be trained.
        allowed = [2 * latents] if sources.mgie is not None or sources.llava is None else [latents, 2 * latents]
        if not channels or channels[0] not in allowed:
            raise ConversionError(
                f"the UNet in {unet_weights.label} takes {channels[0] if channels else '?'} input channels; "
                f"it must take {' or '.join(map(str, allowed))}"
                + ("" if sources.llava is not None else ": give the folder of InstructPix2Pix, not of Stable Diffusion")
            )
        unet_config = _read_json(folder / "unet" / PART_CONFIG_FILE) | {"in_channels": channels[0]}
        unet = _on_meta(UNet2DConditionModel.from_config, unet_config, "unet")
        if unet.config.out_channels != latents:
            raise ConversionError(f"the UNet gives {unet.config.out_channels} channels; the VAE has {latents}")
        if not isinstance(unet.config.cross_attention_dim, int):
            raise ConversionError(
                f"unet: cross_attention_dim is {unet.config.cross_attention_dim}; it must be one number"
            )
        self._module("unet", unet, unet_weights, lambda module: widen_input(module, 2 * latents))
        self.parts["scheduler"] = lambda writer, _report: writer.add_scheduler(scheduler)

        side = unet.config.sample_size
        if side is None:
            raise ConversionError(
                f"{folder.name}/unet/{PART_CONFIG_FILE} has no sample_size, which says at what size the model works"
            )
        height, width = (side, side) if isinstance(side, int) else side
        vae_factor: int = 2 ** (len(vae.config.block_out_channels) - 1)
        unet_factor: int = 2 ** (len(unet.config.block_out_channels) - 1)
        condition_dim: int = unet.config.cross_attention_dim
        self.settings |= {"work_area_px": height * width * vae_factor**2, "multiple_px": vae_factor * unet_factor}
        self.dimensions |= {"latent_channels": latents, "condition_dim": condition_dim}
        return condition_dim

    def _text_encoder(self, folder: Path, condition_dim: int) -> None:
        """Plans `text_encoder`: InstructPix2Pix's own conditioner."""
        encoder, words = folder / "text_encoder", folder / "tokenizer"
        config = _model_config(CLIPTextConfig, _read_json(encoder / PART_CONFIG_FILE), "text_encoder")
        if config.hidden_size != condition_dim:
            raise ConversionError(f"the text encoder is {config.hidden_size} wide; the UNet reads {condition_dim}")
        expected = _prefixed(_expected(CLIPTextModel, config, "text_encoder"), "text_model.")
        tensors = self._match("text_encoder", Weights.find(encoder, prefix="text_model."), expected)
        tokenizer = _load_tokenizer(CLIPTokenizer, words)
        if len(tokenizer) != config.vocab_size:
            raise ConversionError(f"{words.name} has {len(tokenizer)} tokens; the text encoder has {config.vocab_size}")
        self._stream("text_encoder", tensors, _config_json(config, CLIPTextModel, tensors), tokenizer)
        self.dimensions["condition_tokens"] = config.max_position_embeddings

    def _summarizer(self, folder: Path) -> None:
        """Plans `summarizer`."""
        data = _read_json(folder / PART_CONFIG_FILE)
        config = _model_config(T5Config, data, "summarizer")
        expected = _expected(T5ForConditionalGeneration, config, "summarizer")
        # Both stacks read shared.weight. The output layer is a matrix of its own in Flan-T5, in the first T5 it is
        # shared.weight too. transformers 5 calls both "tied" and goes by what is in the file, so it is kept if there.
        expected = {key: shape for key, shape in expected.items() if not key.endswith(".embed_tokens.weight")}
        weights = Weights.find(folder)
        if data.get("tie_word_embeddings", True) and _LM_HEAD not in weights.specs:
            del expected[_LM_HEAD]
        tensors = self._match("summarizer", weights, expected)
        tokenizer = _load_tokenizer(AutoTokenizer, folder)
        # The configuration goes over as it is: transformers 5 would write tie_word_embeddings = true for every T5.
        written = {key: value for key, value in data.items() if key not in ("_name_or_path", "auto_map", "torch_dtype")}
        self._stream("summarizer", tensors, written | {"dtype": _dtype_name(tensors)}, tokenizer)

    def _llava(self, llava: Path, clip: Path, mgie: Path | None, condition_dim: int | None, num_new: int) -> None:
        """Plans `tokenizer`, `vision`, `projector`, `llm`, and `edit_head` where there is a UNet to condition."""
        data = _read_json(llava / PART_CONFIG_FILE)
        config = _llama_config(data, llava.name)
        try:
            tokenizer = Tokenizer.load(llava)
        except BundleError as error:
            raise ConversionError(f"{llava.name}: {error}") from error
        if tokenizer.vocab_size != config.vocab_size:
            raise ConversionError(
                f"the tokenizer in {llava.name} has {tokenizer.vocab_size} tokens; its {PART_CONFIG_FILE} says {config.vocab_size}"
            )
        vision_width = self._vision(clip, select_layer=data.get("mm_vision_select_layer", -2))
        expected = _expected(LlamaForCausalLM, config, "llm")
        projector = {"weight": (config.hidden_size, vision_width), "bias": (config.hidden_size,)}
        weights = Weights.find(llava)
        if (shape := weights.shape(f"{_PROJECTOR}weight")) not in ((), projector["weight"]):
            raise ConversionError(
                f"the projector in {llava.name} maps {shape[-1]} -> {shape[0]}; "
                f"vision tower ({clip.name}) and LLM need {vision_width} -> {config.hidden_size}"
            )
        tensors = self._match("llm", weights, expected | {_PROJECTOR + key: size for key, size in projector.items()})
        self._stream("projector", _under(_PROJECTOR, tensors), None)
        tensors = [tensor for tensor in tensors if not tensor.name.startswith(_PROJECTOR)]

        if mgie is not None and condition_dim is not None:
            new_rows = self._published_mgie(mgie, config.hidden_size, condition_dim)
            num_plain = tokenizer.num_pieces + len(IMAGE_TOKENS)
            num_visual_tokens = new_rows[0].shape[0] - num_plain
            if num_visual_tokens < 1:
                raise ConversionError(
                    f"{_MLLM_FILE} has {new_rows[0].shape[0]} token rows; the tokenizer in {llava.name} alone has "
                    f"{num_plain}, and the visual tokens come after them"
                )
            self._check_emb(mgie / _MLLM_FILE, num_visual_tokens)
            tensors = new_rows + [tensor for tensor in tensors if tensor.name not in (_EMBEDDINGS, _LM_HEAD)]
        elif condition_dim is not None:
            if tokenizer.visual_ids:
                raise ConversionError(f"{llava.name} has visual tokens already; give a plain LLaVA to start from")
            num_visual_tokens = num_new
            tensors = [self._with_new_rows(tensor, num_new) for tensor in tensors]
            self._fresh_edit_head(config.hidden_size, condition_dim)
        else:
            num_visual_tokens = len(tokenizer.visual_ids)
        tokenizer = tokenizer.with_visual_tokens(num_visual_tokens)
        config.vocab_size = tokenizer.vocab_size
        self._stream("llm", tensors, _config_json(config, LlamaForCausalLM, tensors))
        self.parts["tokenizer"] = lambda writer, _report: writer.add_tokenizer(tokenizer)
        self.settings["num_visual_tokens"] = num_visual_tokens
        self.dimensions |= {
            "llm_hidden": config.hidden_size,
            "llm_layers": config.num_hidden_layers,
            "vocabulary": config.vocab_size,
            "max_positions": config.max_position_embeddings,
        }

    def _vision(self, clip: Path, *, select_layer: Any) -> int:
        """Plans `vision`; returns its width."""
        data, pixels = _read_json(clip / PART_CONFIG_FILE), _read_json(clip / PREPROCESSOR_FILE)
        if data.get("model_type") == "clip":
            config = _model_config(CLIPConfig, data, clip.name).vision_config
        elif data.get("model_type") == "clip_vision_model":
            config = _model_config(CLIPVisionConfig, data, clip.name)
        else:
            raise ConversionError(
                f"{clip.name}: model_type is {data.get('model_type')!r}; it must be clip or clip_vision_model"
            )
        try:
            side_px = ClipPixels(pixels).side_px
        except (ConfigError, TypeError, KeyError, ValueError) as error:
            raise ConversionError(f"{clip.name}/{PREPROCESSOR_FILE} cannot be used: {error}") from error
        if side_px != config.image_size:
            raise ConversionError(
                f"{clip.name}/{PREPROCESSOR_FILE} crops to {side_px} px; the model takes {config.image_size} px"
            )
        num_states = config.num_hidden_layers + 1
        if not isinstance(select_layer, int) or not -num_states <= select_layer < num_states:
            raise ConversionError(
                f"mm_vision_select_layer is {select_layer}; {clip.name} has {num_states} hidden states"
            )
        expected = _prefixed(_expected(CLIPVisionModel, config, "vision"), "vision_model.")
        tensors = self._match("vision", Weights.find(clip, prefix="vision_model."), expected)
        self._stream("vision", tensors, _config_json(config, CLIPVisionModel, tensors))
        add_weights = self.parts["vision"]

        def write(writer: BundleWriter, report: Report) -> None:
            writer.add_clip_pixels(pixels)
            add_weights(writer, report)

        self.parts["vision"] = write
        self.settings["vision_select_layer"] = select_layer
        self.dimensions |= {"vision_side_px": side_px, "image_patches": (side_px // config.patch_size) ** 2}
        width: int = config.hidden_size
        return width

    def _published_mgie(self, mgie: Path, llm_dim: int, condition_dim: int) -> "list[TensorPlan]":
        """Plans `edit_head`; returns the trained word embeddings and LM head."""
        weights = Weights([mgie / _MLLM_FILE])
        given = {key.removeprefix(_EDIT_HEAD): t for key, t in weights.specs.items() if key.startswith(_EDIT_HEAD)}
        try:
            head = EditHead.infer_config({key: torch.empty(spec.shape, device="meta") for key, spec in given.items()})
            shapes = _shapes(_on_meta(lambda sizes: EditHead(**sizes), head, "edit_head"))
        except (BundleError, ValueError, IndexError) as error:
            raise ConversionError(f"the edit head in {weights.label} cannot be used: {error}") from error
        if (head["llm_dim"], head["condition_dim"]) != (llm_dim, condition_dim):
            raise ConversionError(
                f"the edit head in {weights.label} maps {head['llm_dim']} -> {head['condition_dim']}; "
                f"LLM and UNet need {llm_dim} -> {condition_dim}"
            )
        rows = (*weights.shape(_EMBEDDINGS), 0)[0]
        expected: dict[str, tuple[int, ...]] = {_EMBEDDINGS: (rows, llm_dim), _LM_HEAD: (rows, llm_dim)}
        expected |= {_EDIT_HEAD + key: shape for key, shape in shapes.items()}
        tensors = self._match("edit_head", weights, expected, also=("emb",))
        self._stream("edit_head", _under(_EDIT_HEAD, tensors), head)
        self.dimensions["condition_tokens"] = head["num_queries"]
        return sorted((t for t in tensors if t.name in (_EMBEDDINGS, _LM_HEAD)), key=lambda t: t.name != _EMBEDDINGS)

    def _check_emb(self, file: Path, num_visual_tokens: int) -> None:
        """`emb`, where present, must be the last N word embeddings: that is what the bundle will use."""
        tensors = read_weights(file)
        rows = tensors[_EMBEDDINGS][-num_visual_tokens:]
        emb = tensors.get("emb")
        if emb is not None and (
            emb.numel() != rows.numel() or not torch.equal(emb.reshape(rows.shape).to(rows.dtype), rows)
        ):
            raise ConversionError(
                f"`emb` {tuple(emb.shape)} in {file.name} is not the last {num_visual_tokens} rows of {_EMBEDDINGS}"
            )

    def _fresh_edit_head(self, llm_dim: int, condition_dim: int) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed)
            head = EditHead(llm_dim=llm_dim, condition_dim=condition_dim).to(dtype=self._dtype or torch.float32)
        num_bytes = sum(value.nbytes for value in head.state_dict().values())

        def write(writer: BundleWriter, report: Report) -> None:
            writer.add_edit_head(head.config, head.state_dict())
            report(num_bytes)

        self.parts["edit_head"] = write
        self.num_bytes += num_bytes
        self.dimensions["condition_tokens"] = head.config["num_queries"]

    def _with_new_rows(self, tensor: "TensorPlan", num_rows: int) -> "TensorPlan":
        """Word embeddings and LM head get rows for the visual tokens; every other tensor stays."""
        if tensor.name not in (_EMBEDDINGS, _LM_HEAD):
            return tensor
        # Two streams: the same noise in both matrices would tie them.
        seed = self._seed * 2 + (tensor.name == _LM_HEAD)
        return replace(
            tensor,
            shape=(tensor.shape[0] + num_rows, *tensor.shape[1:]),
            change=functools.partial(append_token_rows, num_rows=num_rows, seed=seed),
        )

    def _match(
        self, part: Part, weights: "Weights", expected: Mapping[str, tuple[int, ...]], *, also: Sequence[str] = ()
    ) -> "list[TensorPlan]":
        """The tensors that the part needs, in file order.

        Raises:
            ConversionError: Some are missing, unexpected or of another size; they are listed.
        """
        given = {
            key: spec
            for key, spec in weights.specs.items()
            if key in expected or not (key in also or any(re.search(p, key) for p in _TOLERATED.get(part, ())))
        }
        problems = list_misfits(expected, {key: spec.shape for key, spec in given.items()})
        if problems:
            more = f"; and {len(problems) - _MAX_LISTED} more" if len(problems) > _MAX_LISTED else ""
            raise ConversionError(f"{weights.label} does not fit: {'; '.join(problems[:_MAX_LISTED])}{more}")
        return [
            TensorPlan(key, spec.key, spec.file, spec.shape, self._dtype_for(spec.dtype)) for key, spec in given.items()
        ]

    def _dtype_for(self, dtype: torch.dtype) -> torch.dtype:
        return self._dtype if self._dtype is not None and dtype.is_floating_point else dtype

    def _stream(
        self, part: Part, tensors: "Sequence[TensorPlan]", config: Mapping[str, Any] | None, tokenizer: Any = None
    ) -> None:
        """Plans a part whose tensors go from file to file."""
        # Our own small parts are one file each; those that transformers reads may be many.
        max_shard_bytes = None if part in ("projector", "edit_head") else self._max_shard_bytes

        def write(writer: BundleWriter, report: Report) -> None:
            folder = writer.folder(part)
            if config is not None:
                (folder / PART_CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
            write_sharded(folder, tensors, max_shard_bytes, report)

        self.parts[part] = write
        self.num_bytes += sum(tensor.num_bytes for tensor in tensors)

    def _module(self, part: Part, module: Any, weights: "Weights", change: Callable[[Any], Any]) -> None:
        """Plans a diffusers part: loaded as a whole (mapped, not copied), changed, and saved by its library."""
        tensors = self._match(part, weights, _shapes(module))
        num_bytes = sum(tensor.num_bytes for tensor in tensors)

        def write(writer: BundleWriter, report: Report) -> None:
            files = {file: read_weights(file) for file in dict.fromkeys(tensor.file for tensor in tensors)}
            module.load_state_dict({t.name: t.cast(files[t.file][t.key]) for t in tensors}, assign=True)
            writer.add_pretrained(part, change(module))
            report(num_bytes)

        self.parts[part] = write
        self.num_bytes += num_bytes


def append_token_rows(weight: Float[Tensor, "V D"], *, num_rows: int, seed: int) -> Float[Tensor, "W D"]:
    """Word embeddings or LM head with rows for new tokens below: mean row + noise of 0.1 standard deviations.

    The mean keeps the model's predictions for ordinary text nearly as they were; the noise makes the new
    tokens differ, so that they can be told apart from the first training step on.

    Source: Hewitt 2021, "Initializing new word embeddings for pretrained language models".

    Args:
        weight: V rows, which stay as they are.
        num_rows: Rows to add: W = V + num_rows.
        seed: Seed of the noise.
    """
    mean = weight.mean(0, dtype=torch.float32)
    square = torch.linalg.vector_norm(weight, dim=0, dtype=torch.float32) ** 2 / len(weight)
    deviation = (square - mean**2).clamp(min=0).sqrt()
    noise = torch.randn(num_rows, weight.shape[1], generator=torch.Generator().manual_seed(seed))
    return torch.cat([weight, (mean + 0.1 * deviation * noise).to(weight.dtype)])


# --- layouts --------------------------------------------------------------------------------------------------


def _check_combination(sources: Sources) -> None:
    given = set(sources.given())
    main = given - {"summarizer"}
    legal = (
        {"llava", "clip", "stable_diffusion", "mgie"},
        {"llava", "clip", "stable_diffusion"},
        {"llava", "clip"},
        {"stable_diffusion"},
    )
    if not given or (main and main not in legal):
        raise ConfigError(
            f"sources given: {', '.join(sorted(given)) or 'none'}; give "
            + "; ".join(", ".join(sorted(combination)) for combination in legal)
            + "; and summarizer alone or beside them",
            param="sources",
        )


def _check_files(sources: Sources) -> None:
    """Names everything that is missing at once: these folders come from several places and take hours to fetch."""
    needed: dict[str, tuple[str, ...]] = {
        "llava": (PART_CONFIG_FILE, MODEL_FILE, ADDED_FILE),
        "clip": (PART_CONFIG_FILE, PREPROCESSOR_FILE),
        "stable_diffusion": (f"unet/{PART_CONFIG_FILE}", f"vae/{PART_CONFIG_FILE}", f"scheduler/{SCHEDULER_FILE}"),
        "mgie": (_MLLM_FILE, _UNET_FILE),
        "summarizer": (PART_CONFIG_FILE,),
    }
    if sources.llava is None:
        needed["stable_diffusion"] += (f"text_encoder/{PART_CONFIG_FILE}", "tokenizer/tokenizer_config.json")
    problems = []
    for field, folder in sources.given().items():
        missing = [name for name in needed[field] if not (folder / name).is_file()]
        if not folder.is_dir():
            problems.append(f"{folder} is not a folder")
        elif missing:
            problems.append(f"{folder} lacks {', '.join(missing)}")
    if problems:
        raise ConversionError("; ".join(problems))


def _check_space(out: Path, num_bytes: int) -> None:
    parent = next(folder for folder in out.resolve().parents if folder.exists())
    free, needed = shutil.disk_usage(parent).free, num_bytes + 2**24  # configurations and tokenizers: a few MB
    if free < needed:
        raise ConversionError(f"{parent} has {free / 1e9:.2f} GB free; the bundle needs {needed / 1e9:.2f} GB")


def _llama_config(data: Mapping[str, Any], label: str) -> LlamaConfig:
    """LLaMA's part of LLaVA's configuration."""
    if data.get("model_type") != "llava" or "text_config" in data or "hidden_size" not in data:
        raise ConversionError(
            f"{label}/{PART_CONFIG_FILE} is not of a merged LLaVA-7B-v1: model_type {data.get('model_type')!r} must be 'llava', "
            "with the sizes of the LLaMA beside it (transformers' own LLaVA layout, with text_config, is another)"
        )
    if data.get("mm_use_im_start_end") is False:
        raise ConversionError(f"{label}: mm_use_im_start_end is false; MGIE's prompts need <im_start> and <im_end>")
    fields = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "rope_theta", "rope_scaling",
        "bos_token_id", "eos_token_id", "pad_token_id", "attention_bias", "mlp_bias",
    )  # fmt: skip
    chosen = {name: data[name] for name in fields if data.get(name) is not None}
    # The first LLaMA conversions call it max_sequence_length.
    chosen.setdefault("max_position_embeddings", data.get("max_sequence_length") or 2048)
    if missing := [name for name in fields[:5] if name not in chosen]:
        raise ConversionError(f"{label}/{PART_CONFIG_FILE} lacks {', '.join(missing)}")
    config: LlamaConfig = _model_config(LlamaConfig, chosen | {"tie_word_embeddings": False}, label)
    return config


def _model_config(kind: Any, data: Mapping[str, Any], label: str) -> Any:
    if data.get("model_type", kind.model_type) != kind.model_type:
        raise ConversionError(f"{label}: model_type is {data['model_type']!r}; it must be {kind.model_type!r}")
    try:
        config = kind.from_dict(dict(data))
    except (StrictDataclassError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise ConversionError(f"the configuration of {label} cannot be used: {error}") from error
    return config


def _config_json(config: Any, kind: Any, tensors: Sequence[TensorPlan]) -> dict[str, Any]:
    """What goes into a part's config.json: the class and dtype of what is written, no machine paths."""
    data: dict[str, Any] = config.to_dict()
    data |= {"architectures": [kind.__name__], "dtype": _dtype_name(tensors)}
    data.pop("_name_or_path", None)
    return data


def _dtype_name(tensors: Sequence[TensorPlan]) -> str:
    return str(tensors[0].dtype).removeprefix("torch.")


def _on_meta(build: Callable[[Any], Any], config: Any, label: str) -> Any:
    """A model without memory for its weights, to know their names and sizes."""
    if isinstance(config, dict):
        config = {key: value for key, value in config.items() if key != "_name_or_path"}
    try:
        with torch.device("meta"):
            return build(config)
    except (TypeError, ValueError, KeyError, AttributeError, IndexError, ZeroDivisionError) as error:
        raise ConversionError(f"the configuration of {label} cannot be used: {error}") from error


def _expected(kind: Any, config: Any, label: str) -> dict[str, tuple[int, ...]]:
    return _shapes(_on_meta(kind, config, label))


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in module.state_dict().items()}


def _prefixed(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> dict[str, tuple[int, ...]]:
    """Version 5 of transformers leaves CLIP's prefix out of its names; published files have it, and a bundle keeps it."""
    return {prefix + key.removeprefix(prefix): shape for key, shape in shapes.items()}


def _under(prefix: str, tensors: Sequence[TensorPlan]) -> list[TensorPlan]:
    """The tensors whose names begin so, without it."""
    return [replace(t, name=t.name.removeprefix(prefix)) for t in tensors if t.name.startswith(prefix)]


def _modern_vae_name(key: str) -> str:
    if ".attentions." in key:
        for old, new in _LEGACY_VAE_NAMES.items():
            key = key.replace(old, new)
    return key


def _load_tokenizer(kind: Any, folder: Path) -> Any:
    try:
        return kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise ConversionError(f"the tokenizer in {folder} cannot be read: {error}") from error
