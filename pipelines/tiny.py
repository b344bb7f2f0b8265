#!/usr/bin/env python
"""Nothing -> the embedded bundles: makes the tiny world and trains every tiny model on it. `make tiny` runs it.

    world -> pictures and words -> VAE, CLIP -> LLaVA -> Flan-T5 -> InstructPix2Pix
          -> labels (pipelines/summarize.py by those very models) -> MGIE end to end (pipelines/train.py)

Each stage is a command, which is shown (`pipelines/runs/recipe.py`). The same command goes on where it was stopped, and after
a change makes again what the change concerns. Seeds are fixed. On two cores it takes about three hours;
`--share 0.1` runs a tenth of the samples and steps, for a trial; with a GPU's budget, `--gpu --share 4` four times as many.
"""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from mgie.bundle.shipped import SHIPPED
from mgie.errors import ConfigError
from mgie.storage.folder import open_folder
from mgie.tiny.pretraining.__main__ import num_samples
from pipelines.runs.command import Ending, run_command
from pipelines.runs.config_file import write_config
from pipelines.runs.recipe import Stage, make

_LEARN = ("-m", "mgie.tiny.pretraining")
_EXPORT = ("-c", "from mgie.cli import main; main()", "export")
_WORLD = ("mgie/tiny/world",)
# The bundles' records, which hold a digest of each file.
_SHIPPED = tuple(f"mgie/bundle/shipped/{name}/bundle.json" for name in SHIPPED)
_LOOP = ("mgie/tiny/pretraining/loop.py", "mgie/tiny/pretraining/corpus.py")


@dataclass(frozen=True, kw_only=True)
class TinyConfig:
    """Trains the embedded bundles."""

    work: Path = Path("out/tiny")
    "where the stages are kept, about 6 GB"
    share: float = 1.0
    "share of samples and steps: 0.1 for a trial, above 1 for better models than three hours on two cores give"
    gpu: bool = False
    "train the UNets on one GPU; the other stages, which are smaller, stay on CPUs"
    parallel: int = 2
    "stages at a time, one CPU each"
    until: str = ""
    "the last stage to run, with all that it needs; none: all"

    def __post_init__(self) -> None:
        if not 0 < self.share <= 100:
            raise ConfigError(f"share is {self.share}; it must be above 0 and at most 100", param="share")
        if self.parallel < 1:
            raise ConfigError(f"parallel is {self.parallel}; it must be at least 1", param="parallel")
        if self.until and self.until not in STAGES:
            raise ConfigError(f"until is {self.until!r}; it must be one of {', '.join(STAGES)}", param="until")


def _learn(stage: str, *needs: str, code: Sequence[str] = ()) -> Stage:
    given = [part for name in needs for part in (f"--{name}", f"{{{name}}}")]
    arguments = (*_LEARN, "--stage", stage, "--out", "{out}", "--share", "{share}", *given)
    return Stage(arguments=arguments, needs=needs, code=tuple(code))


# Two hundred steps a checkpoint; rates and weights for a UNet that begins from nothing and has little time.
_TRAIN = (
    "pipelines/train.py", "--workers.num", "1", "--threads", "1", "--loader-threads", "1", "--checkpoint-every", "200",
    "--validate-every", "500", "--sample-every", "500", "--sample-steps", "4", "--training.dtype", "bfloat16",
    "--training.optimizer.beta2", "0.98", "--training.optimizer.weight-decay", "0.01",
    "--training.objective.condition-dropout", "0.03", "--training.objective.timestep-shift", "2.0",
    "--training.objective.change-weight", "4.0", "--training.global-batch", "32",
    "--training.optimizer.lr-tokens", "5e-4", "--training.optimizer.lr-edit-head", "1e-3",
)  # fmt: skip
_PREPARE = ("pipelines/prepare.py", "--layout", "parquet", "--dataset", "tiny-world", "--keeps-near-duplicates")
_KEEP = ("--columns.mask", "mask", "--columns.keep", "operation", "family", "is_ambiguous", "held_out", "tiny_world")
_SUMMARIZE = ("pipelines/summarize.py", "--describe-model", "{llava}/bundle", "--summarize-model",
              "{summarizer}/bundle", "--preset", "fast")  # fmt: skip


def training(variant: str, start: str, steps: str, *more: str, rows: str) -> Stage:
    """Trains a variant.

    Args:
        start: Stage whose bundle it begins with. rows: `manifest` or `ledger`.
        steps: Steps, as an argument of a stage.
    """
    arguments = (
        *_TRAIN, "--training.variant", variant, "--ledger",
        "{manifest}/run/manifest" if rows == "manifest" else "{ledger}/ledger", "--cache", "{cache}/cache",
        "--init", f"{{{start}}}/bundle", "--out", "{out}/run", "--training.steps", steps, *more,
    )  # fmt: skip
    return Stage(arguments=arguments, needs=(rows, "cache", start))


def export(run: str, name: str) -> Stage:
    """Makes a bundle of what the stage `run` has trained."""
    arguments = (*_EXPORT, f"{{{run}}}/run", "--out", "{out}/bundle", "--name", name)
    return Stage(arguments=arguments, needs=(run,))


def held_out(num_rows: str) -> dict[str, Stage]:
    """Stages that make held-out edits, and LLaVA's and Flan-T5's words for them."""
    return {
        "test-raw": Stage(
            arguments=(*_LEARN, "--stage", "test-raw", "--out", "{out}", "--rows", num_rows), code=_WORLD
        ),
        "test-manifest": Stage(
            arguments=(*_PREPARE, *_KEEP, "--input", "{test-raw}", "--out", "{out}/run"), needs=("test-raw",)
        ),
        "test-ledger": Stage(
            arguments=(*_SUMMARIZE, "--manifest", "{test-manifest}/run/manifest", "--out", "{out}/ledger"),
            needs=("test-manifest", "llava", "summarizer"),
        ),
    }


