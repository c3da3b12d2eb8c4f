"""How much each stage's decoder should be able to do under a budget of FLOPs.

A decoder has a *capacity*, an integer that its cost grows with; a U-Net's is the width of its decoder. Short proxy runs
give the held-out loss of each stage at several capacities w and numbers of images n. A law

    L(w, n) = floor + b w^-beta + c n^-gamma w^-delta

is fitted to each stage, and the capacities are chosen that minimise the expected loss among all combinations of
candidates that the budget allows.

With delta = 0 the law is that of Hoffmann et al. 2022 (Eq. 2), with the decoder's capacity in the place of parameters.
The last power is there because a small decoder mainly learns more slowly: proxies that are short beside the budget
would otherwise take that for a loss that it never makes up. Zhang et al. 2024 chose their widths by hand.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from multistage_diffusion.errors import ConfigError

POWERS = tuple(round(0.25 * k, 2) for k in range(1, 17))  # exponents tried, 0.25 to 4
_LENGTHS = 64  # lengths of training at which capacities are sought


@dataclass(frozen=True)
class Measurement:
    """Held-out loss of each stage in one proxy run.

    Attributes:
        capacity: Capacity of every decoder of the run.
        images: Images seen, over all stages.
        stage_loss: Loss of each stage.
        seconds: Spent on training until then; 0 where nobody looked.
    """

    capacity: int
    images: int
    stage_loss: tuple[float, ...]
    seconds: float = 0.0


@dataclass(frozen=True)
class Law:
    """Loss of a stage: floor + capacity_scale w^-capacity_power + image_scale n^-image_power w^-mixed_power.

    Attributes:
        floor: Loss of a decoder of any capacity after any training.
        capacity_scale: Part that capacity removes, however long the training.
        capacity_power: How fast.
        image_scale: Part that training removes.
        image_power: How fast.
        mixed_power: How much faster a large decoder learns.
        error: Root of the mean squared relative residual of the fit.
    """

    floor: float
    capacity_scale: float
    capacity_power: float
    image_scale: float
    image_power: float
    mixed_power: float
    error: float

    def loss(self, capacity: int, images: float) -> float:
        """Expected loss of a decoder after a number of images."""
        learning = self.image_scale * images**-self.image_power * capacity**-self.mixed_power
        return self.floor + self.capacity_scale * capacity**-self.capacity_power + learning


@dataclass(frozen=True)
class Allocation:
    """Decoder capacities under a budget.

    Attributes:
        capacities: Capacity of each decoder, stage 0 first.
        loss: Expected loss under the training distribution.
        images: Images that the training budget then allows; for a sampling budget those of the longest proxy run.
        flops: Mean FLOPs an image: of a training step, or of all calls of a sampler.
    """

    capacities: tuple[int, ...]
    loss: float
    images: float
    flops: float


def fit_law(measurements: Sequence[Measurement], stage: int) -> Law:
    """Fit the law of a stage by least squares of relative errors: exactly in the scales, on a grid in the powers.

    Args:
        measurements: Proxy runs with at least two capacities and two numbers of images.
        stage: Which stage.

    Returns:
        The law with non-negative parts.

    Raises:
        ConfigError: Too few different capacities or numbers of images.
    """
    capacities = torch.tensor([float(item.capacity) for item in measurements], dtype=torch.float64)
    images = torch.tensor([float(item.images) for item in measurements], dtype=torch.float64)
    losses = torch.tensor([item.stage_loss[stage] for item in measurements], dtype=torch.float64)
    if len(capacities.unique()) < 2 or len(images.unique()) < 2:
        raise ConfigError("proxy runs need at least two decoder widths and two numbers of images to fit a law")
    # Once the powers are fixed the law is linear in its three scales. Dividing a row by its loss makes the residual
    # relative, (L - loss)/loss, so the target is 1. Units in the middle of the data keep the columns of one size.
    unit, image_unit = float(capacities.log().mean().exp()), float(images.log().mean().exp())
    powers = torch.tensor(list(itertools.product(POWERS, POWERS, (0.0, *POWERS))), dtype=torch.float64)
    w, n = (capacities / unit).log(), (images / image_unit).log()
    capacity_power, image_power, mixed_power = powers[:, :, None].unbind(1)
    columns = torch.stack(
        (
            torch.ones(len(powers), len(w)).double(),
            (-capacity_power * w).exp(),
            (-image_power * n - mixed_power * w).exp(),
        ),
        dim=2,
    )
    scales, errors = _non_negative(columns / losses[:, None])
    best = int(errors.argmin())
    floor, capacity_scale, image_scale = scales[best].tolist()
    capacity_power, image_power, mixed_power = powers[best].tolist()
    return Law(
        floor=floor,
        capacity_scale=capacity_scale * unit**capacity_power,
        capacity_power=capacity_power,
        image_scale=image_scale * image_unit**image_power * unit**mixed_power,
        image_power=image_power,
        mixed_power=mixed_power,
        error=(float(errors[best]) / len(losses)) ** 0.5,
    )


def _non_negative(
    columns: Float[Tensor, "problems points scales"],
) -> tuple[Float[Tensor, "problems scales"], Float[Tensor, " problems"]]:
    """Scales >= 0 that minimise |columns @ scales - 1|^2, and that minimum, for each problem.

    The optimum is the unconstrained one over the scales that are positive there, so of all subsets whose unconstrained
    optimum is non-negative the best is it: with three scales there are seven.
    """
    problems, points, count = columns.shape
    target = columns.new_ones(problems, points, 1)
    scales, errors = columns.new_zeros(problems, count), columns.new_full((problems,), float(points))
    for size in range(1, count + 1):
        for subset in itertools.combinations(range(count), size):
            part = columns[:, :, subset]
            solution = torch.linalg.lstsq(part, target, driver="gelsd").solution
            error = (part @ solution - target).square().sum((1, 2))
            better = (solution[:, :, 0] >= 0).all(1) & (error < errors)
            full = columns.new_zeros(problems, count)
            full[:, subset] = solution[:, :, 0]
            scales, errors = torch.where(better[:, None], full, scales), torch.where(better, error, errors)
    return scales, errors


def allocate_training(
    laws: Sequence[Law],
    shares: Sequence[float],
    candidates: Sequence[int],
    flops: Sequence[Sequence[float]],
    budget: float,
    unit: str = "training FLOPs",
) -> Allocation:
    """Capacities that minimise the expected loss under a budget of training FLOPs: smaller decoders see more images.

    FLOPs may be any cost of an image that adds up over the stages by their shares, like seconds.

    Args:
        laws: Law of each stage.
        shares: Share of each stage in the training distribution.
        candidates: Capacities to choose from.
        flops: Training FLOPs of an image, for each stage and candidate.
        budget: Training FLOPs in all.
        unit: What they are, if they are something else.

    Returns:
        The best combination of candidates.

    Raises:
        ConfigError: The budget does not reach for a single image.
    """
    means = [[share * cost for cost in costs] for share, costs in zip(shares, flops, strict=True)]
    low, high = (sum(map(extreme, means)) for extreme in (min, max))
    if budget < low:
        raise ConfigError(f"a budget of {budget:.3g} {unit} is less than one image costs ({low:.3g})")

    def allocation(choice: tuple[int, ...]) -> Allocation:
        mean = sum(costs[index] for costs, index in zip(means, choice, strict=True))
        capacities = tuple(candidates[index] for index in choice)
        parts = zip(shares, laws, capacities, strict=True)
        loss = sum(share * law.loss(capacity, budget / mean) for share, law, capacity in parts)
        return Allocation(capacities, loss, budget / mean, mean)

    # A choice of mean cost C sees budget/C images, which couples the stages. For a given number of images n they do not
    # depend on one another, and the best choice that can pay for n is on the Pareto front of (cost, loss at n). As n
    # lies between budget/high and budget/low, it is tried on a fine grid; choices that cost up to one step of the grid
    # more than n allows are kept, since their own n lies between two points. All are then rated at what they really
    # see.
    ratio = (high / low) ** (1 / _LENGTHS)
    choices = set[tuple[int, ...]]()
    for images in (budget / high * ratio**place for place in range(_LENGTHS + 1)):
        losses = _losses(laws, shares, candidates, images)
        choices.update(choice for cost, _, choice in _pareto(means, losses) if cost * images <= budget * ratio)
    return min(map(allocation, choices), key=lambda result: result.loss)


def allocate_sampling(
    laws: Sequence[Law],
    shares: Sequence[float],
    candidates: Sequence[int],
    flops: Sequence[Sequence[float]],
    calls: Sequence[int],
    budget: float,
    images: float,
) -> Allocation:
    """Capacities that minimise the expected loss under a budget of FLOPs for drawing one image.

    Args:
        laws: Law of each stage.
        shares: Share of each stage in the training distribution.
        candidates: Capacities to choose from.
        flops: Forward FLOPs of an image, for each stage and candidate.
        calls: Network evaluations of each stage that the solver makes.
        budget: FLOPs of drawing one image.
        images: Images of training at which the loss is read.

    Returns:
        The best combination of candidates.

    Raises:
        ConfigError: The smallest decoders cost more than the budget.
    """
    costs = [[count * cost for cost in stage] for count, stage in zip(calls, flops, strict=True)]
    front = _pareto(costs, _losses(laws, shares, candidates, images))
    if budget < front[0][0]:
        raise ConfigError(
            f"a budget of {budget:.3g} FLOPs an image is below that of the narrowest decoders ({front[0][0]:.3g}); "
            "raise it, or take fewer steps"
        )
    cost, loss, choice = max((row for row in front if row[0] <= budget), key=lambda row: row[0])
    return Allocation(tuple(candidates[index] for index in choice), loss, images, cost)


def _losses(
    laws: Sequence[Law], shares: Sequence[float], candidates: Sequence[int], images: float
) -> list[list[float]]:
    """What each stage adds to the expected loss with each candidate."""
    return [[share * law.loss(w, images) for w in candidates] for share, law in zip(shares, laws, strict=True)]


def _pareto(
    costs: Sequence[Sequence[float]], losses: Sequence[Sequence[float]]
) -> list[tuple[float, float, tuple[int, ...]]]:
    """All combinations, one choice a stage, that no other beats in both cost and loss; by increasing cost.

    Costs and losses add up over stages, so a partial combination that is beaten can be dropped before the next stage.
    """
    front: list[tuple[float, float, tuple[int, ...]]] = [(0.0, 0.0, ())]
    for stage_costs, stage_losses in zip(costs, losses, strict=True):
        rows = [
            (cost + more, loss + part, (*choice, index))
            for cost, loss, choice in front
            for index, (more, part) in enumerate(zip(stage_costs, stage_losses, strict=True))
        ]
        front = []
        for row in sorted(rows):
            if not front or row[1] < front[-1][1]:
                front.append(row)
    return front
