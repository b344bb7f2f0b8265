"""`python -m mgie.tiny.pretraining STAGE ...`: one stage of the recipe, see `pipelines/tiny.py`, which runs them all."""

import dataclasses
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from diffusers import AutoencoderKL
from transformers import CLIPModel, CLIPTokenizer

from mgie.bundle.bundle import Bundle
from mgie.bundle.shipped import ShippedName, pack, shipped_folder, unpack
from mgie.bundle.untrained import corpus_lines
from mgie.model.tokenizer_training import clip_tokenizer, llama_tokenizer, t5_tokenizer
from mgie.tiny.pretraining import bundles as editor
from mgie.tiny.pretraining import clip, llava, summarizer, vae
from mgie.tiny.pretraining import edit_head as head
from mgie.tiny.pretraining.corpus import SHARD_SAMPLES, Corpus
from mgie.tiny.pretraining.loop import LoopConfig
from mgie.tiny.world import write_layout

_SEED = 5  # of the world
_NUM_SAMPLES = 40_000
_NUM_MERGES, _NUM_PIECES = 1500, 2000


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One stage: reads the folders of earlier ones, writes its own."""

    stage: str
    """corpus, raw, test-raw, vae, clip, llava, summarizer, ip2p-start, mgie-start or pack; shipped-vae, shipped-llava and
    shipped-summarizer take what the package brings instead of training it"""
    out: Path
    "folder of the stage"
    corpus: Path | None = None
    "folder of the stage `corpus`"
    vae: Path | None = None
    "folder of the stage `vae`"
    clip: Path | None = None
    "folder of the stage `clip`"
    llava: Path | None = None
    "folder of the stage `llava`"
    summarizer: Path | None = None
    "folder of the stage `summarizer`"
    ip2p: Path | None = None
    "bundle of a trained InstructPix2Pix, whose UNet is taken"
    mgie: Path | None = None
    "bundle of a trained MGIE"
    share: float = 1.0
    "share of samples and steps: less for a trial"
    rows: int = 1000
    "samples of `test-raw`"
    processes: int = 1
    "that make samples"


def run(config: StageConfig) -> None:
    """Runs a stage to its end, or on from where it was stopped."""
    config.out.mkdir(parents=True, exist_ok=True)
    _STAGES[config.stage](config)


def num_samples(share: float) -> int:
    """Samples of the corpus."""
    return max(1, round(_NUM_SAMPLES * share / SHARD_SAMPLES)) * SHARD_SAMPLES


def _given(path: Path | None) -> Path:
    if path is None:
        raise SystemExit("error: this stage needs another stage's folder; see pipelines/tiny.py")
    return path


def _corpus(config: StageConfig, folder: Path | None) -> Corpus:
    return Corpus(_given(folder), num_samples(config.share), seed=_SEED)


def _learning(config: StageConfig, loop: LoopConfig) -> dict[str, Any]:
    """How a stage learns, and where it keeps what is needed to go on."""
    loop = dataclasses.replace(loop, steps=max(1, round(loop.steps * config.share)))
    return {"state_file": config.out / "state.safetensors", "loop": loop, "log": config.out / "log.jsonl"}


def _texts(corpus: Corpus) -> Iterator[str]:
    yield from corpus_lines()
    for words in corpus.words[:20_000]:
        yield from dataclasses.astuple(words)


def _learn_vae(config: StageConfig) -> None:
    model = vae.learn_vae(_corpus(config, config.corpus), **_learning(config, vae.LOOP))
    model.save_pretrained(config.out / "vae")


def _learn_clip(config: StageConfig) -> None:
    corpus = _corpus(config, config.corpus)
    tokenizer = clip_tokenizer(_texts(corpus), _NUM_MERGES)
    model = clip.learn_clip(corpus, tokenizer, **_learning(config, clip.LOOP))
    model.save_pretrained(config.out / "clip")
    tokenizer.save_pretrained(config.out / "clip")


def _learn_llava(config: StageConfig) -> None:
    corpus = _corpus(config, config.corpus)
    tokenizer = llama_tokenizer(_texts(corpus), _NUM_PIECES)
    model = llava.learn_llava(corpus, tokenizer, _load_clip(config), **_learning(config, llava.LOOP))
    editor.write_llava(config.out / "bundle", llava=model, tokenizer=tokenizer)


def _learn_summarizer(config: StageConfig) -> None:
    corpus = _corpus(config, config.corpus)
    tokenizer = t5_tokenizer(_texts(corpus), _NUM_PIECES, config.out, character_coverage=1.0)
    model = summarizer.learn_summarizer(corpus, tokenizer, **_learning(config, summarizer.LOOP))
    editor.write_summarizer(config.out / "bundle", model=model, tokenizer=tokenizer)


def _start_ip2p(config: StageConfig) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(_given(config.clip) / "clip", local_files_only=True)
    editor.write_text_editor(config.out / "bundle", clip=_load_clip(config), tokenizer=tokenizer, vae=_load_vae(config))


def _start_mgie(config: StageConfig) -> None:
    bundle = Bundle(_given(config.llava) / "bundle")
    tokenizer = bundle.load_tokenizer()
    model = bundle.load_mllm(tokenizer, torch.float32)
    tokenizer, edit_head = editor.add_visual_tokens(model, tokenizer)
    ip2p = Bundle(_given(config.ip2p))
    text_tokenizer, text_encoder = ip2p.load_text_encoder()
    head.learn_head(
        _corpus(config, config.corpus), llava=model, tokenizer=tokenizer, head=edit_head, text_encoder=text_encoder,
        text_tokenizer=text_tokenizer, **_learning(config, head.LOOP),
    )  # fmt: skip
    editor.write_mgie(
        config.out / "bundle", llava=model, tokenizer=tokenizer, head=edit_head, vae=_load_vae(config),
        unet=ip2p.load_unet(),
    )  # fmt: skip


def _pack(config: StageConfig) -> None:
    folders = {
        "tiny": _given(config.mgie),
        "tiny-llava": _given(config.llava) / "bundle",
        "tiny-summarizer": _given(config.summarizer) / "bundle",
    }
    pack({name: Bundle(folder) for name, folder in folders.items()}, config.out / "shipped")


def _take_vae(config: StageConfig) -> None:
    _take(config, "tiny")
    shutil.rmtree(config.out / "vae", ignore_errors=True)
    (config.out / "bundle" / "vae").rename(config.out / "vae")
    shutil.rmtree(config.out / "bundle")


def _take(config: StageConfig, name: ShippedName) -> None:
    shutil.rmtree(config.out / "bundle", ignore_errors=True)
    unpack(shipped_folder(), name, config.out / "bundle")


def _load_clip(config: StageConfig) -> CLIPModel:
    return CLIPModel.from_pretrained(_given(config.clip) / "clip", local_files_only=True)


def _load_vae(config: StageConfig) -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(_given(config.vae) / "vae", local_files_only=True)


_STAGES: dict[str, Callable[[StageConfig], None]] = {
    "corpus": lambda config: _corpus(config, config.out).make(num_processes=config.processes),
    "raw": lambda config: write_layout("parquet", config.out, num_samples(config.share), seed=_SEED),
    "test-raw": lambda config: write_layout("parquet", config.out, config.rows, seed=_SEED, split="test"),
    "vae": _learn_vae,
    "clip": _learn_clip,
    "llava": _learn_llava,
    "summarizer": _learn_summarizer,
    "ip2p-start": _start_ip2p,
    "mgie-start": _start_mgie,
    "pack": _pack,
    "shipped-vae": _take_vae,
    "shipped-llava": lambda config: _take(config, "tiny-llava"),
    "shipped-summarizer": lambda config: _take(config, "tiny-summarizer"),
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    given = tyro.cli(StageConfig)
    if given.stage not in _STAGES:
        sys.exit(f"error: stage is {given.stage!r}; it must be one of {json.dumps(list(_STAGES))}")
    run(given)
