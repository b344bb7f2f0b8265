"""The training module: what trains, gradients, independence of batch mates and padding, collation."""

import dataclasses
from pathlib import Path

import pytest
import torch
from PIL import Image

from mgie.checkpoint import Bundle
from mgie.data import Collator, EditExample
from mgie.errors import DataError
from mgie.model import MGIE, TrainingBatch, TrainingDraws, training_state_start


@pytest.fixture(scope="module")
def mgie(tiny_bundle: Bundle) -> MGIE:
    return tiny_bundle.load_mgie(device="cpu")


@pytest.fixture(scope="module")
def collate(tiny_bundle: Bundle, mgie: MGIE) -> Collator:
    return Collator(
        tokenizer=tiny_bundle.load_tokenizer(),
        clip_pixels=tiny_bundle.load_clip_pixels(),
        num_patches=mgie.mllm.num_patches,
        image_side_px=64,
    )


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


def _rows(record: TrainingBatch | TrainingDraws, index: slice) -> dict[str, torch.Tensor]:
    return {f.name: getattr(record, f.name)[index] for f in dataclasses.fields(record)}


def test_embeddings_lm_head_edit_head_and_unet_train_and_nothing_else(mgie: MGIE) -> None:
    trained = {
        name.rsplit(".", 1)[0].split(".")[0] if not name.startswith("mllm") else name
        for name, p in mgie.named_parameters()
        if p.requires_grad
    }
    assert trained == {"mllm.llm.model.embed_tokens.weight", "mllm.llm.lm_head.weight", "edit_head", "unet"}


def test_every_trained_parameter_gets_a_gradient(mgie: MGIE, collate: Collator) -> None:
    losses = mgie(collate([_example(i) for i in range(4)]), _draws(4))
    losses.total.backward()
    trained = {name: p for name, p in mgie.named_parameters() if p.requires_grad}
    without = [name for name, p in trained.items() if p.grad is None or not p.grad.any()]
    # A key's bias shifts all scores of a query alike: softmax does not see it, so nor does the gradient.
    assert [name for name in without if "in_proj_bias" not in name] == []
    assert all(p.grad is None for name, p in mgie.named_parameters() if not p.requires_grad)
    mgie.zero_grad()


@torch.no_grad()
def test_losses_of_a_batch_are_the_means_over_its_parts(mgie: MGIE, collate: Collator) -> None:
    """Rows do not see each other, nor their padding: lengths differ here."""
    batch, draws = collate([_example(i) for i in range(3)]), _draws(3)
    whole = mgie(batch, draws)
    num_label_tokens = int((batch.labels[:, 1:] != -100).sum())
    parts = [
        mgie(
            TrainingBatch(**_rows(batch, slice(i, i + 1))),
            TrainingDraws(**_rows(draws, slice(i, i + 1))),
            num_label_tokens=num_label_tokens,
        )
        for i in range(3)
    ]
    assert whole.instruction.item() == pytest.approx(sum(p.instruction.item() for p in parts), rel=1e-5)
    assert whole.edit.item() == pytest.approx(sum(p.edit.item() for p in parts) / 3, rel=1e-5)


@torch.no_grad()
def test_padding_does_not_change_a_row(mgie: MGIE, collate: Collator) -> None:
    short, long = _example(0), _example(3)
    alone, padded = collate([short]), collate([short, long])
    assert padded.input_ids.shape[1] > alone.input_ids.shape[1]
    ours, theirs = mgie.hidden(alone)[0], mgie.hidden(padded)[0, : alone.input_ids.shape[1]]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert alone.state_starts[0] == padded.state_starts[0]


def test_a_short_row_without_visual_tokens_falls_back_within_itself(collate: Collator) -> None:
    """F4: the original counts padding and would select it."""
    assert training_state_start(40, None, 8) == 31
    assert training_state_start(40, 39, 8) == 31
    assert training_state_start(40, 31, 8) == 30


def test_dropped_text_gives_the_null_condition_and_keeps_its_gradient(mgie: MGIE, collate: Collator) -> None:
    """R8: the null condition is trained through the samples whose text is dropped."""
    draws = dataclasses.replace(_draws(1), dropout_u=torch.tensor([0.02]))
    mgie(collate([_example(0)]), draws).edit.backward()
    assert mgie.edit_head.query.grad is not None
    assert mgie.edit_head.query.grad.abs().sum() > 0
    mgie.zero_grad()


def test_collation_follows_the_examples(collate: Collator) -> None:
    batch = collate([_example(0), _example(1)])
    assert batch.source_pixels.shape == (2, 3, 64, 64)
    assert batch.clip_pixels.shape == (2, 3, 112, 112)
    assert batch.mask.sum(1).tolist() == [int((row != -100).nonzero().max()) + 1 for row in batch.labels]
    assert float(batch.source_pixels.abs().max()) <= 1.0
    assert not torch.equal(batch.source_pixels, batch.goal_pixels)


def test_an_empty_batch_is_refused(collate: Collator) -> None:
    with pytest.raises(DataError, match="0 examples"):
        collate([])


def test_real_pairs_can_be_collated(collate: Collator, sample_photos: Path) -> None:
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
    assert collate(examples).goal_pixels.shape == (4, 3, 64, 64)
