"""Speed and memory of a training step, against the published step, and what each measure brings by itself.

    python benchmarks/train_step.py                                    the tiny bundle's dimensions, this machine's CPU
    python benchmarks/train_step.py --real --device cuda --batch 16    7B and Stable Diffusion 1.5, random weights
    python benchmarks/train_step.py --real --tiny-check                the same code path in miniature, on a CPU

The published step is plain code of our own: images are decoded in the step, VAE and CLIP run for every batch, the
whole batch is padded to its longest row, every position gets logits, the null condition is computed for every
sample, losses and positions are read from the device, AdamW is torch's default. Before the clocks start, both steps'
losses and gradients on one batch are compared.

Then turns are taken, each way a few steps over the same samples, and medians compared: the published step, the
same with one measure, with all, and `mgie.training.trainer`. Memory is taken in a process of its own for each way: of the GPU
all, else resident memory above that of the imports (Linux only).

On a CPU the default is one thread: steps of this size gain little from a second, and on a shared machine it is noise.
There the processor time, in the last column, is what others' work does not change (but threads that work beside the
step save none of it). Each turn starts cold: what is prepared ahead is prepared within it.
The data are drawn: 512 px images (half PNG, half JPEG, in the page cache) and expressive instructions of 8 to 60 words.
"""

import argparse
import copy
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, CLIPVisionConfig, CLIPVisionModel, LlamaConfig

from mgie.bundle.bundle import Bundle
from mgie.bundle.embedded import ensure_bundle
from mgie.config import CacheKind, OptimizerConfig, TrainingConfig
from mgie.data.collate import ConversationCollator, to_device
from mgie.data.examples import TRAIN_FILE, Examples, freeze_examples
from mgie.data.latent_cache import CacheSpec, finish_cache, list_shards, write_shard
from mgie.data.latent_reader import LatentCache
from mgie.data.loader import BatchMaker, MicroBatch, StepLoader
from mgie.data.order import MixedOrder, Place
from mgie.images.geometry import PUBLISHED_SIDE_PX
from mgie.images.pixels import ClipPixels
from mgie.model.batch import Conversations, MomentPair, PixelPair, TrainingBatch, TrainingDraws
from mgie.model.diffusion import LatentVAE, NoiseSchedule
from mgie.model.edit_head import EditHead
from mgie.model.mgie import MGIE
from mgie.model.mllm import MLLM, VisionTower
from mgie.model.prompts import IGNORE
from mgie.storage.folder import open_folder
from mgie.training.distributed import Alone
from mgie.training.trainer import _PEAK_FLOPS, Trainer, accumulate_gradients, compute_in
from mgie.training.variants import TrainingModel, _blocks, _recompute_blocks, load_training_model

ENCODER = "benchmark"
SCHEDULER = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


# ---- ways to make a step


@dataclass(frozen=True, kw_only=True)
class Measures:
    """What may be done better than published. None: the published step."""

    moments: bool = False
    "VAE moments from a cache"
    features: bool = False
    "CLIP features from a cache"
    label_logits: bool = False
    "logits only where labels count"
    single_null: bool = False
    "null condition once, not per sample"
    buckets: bool = False
    "micro-batches of rows of similar length"
    prefetch: bool = False
    "batches prepared ahead by threads"
    fused: bool = False
    "fused AdamW"
    no_round_trips: bool = False
    "positions found on the host, losses left on the device"
    channels_last: bool = False
    bfloat16: bool = False
    compile: bool = False


PUBLISHED, ALL, OURS = "published step", "all of these, in plain code", "mgie.training.trainer"
WAYS: dict[str, Measures] = {
    PUBLISHED: Measures(),
    "VAE moments from a cache": Measures(moments=True),
    "CLIP features from a cache": Measures(features=True),
    "both: no image is read": Measures(moments=True, features=True),
    "logits only at labels": Measures(label_logits=True),
    "null condition once": Measures(single_null=True),
    "micro-batches by length": Measures(buckets=True),
    "batches prepared ahead": Measures(prefetch=True),
    "fused AdamW": Measures(fused=True),
    "no round trips": Measures(no_round_trips=True),
    ALL: Measures(
        moments=True,
        features=True,
        label_logits=True,
        single_null=True,
        buckets=True,
        prefetch=True,
        fused=True,
        no_round_trips=True,
    ),
}
OPTIONS: dict[str, Measures] = {
    "channels last (option)": Measures(channels_last=True),
    "bfloat16 (option)": Measures(bfloat16=True),
    "compiled blocks (option)": Measures(compile=True),
}


