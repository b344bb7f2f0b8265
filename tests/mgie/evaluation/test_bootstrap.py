import numpy as np
import pytest

from mgie.evaluation import bootstrap
from mgie.evaluation.bootstrap import Interval, bootstrap_means


def _one(values: list[float], seed: int = 0) -> Interval:
    [found] = bootstrap_means(np.array(values)[:, None], seed=seed)
    assert found is not None
    return found


def test_the_interval_holds_the_true_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    repeats, true_mean = 400, 3.0
    found = bootstrap_means(rng.exponential(true_mean, (60, repeats)), seed=1, num_resamples=500)
    num_covered = sum(one is not None and one.low <= true_mean <= one.high for one in found)
    assert 0.89 < num_covered / repeats < 0.97  # a little below 95 % for 60 skewed numbers


def test_the_interval_of_normal_numbers_is_that_of_the_textbook() -> None:
    values = np.random.default_rng(3).normal(10, 2, 500)
    found = _one(values.tolist())
    half = 1.96 * values.std() / 500**0.5
    assert found.mean == pytest.approx(values.mean(), rel=1e-12)
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.08)
    assert (found.high + found.low) / 2 == pytest.approx(values.mean(), abs=0.1 * half)


def test_rows_without_a_value_are_left_out_of_its_mean() -> None:
    values = np.array([[1.0, np.nan, np.nan], [3.0, 5.0, np.nan], [5.0, np.nan, np.nan]])
    first, second, third = bootstrap_means(values, seed=0)
    assert first == _one([1.0, 3.0, 5.0])
    assert second == Interval(5.0, 5.0, 5.0, 1)
    assert third is None
    assert bootstrap_means(np.empty((0, 2)), seed=0) == [None, None]


def test_the_same_seed_gives_the_same_interval_however_it_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(5).random((30, 2))
    before = bootstrap_means(values, seed=7)
    assert bootstrap_means(values, seed=8) != before
    monkeypatch.setattr(bootstrap, "_CHUNK_NUMBERS", 100)
    after = bootstrap_means(values, seed=7)
    for one, other in zip(before, after, strict=True):
        assert one is not None
        assert other is not None
        assert list(vars(one).values()) == pytest.approx(list(vars(other).values()), rel=1e-12)
