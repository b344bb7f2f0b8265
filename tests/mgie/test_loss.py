"""Losses and condition dropout against closed forms."""

import math

import pytest
import torch

from mgie.loss import combine, diffusion_loss, drop_conditions, language_loss
from mgie.prompts import IGNORE


def test_language_loss_of_uniform_scores_is_the_log_of_the_vocabulary() -> None:
    labels = torch.tensor([[IGNORE, 3, 1, IGNORE]])
    assert language_loss(torch.zeros(1, 4, 11), labels).item() == pytest.approx(math.log(11))


def test_position_t_is_scored_on_label_t_plus_one() -> None:
    logits = torch.zeros(1, 3, 5)
    logits[0, 0, 4] = 100.0  # position 0 is sure of token 4
    assert language_loss(logits, torch.tensor([[IGNORE, 4, IGNORE]])).item() == pytest.approx(0.0, abs=1e-6)
    assert (
        language_loss(logits, torch.tensor([[4, IGNORE, IGNORE]])).item() == 0.0
    )  # the first label is never predicted


def test_language_loss_is_a_mean_over_tokens_not_rows() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 6, 7), torch.randint(0, 7, (2, 6))
    labels[0, :4] = IGNORE
    scores = logits[:, :-1].log_softmax(-1)
    picked = [-scores[b, t, labels[b, t + 1]] for b in range(2) for t in range(5) if labels[b, t + 1] != IGNORE]
    assert language_loss(logits, labels).item() == pytest.approx(float(torch.stack(picked).mean()), rel=1e-6)


def test_parts_of_a_global_batch_add_up_to_its_loss() -> None:
    torch.manual_seed(1)
    logits, labels = torch.randn(4, 5, 7), torch.randint(0, 7, (4, 5))
    labels[1:, :3] = IGNORE
    count = int((labels[:, 1:] != IGNORE).sum())
    parts = sum(language_loss(logits[i : i + 2], labels[i : i + 2], num_label_tokens=count) for i in (0, 2))
    assert float(parts) == pytest.approx(float(language_loss(logits, labels)), rel=1e-6)


def test_a_batch_without_labels_has_loss_zero_not_nan() -> None:
    """F6: the original gives NaN."""
    logits = torch.randn(2, 4, 5, requires_grad=True)
    loss = language_loss(logits, torch.full((2, 4), IGNORE))
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(logits.grad, torch.zeros_like(logits))  # type: ignore[arg-type]


def test_total_weighs_the_edit_loss_by_half() -> None:
    losses = combine(torch.tensor(2.0), torch.tensor(3.0))
    assert losses.total.item() == 3.5


def test_diffusion_loss_is_computed_in_float32() -> None:
    prediction = torch.full((1, 4, 2, 2), 300.0, dtype=torch.float16)
    assert diffusion_loss(prediction, torch.zeros(1, 4, 2, 2)).item() == pytest.approx(90000.0)


def test_dropout_intervals() -> None:
    u = torch.tensor([0.0, 0.0499, 0.05, 0.0999, 0.10, 0.1499, 0.15, 0.9999])
    condition, null = torch.ones(8, 3, 2), torch.zeros(1, 3, 2)
    text, image = drop_conditions(condition, null, torch.ones(8, 4, 2, 2), u)
    assert [bool(row.any()) for row in text] == [False, False, False, False, True, True, True, True]
    assert [bool(row.any()) for row in image] == [True, True, False, False, False, False, True, True]


def test_dropout_rates_are_five_percent_each() -> None:
    u = torch.rand(200_000, generator=torch.Generator().manual_seed(7))
    text, image = drop_conditions(torch.ones(len(u), 1, 1), torch.zeros(1, 1, 1), torch.ones(len(u), 1, 1, 1), u)
    text_off, image_off = text.flatten() == 0, image.flatten() == 0
    for rate in (text_off & ~image_off, text_off & image_off, ~text_off & image_off):
        assert rate.float().mean().item() == pytest.approx(0.05, abs=0.003)
