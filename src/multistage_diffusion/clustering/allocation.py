"""Capacity allocation: how wide each stage's decoder should be under a budget of FLOPs.

Short proxy runs give the held-out loss of each stage at several decoder widths and numbers of images. A law
L(w, n) = floor + b w^-beta + c n^-gamma w^-delta is fitted to each stage, and the widths are chosen that minimise the
expected loss among all combinations of candidates that the budget allows.

With delta = 0 the law is that of Hoffmann et al. 2022 (Eq. 2), with the decoder's width in the place of parameters. The
last power is there because a narrow decoder mainly learns more slowly: proxies that are short beside the budget would
otherwise take that for a loss that it never makes up. Zhang
et al. 2024 chose their widths by hand.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from multistage_diffusion.errors import ConfigError

POWERS = tuple(round(0.25 * k, 2) for k in range(1, 17))  # exponents tried, 0.25 to 4
_LENGTHS = 64  # lengths of training at which widths are sought


@dataclass(frozen=True)
class Measurement:
    """Held-out loss of each stage in one proxy run.

    Attributes:
        width: Base width of every decoder of the run.
        images: Images seen, over all stages.
        stage_loss: Loss of each stage.
    """

    width: int
    images: int
    stage_loss: tuple[float, ...]


@dataclass(frozen=True)
class Law:
    """Loss of a stage: floor + width_scale w^-width_power + image_scale n^-image_power w^-mixed_power.

    Attributes:
        floor: Loss of a decoder of any width after any training.
        width_scale: Part that capacity removes, however long the training.
        width_power: How fast.
        image_scale: Part that training removes.
        image_power: How fast.
        mixed_power: How much faster a wide decoder learns.
        error: Root of the mean squared relative residual of the fit.
    """

    floor: float
    width_scale: float
    width_power: float
    image_scale: float
    image_power: float
    mixed_power: float
    error: float

    def loss(self, width: int, images: float) -> float:
        """Expected loss of a decoder of a width after a number of images."""
        learning = self.image_scale * images**-self.image_power * width**-self.mixed_power
        return self.floor + self.width_scale * width**-self.width_power + learning


@dataclass(frozen=True)
class Allocation:
    """Decoder widths under a budget.

    Attributes:
        widths: Base width of each decoder, stage 0 first.
        loss: Expected loss under the training distribution.
        images: Images that the training budget then allows; for a sampling budget those of the longest proxy run.
        flops: Mean FLOPs an image: of a training step, or of all calls of a sampler.
    """

    widths: tuple[int, ...]
    loss: float
    images: float
    flops: float


def fit_law(measurements: Sequence[Measurement], stage: int) -> Law:
    """Fit the law of a stage by least squares of relative errors: exactly in the scales, on a grid in the powers.

    Args:
        measurements: Proxy runs with at least two widths and two numbers of images.
        stage: Which stage.

    Returns:
        The law with non-negative parts.

    Raises:
        ConfigError: Too few different widths or numbers of images.
    """
    widths = torch.tensor([float(item.width) for item in measurements], dtype=torch.float64)
    images = torch.tensor([float(item.images) for item in measurements], dtype=torch.float64)
    losses = torch.tensor([item.stage_loss[stage] for item in measurements], dtype=torch.float64)
    if len(widths.unique()) < 2 or len(images.unique()) < 2:
        raise ConfigError("proxy runs need at least two decoder widths and two numbers of images to fit a law")
    width_unit, image_unit = float(widths.log().mean().exp()), float(images.log().mean().exp())
    powers = torch.tensor(list(itertools.product(POWERS, POWERS, (0.0, *POWERS))), dtype=torch.float64)
    w, n = (widths / width_unit).log(), (images / image_unit).log()
    width_power, image_power, mixed_power = powers[:, :, None].unbind(1)
    columns = torch.stack(
        (
            torch.ones(len(powers), len(w)).double(),
            (-width_power * w).exp(),
            (-image_power * n - mixed_power * w).exp(),
        ),
        dim=2,
    )
    scales, errors = _non_negative(columns / losses[:, None])
    best = int(errors.argmin())
    floor, width_scale, image_scale = scales[best].tolist()
    width_power, image_power, mixed_power = powers[best].tolist()
    return Law(
        floor, width_scale * width_unit**width_power, width_power,
        image_scale * image_unit**image_power * width_unit**mixed_power, image_power, mixed_power,
        (float(errors[best]) / len(losses)) ** 0.5,
    )  # fmt: skip


def allocate_training(
    laws: Sequence[Law],
    shares: Sequence[float],
    candidates: Sequence[int],
    flops: Sequence[Sequence[float]],
    budget: float,
) -> Allocation:
    """Widths that minimise the expected loss under a budget of training FLOPs: narrower decoders see more images.

    Args:
        laws: Law of each stage.
        shares: Share of each stage in the training distribution.
        candidates: Widths to choose from.
        flops: Training FLOPs of an image, for each stage and candidate.
        budget: Training FLOPs in all.

    Returns:
        The best combination of candidates.

    Raises:
        ConfigError: The budget does not reach for a single image.
    """
    means = [[share * cost for cost in costs] for share, costs in zip(shares, flops, strict=True)]
    low, high = (sum(map(extreme, means)) for extreme in (min, max))
    if budget < low:
        raise ConfigError(f"a budget of {budget:.3g} training FLOPs is less than one image costs ({low:.3g})")

    def result(chosen: tuple[int, ...]) -> Allocation:
        mean = sum(costs[index] for costs, index in zip(means, chosen, strict=True))
        widths = tuple(candidates[index] for index in chosen)
        parts = zip(shares, laws, widths, strict=True)
        loss = sum(share * law.loss(width, budget / mean) for share, law, width in parts)
        return Allocation(widths, loss, budget / mean, mean)

    # Once the number of images is given, the stages do not depend on one another; it lies between these ends.
    ratio = (high / low) ** (1 / _LENGTHS)
    found = set[tuple[int, ...]]()
    for images in (budget / high * ratio**place for place in range(_LENGTHS + 1)):
        parts = [[share * law.loss(w, images) for w in candidates] for share, law in zip(shares, laws, strict=True)]
        found.update(chosen for cost, _, chosen in _pareto(means, parts) if cost * images <= budget * ratio)
    return min(map(result, found), key=lambda allocation: allocation.loss)


def allocate_sampling(
    laws: Sequence[Law],
    shares: Sequence[float],
    candidates: Sequence[int],
    flops: Sequence[Sequence[float]],
    calls: Sequence[int],
    budget: float,
    images: float,
) -> Allocation:
    """Widths that minimise the expected loss under a budget of FLOPs for drawing one image.

    Args:
        laws: Law of each stage.
        shares: Share of each stage in the training distribution.
        candidates: Widths to choose from.
        flops: Forward FLOPs of an image, for each stage and candidate.
        calls: Calls of each stage that the solver makes.
        budget: FLOPs of drawing one image.
        images: Images of training at which the loss is read.

    Returns:
        The best combination of candidates.

    Raises:
        ConfigError: The narrowest decoders cost more than the budget.
    """
    costs = [[count * cost for cost in stage] for count, stage in zip(calls, flops, strict=True)]
    parts = [[share * law.loss(w, images) for w in candidates] for share, law in zip(shares, laws, strict=True)]
    front = _pareto(costs, parts)
    if budget < front[0][0]:
        raise ConfigError(f"a budget of {budget:.3g} FLOPs an image is below that of the narrowest decoders "
                          f"({front[0][0]:.3g}); raise it, or take fewer steps")  # fmt: skip
    cost, loss, chosen = max((row for row in front if row[0] <= budget), key=lambda row: row[0])
    return Allocation(tuple(candidates[index] for index in chosen), loss, images, cost)


def _pareto(
    costs: Sequence[Sequence[float]], losses: Sequence[Sequence[float]]
) -> list[tuple[float, float, tuple[int, ...]]]:
    """All combinations, one choice a stage, that no other beats in both cost and loss; by increasing cost.

    Costs and losses add up over stages, so a partial combination that is beaten can be dropped before the next stage.
    """
    front: list[tuple[float, float, tuple[int, ...]]] = [(0.0, 0.0, ())]
    for stage_costs, stage_losses in zip(costs, losses, strict=True):
        rows = [
            (cost + more, loss + part, (*chosen, index))
            for cost, loss, chosen in front
            for index, (more, part) in enumerate(zip(stage_costs, stage_losses, strict=True))
        ]
        front = []
        for row in sorted(rows):
            if not front or row[1] < front[-1][1]:
                front.append(row)
    return front


def _non_negative(columns: Tensor) -> tuple[Tensor, Tensor]:
    """Least squares of columns @ scales against 1 with scales >= 0, by trying every set of positive ones.

    Columns are (problems, points, scales); returned are the scales and the squared error of each problem.
    """
    problems, points, count = columns.shape
    target = columns.new_ones(problems, points, 1)
    scales, errors = columns.new_zeros(problems, count), columns.new_full((problems,), float(points))
    for size in range(1, count + 1):
        for chosen in itertools.combinations(range(count), size):
            part = columns[:, :, chosen]
            found = torch.linalg.lstsq(part, target, driver="gelsd").solution
            error = (part @ found - target).square().sum((1, 2))
            better = (found[:, :, 0] >= 0).all(1) & (error < errors)
            full = columns.new_zeros(problems, count)
            full[:, chosen] = found[:, :, 0]
            scales, errors = torch.where(better[:, None], full, scales), torch.where(better, error, errors)
    return scales, errors
