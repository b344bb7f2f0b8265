"""Guidance against its equation, written out with one denoiser call per branch."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mgie.model.guidance import Branch, GuidanceInput, guided_prediction, needed_branches


class NonlinearDenoiser:
    """A denoiser that depends on each of its inputs and mixes no rows; keeps the batches that it got."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def __call__(self, latents: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:
        self.calls.append((latents, timesteps, condition))
        text = condition.square().mean(dim=(1, 2))[:, None, None, None]
        time = (timesteps / 1000)[:, None, None, None]
        return torch.sin(latents[:, :4] + 2 * latents[:, 4:] + 3 * text + time).to(self.dtype)


def make_input(seed: int, text_scale: float = 7.5, image_scale: float = 1.5) -> GuidanceInput:
    generator = torch.Generator().manual_seed(seed)
    return GuidanceInput(
        latents=torch.randn((4, 3, 5), generator=generator),
        timestep=100.0 * seed + 0.5,
        image_latents=torch.randn((4, 3, 5), generator=generator),
        condition=torch.randn((7, 6), generator=generator),
        null_condition=torch.randn((7, 6), generator=generator),
        text_scale=text_scale,
        image_scale=image_scale,
    )


def branch_predictions(sample: GuidanceInput) -> tuple[Tensor, Tensor, Tensor]:
    """e(T, V), e(0, V), e(0, 0), each by a call of its own."""

    def predict(image_latents: Tensor, condition: Tensor) -> Tensor:
        latents = torch.cat([sample.latents, image_latents])[None]
        return NonlinearDenoiser()(latents, torch.tensor([sample.timestep]), condition[None])[0]

    return (
        predict(sample.image_latents, sample.condition),
        predict(sample.image_latents, sample.null_condition),
        predict(torch.zeros_like(sample.image_latents), sample.null_condition),
    )


def by_equation(sample: GuidanceInput) -> Tensor:
    t, i, n = branch_predictions(sample)
    return n + sample.image_scale * (i - n) + sample.text_scale * (t - i)


def test_prediction_equals_the_equation() -> None:
    sample = make_input(1)
    torch.testing.assert_close(guided_prediction(NonlinearDenoiser(), [sample])[0], by_equation(sample))


def test_rows_are_sorted_by_branch_then_sample_in_one_call() -> None:
    first, second = make_input(1), make_input(2)
    denoiser = NonlinearDenoiser()
    guided_prediction(denoiser, [first, second])
    ((latents, timesteps, condition),) = denoiser.calls
    zero = torch.zeros_like(first.image_latents)
    assert torch.equal(latents[:, :4], torch.stack([first.latents, second.latents] * 3))
    assert torch.equal(latents[:, 4:], torch.stack([first.image_latents, second.image_latents] * 2 + [zero, zero]))
    assert timesteps.tolist() == [100.5, 200.5] * 3
    nulls = [first.null_condition, second.null_condition]
    assert torch.equal(condition, torch.stack([first.condition, second.condition, *nulls, *nulls]))


@pytest.mark.parametrize(
    ("text_scale", "image_scale", "branches"),
    [
        (7.5, 1.5, ("text_and_image", "image", "none")),
        (1.0, 1.5, ("text_and_image", "image", "none")),
        (1.0, 1.0, ("text_and_image",)),
        (7.5, 1.0, ("text_and_image", "image")),
        (3.0, 3.0, ("text_and_image", "none")),
        (0.0, 1.5, ("image", "none")),
        (0.0, 1.0, ("image",)),
        (0.0, 0.0, ("none",)),
        (2.0, 0.0, ("text_and_image", "image", "none")),
    ],
)
def test_branches_that_cannot_matter_are_not_computed(
    text_scale: float, image_scale: float, branches: tuple[Branch, ...]
) -> None:
    sample = make_input(3, text_scale, image_scale)
    denoiser = NonlinearDenoiser()
    prediction = guided_prediction(denoiser, [sample])
    assert needed_branches(text_scale, image_scale) == branches
    assert len(denoiser.calls) == 1
    assert denoiser.calls[0][0].shape[0] == len(branches)
    torch.testing.assert_close(prediction[0], by_equation(sample))


def test_scales_of_one_return_the_conditional_prediction_itself() -> None:
    sample = make_input(4, 1.0, 1.0)
    prediction = guided_prediction(NonlinearDenoiser(), [sample])
    assert torch.equal(prediction[0], branch_predictions(sample)[0])


def test_mixed_scales_in_one_batch_equal_each_sample_alone() -> None:
    scales = [(7.5, 1.5), (1.0, 1.0), (3.0, 3.0), (0.0, 0.0), (7.5, 1.0), (0.0, 1.0), (0.0, 2.0)]
    samples = [make_input(seed, *pair) for seed, pair in enumerate(scales)]
    denoiser = NonlinearDenoiser()
    together = guided_prediction(denoiser, samples)
    assert denoiser.calls[0][0].shape[0] == 3 + 1 + 2 + 1 + 2 + 1 + 2
    for index, sample in enumerate(samples):
        torch.testing.assert_close(together[index], by_equation(sample))


def test_combination_is_float32_though_the_denoiser_answers_in_bfloat16() -> None:
    sample = make_input(5)
    prediction = guided_prediction(NonlinearDenoiser(torch.bfloat16), [sample])
    t, i, n = (branch.bfloat16().float() for branch in branch_predictions(sample))
    assert prediction.dtype == torch.float32
    torch.testing.assert_close(prediction[0], n + 1.5 * (i - n) + 7.5 * (t - i))


def test_non_finite_prediction_of_one_sample_stays_with_it() -> None:
    good, bad = make_input(6), replace(make_input(7), latents=torch.full((4, 3, 5), float("nan")))
    prediction = guided_prediction(NonlinearDenoiser(), [bad, good])
    assert prediction[0].isnan().all()
    torch.testing.assert_close(prediction[1], by_equation(good))
