"""Means over seeds with their errors, and differences seed by seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Estimate:
    """A figure over seeds.

    Attributes:
        mean: Mean over seeds.
        error: Its standard error; none for one seed.
        values: One a seed.
    """

    mean: float
    error: float | None
    values: tuple[float, ...]

    @property
    def interval(self) -> tuple[float, float] | None:
        """95% interval of the mean by Student's distribution; none for one seed.

        With three seeds it is 4.3 standard errors to each side, not 2.
        """
        if self.error is None:
            return None
        from scipy.stats import t

        half = float(t.ppf(0.975, len(self.values) - 1)) * self.error
        return self.mean - half, self.mean + half

    def document(self) -> dict[str, Any]:
        """As JSON types, with the interval."""
        interval = self.interval
        return {**asdict(self), "values": list(self.values), "interval": None if interval is None else list(interval)}


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and standard error of values, one a seed, at least one."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return Estimate(statistics.fmean(values), error, tuple(values))


def difference(values: Sequence[float], others: Sequence[float]) -> Estimate:
    """Mean of values - others, seed by seed: equal seeds share initial weights, data order and noise."""
    return estimate([value - other for value, other in zip(values, others, strict=True)])


def differs(change: Estimate) -> bool | None:
    """Whether the 95% interval of a difference leaves out 0; none where one seed gives no interval."""
    interval = change.interval
    return None if interval is None else interval[0] > 0 or interval[1] < 0
