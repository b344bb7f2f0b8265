"""Places in the sample order -> micro-batches with their random draws, prepared ahead of the training step.

Knows nothing of models but the shapes they take, nor of how steps use what is prepared.
"""

import itertools
import math
import re
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
from PIL import Image

from mgie.config import AugmentConfig
from mgie.data.collate import ConversationCollator, EditExample, EncoderCollator, pixel_pair, vision_pixels
from mgie.data.examples import ExampleRow, Examples
from mgie.data.latent_reader import LatentCache
from mgie.data.order import MixedOrder, Place
from mgie.data.randomness import VALIDATION_EPOCH, SampleKey, generator, training_draws
from mgie.errors import ConfigError
from mgie.images.pixels import ClipPixels
from mgie.model.batch import Conversations, EncoderWords, MomentPair, PixelPair, TrainingBatch, TrainingDraws

_SIDES = re.compile(r"\b(left|right)\b", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Samples that pass through the model together."""

    batch: TrainingBatch
    draws: TrainingDraws
    ids: tuple[int, ...]
    num_label_tokens: int
    num_tokens: int
    "without padding"

    @property
    def num_samples(self) -> int:
        """B."""
        return len(self.ids)


@dataclass(frozen=True, kw_only=True)
class StepWork:
    """One worker's share of a step."""

    step: int
    "from 0"
    micro_batches: tuple[MicroBatch, ...]
    wait_s: float
    "how long the step had to wait for it"


class BatchMaker:
    """Makes micro-batches.

    Args:
        sources: The ledgers' rows, in the order's numbering.
        collate: Makes the batch that the model reads.
        clip_pixels: Preprocessing of the vision tower; None where the LLM does not look, or reads `features`.
        moments, features: Caches that hold all rows; None = images are read and encoded in the step.
        latent_shape: c, h, w.

    Raises:
        ConfigError: Augmentation and caches at once: a cache knows only the images as they are.
    """

    def __init__(
        self,
        sources: Sequence[Examples],
        *,
        collate: ConversationCollator | EncoderCollator,
        clip_pixels: ClipPixels | None,
        image_side_px: int,
        latent_shape: tuple[int, int, int],
        num_timesteps: int,
        seed: int,
        augment: AugmentConfig | None = None,
        moments: LatentCache | None = None,
        features: LatentCache | None = None,
    ) -> None:
        self._augment = augment or AugmentConfig()
        if self._augment.is_on and (moments or features):
            raise ConfigError(
                "augmentation changes the images, a cache holds them unchanged; give only one", param="augment"
            )
        self._sources, self._collate, self._clip_pixels = sources, collate, clip_pixels
        self._side_px, self._latent_shape, self._num_timesteps = image_side_px, latent_shape, num_timesteps
        self._seed, self._moments, self._features = seed, moments, features

    def row(self, place: Place) -> ExampleRow:
        """The row at a place."""
        return self._sources[place.source].row(place.row)

    def __call__(self, places: Sequence[Place], *, is_validation: bool = False) -> MicroBatch:
        """The micro-batch of these places, on the CPU.

        Raises:
            DataError: An image cannot be read.
        """
        rows = [self.row(place) for place in places]
        keys = [
            SampleKey(VALIDATION_EPOCH if is_validation else place.epoch, row.id)
            for place, row in zip(places, rows, strict=True)
        ]
        ids = [row.id for row in rows]
        of = [self._sources[place.source] for place in places]
        sources: list[Image.Image] = []
        if self._moments is not None:
            images: PixelPair | MomentPair = self._moments.moments(ids)
            if self._looks:
                sources = [source.read_source(row) for source, row in zip(of, rows, strict=True)]
        else:
            examples = [source.read(row) for source, row in zip(of, rows, strict=True)]
            if self._augment.is_on and not is_validation:
                examples = [
                    augment(e, self._augment, generator(self._seed, key, "augment"))
                    for e, key in zip(examples, keys, strict=True)
                ]
            images = pixel_pair(examples, self._side_px)
            sources = [example.source for example in examples]
        words = self._words([(row.instruction, row.expressive) for row in rows], ids, sources)
        draws = training_draws(self._seed, keys, latent_shape=self._latent_shape, num_timesteps=self._num_timesteps)
        if is_validation:
            draws = replace(draws, dropout_u=torch.ones(len(rows)))
        return MicroBatch(
            batch=TrainingBatch(words=words, images=images),
            draws=draws,
            ids=tuple(ids),
            num_label_tokens=len(words.label_ids) if isinstance(words, Conversations) else 0,
            num_tokens=int(words.mask.sum()) if isinstance(words, Conversations) else words.input_ids.numel(),
        )

    @property
    def _looks(self) -> bool:
        """Whether the vision tower runs in the step."""
        return self._clip_pixels is not None and self._features is None

    def _words(
        self, words: Sequence[tuple[str, str]], ids: Sequence[int], sources: Sequence[Image.Image]
    ) -> Conversations | EncoderWords:
        if isinstance(self._collate, EncoderCollator):
            return self._collate(words)
        if self._features is not None:
            return self._collate(words, features=self._features.features(ids))
        if self._clip_pixels is None:
            return self._collate(words)
        return self._collate(words, clip_pixels=vision_pixels(sources, self._clip_pixels))


class StepLoader:
    """One worker's share of every step, prepared ahead by threads.

    A step's samples are sorted by the length of their words and dealt out to the workers in turn, then cut into as few
    micro-batches as their size allows, of equal size: each holds rows of similar length, and the workers have equal work.

    Args:
        ahead: Micro-batches that are prepared before they are asked for.
    """

    def __init__(
        self,
        maker: BatchMaker,
        order: MixedOrder,
        *,
        global_batch: int,
        micro_batch: int,
        rank: int = 0,
        world_size: int = 1,
        num_threads: int = 2,
        ahead: int = 8,
    ) -> None:
        if global_batch < world_size:
            raise ConfigError(
                f"global_batch is {global_batch}; each of {world_size} workers needs a sample", param="global_batch"
            )
        self._maker, self._order, self._global_batch, self._micro_batch = maker, order, global_batch, micro_batch
        self._rank, self._world_size, self._num_threads, self._ahead = rank, world_size, num_threads, ahead
        # The same for all workers, though some may have a sample less.
        self._num_parts = math.ceil(math.ceil(global_batch / world_size) / micro_batch)

    def places(self, step: int) -> list[list[Place]]:
        """This worker's micro-batches of a step."""
        first = step * self._global_batch
        places = [self._order[index] for index in range(first, first + self._global_batch)]
        places.sort(key=self._length)  # stable
        own = places[self._rank :: self._world_size]
        parts = min(self._num_parts, len(own))
        edges = [len(own) * part // parts for part in range(parts + 1)]
        return [own[start:end] for start, end in itertools.pairwise(edges)]

    @property
    def is_even(self) -> bool:
        """Whether every worker has as many micro-batches as every other."""
        return self._num_parts <= self._global_batch // self._world_size

    def _length(self, place: Place) -> int:
        row = self._maker.row(place)
        return len(row.instruction) + len(row.expressive)

    def steps(self, first: int, end: int) -> Iterator[StepWork]:
        """The work of steps `first` to `end` - 1."""
        pool = ThreadPoolExecutor(self._num_threads, thread_name_prefix="batches")
        waiting: deque[tuple[int, list[Future[MicroBatch]]]] = deque()
        following = first
        try:
            while following < end or waiting:
                while following < end and sum(len(futures) for _, futures in waiting) < self._ahead:
                    parts = self.places(following)
                    waiting.append((following, [pool.submit(self._maker, part) for part in parts]))
                    following += 1
                step, futures = waiting.popleft()
                started = time.perf_counter()
                micro_batches = tuple(future.result() for future in futures)
                yield StepWork(step=step, micro_batches=micro_batches, wait_s=time.perf_counter() - started)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def augment(example: EditExample, config: AugmentConfig, random: torch.Generator) -> EditExample:
    """The example with source and goal cropped and mirrored alike.

    Images may differ in size: the crop is a share of each one's centre square.
    """
    u = torch.rand(4, generator=random, dtype=torch.float64).tolist()
    side = 1 - config.crop * u[0]
    left, top = (1 - side) * u[1], (1 - side) * u[2]
    is_mirrored = u[3] < config.flip and not _SIDES.search(f"{example.instruction} {example.expressive}")

    def change(image: Image.Image) -> Image.Image:
        square = min(image.size)
        x, y = (image.width - square) / 2 + left * square, (image.height - square) / 2 + top * square
        corner = (round(x), round(y))
        cropped = image.crop((*corner, corner[0] + round(side * square), corner[1] + round(side * square)))
        return cropped.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if is_mirrored else cropped

    return replace(example, source=change(example.source), goal=change(example.goal))
