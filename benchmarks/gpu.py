"""Speed and memory of the published model's sizes on one GPU, and which share of that GPU's ceilings they reach.

    python benchmarks/gpu.py --out docs/results/gpu-h200.json     within 8 minutes on one H200
    python benchmarks/gpu.py --device cpu --size tiny             the same path in miniature

LLaVA-7B (LLaMA-7B, CLIP ViT-L/14), the published edit head, Stable Diffusion 1.5's UNet with 8 input channels and its
VAE at 512 px, with random weights made on the device: they decide what is in the picture, not how long it takes. No
Ray. What runs is the project's own path: `MLLMConditioner.derive` and `Renderer.render` as `Editor.edit` calls them,
`Generator`, `Trainer`, `Bundle`. Parts, in this order:

    ceilings   a large device copy (bytes read and written) and a large matrix product in the dtype, the best of each
    build      the model; bytes of its weights; operations of one call of each network, counted
    networks   calls alone: UNet (three rows of guidance per sample), CLIP with projector, VAE (one image, float32)
    llm        the prompt's pass up to the first token, and greedy decoding of the tokens after it
    edit       words to picture, 20 and 100 steps, guidance 7.5 and 1.5: seconds, and the most memory in use
    train      a step of the paper's set-up by the trainer: word embeddings, LM head, edit head and UNet train in
               float32, the rest is frozen; 256 px; images are decoded and pass VAE and CLIP within the step
    load       a bundle of these sizes, written to --folder, then read by the bundle's loader: first with its files in
               the page cache, then dropped from it (where the system does that)

Times are medians of runs that follow a warm-up and end with a synchronisation. `compute_share`: operations over time,
of the product's rate. `bandwidth_share`: bytes of the LLM's weights that a token's pass reads, over time, of the copy's
rate. `bound_s` of an edit: every network takes the time of its operations or that of reading its weights once, whichever
is longer, at the measured ceilings, and nothing else takes any; `bound_share` is that over the measured time.

The published model ends its answers, and its visual tokens pass in one go. Random weights do neither: they are made to
write exactly --new-tokens tokens, one pass each, which is more than most answers need. Not measured: quality, the
engine's batching, several GPUs. On a CPU the most memory in use is that of the process since its start.

A part begins only if the seconds that it may take are left of --budget-s. What did not begin is listed with the reason,
and so is what failed or ran out of memory. Figures are printed, and written to --out, as soon as they are known; their
names end in their units (GB: 1e9 bytes). The last line is JSON; its ratio is an edit's lower bound (batch 1, fewest
steps) over its time: no other program's time but arithmetic, at most 1 where copy and product are the fastest that the
device does (in half precision on a CPU they are not).
"""

import argparse
import contextlib
import gc
import json
import math
import os
import shutil
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import diffusers
import numpy as np
import torch
import transformers
from PIL import Image
from sentencepiece import sentencepiece_model_pb2
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from train_step import MINIATURE, REAL, SCHEDULER, Sizes, draw_rows, random_model

from mgie.bundle.bundle import Bundle
from mgie.bundle.devices import resolve_device, resolve_dtype
from mgie.bundle.untrained import build_tokenizer
from mgie.bundle.writer import BundleWriter
from mgie.config import (
    DIFFUSION_PARTS,
    MLLM_PARTS,
    BundleConfig,
    ComputeDtype,
    EditSettings,
    GenerationConfig,
    Provenance,
    TrainingConfig,
)
from mgie.data.examples import TRAIN_FILE, Examples
from mgie.data.loader import StepLoader
from mgie.data.order import MixedOrder
from mgie.images.pixels import ClipPixels
from mgie.inference.conditioner import EditRequest, MLLMConditioner
from mgie.inference.renderer import Renderer, RenderRequest
from mgie.model.diffusion import UNetDenoiser
from mgie.model.generation import Generator
from mgie.model.mgie import MGIE
from mgie.model.prompts import encode_question
from mgie.model.tokens import IMAGE_TOKENS, MODEL_FILE, Tokenizer
from mgie.training.trainer import StepRecord, Trainer, memory_bytes
from mgie.training.variants import TrainingModel

