"""Capacity allocation: how wide each stage's decoder should be under a budget of FLOPs.

Short proxy runs give the held-out loss of each stage at several decoder widths and numbers of images. A law
L(w, n) = floor + b w^-beta + c n^-gamma is fitted to each stage, and the widths are chosen that minimise the expected
loss among all combinations of candidates that the budget allows, exactly.

The form of the law is that of Hoffmann et al. 2022 (Eq. 2), with the decoder's width in the place of parameters. Zhang
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
    """Loss of a stage: floor + width_scale w^-width_power + image_scale n^-image_power.

    Attributes:
        floor: Loss of a decoder of any width after any training.
        width_scale: Part that capacity removes.
        width_power: How fast.
        image_scale: Part that training removes.
        image_power: How fast.
        error: Root of the mean squared relative residual of the fit.
    """

    floor: float
    width_scale: float
    width_power: float
    image_scale: float
    image_power: float
    error: float

    def capacity(self, width: int) -> float:
        """The part that depends on the decoder's width."""
        return self.width_scale * width**-self.width_power

    def training(self, images: float) -> float:
        """The part that depends on the number of images."""
        return self.image_scale * images**-self.image_power


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
    best: tuple[float, tuple[float, ...]] | None = None
    for width_power, image_power in itertools.product(POWERS, POWERS):
        columns = torch.stack(
            (torch.ones_like(widths), (widths / width_unit) ** -width_power, (images / image_unit) ** -image_power), 1
        )
        scales, error = _non_negative(columns / losses[:, None])
        if best is None or error < best[0]:
            best = (error, (*scales, width_power, image_power))
    assert best is not None
    error, (floor, width_scale, image_scale, width_power, image_power) = best
    return Law(
        floor, width_scale * width_unit**width_power, width_power, image_scale * image_unit**image_power, image_power,
        (error / len(losses)) ** 0.5,
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
    parts = [[share * law.capacity(w) for w in candidates] for share, law in zip(shares, laws, strict=True)]
    front = _pareto(means, parts)
    if budget < front[0][0]:
        raise ConfigError(f"a budget of {budget:.3g} training FLOPs is less than one image costs ({front[0][0]:.3g})")
    results = []
    for mean, capacity, chosen in front:
        images = budget / mean
        loss = capacity + sum(
            share * (law.floor + law.training(images)) for share, law in zip(shares, laws, strict=True)
        )
        results.append(Allocation(tuple(candidates[index] for index in chosen), loss, images, mean))
    return min(results, key=lambda result: result.loss)


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
    parts = [[share * law.capacity(w) for w in candidates] for share, law in zip(shares, laws, strict=True)]
    front = _pareto(costs, parts)
    if budget < front[0][0]:
        raise ConfigError(f"a budget of {budget:.3g} FLOPs an image is below that of the narrowest decoders "
                          f"({front[0][0]:.3g}); raise it, or take fewer steps")  # fmt: skip
    cost, capacity, chosen = max((row for row in front if row[0] <= budget), key=lambda row: row[0])
    rest = sum(share * (law.floor + law.training(images)) for share, law in zip(shares, laws, strict=True))
    return Allocation(tuple(candidates[index] for index in chosen), capacity + rest, images, cost)


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


def _non_negative(columns: Tensor) -> tuple[tuple[float, ...], float]:
    """Least squares of columns @ scales against 1 with scales >= 0, by trying every set of positive ones."""
    target = columns.new_ones(len(columns))
    best = ((0.0,) * columns.shape[1], float(target.square().sum()))
    for size in range(1, columns.shape[1] + 1):
        for chosen in itertools.combinations(range(columns.shape[1]), size):
            part = columns[:, chosen]
            scales = torch.linalg.lstsq(part, target[:, None], driver="gelsd").solution[:, 0]
            error = float((part @ scales - target).square().sum())
            if bool((scales >= 0).all()) and error < best[1]:
                full = [0.0] * columns.shape[1]
                for index, scale in zip(chosen, scales.tolist(), strict=True):
                    full[index] = scale
                best = (tuple(full), error)
    return best
