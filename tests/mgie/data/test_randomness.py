"""Draws keyed by seed, epoch and sample."""

import torch

from mgie.data.randomness import SampleKey, training_draws
from mgie.model.batch import TrainingDraws

SHAPE = (4, 3, 5)


def _draws(keys: list[SampleKey], seed: int = 0) -> TrainingDraws:
    return training_draws(seed, keys, latent_shape=SHAPE, num_timesteps=1000)


def test_a_sample_has_the_same_draws_in_any_batch() -> None:
    keys = [SampleKey(epoch, i) for epoch in range(2) for i in (5, 2**62 + 1)]
    together = _draws(keys)
    for place, key in enumerate(keys):
        alone = _draws([key])
        for name in ("noise", "posterior_noise", "timesteps", "dropout_u"):
            assert torch.equal(getattr(together, name)[place], getattr(alone, name)[0])


def test_seed_epoch_and_id_each_change_all_draws() -> None:
    base = _draws([SampleKey(0, 7)])
    for other in (_draws([SampleKey(0, 7)], seed=1), _draws([SampleKey(1, 7)]), _draws([SampleKey(0, 8)])):
        for name in ("noise", "posterior_noise", "timesteps", "dropout_u"):
            assert not torch.equal(getattr(base, name), getattr(other, name))


def test_noise_and_posterior_noise_are_independent_standard_normals() -> None:
    draws = _draws([SampleKey(0, i) for i in range(500)])
    for values in (draws.noise, draws.posterior_noise):
        assert abs(float(values.mean())) < 0.03
        assert abs(float(values.std()) - 1) < 0.03
    both = torch.stack([draws.noise.flatten(), draws.posterior_noise.flatten()])
    assert abs(float(torch.corrcoef(both)[0, 1])) < 0.03


def test_timesteps_and_dropout_cover_their_ranges() -> None:
    draws = _draws([SampleKey(0, i) for i in range(4000)])
    assert int(draws.timesteps.min()) < 10
    assert 990 < int(draws.timesteps.max()) < 1000
    assert abs(float(draws.timesteps.float().mean()) - 499.5) < 15
    assert abs(float(draws.dropout_u.mean()) - 0.5) < 0.02
    assert float(draws.dropout_u.max()) < 1