INSTRUCTION = "make the sky look like a sunset over the sea"
NUM_VISUAL_TOKENS = 8
ROWS_PER_SAMPLE = 3  # branches of guidance, all of which 7.5 and 1.5 need
GB, TFLOP = 1e9, 1e12
GROUPS = ("networks", "llm", "edit", "train", "load")  # that can be left out
MICRO_BATCH = 8  # of training, the trainer's default
OUT_OF_MEMORY = "out of memory"
REFERENCE = "arithmetic lower bound of the edit at this device's measured ceilings; not another program"

Figures = Iterator[tuple[str, float]]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured, and how much of it."""

    sizes: Sizes
    side_px: int
    batches: tuple[int, ...]
    steps: tuple[int, ...]
    train_batches: tuple[int, ...]
    num_rows: int
    "to train on"
    new_tokens: int
    repeats: int
    calls: int
    "of a network per run, where one is too short"
    copy_bytes: int
    product_side: int
    pace: float
    "what the parts' expected seconds are multiplied by"


PLANS = {
    "real": Plan(
        sizes=REAL, side_px=512, batches=(1, 4, 8), steps=(20, 100), train_batches=(1, 8, 32), num_rows=16,
        new_tokens=96, repeats=5, calls=10, copy_bytes=4 * 2**30, product_side=8192, pace=1.0,
    ),
    "tiny": Plan(
        sizes=MINIATURE, side_px=128, batches=(1, 2), steps=(1, 2), train_batches=(1, 2), num_rows=4,
        new_tokens=4, repeats=1, calls=1, copy_bytes=2**24, product_side=256, pace=0.0,
    ),
}  # fmt: skip


# ---- the report


class Report:
    """Figures, printed and written as they come; what was skipped; what failed.

    Args:
        facts: Of the run, put beside the figures. steps: Of the edit that the ratio is about.
    """

    def __init__(
        self, facts: dict[str, Any], *, steps: int, budget_s: float, skip: list[str], out: Path | None
    ) -> None:
        self._facts, self._steps, self._budget_s, self._skip, self._out = facts, steps, budget_s, skip, out
        self._started = time.perf_counter()
        self.figures: dict[str, float] = {}
        self.skipped: dict[str, str] = {}
        self.failed: dict[str, str] = {}

    @property
    def elapsed_s(self) -> float:
        """Since the start."""
        return time.perf_counter() - self._started

    def run(self, part: str, measure: Callable[[], Figures], *, needs_s: float, needs: str = "") -> None:
        """Measures a part, unless it is not wanted, too little time is left, or the part that it `needs` is missing."""
        left = self._budget_s - self.elapsed_s
        if part.split(maxsplit=1)[0] in self._skip:
            self.skip(part, "not wanted")
        elif left <= needs_s:
            self.skip(part, f"{max(left, 0):.0f} s left, about {needs_s:.0f} s needed")
        elif needs in self.skipped or needs in self.failed:
            self.skip(part, f"without {needs!r}")
        else:
            try:
                for name, value in measure():
                    self._add(name, value)
            except torch.OutOfMemoryError:
                self._fail(part, OUT_OF_MEMORY)
            except Exception as error:  # noqa: BLE001  the other parts are wanted all the same
                traceback.print_exc()
                self._fail(part, f"{type(error).__name__}: {error}")
            free_memory()

    def skip(self, part: str, reason: str) -> None:
        """Notes a part that did not begin."""
        self.skipped[part] = reason
        self._print(f"{part}: skipped, {reason}")

    def result(self) -> dict[str, Any]:
        """All that is known."""
        ours, reference = (self.figures.get(f"edit.batch_1.steps_{self._steps}.{of}_s") for of in ("total", "bound"))
        return {
            "name": "gpu",
            "unit": f"s per edit, batch 1, {self._steps} steps",
            "ours": ours,
            "reference": reference,
            "ratio": round(reference / ours, 4) if ours and reference else None,
            "reference_is": REFERENCE,
            **self._facts,
            "elapsed_s": round(self.elapsed_s, 1),
            "figures": self.figures,
            "skipped": self.skipped,
            "failed": self.failed,
        }

    def _add(self, name: str, value: float) -> None:
        if not math.isfinite(value):
            raise ValueError(f"{name} is {value}")
        self.figures[name] = float(f"{value:.4g}")
        self._print(f"{name:40} {value:12.4g}")

    def _fail(self, part: str, reason: str) -> None:
        self.failed[part] = reason
        self._print(f"{part}: {reason}")

    def _print(self, line: str) -> None:
        print(f"{self.elapsed_s:6.1f} s  {line}", flush=True)
        if self._out is not None:  # the file is whole at any time
            draft = self._out.with_name(f".{self._out.name}")
            draft.write_text(json.dumps(self.result(), indent=2) + "\n")
            draft.replace(self._out)


# ---- measuring


def free_memory() -> None:
    """Gives back what nothing holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def name_of(dtype: torch.dtype) -> str:
    """As the configurations name it."""
    return str(dtype).removeprefix("torch.")