class PlainStep:
    """The published step with measures: forward, backward, clipping, AdamW. Plain on purpose."""

    def __init__(self, model: MGIE, measures: Measures, config: TrainingConfig, device: torch.device) -> None:
        self.model, self.measures, self.config, self.device = model, measures, config, device
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        fused = True if measures.fused else None
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, weight_decay=0.0, fused=fused)

    def __call__(self, micro_batches: Sequence[MicroBatch]) -> list[Any]:
        """One step; returns its losses, read from the device or not."""
        losses = self.backward(micro_batches)
        nn.utils.clip_grad_norm_(self.parameters, self.config.optimizer.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return losses

    def backward(self, micro_batches: Sequence[MicroBatch]) -> list[Any]:
        """Adds the gradients; returns L_ins, L_edit and the loss of each micro-batch."""
        num_labels = sum(micro.num_label_tokens for micro in micro_batches)
        num_samples = sum(micro.num_samples for micro in micro_batches)
        found: list[Any] = []
        for micro in micro_batches:
            batch, draws = to_device(micro.batch, self.device), to_device(micro.draws, self.device)
            with compute_in("bfloat16" if self.measures.bfloat16 else self.config.dtype, self.device):
                instruction, condition, null = self.read(batch)
                edit = self.edit_loss(batch.images, draws, condition, null)
            instruction = instruction / num_labels
            edit = edit * (micro.num_samples / num_samples)
            loss = instruction + 0.5 * edit
            loss.backward()
            values = (instruction, edit, loss)
            found += [v.detach() if self.measures.no_round_trips else v.item() for v in values]
        return found

    def read(self, batch: TrainingBatch) -> tuple[Tensor, Tensor, Tensor]:
        """L_ins (a sum), conditions, and null conditions."""
        words, mllm = cast(Conversations, batch.words), self.model.mllm
        visual = mllm.visual_embeddings(self.model.num_visual_tokens)
        embeddings = self.splice(words)
        hidden = mllm.llm.model(
            inputs_embeds=embeddings, attention_mask=words.mask.long(), use_cache=False
        ).last_hidden_state
        if self.measures.label_logits:
            logits, labels = mllm.llm.lm_head(hidden.flatten(0, 1)[words.label_positions]), words.label_ids
        else:
            logits = mllm.llm.lm_head(hidden)[:, :-1].flatten(0, 1)
            labels = words.labels[:, 1:].flatten()
        instruction = nn.functional.cross_entropy(logits.float(), labels, ignore_index=IGNORE, reduction="sum")
        num = self.model.num_visual_tokens
        if self.measures.no_round_trips:
            places = words.state_starts[:, None] + torch.arange(num, device=self.device)
            states = hidden.gather(1, places[..., None].expand(-1, -1, hidden.shape[-1]))
        else:
            # `</s>` is the last real token, the visual tokens stand before it; states are those that predict them.
            starts = [int(length) - num - 2 for length in words.mask.sum(1)]
            states = torch.stack([row[start : start + num] for row, start in zip(hidden, starts, strict=True)])
        zeros = torch.zeros_like(states[:1] if self.measures.single_null else states)
        return instruction, self.model.edit_head(states, visual), self.model.edit_head(zeros, visual)

    def splice(self, words: Conversations) -> Tensor:
        """Word embeddings with the image features in their places."""
        mllm = self.model.mllm
        assert mllm.vision is not None
        assert mllm.projector is not None
        with torch.no_grad():
            features = words.features
            if features is None:
                assert words.clip_pixels is not None
                clip = mllm.vision.clip
                states = clip(pixel_values=words.clip_pixels.to(clip.dtype), output_hidden_states=True).hidden_states
                features = states[mllm.vision.select_layer][:, 1:]
            features = mllm.projector(features.to(mllm.projector.weight.dtype))
        embeddings = mllm.llm.model.embed_tokens(words.input_ids).to(mllm.llm.model.norm.weight.dtype)
        features = features.to(embeddings.dtype)
        places = words.input_ids == mllm.im_patch_id
        if self.measures.no_round_trips:
            return cast(Tensor, embeddings.masked_scatter(places[..., None], features))
        rows = []
        for row, image, place in zip(embeddings, features, places, strict=True):
            start = int(place.nonzero()[0])
            rows.append(torch.cat([row[:start], image, row[start + len(image) :]]))
        return torch.stack(rows)

    def edit_loss(
        self, images: PixelPair | MomentPair, draws: TrainingDraws, condition: Tensor, null: Tensor
    ) -> Tensor:
        """L_edit (a mean)."""
        vae, abar = self.model.vae.autoencoder, self.model.schedule.abar[draws.timesteps][:, None, None, None]
        with torch.no_grad():
            if isinstance(images, MomentPair):
                source, mean, logvar = images.source_mean, images.goal_mean, images.goal_logvar
            else:
                goal = vae.encode(images.goal).latent_dist
                source, mean, logvar = vae.encode(images.source).latent_dist.mode(), goal.mean, goal.logvar
            latents = (mean + (0.5 * logvar).exp() * draws.posterior_noise) * vae.config.scaling_factor
        u = draws.dropout_u
        condition = torch.where((u < 0.10)[:, None, None], null, condition)
        source = torch.where(((u >= 0.05) & (u < 0.15))[:, None, None, None], 0.0, source)
        noisy = abar.sqrt() * latents + (1 - abar).sqrt() * draws.noise
        found = self.model.unet(torch.cat([noisy, source], dim=1), draws.timesteps, condition, return_dict=False)[0]
        return nn.functional.mse_loss(found.float(), draws.noise.float())


class Bench:
    """The model, its rows on disk and their caches; makes turns of every way. One optimiser is alive at a time."""

    def __init__(self, made: TrainingModel, config: TrainingConfig, folder: Path, device: torch.device) -> None:
        self.made, self.config, self.device = made, config, device
        self.model = cast(MGIE, made.model).train()
        self.rows = Examples(folder / TRAIN_FILE, lambda uri: (folder / uri).read_bytes())
        self.caches = open_caches(folder, self.rows, made.image_side_px)
        self._compiled: MGIE | None = None

    def micro_batches(self, measures: Measures, first: int, end: int) -> Iterator[Sequence[MicroBatch]]:
        """Those of each step, prepared ahead or when they are asked for. The same samples for every way."""
        maker, loader = self.maker(measures), self.loader(measures)
        if measures.prefetch:
            yield from (work.micro_batches for work in loader.steps(first, end))
            return
        for step in range(first, end):
            yield [maker(part) for part in loader.places(step)]

    def maker(self, measures: Measures) -> BatchMaker:
        """With caches, or from images."""
        return self.made.batch_maker(
            [self.rows],
            self.config,
            moments=self.caches["vae_moments"] if measures.moments else None,
            features=self.caches["clip_features"] if measures.features else None,
        )

    def loader(self, measures: Measures) -> StepLoader:
        """With the batch cut up, or whole."""
        batch, order = self.config.global_batch, MixedOrder([len(self.rows)], seed=self.config.seed)
        micro_batch = self.config.micro_batch if measures.buckets else batch
        return StepLoader(self.maker(measures), order, global_batch=batch, micro_batch=micro_batch)

    def plain(self, measures: Measures) -> PlainStep:
        """A step of that way."""
        model = self.model
        if measures.compile:
            if self._compiled is None:
                self._compiled = copy.deepcopy(model)
                for block in _blocks(self._compiled):
                    block.compile()
            model = self._compiled
        layout = torch.channels_last if measures.channels_last else torch.contiguous_format
        model.unet.to(memory_format=layout)
        return PlainStep(model, measures, self.config, self.device)

    def steps(self, way: str, num_steps: int) -> Iterator[None]:
        """Makes steps; after each, its work is done or on its way to the device."""
        if way == OURS:
            config = replace(self.config, steps=num_steps)
            trainer = Trainer(self.model, config, self.loader(WAYS[ALL]), on_step=lambda _: None)
            # Two calls, so that nothing is prepared during the step that warms up.
            for until in (1, num_steps):
                for _ in trainer.run(until):
                    yield
            return
        measures = (WAYS | OPTIONS)[way]
        step = self.plain(measures)
        for first, end in ((0, 1), (1, num_steps)):
            for micro_batches in self.micro_batches(measures, first, end):
                step(micro_batches)
                yield

    def turn(self, way: str, num_steps: int) -> tuple[float, float]:
        """Seconds per step, after one that warms up: of the clock, and of this process's processors."""
        steps = self.steps(way, num_steps + 1)
        next(steps)
        self.synchronize()
        started = time.perf_counter(), time.process_time()
        for _ in steps:
            pass
        self.synchronize()
        seconds = (time.perf_counter() - started[0]) / num_steps, (time.process_time() - started[1]) / num_steps
        gc.collect()  # the optimiser and its moments, before the next way makes its own
        return seconds

    def synchronize(self) -> None:
        """Waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def backward(self, way: str) -> Tensor:
        """Adds the gradients of the first step's samples; returns L_ins, L_edit and the loss."""
        measures = WAYS[ALL] if way == OURS else (WAYS | OPTIONS)[way]
        [micro_batches] = self.micro_batches(measures, 0, 1)
        if way != OURS:
            return torch.tensor(self.plain(measures).backward(micro_batches)).reshape(-1, 3).sum(0)
        losses, _ = accumulate_gradients(
            Alone(self.model),
            micro_batches,
            device=self.device,
            dtype=self.config.dtype,
            num_label_tokens=sum(micro.num_label_tokens for micro in micro_batches),
            num_samples=self.config.global_batch,
        )
        return losses.cpu()

    def gradients(self, way: str) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses, and gradients by parameter."""
        losses = self.backward(way)
        found = {name: p.grad.float().cpu() for name, p in self.model.named_parameters() if p.grad is not None}
        self.model.zero_grad()
        return losses, found

    def flops(self, way: str) -> float:
        """Operations per sample of one step."""
        with FlopCounterMode(display=False) as counter:
            self.backward(way)
        self.model.zero_grad()
        return float(counter.get_total_flops() / self.config.global_batch)


def assert_same(bench: Bench) -> None:
    """Both steps compute the same losses and gradients."""
    (losses, gradients), (theirs, expected) = bench.gradients(OURS), bench.gradients(PUBLISHED)
    assert gradients.keys() == expected.keys()
    assert len(gradients) == sum(p.requires_grad for p in bench.model.parameters())
    of_losses = float(((losses - theirs).abs() / theirs).max())
    errors = {name: float((gradients[name] - g).norm() / g.norm()) for name, g in expected.items()}
    errors["all"] = float(
        torch.stack([(gradients[name] - g).norm() for name, g in expected.items()]).norm()
        / torch.stack([g.norm() for g in expected.values()]).norm()
    )
    worst = max(errors, key=lambda name: errors[name])
    print(
        f"one batch, ours against published, relative differences: losses {of_losses:.1e}, gradient {errors['all']:.1e}, "
        f"its worst of {len(expected)} tensors {errors[worst]:.1e}"
    )
    if bench.config.dtype == "float32":
        assert max(of_losses, errors[worst]) < 1e-4, f"the steps differ: {worst}"
    else:  # other shapes round differently, and the published step's VAE computes in bfloat16, too
        assert max(of_losses, errors["all"]) < 0.1, "the steps differ"


# ---- data


def draw_rows(folder: Path, count: int) -> None:
    """Images with content of every fineness, and rows of different lengths."""
    rng = np.random.default_rng(0)
    vocabulary = sorted({word for text in CORPUS.read_text().split("\n") for word in text.split()})
    rows = []
    for i in range(count):
        kind = "png" if i % 2 else "jpg"
        for name in ("source", "goal"):
            coarse = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
            smooth = np.asarray(coarse.resize((512, 512), Image.Resampling.BICUBIC), dtype=np.float32)
            noisy = (smooth + rng.normal(0, 6, smooth.shape)).clip(0, 255).astype(np.uint8)
            Image.fromarray(noisy).save(folder / f"{i}-{name}.{kind}", quality=90)
        instruction, expressive = (" ".join(rng.choice(vocabulary, rng.integers(*span))) for span in ((3, 9), (8, 61)))
        row = {"id": i, "dataset": "drawn", "split": "train", "session": f"{i}", "source": f"{i}-source.{kind}"}
        rows.append({**row, "goal": f"{i}-goal.{kind}", "instruction": instruction, "expressive": expressive})
    freeze_examples([pa.RecordBatch.from_pylist(rows)], folder, validation_share=0.0)


@torch.no_grad()
def write_caches(made: TrainingModel, config: TrainingConfig, folder: Path, device: torch.device) -> None:
    """Caches of all rows, made by the model's own encoders."""
    rows = Examples(folder / TRAIN_FILE, lambda uri: (folder / uri).read_bytes())
    maker, model = made.batch_maker([rows], config), cast(MGIE, made.model)
    assert model.mllm.vision is not None
    dim = int(model.mllm.vision.clip.config.hidden_size)
    shapes: dict[CacheKind, dict[str, tuple[int, ...]]] = {
        "vae_moments": dict.fromkeys(("source_mean", "goal_mean", "goal_logvar"), made.latent_shape),
        "clip_features": {"features": (model.mllm.num_patches, dim)},
    }
    arrays: dict[str, list[Tensor]] = {name: [] for shape in shapes.values() for name in shape}
    for first in range(0, len(rows), config.micro_batch):
        places = [Place(0, 0, row) for row in range(first, min(first + config.micro_batch, len(rows)))]
        batch = to_device(maker(places).batch, device)
        words, images = cast(Conversations, batch.words), cast(PixelPair, batch.images)
        mean, logvar = model.vae.moments(images.goal)
        found = {"source_mean": model.vae.condition_latents(images.source), "goal_mean": mean, "goal_logvar": logvar}
        assert words.clip_pixels is not None
        found["features"] = model.mllm.vision(words.clip_pixels.to(model.mllm.vision.clip.dtype))
        for name, value in found.items():
            arrays[name].append(value.float().cpu())
    whole = {name: torch.cat(parts).numpy() for name, parts in arrays.items()}
    for kind, shape in shapes.items():
        side_px = made.image_side_px if kind == "vae_moments" else PUBLISHED_SIDE_PX
        spec = CacheSpec(kind=kind, encoder=ENCODER, image_side_px=side_px, dtype="float32", shapes=shape)
        write_shard(open_folder(folder), spec, rows.ids, {name: whole[name] for name in shape})
        finish_cache(open_folder(folder), spec, list_shards(open_folder(folder), spec))


def open_caches(folder: Path, rows: Examples, side_px: int) -> dict[CacheKind, LatentCache]:
    """Both caches."""
    opened = partial(LatentCache.open, folder, encoder=ENCODER, ids=rows.ids)
    return {
        "vae_moments": opened(kind="vae_moments", image_side_px=side_px),
        "clip_features": opened(kind="clip_features", image_side_px=PUBLISHED_SIDE_PX),
    }


# ---- models


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of a model with random weights: arguments of the libraries' configurations."""

    llama: dict[str, Any]
    clip: dict[str, Any]
    unet: dict[str, Any]
    vae: dict[str, Any]
    edit_head: dict[str, int]
    side_px: int


REAL = Sizes(  # LLaVA-7B-v1 with MGIE's vocabulary, Stable Diffusion 1.5 with 8 input channels, the published edit head
    llama={
        "vocab_size": 32011,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
    },
    clip={
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 14,
    },
    unet={"cross_attention_dim": 768, "attention_head_dim": 8},
    vae={"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "norm_num_groups": 32},
    edit_head={"condition_dim": 768, "width": 512, "num_queries": 77},
    side_px=256,
)
MINIATURE = Sizes(
    llama={**REAL.llama, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
    clip={**REAL.clip, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4},
    unet={**REAL.unet, "cross_attention_dim": 64, "block_out_channels": (64, 64, 128, 128), "layers_per_block": 1},
    vae={"block_out_channels": (16, 16, 32, 32), "layers_per_block": 1, "norm_num_groups": 8},
    edit_head={"condition_dim": 64, "width": 64, "num_queries": 77},
    side_px=128,
)
CORPUS = Path(__file__).parents[1] / "mgie" / "bundle" / "corpus.txt"


def random_model(sizes: Sizes, config: TrainingConfig, device: torch.device) -> TrainingModel:
    """A model of these sizes, made on the device: frozen parts in the compute dtype, what trains and the VAE float32.

    Words are tokenised by the tiny bundle's tokenizer: ids above its own are rows that no word uses.
    """
    torch.manual_seed(0)
    tokenizer = Bundle(ensure_bundle("random")).load_tokenizer()
    frozen = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
    with torch.device(device):
        llm = AutoModelForCausalLM.from_config(LlamaConfig(**sizes.llama), dtype=frozen)
        vision = CLIPVisionModel(CLIPVisionConfig(**sizes.clip)).to(frozen)
        unet = UNet2DConditionModel(in_channels=8, **sizes.unet)
        kinds = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
        vae = AutoencoderKL(latent_channels=4, **kinds, **sizes.vae)
        head = EditHead(llm_dim=sizes.llama["hidden_size"], **sizes.edit_head)
        projector = nn.Linear(sizes.clip["hidden_size"], sizes.llama["hidden_size"]).to(frozen)
    llm.model.embed_tokens.float()
    llm.lm_head.float()
    model = MGIE(
        mllm=MLLM(VisionTower(vision), projector, llm, im_patch_id=tokenizer.im_patch_id),
        edit_head=head,
        unet=unet,
        vae=LatentVAE(vae),
        schedule=NoiseSchedule(SCHEDULER),
        num_visual_tokens=len(tokenizer.visual_ids),
    )
    model.freeze()
    latent_side = sizes.side_px // model.vae.downsampling
    return TrainingModel(
        model=model.to(device),
        collate=ConversationCollator(tokenizer, num_patches=model.mllm.num_patches),
        clip_pixels=ClipPixels({"size": sizes.clip["image_size"], "crop_size": sizes.clip["image_size"]}),
        image_side_px=sizes.side_px,
        latent_shape=(4, latent_side, latent_side),
    )


def make_model(args: argparse.Namespace, config: TrainingConfig, device: torch.device) -> TrainingModel:
    """The tiny bundle, or one with random weights."""
    if args.real:
        made = random_model(MINIATURE if args.tiny_check else REAL, config, device)
    else:
        made = load_training_model(Bundle(ensure_bundle("random")), config, device=str(device))
    if args.gradient_checkpointing:
        _recompute_blocks(made.model)
    return made


# ---- memory


def read_status() -> dict[str, int]:
    """Resident memory of this process, now (VmRSS) and at most (VmHWM), bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith(("VmRSS", "VmHWM"))}


def measure_memory(way: str, folder: Path) -> float:
    """Most memory that training this way takes, MiB, in a fresh process."""
    command = [sys.executable, __file__, *sys.argv[1:], "--child", way, str(folder)]
    child = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return float(child.stdout.splitlines()[-1])


def run_child(args: argparse.Namespace, config: TrainingConfig, device: torch.device) -> None:
    """In the child: three steps, and the most memory ever in use."""
    way, folder = args.child
    before = 0
    if device.type != "cuda":
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the imports
        before = read_status()["VmRSS"]
    bench = Bench(make_model(args, config, device), config, Path(folder), device)
    bench.turn(way, 2)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else read_status()["VmHWM"] - before
    print(peak / 2**20)


# ---- the run


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", action="store_true", help="7B, CLIP L/14, SD 1.5: random weights, no bundle")
    parser.add_argument("--tiny-check", action="store_true", help="with --real: the same layers, far fewer and thinner")
    parser.add_argument("--device", default="cpu", help="cpu, cuda")
    parser.add_argument("--dtype", default=None, help="float32, or bfloat16 (default on cuda)")
    parser.add_argument("--batch", type=int, default=16, help="samples per step")
    parser.add_argument("--micro-batch", type=int, default=8, help="of ours, and of micro-batches by length")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--steps", type=int, default=3, help="of a turn, after one that warms up")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each way")
    parser.add_argument("--threads", type=int, default=1, help="of torch on a CPU")
    parser.add_argument("--only", action="store_true", help="the published step and ours, no single measures")
    parser.add_argument("--options", nargs="*", default=[], choices=sorted(OPTIONS), help="measures that are optional")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="of all ways")
    parser.add_argument("--child", nargs=2, metavar=("WAY", "FOLDER"), help=argparse.SUPPRESS)
    return parser.parse_args()


def show(way: str, *, rate: float, reference: float, details: Sequence[str]) -> None:
    """A line of the table."""
    print(f"{way:28} {rate:8.3f} samples/s {rate / reference:6.2f}x   {'   '.join(details)}")


def main() -> None:
    """Compares, measures, prints."""
    args = parse()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    config = TrainingConfig(
        global_batch=args.batch,
        micro_batch=args.micro_batch,
        image_side_px=0 if args.real else 128,
        dtype=args.dtype or ("bfloat16" if device.type == "cuda" else "float32"),
        optimizer=OptimizerConfig(ema_decay=0.0),  # the published step keeps no average
    )
    if args.child:
        run_child(args, config, device)
        return
    ways = [PUBLISHED, *args.options, OURS] if args.only else [*WAYS, *args.options, OURS]
    with tempfile.TemporaryDirectory(prefix="mgie-bench-") as name:
        folder = Path(name)
        draw_rows(folder, args.rows)
        write_caches(make_model(args, config, device), config, folder, device)
        if device.type == "cuda":  # the processes that measure memory need it
            gc.collect()
            torch.cuda.empty_cache()
        memory = {way: measure_memory(way, folder) for way in ways}
        bench = Bench(make_model(args, config, device), config, folder, device)
        where = torch.cuda.get_device_name() if device.type == "cuda" else f"{os.cpu_count()} CPUs"
        print(f"{where}, {args.threads} thread(s), {config.dtype}, batch {args.batch} of {bench.made.image_side_px} px")
        [[whole]] = bench.micro_batches(WAYS[PUBLISHED], 0, 1)
        tokens = cast(Conversations, whole.batch.words).mask.sum(1)
        print(
            f"rows of {int(tokens.min())} to {int(tokens.max())} tokens, {whole.num_label_tokens / args.batch:.0f} labels"
        )
        assert_same(bench)
        flops = {way: bench.flops(way) for way in ways}
        turns: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
        for repeat in range(args.repeats + 1):
            for way, done in turns.items():
                seconds = bench.turn(way, args.steps)
                if repeat:  # the first round warms up: allocators, compilation
                    done.append(seconds)
    rates = {way: args.batch / statistics.median(wall for wall, _ in done) for way, done in turns.items()}
    processors = {way: statistics.median(cpu for _, cpu in done) for way, done in turns.items()}
    peak = next((peak for start, peak in _PEAK_FLOPS.items() if where.startswith(start)), None)
    for way, rate in rates.items():
        details = [f"{memory[way]:7.0f} MiB", f"{flops[way] / 1e9:9.2f} GFLOP/sample"]
        if device.type == "cpu":
            of = processors[way], processors[PUBLISHED] / processors[way]
            details.append("processor time per step {:5.2f} s {:5.2f}x".format(*of))
        elif peak:
            details.append(f"{rate * flops[way] / peak:6.1%} of the device's bfloat16 peak")
        show(way, rate=rate, reference=rates[PUBLISHED], details=details)
    for way in (PUBLISHED, OURS):
        each = ", ".join(f"{wall:.2f} ({cpu:.2f})" for wall, cpu in turns[way])
        print(f"{way}, seconds per step (of processors): {each}")
    result = {
        "name": "train_step",
        "unit": "samples/s",
        "ours": round(rates[OURS], 3),
        "reference": round(rates[PUBLISHED], 3),
        "ratio": round(rates[OURS] / rates[PUBLISHED], 3),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