def scoring(bundle: str, *more: str) -> Stage:
    """Edits the held-out rows with the bundle of a stage, and scores the edits."""
    arguments = (
        "pipelines/evaluate.py", "--ledger", "{test-ledger}/ledger", "--bundle", f"{{{bundle}}}/bundle",
        "--out", "{out}/scores", "--scorer", "mgie.tiny.world.scorer:WorldScorer", "--by", "family", "operation", "is_ambiguous", "held_out", *more,
    )  # fmt: skip
    return Stage(arguments=arguments, needs=("test-ledger", bundle))


STAGES: Mapping[str, Stage] = {
    "corpus": _learn("corpus", code=_WORLD),
    "raw": _learn("raw", code=_WORLD),
    "vae": _learn("vae", "corpus", code=(*_LOOP, "mgie/tiny/pretraining/vae.py")),
    "clip": _learn("clip", "corpus", code=(*_LOOP, "mgie/tiny/pretraining/clip.py", "mgie/model/tokenizer_training.py")),
    "llava": _learn("llava", "corpus", "clip", code=(*_LOOP, "mgie/tiny/pretraining/llava.py")),
    "summarizer": _learn("summarizer", "corpus", code=(*_LOOP, "mgie/tiny/pretraining/summarizer.py")),
    "ip2p-start": _learn("ip2p-start", "clip", "vae", code=("mgie/tiny/pretraining/bundles.py",)),
    "manifest": Stage(arguments=(*_PREPARE, "--input", "{raw}", "--out", "{out}/run"), needs=("raw",)),
    "cache": Stage(
        arguments=("pipelines/cache.py", "--ledger", "{manifest}/run/manifest", "--bundle", "{ip2p-start}/bundle",
                   "--out", "{out}/cache"),
        needs=("manifest", "ip2p-start"),
    ),
    "ip2p": training(
        "ip2p", "ip2p-start", "{5000*share}", "--training.micro-batch", "32",
        "--training.optimizer.lr-unet", "1e-3", "--training.optimizer.lr-text-encoder", "3e-4", rows="manifest",
    ),
    "ip2p-bundle": export("ip2p", "ip2p-tiny"),
    "ledger": Stage(
        arguments=(*_SUMMARIZE, "--manifest", "{manifest}/run/manifest", "--out", "{out}/ledger"),
        needs=("manifest", "llava", "summarizer"),
    ),
    "mgie-start": Stage(
        arguments=(*_LEARN, "--stage", "mgie-start", "--out", "{out}", "--llava", "{llava}", "--vae", "{vae}",
                   "--ip2p", "{ip2p-bundle}/bundle", "--corpus", "{corpus}", "--share", "{share}"),
        needs=("llava", "vae", "ip2p-bundle", "corpus"),
        code=(*_LOOP, "mgie/tiny/pretraining/bundles.py", "mgie/tiny/pretraining/edit_head.py"),
    ),
    "mgie": training(
        "e2e", "mgie-start", "{5000*share}", "--training.micro-batch", "16", "--training.optimizer.lr-unet", "5e-4",
        rows="ledger",
    ),
    "mgie-bundle": export("mgie", "mgie-tiny"),
    "packed": Stage(
        arguments=(*_LEARN, "--stage", "pack", "--out", "{out}", "--mgie", "{mgie-bundle}/bundle", "--llava", "{llava}",
                   "--summarizer", "{summarizer}"),
        needs=("mgie-bundle", "llava", "summarizer"),
        code=("mgie/bundle/shipped.py",),
    ),
    **held_out("{1000*share}"),
    "scores": scoring("mgie-bundle"),
}  # fmt: skip


def with_shipped(stages: Mapping[str, Stage]) -> dict[str, Stage]:
    """The stages, with the package's own VAE, LLaVA and Flan-T5 instead of ones that they train."""
    taken = {name: _learn(f"shipped-{name}", code=_SHIPPED) for name in ("vae", "llava", "summarizer")}
    return {name: taken.get(name, stage) for name, stage in stages.items()}


def on_gpu(stages: Mapping[str, Stage]) -> dict[str, Stage]:
    """The stages, with a GPU for each that trains a UNet."""
    gpu = ("--workers.num-gpus", "1")
    return {
        name: dataclasses.replace(stage, arguments=(*stage.arguments, *gpu))
        if stage.arguments[0] == _TRAIN[0]
        else stage
        for name, stage in stages.items()
    }


def _run(config: TinyConfig, *, console: Console) -> Ending:
    console.print(f"{num_samples(config.share)} samples, share {config.share} of all steps, in {config.work}")
    write_config(open_folder(config.work), config)
    places = make(
        on_gpu(STAGES) if config.gpu else STAGES,
        config.work.resolve(),
        share=config.share,
        parallel=config.parallel,
        console=console,
        until=[config.until] if config.until else (),
    )
    shipped, scores = places["packed"] / "shipped", places["scores"] / "scores"
    return Ending(said=f"to ship (mgie/bundle/shipped): {shipped}\nscores: {scores}")


def main() -> int:
    """The recipe as a command; returns the exit status."""
    return run_command(TinyConfig, _run, about=__doc__)


if __name__ == "__main__":
    sys.exit(main())