def bytes_of(*modules: nn.Module | None) -> int:
    """Of the weights."""
    return sum(p.numel() * p.element_size() for module in modules if module is not None for p in module.parameters())


def flops_of(call: Callable[[], object]) -> int:
    """Operations of a call."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())


class Timer:
    """Seconds of work on a device.

    Args:
        repeats: Runs. limit_s: No run begins after so long.
    """

    def __init__(self, device: torch.device, *, repeats: int, limit_s: float = 10.0) -> None:
        self._device, self._repeats, self._limit_s = device, repeats, limit_s

    def synchronize(self) -> None:
        """Waits for the device."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def once(self, work: Callable[[], object]) -> float:
        """Of one run, waited for."""
        self.synchronize()
        started = time.perf_counter()
        work()
        self.synchronize()
        return time.perf_counter() - started

    def runs(self, work: Callable[[], object], *, calls: int = 1) -> list[float]:
        """Per call, in each of several runs of `calls`, after one call that warms up."""

        def run() -> None:
            for _ in range(calls):
                work()

        work()
        seconds: list[float] = []
        while len(seconds) < self._repeats and sum(seconds) * calls < self._limit_s:
            seconds.append(self.once(run) / calls)
        return seconds

    def median(self, work: Callable[[], object], *, calls: int = 1) -> float:
        """Of `runs`."""
        return statistics.median(self.runs(work, calls=calls))


# ---- the model


def full_tokenizer(vocab_size: int) -> Tokenizer:
    """The tiny tokenizer with pieces that no text holds, up to this number of ids, visual tokens included."""
    proto = sentencepiece_model_pb2.ModelProto()
    with tempfile.TemporaryDirectory() as folder:
        build_tokenizer().save(Path(folder))
        proto.ParseFromString((Path(folder) / MODEL_FILE).read_bytes())
    num_pieces = vocab_size - len(IMAGE_TOKENS) - NUM_VISUAL_TOKENS
    for i in range(len(proto.pieces), num_pieces):
        proto.pieces.add(piece=chr(0xF0000 + i), score=-1e6)  # of a private area of Unicode
    added = {token: num_pieces + i for i, token in enumerate(IMAGE_TOKENS)}
    return Tokenizer(proto.SerializeToString(), added).with_visual_tokens(NUM_VISUAL_TOKENS)


