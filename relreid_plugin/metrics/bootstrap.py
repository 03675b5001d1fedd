"""Bootstrap intervals over queries: of a mean, and of a difference that is paired over the queries.

Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, the percentile interval (chapter 13).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

RESAMPLES = 1000


@dataclass(frozen=True)
class Difference:
    """A difference in mAP, paired over the queries, with its 95 % bootstrap interval; fractions of 1."""

    mean: float
    low: float
    high: float

    @property
    def certain(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        text = f"{100 * self.mean:+.1f} [{100 * self.low:+.1f}, {100 * self.high:+.1f}]"
        return text if self.certain else f"{text} n.s."


def bootstrap(first: np.ndarray, second: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0) -> Difference:
    """Compare the average precisions (Q,) of two methods on the same queries; queries without a match (NaN) are left out.

    Args:
        first, second: Average precisions; the difference is ``first - second``.
        resamples: Draws of Q queries with replacement.
        seed: Of the draws.

    Returns:
        The mean difference and its 2.5 % and 97.5 % quantiles over the draws.
    """
    gain = first - second
    gain = gain[np.isfinite(gain)]
    rng = np.random.default_rng(seed)
    means = np.array([gain[rng.integers(0, len(gain), len(gain))].mean() for _ in range(resamples)])
    low, high = np.quantile(means, [0.025, 0.975])
    return Difference(float(gain.mean()), float(low), float(high))


def interval(values: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0) -> tuple[float, float]:
    """Return the ends of the 95 % bootstrap interval of the mean of values (Q,); those that are NaN are left out."""
    found = bootstrap(values, np.zeros_like(values), resamples=resamples, seed=seed)
    return found.low, found.high
