"""Exact partition of ordered noise levels into contiguous stages: one dynamic programme, pluggable interval costs.

A cost is a matrix of (levels + 1) x (levels + 1): entry [a, b] is what a stage of the levels a..b-1 costs, infinite
where that is no stage. All costs come from prefix sums, so an entry takes constant time.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from multistage_diffusion.config import check
from multistage_diffusion.errors import ConfigError

MAX_STAGES = 8
_TIE = 1e-9  # two objectives that differ by less, relative to the largest cost of a stage, are equal

Cost = Float[Tensor, "ends ends"]


def partition(cost: Cost, stages: int, *, smallest: int = 1, largest: int | None = None) -> tuple[int, ...]:
    """The cuts that minimise the sum of the stages' costs.

    Args:
        cost: Cost of each interval of levels.
        stages: Number of stages.
        smallest: Fewest levels in a stage.
        largest: Most levels in a stage; by default all.

    Returns:
        Increasing cuts c: levels before a cut belong to the stage below it. Among equal optima the one nearest to
        equal sizes (smallest sum of squared distances of the cuts), so ties break the same way seen from both ends.

    Raises:
        ConfigError: No partition keeps the limits.
    """
    count = len(cost) - 1
    check(1 <= stages, "stages", "at least 1", stages)
    size = torch.arange(count + 1)[None] - torch.arange(count + 1)[:, None]
    allowed = (size >= smallest) & (size <= (count if largest is None else largest))
    cost = torch.where(allowed, cost.double(), torch.inf)
    below = [_first(count + 1, 0)]  # below[k][b]: least cost of the levels before b in k stages
    above = [_first(count + 1, count)]  # above[k][a]: least cost of the levels from a on in k stages
    for _ in range(stages):
        below.append((below[-1][:, None] + cost).amin(0))
        above.append((cost + above[-1][None]).amin(1))
    best = float(below[stages][count])
    if best == torch.inf:
        raise ConfigError(f"{count} levels cannot be cut into {stages} stages of {smallest} to {largest or count}")
    finite = cost[cost.isfinite()].abs()
    slack = _TIE * max(float(finite.max()), abs(best))
    return _most_even(below, above, cost, best + slack)


def _first(size: int, index: int) -> Tensor:
    values = torch.full((size,), torch.inf, dtype=torch.float64)
    values[index] = 0.0
    return values


def _most_even(below: list[Tensor], above: list[Tensor], cost: Tensor, limit: float) -> tuple[int, ...]:
    """Of all partitions within `limit`, the one whose cuts are nearest to equal spacing."""
    stages, count = len(below) - 1, len(cost) - 1
    position = torch.arange(count + 1, dtype=torch.float64)
    distance, origin = _first(count + 1, 0), []
    for stage in range(stages):
        optimal = below[stage][:, None] + cost + above[stages - 1 - stage][None] <= limit
        through = torch.where(optimal, distance[:, None], torch.inf)
        best = through.min(0)
        distance = best.values + (position - count * (stage + 1) / stages) ** 2
        origin.append(best.indices)
    cuts = [count]
    for stage in range(stages - 1, 0, -1):
        cuts.append(int(origin[stage][cuts[-1]]))
    return tuple(reversed(cuts[1:]))


def size_limits(levels: int, stages: int) -> tuple[int, int]:
    """The limits of the interval-clustering baselines: between N/(2k) and 3N/(2k) of N levels.

    Args:
        levels: Number of levels N.
        stages: Number of stages k.

    Returns:
        Fewest and most levels of a stage.

    Source: Go et al. 2023, "Addressing Negative Transfer in Diffusion Models".
    """
    return max(1, levels // (2 * stages)), -(-3 * levels // (2 * stages))


def distance_cost(values: Float[Tensor, " levels"]) -> Cost:
    """Sum of the distances of an interval's values to its central one.

    Args:
        values: One value a level, increasing or decreasing.

    Returns:
        The cost of each interval; the central level of a..b-1 is a + (b - a) // 2.
    """
    values = values.double()
    if values[-1] < values[0]:
        values = -values
    count = len(values)
    start, stop, centre = _intervals(count)
    total = torch.cat((values.new_zeros(1), values.cumsum(0)))
    middle = values[centre]
    upper = total[stop] - total[centre] - middle * (stop - centre)
    lower = middle * (centre - start) - (total[centre] - total[start])
    return torch.where(stop > start, upper + lower, torch.inf)


def affinity_cost(affinity: Float[Tensor, "levels levels"]) -> Cost:
    """Minus the sum of an interval's affinities to its central level.

    Args:
        affinity: Affinity of each pair of levels, like the cosine of their gradients.

    Returns:
        The cost of each interval; the central level of a..b-1 is a + (b - a) // 2.
    """
    affinity = affinity.double()
    start, stop, centre = _intervals(len(affinity))
    total = torch.cat((affinity.new_zeros(1, len(affinity)), affinity.cumsum(0)))
    return torch.where(stop > start, total[start, centre] - total[stop, centre], torch.inf)


def block_cost(matrix: Float[Tensor, "levels levels"]) -> Cost:
    """Minus an interval's number of levels times the mean of its block of a matrix.

    For a similarity matrix the optimum maximises the length-weighted mean similarity within stages. For the Gram matrix
    of a function the cost is, up to a constant, the sum of squared distances to the stage's mean function.

    Args:
        matrix: Similarity or inner product of each pair of levels, symmetric.

    Returns:
        The cost of each interval.
    """
    count = len(matrix)
    total = torch.zeros(count + 1, count + 1, dtype=torch.float64)
    total[1:, 1:] = matrix.double().cumsum(0).cumsum(1)
    start, stop, _ = _intervals(count)
    inside = total[stop, stop] - total[start, stop] - total[stop, start] + total[start, start]
    return torch.where(stop > start, -inside / (stop - start).clamp(min=1), torch.inf)


def _intervals(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """First level, end and central level of each interval, as grids."""
    ends = torch.arange(count + 1)
    start, stop = torch.meshgrid(ends, ends, indexing="ij")
    centre = (start + (stop - start).clamp(min=0) // 2).clamp(max=count - 1)
    return start, stop, centre