class Editing:
    """The model as an editor holds it: VAE in float32, all else in the dtype; nothing trains.

    Args:
        new_tokens: What it writes per edit.
    """

    def __init__(self, plan: Plan, device: torch.device, dtype: torch.dtype, *, new_tokens: int) -> None:
        frozen: ComputeDtype = "bfloat16" if dtype == torch.bfloat16 else "float32"
        made = random_model(plan.sizes, TrainingConfig(dtype=frozen), device)
        model = cast(MGIE, made.model).eval().requires_grad_(requires_grad=False)
        self.device, self.dtype, self.side_px = device, dtype, plan.side_px
        self.clip_pixels = cast(ClipPixels, made.clip_pixels)
        self.tokenizer = full_tokenizer(plan.sizes.llama["vocab_size"])
        self.mllm, self.edit_head, self.unet = model.mllm.to(dtype), model.edit_head.to(dtype), model.unet.to(dtype)
        self.vae = model.vae
        self.mllm.im_patch_id = self.tokenizer.im_patch_id
        with torch.no_grad():  # neither ends an answer: their scores are 0, below the best of so many
            self.mllm.llm.lm_head.weight[[self.tokenizer.eos_id, self.tokenizer.visual_ids[0]]] = 0
        self.generator = Generator(self.mllm, eos_id=self.tokenizer.eos_id, visual_ids=self.tokenizer.visual_ids)
        self.conditioner = MLLMConditioner(
            tokenizer=self.tokenizer,
            clip_pixels=self.clip_pixels,
            mllm=self.mllm,
            edit_head=self.edit_head,
            generation=GenerationConfig(max_new_tokens=new_tokens),
            bundle="random",
        )
        self.renderer = Renderer(
            unet=self.unet,
            vae=self.vae,
            scheduler_config=SCHEDULER,
            work_area_px=plan.side_px**2,
            multiple_px=64,
        )
        noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        self.image = Image.fromarray(noise).resize((plan.side_px, plan.side_px), Image.Resampling.BICUBIC)
        self.prompt = encode_question(self.tokenizer, INSTRUCTION, self.mllm.num_patches)

    def calls(self, batch: int) -> dict[str, Callable[[], Any]]:
        """A call of each network as an edit of so many samples makes it, but prompt, token and VAE for one alone."""
        mllm, vae = self.mllm, self.vae
        side, rows = self.side_px // vae.downsampling, ROWS_PER_SAMPLE * batch
        queries, width = self.edit_head.config["num_queries"], self.edit_head.config["condition_dim"]
        draw = partial(torch.randn, device=self.device)
        pixels = self.clip_pixels([self.image] * batch).to(self.device)

        def read(num_tokens: int) -> torch.Tensor:
            ids = torch.zeros(1, num_tokens, dtype=torch.long, device=self.device)
            return mllm.logits(mllm(mllm.embed(ids, None), torch.ones_like(ids, dtype=torch.bool))[:, -1])

        return {
            "look": partial(mllm.image_features, pixels),
            "prompt": partial(read, len(self.prompt)),
            "token": partial(read, 1),
            "unet": partial(
                UNetDenoiser(self.unet),
                draw(rows, 8, side, side),
                torch.full((rows,), 500.0, device=self.device),
                draw(rows, queries, width, dtype=self.dtype),
            ),
            "encode": partial(vae.condition_latents, draw(1, 3, self.side_px, self.side_px).clamp(-1, 1)),
            "decode": partial(vae.decode, draw(1, 4, side, side) * vae.scaling_factor),
        }

    def num_bytes(self) -> dict[str, int]:
        """Weights that each of these calls reads; of the word embeddings, a row per token, none are counted."""
        llm, vae = self.mllm.llm, self.vae.autoencoder
        token = bytes_of(llm.model.layers, llm.model.norm, llm.lm_head)
        return {
            "look": bytes_of(self.mllm.vision, self.mllm.projector),
            "prompt": token,
            "token": token,
            "unet": bytes_of(self.unet),
            "encode": bytes_of(vae.encoder, vae.quant_conv),
            "decode": bytes_of(vae.decoder, vae.post_quant_conv),
        }

    def write(self, batch: int, features: torch.Tensor, num_tokens: int) -> None:
        """Greedy decoding."""
        config = GenerationConfig(max_new_tokens=num_tokens)
        rows = self.generator.generate([self.prompt] * batch, features, config)
        assert all(len(row.output_ids) == num_tokens for row in rows), "an answer has another length than asked for"

    def edit(self, batch: int, steps: int, generation: GenerationConfig | None = None) -> tuple[float, float]:
        """What `Editor.edit` does, for a batch; seconds from words to guidance, and from there to the last picture."""
        started = time.perf_counter()
        request = EditRequest(image=self.image, instruction=INSTRUCTION)
        edit_condition = self.conditioner.derive([request] * batch, generation)
        derived = time.perf_counter()
        settings = EditSettings(steps=steps, guidance_scale=7.5, image_guidance_scale=1.5)
        renders = [
            RenderRequest(image=self.image, edit_condition=of, settings=settings, seed=i)
            for i, of in enumerate(edit_condition)
        ]
        num_done = sum(1 for _ in self.renderer.render(renders))
        assert num_done == batch, f"{num_done} of {batch} pictures came"
        return derived - started, time.perf_counter() - derived

    def save(self, out: Path) -> None:
        """A bundle."""
        config = BundleConfig(
            name="random",
            parts=(*MLLM_PARTS, *DIFFUSION_PARTS),
            trained=False,
            provenance=Provenance(made_by="benchmarks/gpu.py"),
            num_visual_tokens=NUM_VISUAL_TOKENS,
            work_area_px=self.side_px**2,
        )
        assert self.mllm.vision is not None
        assert self.mllm.projector is not None
        side = self.clip_pixels.side_px
        with BundleWriter(out, config) as writer:
            writer.add_tokenizer(self.tokenizer)
            writer.add_pretrained("vision", self.mllm.vision.clip)
            writer.add_clip_pixels({"size": side, "crop_size": side})
            writer.add_projector(self.mllm.projector.state_dict())
            writer.add_pretrained("llm", self.mllm.llm)
            writer.add_edit_head(self.edit_head.config, self.edit_head.state_dict())
            writer.add_pretrained("unet", self.unet)
            writer.add_pretrained("vae", self.vae.autoencoder)
            writer.add_scheduler(SCHEDULER)


