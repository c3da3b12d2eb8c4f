"""Exact partition of ordered noise levels into contiguous stages: one dynamic programme, pluggable interval costs.

A cost is a matrix of (levels + 1) x (levels + 1): entry [a, b] is what a stage of the levels a..b-1 costs, infinite
where that is no stage. All costs come from prefix sums, so an entry takes constant time.

The least cost of k stages up to level b obeys B_k[b] = min_a B_{k-1}[a] + cost[a, b], with B_0[0] = 0: whatever the
last stage is, the others are the best partition of what lies below it. That is exact, in stages * levels^2 steps.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from multistage_diffusion.errors import ConfigError
from multistage_diffusion.records import check

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
    below = [_zero_at(0, count + 1)]  # below[k][b]: least cost of the levels before b in k stages
    above = [_zero_at(count, count + 1)]  # above[k][a]: least cost of the levels from a on in k stages
    for _ in range(stages):
        below.append((below[-1][:, None] + cost).amin(0))
        above.append((cost + above[-1][None]).amin(1))
    best = float(below[stages][count])
    if best == torch.inf:
        raise ConfigError(f"{count} levels cannot be cut into {stages} stages of {smallest} to {largest or count}")
    finite = cost[cost.isfinite()].abs()
    slack = _TIE * max(float(finite.max()), abs(best))
    return _most_even(below, above, cost, best + slack)


def _zero_at(index: int, size: int) -> Tensor:
    """Costs of no stage at all: nothing at the one end where all levels are accounted for, elsewhere impossible."""
    values = torch.full((size,), torch.inf, dtype=torch.float64)
    values[index] = 0.0
    return values


def _most_even(below: list[Tensor], above: list[Tensor], cost: Tensor, limit: float) -> tuple[int, ...]:
    """Of all partitions within `limit`, the one whose cuts are nearest to equal spacing.

    An arg min of costs alone takes the first of equal optima, which depends on the end one counts from. The stage
    number k from a to b is part of an optimal partition exactly if

        below[k][a] + cost[a, b] + above[stages - 1 - k][b] <= limit,

    the best below it, itself, and the best above it. A path from 0 to the last level through such stages only is an
    optimal partition as a whole (up to the slack in the limit, once a stage), so a second programme over them minimises

        sum over cuts of (cut - levels * k / stages)^2.
    """
    stages, count = len(below) - 1, len(cost) - 1
    position = torch.arange(count + 1, dtype=torch.float64)
    distance = _zero_at(0, count + 1)  # distance[b]: least sum of squares of the cuts up to one at b
    previous: list[Tensor] = []  # previous[k][b]: where the stage number k that ends at b begins
    for stage in range(stages):
        optimal = below[stage][:, None] + cost + above[stages - 1 - stage][None] <= limit
        best = torch.where(optimal, distance[:, None], torch.inf).min(0)
        distance = best.values + (position - count * (stage + 1) / stages) ** 2
        previous.append(best.indices)
    cuts = [count]
    for stage in range(stages - 1, 0, -1):
        cuts.append(int(previous[stage][cuts[-1]]))
    return tuple(reversed(cuts[1:]))


def size_limits(levels: int, stages: int) -> tuple[int, int]:
    """Fewest and most levels of a stage in the baselines: N/(2k) and 3N/(2k) of N levels, for k stages.

    Source: Go et al. 2023, "Addressing Negative Transfer in Diffusion Models".
    """
    return max(1, levels // (2 * stages)), -(-3 * levels // (2 * stages))


def distance_cost(values: Float[Tensor, " levels"]) -> Cost:
    """Sum of the distances of an interval's values, increasing or decreasing, to the central one, a + (b - a) // 2."""
    values = values.double()
    if values[-1] < values[0]:
        values = -values
    count = len(values)
    start, stop, centre = _intervals(count)
    total = torch.cat((values.new_zeros(1), values.cumsum(0)))
    middle = values[centre]  # at or above the values before it, at or below those after it, so no |.| is needed
    upper = total[stop] - total[centre] - middle * (stop - centre)
    lower = middle * (centre - start) - (total[centre] - total[start])
    return torch.where(stop > start, upper + lower, torch.inf)


def affinity_cost(affinity: Float[Tensor, "levels levels"]) -> Cost:
    """Minus the sum of an interval's affinities (like cosines of gradients) to its central level, a + (b - a) // 2."""
    affinity = affinity.double()
    start, stop, centre = _intervals(len(affinity))
    total = torch.cat((affinity.new_zeros(1, len(affinity)), affinity.cumsum(0)))
    return torch.where(stop > start, total[start, centre] - total[stop, centre], torch.inf)


def block_cost(matrix: Float[Tensor, "levels levels"]) -> Cost:
    """Minus an interval's number of levels times the mean of its block of a matrix.

    For a similarity matrix the optimum maximises the length-weighted mean similarity within stages. For the Gram matrix
    G_ij = <f_i, f_j> of a function's values f_i at the levels it minimises the squared distances to the stages' means
    m: over a stage of n levels sum |f_i - m|^2 = sum G_ii - (1/n) sum_ij G_ij, and sum G_ii over all stages is
    constant.
    """
    count = len(matrix)
    total = torch.zeros(count + 1, count + 1, dtype=torch.float64)
    total[1:, 1:] = matrix.double().cumsum(0).cumsum(1)
    start, stop, _ = _intervals(count)
    # Sum of the square block a..b-1 by inclusion and exclusion of sums of corners.
    inside = total[stop, stop] - total[start, stop] - total[stop, start] + total[start, start]
    return torch.where(stop > start, -inside / (stop - start).clamp(min=1), torch.inf)


def _intervals(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """First level, end and central level of each interval, as grids."""
    ends = torch.arange(count + 1)
    start, stop = torch.meshgrid(ends, ends, indexing="ij")
    centre = (start + (stop - start).clamp(min=0) // 2).clamp(max=count - 1)
    return start, stop, centre
