"""Means with intervals, by resampling rows. Knows nothing of what the numbers measure.

Axes: N rows, M columns, R resamples.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

LEVEL = 0.95
NUM_RESAMPLES = 2000
_CHUNK_NUMBERS = 4_000_000  # drawn at a time: memory stays bounded whatever N is


@dataclass(frozen=True)
class Interval:
    """A mean and where it may lie."""

    mean: float
    low: float
    high: float
    num: int
    "rows that have a value"


def bootstrap_means(
    values: npt.NDArray[np.float64], *, seed: int, level: float = LEVEL, num_resamples: int = NUM_RESAMPLES
) -> list[Interval | None]:
    """Mean of each column with its percentile interval; None for a column without values.

    All columns are resampled by the same rows. The same values and seed give the same intervals.

    Args:
        values: [N, M]; NaN where a row has no value.
        level: Share of resampled means between `low` and `high`, 0 to 1.

    Source: Efron and Tibshirani 1993, chapter 13, the percentile interval.
    """
    num_rows = len(values)
    is_there = ~np.isnan(values)
    num = is_there.sum(axis=0)
    filled, there = np.where(is_there, values, 0.0), is_there.astype(np.float64)
    rng = np.random.default_rng(seed)
    sums, counts = [], []
    per_chunk = max(1, _CHUNK_NUMBERS // max(1, num_rows))
    for start in range(0, num_resamples if num_rows else 0, per_chunk):
        size = min(per_chunk, num_resamples - start)
        drawn = rng.integers(0, num_rows, (size, num_rows)) + num_rows * np.arange(size)[:, None]
        times = np.bincount(drawn.reshape(-1), minlength=size * num_rows).reshape(size, num_rows).astype(np.float64)
        sums.append(times @ filled)
        counts.append(times @ there)
    found: list[Interval | None] = []
    for column in range(values.shape[1]):
        if not num[column]:
            found.append(None)
            continue
        total, count = (np.concatenate([part[:, column] for part in parts]) for parts in (sums, counts))
        # A resample may hold none of the few rows that have a value.
        means = total[count > 0] / count[count > 0]
        low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
        mean = filled[:, column].sum() / num[column]
        found.append(Interval(float(mean), float(low), float(high), int(num[column])))
    return found
