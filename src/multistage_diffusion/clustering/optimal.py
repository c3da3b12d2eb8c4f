"""The stages of the optimal denoiser: Algorithm 1, and any number of stages by a dynamic programme."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from multistage_diffusion.clustering.options import MAX_STAGES, ClusterOptions
from multistage_diffusion.clustering.partition import block_cost, partition
from multistage_diffusion.clustering.posterior import OptimalDenoiser, as_floats
from multistage_diffusion.clustering.similarity import (
    Progress,
    Similarities,
    Similarity,
    bootstrap_weights,
    compare_levels,
    compare_to_ends,
    draw_grid,
    draw_random,
    edge_samples,
    first_crossings,
    interval,
)
from multistage_diffusion.errors import ConfigError
from multistage_diffusion.noise import Process
from multistage_diffusion.process_group import SINGLE, ProcessGroup

_GRID = 64  # levels of the similarity matrices


@dataclass(frozen=True)
class EdgeEstimate:
    """Edges as shares u of the measure, with what they were estimated from; see `Clustering`."""

    u: tuple[float, ...]
    intervals: tuple[tuple[float, float], ...] = ()
    similarity: Similarity | None = None
    matrices: Similarities | None = None
    elbow: tuple[float, ...] = ()
    extrapolation: dict[str, Any] | None = None


def _compared(images: Tensor, options: ClusterOptions) -> Tensor:
    """The entries that vary, in the range of the options; a constant border agrees everywhere and would only dilute."""
    varies = images.amin(0) < images.amax(0)
    if not bool(varies.all()):
        images = images[:, varies][:, :, None, None]
    return as_floats(images) / 2 if options.unit_range else images


def algorithm_1(
    images: Tensor,
    labels: Tensor | None,
    total: int,
    process: Process,
    options: ClusterOptions,
    device: torch.device | str | None,
    progress: Progress | None,
    processes: ProcessGroup = SINGLE,
) -> EdgeEstimate:
    """Three stages by first crossings; on a part of the images, the lower edge is extrapolated in ln N.

    Args:
        images: The data set, or a random part of it.
        labels: Class of each image, for posteriors within a class.
        total: Number of images in the set, to which the lower edge is extrapolated.
        process: Gives the noise levels.
        options: How the stages are found.
        device: Where to compute.
        progress: Called with the pairs done and their number.
        processes: The processes that share the pairs.

    Returns:
        The edges, their intervals and the similarities behind them.

    Raises:
        ConfigError: No level qualifies, all do, or the edges cross.
    """
    count = len(images)
    sizes = [count // 4, count // 2, count] if count < total else [count]
    pairs = draw_random(process, options.measure, sizes[0], options.draws, options.seed)
    images, results = _compared(images, options), []
    for size in sizes:
        exact = OptimalDenoiser(images[:size], labels=None if labels is None else labels[:size], device=device)
        results.append(
            compare_to_ends(
                exact,
                pairs,
                options.eta,
                options.reference,
                process.sigma_max,
                within_class=labels is not None,
                progress=progress,
                processes=processes,
            )
        )
        del exact  # before the next one is made
    crossings = first_crossings(results[-1], options.alpha, resamples=options.resamples, seed=options.seed)
    if len(sizes) == 1:
        return EdgeEstimate(crossings.edges, crossings.intervals if options.resamples else (), similarity=results[-1])
    return extrapolated(results, sizes, total, crossings.edges[1], crossings.intervals[1], options)


def extrapolated(
    results: list[Similarity],
    sizes: list[int],
    images: int,
    upper: float,
    upper_interval: tuple[float, float],
    options: ClusterOptions,
) -> EdgeEstimate:
    """The lower edge by a straight line in ln N through nested parts of the images; the upper one does not move.

    Args:
        results: Similarities of the same pairs in each part.
        sizes: Images in each part, increasing.
        images: Number of images to extrapolate to.
        upper: The upper edge, as a share of the measure.
        upper_interval: Its interval.
        options: How the stages are found.

    Returns:
        Both edges; the interval of the lower one is widened by how far the last two parts' line misses that of all.

    Raises:
        ConfigError: A part has no lower edge, or the line leaves the range below the upper edge.
    """
    # The lower edge is where the softmax collapses on one image. The other N - 1 weigh in together, with a logit of
    # about ln N, so the edge moves along a line in ln N. Least squares through all sizes, for each bootstrap resample
    # at once.
    weights = bootstrap_weights(len(results[0].u), options.resamples, options.seed)
    lower = torch.stack([edge_samples(result, weights, options.alpha)[0] for result in results])
    logs = torch.tensor(sizes, dtype=torch.float64).log()
    ahead = math.log(images) - logs.mean()
    slope = ((logs - logs.mean())[:, None] * lower).sum(0) / (logs - logs.mean()).square().sum()
    line = lower.mean(0) + slope * ahead
    last = lower[-1] + (lower[-1] - lower[-2]) / (logs[-1] - logs[-2]) * (math.log(images) - logs[-1])
    curvature = float((line - last)[0].abs())
    low, high = interval(line[1:]) if options.resamples else (float(line[0]), float(line[0]))
    edge = float(line[0])
    if not (0 < edge < upper and bool(((lower[:, 0] > 0) & (lower[:, 0] < 1)).all())):
        raise ConfigError(
            f"the lower edge cannot be extrapolated from {sizes} images: it lies at {lower[:, 0].tolist()} of the "
            f"levels, and the upper one at {upper:.4f}; raise max-images"
        )
    record = {
        "sizes": sizes,
        "images": images,
        "u": lower[:, 0].tolist(),
        "extrapolated_u": edge,
        "curvature_error_u": curvature,
    }
    bounds = (max(low - curvature, 0.0), min(high + curvature, 1.0))
    intervals = (bounds, upper_interval) if options.resamples else ()
    return EdgeEstimate((edge, upper), intervals, similarity=results[-1], extrapolation=record)


def dynamic_programme(
    images: Tensor,
    labels: Tensor | None,
    process: Process,
    options: ClusterOptions,
    device: torch.device | str | None,
    progress: Progress | None,
    processes: ProcessGroup = SINGLE,
) -> EdgeEstimate:
    """Any number of stages by the dynamic programme on a matrix over levels.

    Arguments as for `algorithm_1`. Each bootstrap resample of the pairs is partitioned again, for the intervals.
    """
    pairs = draw_grid(process, options.measure, len(images), options.draws, _GRID, options.seed)
    exact = OptimalDenoiser(_compared(images, options), labels=labels, device=device)
    within_class = labels is not None
    matrices = compare_levels(
        exact, pairs, options.eta, within_class=within_class, progress=progress, processes=processes
    )
    by_pair = (matrices.similar if options.criterion == "similarity" else matrices.gram).double()
    weights = bootstrap_weights(len(by_pair), options.resamples, options.seed)
    means = torch.einsum("rp,pab->rab", weights / weights.sum(1, keepdim=True), by_pair)
    cuts = torch.tensor([partition(block_cost(mean), options.stages) for mean in means], dtype=torch.float64) / _GRID
    return EdgeEstimate(
        tuple(cuts[0].tolist()),
        tuple(interval(column) for column in cuts[1:].T) if options.resamples else (),
        matrices=matrices,
        elbow=elbow(means[0]),
    )


def elbow(matrix: Float[Tensor, "levels levels"]) -> tuple[float, ...]:
    """What 1, 2, ... 8 stages reach: the length-weighted mean of a matrix over levels within them, never decreasing."""
    cost, values = block_cost(matrix), []
    for stages in range(1, min(MAX_STAGES, len(matrix)) + 1):
        ends = (0, *partition(cost, stages), len(matrix))
        values.append(-sum(float(cost[a, b]) for a, b in itertools.pairwise(ends)) / len(matrix))
    return tuple(values)
