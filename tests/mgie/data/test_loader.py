"""Micro-batches: who gets which samples, augmentation, and preparing ahead."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from mgie.bundle.bundle import Bundle
from mgie.config import AugmentConfig, TrainingConfig
from mgie.data.collate import EditExample, pixel_pair
from mgie.data.loader import BatchMaker, StepLoader, augment
from mgie.data.order import MixedOrder, Place
from mgie.errors import ConfigError, DataError
from mgie.model.batch import Conversations, PixelPair
from mgie.training.variants import load_training_model
from tests.mgie.training_rows import draw_rows, open_rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_rows(tmp_path_factory.mktemp("rows"), 20)


@pytest.fixture(scope="module")
def maker(folder: Path, random_bundle: Bundle) -> BatchMaker:
    config = TrainingConfig(image_side_px=32)
    return load_training_model(random_bundle, config, device="cpu").batch_maker([open_rows(folder)], config)


def _loader(maker: BatchMaker, *, rank: int = 0, world_size: int = 1, micro_batch: int = 3) -> StepLoader:
    order = MixedOrder([20], seed=1)
    return StepLoader(
        maker, order, global_batch=10, micro_batch=micro_batch, rank=rank, world_size=world_size, num_threads=2, ahead=4
    )


@pytest.mark.parametrize(
    ("global_batch", "micro_batch", "world_size", "is_even"),
    [(9, 4, 2, True), (32, 5, 3, True), (10, 3, 4, True), (9, 1, 2, False), (8, 1, 2, True)],
)
def test_workers_have_equal_numbers_of_micro_batches_wherever_that_can_be(
    maker: BatchMaker, global_batch: int, micro_batch: int, world_size: int, is_even: bool
) -> None:
    """Sharded weights are put together for every micro-batch: a worker with one more would wait for ever."""
    loaders = [
        StepLoader(
            maker,
            MixedOrder([20], seed=1),
            global_batch=global_batch,
            micro_batch=micro_batch,
            rank=rank,
            world_size=world_size,
        )
        for rank in range(world_size)
    ]
    parts = [loader.places(0) for loader in loaders]
    assert {loader.is_even for loader in loaders} == {is_even}
    assert (len({len(own) for own in parts}) == 1) == is_even
    assert all(0 < len(part) <= micro_batch for own in parts for part in own)
    assert sum(len(part) for own in parts for part in own) == global_batch


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_the_workers_shares_are_the_steps_samples(maker: BatchMaker, world_size: int) -> None:
    order = MixedOrder([20], seed=1)
    for step in (0, 1, 5):
        shares = [
            [place for part in _loader(maker, rank=rank, world_size=world_size).places(step) for place in part]
            for rank in range(world_size)
        ]
        dealt = [(p.epoch, p.row) for share in shares for p in share]
        expected = [(p.epoch, p.row) for p in (order[index] for index in range(step * 10, step * 10 + 10))]
        assert sorted(dealt) == sorted(expected)
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_micro_batches_hold_rows_of_similar_length(maker: BatchMaker) -> None:
    parts = _loader(maker).places(0)
    assert [len(part) for part in parts] == [2, 3, 2, 3]
    lengths = [len(maker.row(p).instruction + maker.row(p).expressive) for part in parts for p in part]
    assert lengths == sorted(lengths)


def test_steps_come_in_order_and_whole(maker: BatchMaker) -> None:
    loader = _loader(maker)
    works = list(loader.steps(2, 6))
    assert [work.step for work in works] == [2, 3, 4, 5]
    for work in works:
        expected = [tuple(maker.row(place).id for place in part) for part in loader.places(work.step)]
        assert [micro.ids for micro in work.micro_batches] == expected


def test_a_row_that_cannot_be_read_stops_the_step_that_needs_it(tmp_path: Path, random_bundle: Bundle) -> None:
    config = TrainingConfig(image_side_px=32)
    made = load_training_model(random_bundle, config, device="cpu")
    loader = _loader(made.batch_maker([open_rows(draw_rows(tmp_path, 20))], config))
    (tmp_path / "4-goal.png").unlink()
    with pytest.raises(DataError, match="row 1028"):
        list(loader.steps(0, 2))


def test_more_workers_than_samples_are_refused(maker: BatchMaker) -> None:
    with pytest.raises(ConfigError, match="each of 11 workers needs a sample"):
        _loader(maker, world_size=11)


def test_validation_draws_do_not_change_and_drop_nothing(maker: BatchMaker) -> None:
    first, later = (maker([Place(0, epoch, 3)], is_validation=True) for epoch in (0, 9))
    assert torch.equal(first.draws.noise, later.draws.noise)
    assert first.draws.dropout_u.tolist() == [1.0]
    assert not torch.equal(maker([Place(0, 0, 3)]).draws.noise, first.draws.noise)


def test_the_vision_tower_and_the_vae_get_their_own_pixels(maker: BatchMaker) -> None:
    micro = maker([Place(0, 0, 0), Place(0, 0, 1)])
    assert isinstance(micro.batch.words, Conversations)
    assert isinstance(micro.batch.images, PixelPair)
    assert micro.batch.words.clip_pixels is not None
    assert micro.batch.words.clip_pixels.shape == (2, 3, 112, 112)
    assert micro.batch.images.source.shape == (2, 3, 32, 32)
    assert micro.num_label_tokens == len(micro.batch.words.label_ids)
    assert micro.num_tokens == int(micro.batch.words.mask.sum())


# ---- augmentation


def _example(words: str = "make it night") -> EditExample:
    ramp = np.tile(np.arange(90, dtype=np.uint8)[:, None], (60, 1, 3))
    image = Image.fromarray(ramp)
    return EditExample(source=image, goal=image.resize((180, 120)), instruction=words, expressive="It is dark.")


def test_source_and_goal_are_cropped_alike() -> None:
    for seed in range(8):
        random = torch.Generator().manual_seed(seed)
        changed = augment(_example(), AugmentConfig(crop=0.5), random)
        assert changed.goal.width == pytest.approx(2 * changed.source.width, abs=1)
        assert 30 <= changed.source.width <= 60
        pair = pixel_pair([changed], 16)
        assert float((pair.source - pair.goal).abs().max()) < 0.05  # the same part of the same picture


def test_mirroring_takes_both_images_and_leaves_words_of_sides_true() -> None:
    def changed(words: str) -> EditExample:
        return augment(_example(words), AugmentConfig(flip=1.0), torch.Generator().manual_seed(0))

    mirrored, kept = changed("make it night"), changed("remove the LEFT tree")
    plain = augment(_example(), AugmentConfig(), torch.Generator().manual_seed(0))
    assert mirrored.source.tobytes() == ImageOps.mirror(plain.source).tobytes()
    assert mirrored.goal.tobytes() == ImageOps.mirror(plain.goal).tobytes()
    assert kept.source.tobytes() == plain.source.tobytes()


def test_augmentation_follows_epoch_and_sample(folder: Path, random_bundle: Bundle) -> None:
    config = TrainingConfig(image_side_px=32, augment=AugmentConfig(crop=0.6))
    maker = load_training_model(random_bundle, config, device="cpu").batch_maker([open_rows(folder)], config)

    def source(place: Place) -> torch.Tensor:
        images = maker([place]).batch.images
        assert isinstance(images, PixelPair)
        return images.source

    assert torch.equal(source(Place(0, 0, 2)), source(Place(0, 0, 2)))
    assert not torch.equal(source(Place(0, 0, 2)), source(Place(0, 1, 2)))