# ---- the parts


class Bench:
    """What the parts share: ceilings, counted operations, the model while it is there, a folder."""

    def __init__(
        self,
        plan: Plan,
        device: torch.device,
        dtype: torch.dtype,
        folder: Path,
        *,
        new_tokens: int,
        figures: dict[str, float],
    ) -> None:
        self.plan, self.device, self.dtype, self.folder = plan, device, dtype, folder
        self.new_tokens, self.figures = new_tokens, figures
        self.timer = Timer(device, repeats=plan.repeats)
        self.model: Editing | None = None
        self.num_bytes: dict[str, int] = {}
        self.flops: dict[str, int] = {}

    @property
    def editing(self) -> Editing:
        """The model; parts that need it are skipped where it was not built."""
        assert self.model is not None, "the model was given back"
        return self.model

    def ceilings(self) -> Figures:
        """What this device can do."""
        source = torch.zeros(self.plan.copy_bytes, dtype=torch.uint8, device=self.device)
        seconds = min(self.timer.runs(partial(torch.empty_like(source).copy_, source), calls=self.plan.calls))
        yield "ceiling.copy_gb_per_s", 2 * self.plan.copy_bytes / seconds / GB
        side = self.plan.product_side
        a, b = (torch.randn(side, side, device=self.device, dtype=self.dtype) for _ in range(2))
        product = partial(torch.mm, a, b, out=torch.empty_like(a))
        seconds = min(self.timer.runs(product, calls=self.plan.calls))
        yield "ceiling.product_tflop_per_s", 2 * side**3 / seconds / TFLOP

    def build(self) -> Figures:
        """The model: bytes by part, and operations by network."""
        started = time.perf_counter()
        self.model = model = Editing(self.plan, self.device, self.dtype, new_tokens=self.new_tokens)
        self.timer.synchronize()
        yield "build.total_s", time.perf_counter() - started
        yield "build.prompt_tokens", len(model.prompt)
        mllm = model.mllm
        parts = {"llm": mllm.llm, "vision": mllm.vision, "projector": mllm.projector}
        parts |= {"edit_head": model.edit_head, "unet": model.unet, "vae": model.vae.autoencoder}
        for name, module in parts.items():
            yield f"weights.{name}_gb", bytes_of(module) / GB
        self.num_bytes = model.num_bytes()
        for name, call in model.calls(1).items():
            self.flops[name] = flops_of(call)
            yield f"flops.{name}_tflop", self.flops[name] / TFLOP

    @torch.inference_mode()
    def networks(self, batch: int) -> Figures:
        """Calls alone."""
        calls = self.editing.calls(batch)
        for name in ("unet", "look") if batch > 1 else ("unet", "look", "encode", "decode"):
            seconds = self.timer.median(calls[name], calls=self.plan.calls)
            yield f"{name}.batch_{batch}.call_s", seconds
            yield f"{name}.batch_{batch}.calls_per_s", 1 / seconds
            rate = batch * self.flops[name] / seconds / TFLOP
            yield f"{name}.batch_{batch}.compute_share", rate / self.figures["ceiling.product_tflop_per_s"]

    @torch.inference_mode()
    def llm(self, batch: int) -> Figures:
        """From the image's features to the last token."""
        features = self.editing.calls(batch)["look"]()
        first = self.timer.median(partial(self.editing.write, batch, features, 1))
        yield f"llm.batch_{batch}.prompt_s", first
        whole = self.timer.median(partial(self.editing.write, batch, features, self.new_tokens))
        passes_per_s = (self.new_tokens - 1) / (whole - first)
        yield f"llm.batch_{batch}.tokens_per_s", batch * passes_per_s
        rate = passes_per_s * self.num_bytes["token"] / GB
        yield f"llm.batch_{batch}.bandwidth_share", rate / self.figures["ceiling.copy_gb_per_s"]

    def bound_s(self, batch: int, steps: int) -> float:
        """The least that the measured ceilings allow for the networks of an edit."""
        peak = self.figures["ceiling.product_tflop_per_s"] * TFLOP
        bandwidth = self.figures["ceiling.copy_gb_per_s"] * GB

        def least(network: str, samples: int = batch) -> float:
            return max(samples * self.flops[network] / peak, self.num_bytes[network] / bandwidth)

        words = least("look") + least("prompt") + (self.new_tokens - 1) * least("token")
        return words + steps * least("unet") + batch * (least("encode", 1) + least("decode", 1))

    def edit(self, batch: int, steps: int) -> Figures:
        """From words to pictures."""
        self.editing.edit(batch, 1, GenerationConfig(max_new_tokens=2))
        reset_peak()
        runs: list[tuple[float, float]] = []
        while len(runs) < self.plan.repeats and sum(map(sum, runs)) < 12:
            runs.append(self.editing.edit(batch, steps))
        name = f"edit.batch_{batch}.steps_{steps}"
        total = statistics.median(map(sum, runs))
        yield f"{name}.total_s", total
        yield f"{name}.derive_s", statistics.median(derive for derive, _ in runs)
        yield f"{name}.render_s", statistics.median(render for _, render in runs)
        yield f"{name}.peak_gb", memory_bytes(self.device) / GB
        bound = self.bound_s(batch, steps)
        yield f"{name}.bound_s", bound
        yield f"{name}.bound_share", bound / total

    def write_bundle(self) -> Figures:
        """Writes the model as a bundle, checksums included."""
        num_bytes = bytes_of(self.editing.mllm, self.editing.edit_head, self.editing.unet, self.editing.vae)
        free = shutil.disk_usage(self.folder).free
        if free < 1.1 * num_bytes:
            raise OSError(f"{free / GB:.1f} GB are free on disk; {1.1 * num_bytes / GB:.1f} GB are needed")
        yield "load.write_s", self.timer.once(lambda: self.editing.save(self.folder / "bundle"))
        yield "load.bundle_gb", sum(path.stat().st_size for path in (self.folder / "bundle").rglob("*.*")) / GB

    def load(self, *, cached: bool) -> Figures:
        """Reads it back, both halves."""
        if not cached:
            drop_from_cache((self.folder / "bundle").rglob("*.*"))
        bundle, name = Bundle(self.folder / "bundle"), "load.cached" if cached else "load.dropped"
        halves = {"conditioner": bundle.load_conditioner, "renderer": bundle.load_renderer}
        total, kept = 0.0, []  # kept: both are on the device in the end
        for half, load in halves.items():
            seconds = self.timer.once(
                lambda load=load: kept.append(load(device=str(self.device), dtype=name_of(self.dtype)))
            )
            yield f"{name}.{half}_s", seconds
            total += seconds
        yield f"{name}.gb_per_s", self.figures["load.bundle_gb"] / total

    def give_back(self) -> None:
        """Training has the device for itself."""
        self.model = None
        free_memory()

    @cached_property
    def rows(self) -> Examples:
        """Drawn training rows."""
        folder = self.folder / "rows"
        folder.mkdir()
        draw_rows(folder, self.plan.num_rows)
        return Examples(folder / TRAIN_FILE, lambda uri: (folder / uri).read_bytes())

    @cached_property
    def trained(self) -> TrainingModel:
        """The model as it trains; weights go on changing from part to part."""
        return random_model(self.plan.sizes, TrainingConfig(dtype=train_dtype(self.device)), self.device)

    def train(self, batch: int) -> Figures:
        """Steps of the trainer."""
        num_steps, num_warm_up = self.plan.repeats + 2, 2
        config = TrainingConfig(
            global_batch=batch, micro_batch=min(batch, MICRO_BATCH), dtype=train_dtype(self.device), steps=num_steps
        )
        loader = StepLoader(
            self.trained.batch_maker([self.rows], config),
            MixedOrder([len(self.rows)], seed=0),
            global_batch=batch,
            micro_batch=config.micro_batch,
        )
        self.trained.model.zero_grad()  # what an earlier part left
        reset_peak()
        records: list[StepRecord] = []
        for _ in Trainer(self.trained.model, config, loader, on_step=records.append).run(num_steps):
            pass
        kept = records[num_warm_up:]
        yield f"train.batch_{batch}.step_s", statistics.median(record.step_s for record in kept)
        yield f"train.batch_{batch}.samples_per_s", statistics.median(record.samples_per_s for record in kept)
        yield f"train.batch_{batch}.wait_share", statistics.median(record.wait_share for record in kept)
        yield f"train.batch_{batch}.peak_gb", kept[-1].memory_bytes / GB
        if kept[-1].flops_utilisation is not None:
            yield f"train.batch_{batch}.datasheet_share", kept[-1].flops_utilisation
        yield f"train.batch_{batch}.loss", kept[-1].loss  # a figure must be finite


