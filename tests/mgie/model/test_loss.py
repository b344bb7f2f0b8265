"""Losses and condition dropout against closed forms."""

import math

import pytest
import torch

from mgie.config import ObjectiveConfig
from mgie.model.loss import change_weights, combine, diffusion_loss, drop_conditions, language_loss, min_snr_weights


def test_language_loss_of_uniform_scores_is_the_log_of_the_vocabulary() -> None:
    assert language_loss(torch.zeros(2, 11), torch.tensor([3, 1])).item() == pytest.approx(math.log(11))


def test_language_loss_is_the_mean_of_the_labels_negative_log_probabilities() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(9, 7), torch.randint(0, 7, (9,))
    picked = [-logits[i].log_softmax(-1)[labels[i]] for i in range(9)]
    assert language_loss(logits, labels).item() == pytest.approx(float(torch.stack(picked).mean()), rel=1e-6)


def test_parts_of_a_global_batch_add_up_to_its_loss() -> None:
    torch.manual_seed(1)
    logits, labels = torch.randn(9, 7), torch.randint(0, 7, (9,))
    parts = sum(language_loss(logits[i], labels[i], num_label_tokens=9) for i in (slice(0, 4), slice(4, 9)))
    assert float(parts) == pytest.approx(float(language_loss(logits, labels)), rel=1e-6)


def test_a_batch_without_labels_has_loss_zero_not_nan() -> None:
    """F6: the original gives NaN."""
    states = torch.randn(0, 5, requires_grad=True)
    loss = language_loss(states, torch.zeros(0, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0.0
    assert states.grad is not None


def test_weighted_diffusion_losses_of_parts_add_up() -> None:
    generator = torch.Generator().manual_seed(3)
    prediction, target = (torch.randn(5, 4, 2, 2, generator=generator) for _ in range(2))
    weights = torch.rand(5, generator=generator)
    expected = sum(float(((prediction[i] - target[i]) ** 2).mean() * weights[i]) for i in range(5)) / 5
    parts = [
        diffusion_loss(prediction[i], target[i], weights=weights[i], num_samples=5) for i in (slice(0, 2), slice(2, 5))
    ]
    assert float(sum(parts)) == pytest.approx(expected, rel=1e-6)


def test_min_snr_weights_are_one_loss_on_clean_latents_whatever_is_predicted() -> None:
    """Hang et al.: an error of epsilon is SNR times, one of v SNR + 1 times, as large as that of the latents."""
    snr = torch.tensor([0.01, 1.0, 5.0, 400.0])
    expected = snr.clamp(max=5)
    for kind, factor in (("sample", torch.ones(4)), ("epsilon", snr), ("v_prediction", snr + 1)):
        torch.testing.assert_close(min_snr_weights(snr, 5.0, kind) * factor, expected)


def test_total_weighs_the_edit_loss_by_half() -> None:
    losses = combine(torch.tensor(2.0), torch.tensor(3.0), edit_weight=ObjectiveConfig().edit_weight)
    assert losses.total.item() == 3.5


def test_diffusion_loss_is_computed_in_float32() -> None:
    prediction = torch.full((1, 4, 2, 2), 300.0, dtype=torch.float16)
    assert diffusion_loss(prediction, torch.zeros(1, 4, 2, 2)).item() == pytest.approx(90000.0)


def test_dropout_intervals() -> None:
    u = torch.tensor([0.0, 0.0499, 0.05, 0.0999, 0.10, 0.1499, 0.15, 0.9999])
    condition, null = torch.ones(8, 3, 2), torch.zeros(1, 3, 2)
    text, image = drop_conditions(condition, null, torch.ones(8, 4, 2, 2), u, share=ObjectiveConfig().condition_dropout)
    assert [bool(row.any()) for row in text] == [False, False, False, False, True, True, True, True]
    assert [bool(row.any()) for row in image] == [True, True, False, False, False, False, True, True]


def test_dropout_rates_are_five_percent_each() -> None:
    u = torch.rand(200_000, generator=torch.Generator().manual_seed(7))
    text, image = drop_conditions(
        torch.ones(len(u), 1, 1), torch.zeros(1, 1, 1), torch.ones(len(u), 1, 1, 1), u, share=0.05
    )
    text_off, image_off = text.flatten() == 0, image.flatten() == 0
    for rate in (text_off & ~image_off, text_off & image_off, ~text_off & image_off):
        assert rate.float().mean().item() == pytest.approx(0.05, abs=0.003)


def test_changed_places_count_more_by_how_much_they_differ() -> None:
    source = torch.tensor([[[[1.0, -1.0], [1.0, -1.0]], [[1.0, -1.0], [1.0, -1.0]]]])
    spread = float(source.std())
    goal = source + torch.tensor([[0.0, 0.5 * spread], [2.0 * spread, -spread]])
    weights = change_weights(goal, source, weight=4.0)
    torch.testing.assert_close(weights, torch.tensor([[[[1.0, 3.0], [5.0, 5.0]]]]))


def test_place_weights_multiply_the_squared_errors() -> None:
    torch.manual_seed(3)
    prediction, target = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    weights = torch.rand(2, 1, 4, 4)
    expected = ((prediction - target) ** 2 * weights).mean()
    torch.testing.assert_close(diffusion_loss(prediction, target, place_weights=weights), expected)
