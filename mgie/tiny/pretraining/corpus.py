"""Samples of the world as arrays and texts on disk, made once and read by every stage that learns from them.

A corpus is a folder of shards, each a prefix of numbers of one split, so that a longer one goes on from a shorter one
and several processes can make it together.
"""

import dataclasses
import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mgie.storage.atomic import atomic_folder
from mgie.tiny.pretraining.patches import patch_labels
from mgie.tiny.world import make_sample
from mgie.tiny.world.samples import SIDE_PX, Split

SHARD_SAMPLES = 1000


@dataclass(frozen=True, kw_only=True)
class Words:
    """All words of a sample, see `mgie.tiny.world.Sample`."""

    instruction: str
    verbose: str
    expressive: str
    source_caption: str
    goal_caption: str


class Corpus:
    """Samples 0 to num_samples - 1 of a split.

    Args:
        folder: Where the shards are kept. num_samples: A multiple of `SHARD_SAMPLES`.
    """

    def __init__(self, folder: Path, num_samples: int, *, seed: int, split: Split = "train") -> None:
        if num_samples < 1 or num_samples % SHARD_SAMPLES:
            raise ValueError(f"num_samples is {num_samples}; it must be a multiple of {SHARD_SAMPLES}")
        self._shards = [
            folder / f"{split}-{seed}-{SIDE_PX}-{start:07d}" for start in range(0, num_samples, SHARD_SAMPLES)
        ]
        self._arguments = [(shard, seed, split, i * SHARD_SAMPLES) for i, shard in enumerate(self._shards)]
        self.num_samples = num_samples

    def make(self, *, num_processes: int = 1) -> None:
        """Makes the shards that are not there."""
        missing = [arguments for arguments in self._arguments if not arguments[0].is_dir()]
        if num_processes == 1:
            for arguments in missing:
                _make_shard(*arguments)
            return
        with ProcessPoolExecutor(num_processes, mp_context=get_context("spawn")) as pool:
            list(pool.map(_make_shard, *zip(*missing, strict=True))) if missing else None

    @cached_property
    def words(self) -> Sequence[Words]:
        """Words of every sample."""
        lines = (line for shard in self._shards for line in (shard / "words.jsonl").read_text().splitlines())
        return [Words(**json.loads(line)) for line in lines]

    @cached_property
    def _pictures(self) -> list[tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]]:
        return [
            (np.load(shard / "sources.npy", mmap_mode="r"), np.load(shard / "goals.npy", mmap_mode="r"))
            for shard in self._shards
        ]

    def sources(self, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        """Pictures before the edit, [B, S, S, 3]."""
        return self._picked(numbers, 0)

    def goals(self, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        """Pictures after the edit, [B, S, S, 3]."""
        return self._picked(numbers, 1)

    def patches(self, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """What the sources' patches show, [B, P, 3], see `patches.py`."""
        return np.stack([self._patches[n // SHARD_SAMPLES][n % SHARD_SAMPLES] for n in numbers.tolist()]).astype(
            np.int64
        )

    @cached_property
    def _patches(self) -> list[npt.NDArray[np.uint8]]:
        return [np.load(shard / "patches.npy") for shard in self._shards]

    def _picked(self, numbers: npt.NDArray[np.int64], which: int) -> npt.NDArray[np.uint8]:
        return np.stack([self._pictures[n // SHARD_SAMPLES][which][n % SHARD_SAMPLES] for n in numbers.tolist()])


def _make_shard(shard: Path, seed: int, split: Split, start: int) -> None:
    """One shard, whole or not at all."""
    samples = [make_sample(seed, split, start + i) for i in range(SHARD_SAMPLES)]
    names = [field.name for field in dataclasses.fields(Words)]
    lines = [json.dumps({name: getattr(sample, name) for name in names}) for sample in samples]
    with atomic_folder(shard) as draft:
        np.save(draft / "sources.npy", np.stack([sample.source_pixels for sample in samples]))
        np.save(draft / "goals.npy", np.stack([sample.goal_pixels for sample in samples]))
        np.save(draft / "patches.npy", np.stack([patch_labels(sample) for sample in samples]))
        (draft / "words.jsonl").write_text("\n".join(lines))