def train_dtype(device: torch.device) -> ComputeDtype:
    """What training computes in; never float16."""
    return "bfloat16" if device.type == "cuda" else "float32"


def reset_peak() -> None:
    """What was most in memory is forgotten (of a GPU; a process cannot)."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def drop_from_cache(files: Iterable[Path]) -> None:
    """Has the system forget what it holds of these files, where it can be told so."""
    os.sync()  # what is not yet written cannot be dropped
    with contextlib.suppress(AttributeError):  # not on macOS
        for path in files:
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# ---- the run


def measure(bench: Bench, report: Report) -> None:
    """All parts, with the seconds that each may be expected to take on one H200."""
    plan = bench.plan

    def run(part: str, work: Callable[[], Figures], seconds: float, needs: str = "build") -> None:
        report.run(part, work, needs_s=seconds * plan.pace, needs=needs)

    run("ceilings", bench.ceilings, 5, needs="")
    run("build", bench.build, 40, needs="ceilings")
    for batch in plan.batches:
        run(f"networks batch {batch}", partial(bench.networks, batch), 10)
    for batch in plan.batches:
        run(f"llm batch {batch}", partial(bench.llm, batch), 20)
    for steps in plan.steps:
        for batch in plan.batches:
            run(f"edit batch {batch} steps {steps}", partial(bench.edit, batch, steps), 20)
    run("load write", bench.write_bundle, 75 + 100)  # of which 100 are training's
    bench.give_back()
    for i, batch in enumerate(plan.train_batches):
        run(f"train batch {batch}", partial(bench.train, batch), 20 if i else 60, needs="")
    vars(bench).pop("trained", None)
    free_memory()
    for name, cached in (("cached", True), ("dropped", False)):
        run(f"load {name}", partial(bench.load, cached=cached), 40, needs="load write")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    parser.add_argument("--dtype", default="auto", help="of all but the VAE: auto, float32, float16, bfloat16")
    parser.add_argument("--size", default="auto", choices=("auto", *PLANS), help="auto: real on a GPU, else tiny")
    parser.add_argument("--budget-s", type=float, default=420.0, help="no part begins that would not end by then")
    parser.add_argument("--new-tokens", type=int, default=None, help="of each answer; default 96, tiny 4")
    parser.add_argument("--skip", nargs="*", default=[], choices=GROUPS, help="parts, and so those that need them")
    parser.add_argument("--folder", type=Path, default=None, help="where the bundle is written; 17 GB")
    parser.add_argument("--out", type=Path, default=None, help="JSON file, kept up to date from the start")
    parser.add_argument("--threads", type=int, default=1, help="of torch on a CPU")
    return parser.parse_args()


def facts_of(size: str, device: torch.device, dtype: torch.dtype, *, new_tokens: int) -> dict[str, Any]:
    """What the figures are of."""
    is_cuda = device.type == "cuda"
    return {
        "size": size,
        "device": torch.cuda.get_device_name(device) if is_cuda else f"{os.cpu_count()} CPUs, {torch.get_num_threads()} thread(s)",
        "device_memory_gb": round(torch.cuda.get_device_properties(device).total_memory / GB, 1) if is_cuda else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "transformers": transformers.__version__,
        "diffusers": diffusers.__version__,
        "dtype": name_of(dtype),
        "train_dtype": train_dtype(device),
        "side_px": PLANS[size].side_px,
        "new_tokens": new_tokens,
    }  # fmt: skip


def main() -> None:
    """Measures, prints."""
    args = parse()
    device = resolve_device(args.device)
    dtype = resolve_dtype(args.dtype, device)
    size = args.size if args.size != "auto" else "real" if device.type == "cuda" else "tiny"
    plan = PLANS[size]
    new_tokens = args.new_tokens or plan.new_tokens
    if device.type == "cpu":
        torch.set_num_threads(args.threads)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    facts = facts_of(size, device, dtype, new_tokens=new_tokens)
    print(", ".join(f"{name} {value}" for name, value in facts.items() if value is not None), flush=True)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
    report = Report(facts, steps=plan.steps[0], budget_s=args.budget_s, skip=args.skip, out=args.out)
    with tempfile.TemporaryDirectory(prefix="mgie-bench-", dir=args.folder) as folder:
        bench = Bench(plan, device, dtype, Path(folder), new_tokens=new_tokens, figures=report.figures)
        measure(bench, report)
    print(json.dumps(report.result()))
    sys.exit(int(any(reason != OUT_OF_MEMORY for reason in report.failed.values())))


if __name__ == "__main__":
    main()
