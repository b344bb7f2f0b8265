"""The training module: what trains, gradients, independence of batch mates and padding, collation."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image

from mgie.bundle.bundle import Bundle
from mgie.data.collate import ConversationCollator, EditExample, pixel_pair, vision_pixels
from mgie.errors import DataError
from mgie.model.batch import Conversations, PixelPair, TrainingBatch, TrainingDraws
from mgie.model.mgie import MGIE
from mgie.model.visual_states import select_start


@pytest.fixture(scope="module")
def mgie(random_bundle: Bundle) -> MGIE:
    return random_bundle.load_mgie(device="cpu")


Collate = Callable[[Sequence[EditExample]], TrainingBatch]


@pytest.fixture(scope="module")
def collate(random_bundle: Bundle, mgie: MGIE) -> Collate:
    words = ConversationCollator(random_bundle.load_tokenizer(), num_patches=mgie.mllm.num_patches)
    clip_pixels = random_bundle.load_clip_pixels()

    def collate(examples: Sequence[EditExample]) -> TrainingBatch:
        pixels = vision_pixels([example.source for example in examples], clip_pixels)
        return TrainingBatch(
            words=words([(e.instruction, e.expressive) for e in examples], clip_pixels=pixels),
            images=pixel_pair(examples, 64),
        )

    return collate


def _example(i: int) -> EditExample:
    generator = torch.Generator().manual_seed(i)
    images = [
        Image.fromarray(torch.randint(0, 256, (70, 90, 3), generator=generator, dtype=torch.uint8).numpy())
        for _ in range(2)
    ]
    words = ["make it night", "turn the day into dusk, and add a red balloon"][i % 2]
    return EditExample(
        source=images[0], goal=images[1], instruction=words, expressive="The sky would be dark. " * (i + 1)
    )


def _draws(num: int, seed: int = 0) -> TrainingDraws:
    generator = torch.Generator().manual_seed(seed)
    return TrainingDraws(
        noise=torch.randn(num, 4, 8, 8, generator=generator),
        posterior_noise=torch.randn(num, 4, 8, 8, generator=generator),
        timesteps=torch.randint(0, 1000, (num,), generator=generator),
        dropout_u=torch.linspace(0.02, 0.5, num),
    )


def conversations(batch: TrainingBatch) -> Conversations:
    assert isinstance(batch.words, Conversations)
    return batch.words


def test_embeddings_lm_head_edit_head_and_unet_train_and_nothing_else(mgie: MGIE) -> None:
    trained = {
        name.rsplit(".", 1)[0].split(".")[0] if not name.startswith("mllm") else name
        for name, p in mgie.named_parameters()
        if p.requires_grad
    }
    assert trained == {"mllm.llm.model.embed_tokens.weight", "mllm.llm.lm_head.weight", "edit_head", "unet"}


def test_every_trained_parameter_gets_a_gradient(mgie: MGIE, collate: Collate) -> None:
    losses = mgie(collate([_example(i) for i in range(4)]), _draws(4))
    losses.total.backward()
    trained = {name: p for name, p in mgie.named_parameters() if p.requires_grad}
    without = [name for name, p in trained.items() if p.grad is None or not p.grad.any()]
    # A key's bias shifts all scores of a query alike: softmax does not see it, so nor does the gradient.
    assert [name for name in without if "in_proj_bias" not in name] == []
    assert all(p.grad is None for name, p in mgie.named_parameters() if not p.requires_grad)
    mgie.zero_grad()


@torch.no_grad()
def test_losses_of_a_batch_are_the_means_over_its_parts(mgie: MGIE, collate: Collate) -> None:
    """Rows do not see each other, nor their padding: lengths differ here."""
    batch, draws = collate([_example(i) for i in range(3)]), _draws(3)
    whole = mgie(batch, draws)
    parts = [
        mgie(
            collate([_example(i)]),
            TrainingDraws(**{f.name: getattr(draws, f.name)[i : i + 1] for f in dataclasses.fields(draws)}),
            num_label_tokens=len(conversations(batch).label_ids),
            num_samples=3,
        )
        for i in range(3)
    ]
    assert whole.instruction.item() == pytest.approx(sum(p.instruction.item() for p in parts), rel=1e-5)
    assert whole.edit.item() == pytest.approx(sum(p.edit.item() for p in parts), rel=1e-5)


@torch.no_grad()
def test_padding_does_not_change_a_row(mgie: MGIE, collate: Collate) -> None:
    short, long = _example(0), _example(3)
    alone, padded = conversations(collate([short])), conversations(collate([short, long]))
    assert padded.input_ids.shape[1] > alone.input_ids.shape[1]
    ours, theirs = mgie.hidden(alone)[0], mgie.hidden(padded)[0, : alone.input_ids.shape[1]]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert alone.state_starts[0] == padded.state_starts[0]


@pytest.mark.parametrize("numbers", [(0, 1, 2, 3), (0, 2)])
def test_what_all_rows_begin_with_passes_once_and_changes_nothing(
    mgie: MGIE, collate: Collate, numbers: tuple[int, ...]
) -> None:
    """Rows of 0 and 2 ask the same: what they share ends where the images begin."""
    batch = collate([_example(i) for i in numbers])
    words = conversations(batch)
    image = int((words.input_ids[0] == mgie.mllm.im_patch_id).nonzero()[0])
    assert 30 < words.num_shared <= image
    assert (words.num_shared == image) == (len(numbers) == 2)
    assert (words.input_ids[:, : words.num_shared] == words.input_ids[:1, : words.num_shared]).all()
    found = []
    for shares in (True, False):
        mgie.shares_prefix = shares
        losses = mgie(batch, _draws(len(numbers)))
        losses.total.backward()
        found.append((losses.total.item(), {n: p.grad for n, p in mgie.named_parameters() if p.grad is not None}))
        mgie.zero_grad()
    mgie.shares_prefix = True
    (ours, gradients), (theirs, expected) = found
    assert ours == pytest.approx(theirs, rel=1e-6)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6)


def test_rows_cut_before_the_image_share_what_is_left(random_bundle: Bundle) -> None:
    collator = ConversationCollator(random_bundle.load_tokenizer(), num_patches=64, max_length=20)
    assert collator([("make it night", "Dark."), ("winter", "Snow.")]).num_shared == 19


def test_a_short_row_without_visual_tokens_falls_back_within_itself(collate: Collate) -> None:
    """F4: the original counts padding and would select it."""
    assert select_start(40, None, 8) == 31
    assert select_start(40, 39, 8) == 31
    assert select_start(40, 31, 8) == 30


def test_dropped_text_gives_the_null_condition_and_keeps_its_gradient(mgie: MGIE, collate: Collate) -> None:
    """R8: the null condition is trained through the samples whose text is dropped."""
    draws = dataclasses.replace(_draws(1), dropout_u=torch.tensor([0.02]))
    mgie(collate([_example(0)]), draws).edit.backward()
    assert mgie.edit_head.query.grad is not None
    assert mgie.edit_head.query.grad.abs().sum() > 0
    mgie.zero_grad()


def test_collation_follows_the_examples(collate: Collate) -> None:
    batch = collate([_example(0), _example(1)])
    words, images = conversations(batch), batch.images
    assert isinstance(images, PixelPair)
    assert images.source.shape == (2, 3, 64, 64)
    assert words.clip_pixels is not None
    assert words.clip_pixels.shape == (2, 3, 112, 112)
    assert words.mask.sum(1).tolist() == [int((row != -100).nonzero().max()) + 1 for row in words.labels]
    assert float(images.source.abs().max()) <= 1.0
    assert not torch.equal(images.source, images.goal)


def test_label_positions_are_those_that_predict_the_labels(collate: Collate) -> None:
    words = conversations(collate([_example(0), _example(3)]))
    num_rows, num_tokens = words.labels.shape
    expected = [
        (row * num_tokens + t, int(words.labels[row, t + 1]))
        for row in range(num_rows)
        for t in range(num_tokens - 1)
        if words.labels[row, t + 1] != -100
    ]
    assert list(zip(words.label_positions.tolist(), words.label_ids.tolist(), strict=True)) == expected


def test_an_empty_batch_is_refused(random_bundle: Bundle) -> None:
    with pytest.raises(DataError, match="0 examples"):
        ConversationCollator(random_bundle.load_tokenizer(), num_patches=64)([])


def test_real_pairs_can_be_collated(collate: Collate, sample_photos: Path) -> None:
    pairs = sorted((sample_photos / "ipr2pr").glob("*/*_0.jpg"))
    assert len(pairs) == 4
    examples = [
        EditExample(
            source=Image.open(path).convert("RGB"),
            goal=Image.open(path.with_name(path.name.replace("_0.jpg", "_1.jpg"))).convert("RGB"),
            instruction="x",
            expressive="y.",
        )
        for path in pairs
    ]
    images = collate(examples).images
    assert isinstance(images, PixelPair)
    assert images.goal.shape == (4, 3, 64, 64)
