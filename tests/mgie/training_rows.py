"""What the tests of training share: drawn rows on disk, and a trainer over them."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from mgie.bundle.bundle import Bundle
from mgie.config import TrainingConfig
from mgie.data.examples import TRAIN_FILE, Examples, freeze_examples
from mgie.data.ledger import LEDGER_SCHEMA
from mgie.data.loader import StepLoader
from mgie.data.order import MixedOrder
from mgie.model.mgie import LatentDiffusion
from mgie.training.trainer import StepRecord, Trainer
from mgie.training.variants import load_training_model

WORDS = ["make it night", "add a red balloon above the house", "winter", "turn the day into dusk, and warm"]


def draw_rows(folder: Path, count: int = 12, *, seed: int = 0, side_px: int = 48) -> Path:
    """Images `<i>-source.png`, `<i>-goal.png`, and frozen rows of different lengths; returns `folder`."""
    rng = np.random.default_rng(seed)
    rows = []
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        for name in ("source", "goal"):
            pixels = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((side_px + i % 3 * 8, side_px)).save(folder / f"{i}-{name}.png")
        row = {
            "id": 1000 + 7 * i,
            "dataset": "drawn",
            "split": "train",
            "session": None,
            "source": f"{i}-source.png",
            "goal": f"{i}-goal.png",
            "instruction": WORDS[i % len(WORDS)],
            "expressive": "The sky would be dark. " * (i % 4 + 1),
        }
        rows.append(row)
    freeze_examples([pa.RecordBatch.from_pylist(rows, LEDGER_SCHEMA)], folder, validation_share=0.0)
    return folder


def open_rows(folder: Path) -> Examples:
    """The training rows in `folder`."""
    return Examples(folder / TRAIN_FILE, lambda uri: (folder / uri).read_bytes())


def make_trainer(
    bundle: Bundle,
    rows: Examples,
    config: TrainingConfig,
    *,
    rank: int = 0,
    world_size: int = 1,
    on_step: Callable[[StepRecord], None] | None = None,
    change: Callable[[LatentDiffusion], None] | None = None,
) -> Trainer:
    """A trainer on the CPU; `change` may alter the model before it is wrapped."""
    torch.manual_seed(0)
    made = load_training_model(bundle, config, device="cpu")
    if change is not None:
        change(made.model)
    loader = StepLoader(
        made.batch_maker([rows], config),
        MixedOrder([len(rows)], seed=config.seed),
        global_batch=config.global_batch,
        micro_batch=config.micro_batch,
        rank=rank,
        world_size=world_size,
        num_threads=1,
    )
    return Trainer(made.model, config, loader, on_step=on_step or (lambda record: None))


def encode_png(image: Image.Image) -> bytes:
    """As the rows' images are stored."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
