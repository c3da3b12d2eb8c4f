"""Functional similarity of optimal denoisers at different noise levels, and Algorithm 1 (three stages) on top.

With x = x0 + sigma eps the optimal noise prediction is eps* = (x - m)/sigma = eps + delta, delta = (x0 - m)/sigma,
where m is the posterior mean of x0; two levels are compared on the same (x0, eps), so eps cancels and only delta is
ever formed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from multistage_diffusion import rng
from multistage_diffusion.clustering.levels import noise_levels
from multistage_diffusion.clustering.posterior import OptimalDenoiser
from multistage_diffusion.errors import ConfigError
from multistage_diffusion.noise import Process
from multistage_diffusion.process_group import SINGLE, ProcessGroup

Progress = Callable[[int, int], None]
LEVELS = 8  # noise levels a pair is compared on: one in each of so many equal parts of the measure
_PAIRS = 128  # pairs at a time
_FEWEST = 32  # a running mean of fewer draws is not believed
_ELEMENTS = 1 << 20  # numbers compared at once: they stay in a cache


@dataclass(frozen=True)
class Pairs:
    """The draws of an experiment: images of the set, noise by counter, and noise levels.

    Attributes:
        seed: Seed of the noise.
        image: Which image each pair begins with.
        u: Share of the measure below each level, increasing along a row.
        sigma: The levels.
    """

    seed: int
    image: Int[Tensor, " pairs"]
    u: Float[Tensor, "pairs levels"]
    sigma: Float[Tensor, "pairs levels"]


@dataclass(frozen=True)
class Similarity:
    """Functional similarity of each draw to the two ends of the noise levels.

    Attributes:
        u: Share of the measure below each draw's level.
        low: Share of an image's entries in which eps* is within eta of the one at zero noise.
        high: The same for the reference at the highest noise.
        effective: Effective number of images in the posterior.
    """

    u: Float[Tensor, "pairs levels"]
    low: Float[Tensor, "pairs levels"]
    high: Float[Tensor, "pairs levels"]
    effective: Float[Tensor, "pairs levels"]


@dataclass(frozen=True)
class Similarities:
    """Functional similarity of every two levels of a grid, for each pair.

    Attributes:
        similar: Share of an image's entries in which eps* differs by at most eta.
        gram: Mean over entries of the product of the two deltas.
        effective: Effective number of images in the posterior.
    """

    similar: Float[Tensor, "pairs levels levels"]
    gram: Float[Tensor, "pairs levels levels"]
    effective: Float[Tensor, "pairs levels"]


def draw_random(process: Process, measure: str, images: int, samples: int, seed: int) -> Pairs:
    """Draws for Algorithm 1: each pair gets one random level in each of `LEVELS` equal parts of the measure.

    So the levels of all pairs together are K stratified draws, as many as `samples` (rounded up to whole pairs).

    Args:
        process: Gives the noise levels.
        measure: What their distribution is.
        images: Number of images in the set.
        samples: Number K of draws (x0, eps, t).
        seed: Seed of all draws.

    Returns:
        The draws. Images are taken without replacement while there are enough.
    """
    levels = min(LEVELS, samples)
    index = torch.arange(-(-samples // levels))
    u = (torch.arange(levels) + rng.uniform(seed, "cluster/level", index, levels)) / levels
    return Pairs(seed, _images(images, len(index), seed), u, noise_levels(process, measure, u))


def draw_grid(process: Process, measure: str, images: int, samples: int, levels: int, seed: int) -> Pairs:
    """Draws for similarity matrices: all pairs on the same levels, the middles of equal parts of the measure.

    Args:
        process: Gives the noise levels.
        measure: What their distribution is.
        images: Number of images in the set.
        samples: Number of draws, shared out over the levels.
        levels: Number of levels.
        seed: Seed of all draws.

    Returns:
        The draws.
    """
    index = torch.arange(max(2, -(-samples // levels)))
    u = ((torch.arange(levels, dtype=torch.float64) + 0.5) / levels).expand(len(index), -1)
    return Pairs(seed, _images(images, len(index), seed), u, noise_levels(process, measure, u))


def _images(images: int, pairs: int, seed: int) -> Tensor:
    return rng.permutation(seed, "cluster/image", 0, images)[torch.arange(pairs) % images]


def compare_to_ends(
    denoiser: OptimalDenoiser,
    pairs: Pairs,
    eta: float,
    reference: str,
    sigma_max: float,
    *,
    within_class: bool = False,
    progress: Progress | None = None,
    processes: ProcessGroup = SINGLE,
) -> Similarity:
    """Similarity of each draw to zero noise and to the highest noise.

    Args:
        denoiser: The optimal denoiser of the set.
        pairs: The draws.
        eta: Largest difference of eps* that counts as similar.
        reference: What the high end is: `data-mean`, the constant denoiser at the same x (the paper's code), or
            `definition`, eps* at `sigma_max` of the same pair (the paper's text).
        sigma_max: Highest noise level.
        within_class: Use posteriors within each image's class.
        progress: Called with the pairs done and their number.
        processes: The processes that share the pairs; all must call, and all get the result.

    Returns:
        The similarities, on the CPU.
    """
    definition = reference == "definition"
    low, high, effective = (torch.zeros(pairs.u.shape) for _ in range(3))
    mean = denoiser.class_mean(pairs.image) if within_class else denoiser.mean.expand(len(pairs.image), -1, -1, -1)
    for part, x0, noise in _parts(denoiser, pairs, progress, processes):
        sigma = pairs.sigma[part]
        if definition:
            sigma = torch.cat((sigma, torch.full_like(sigma[:, :1], sigma_max)), 1)
        posterior = denoiser.pairs(pairs.image[part], noise, sigma, within_class=within_class)
        levels = pairs.u.shape[1]
        delta = posterior.delta[:, :levels]
        if definition:
            target = posterior.delta[:, levels:]
        else:
            target = (x0 - mean[part])[:, None] / sigma.to(x0)[:, :, None, None, None]
        low[part] = _share(delta.abs() <= eta)
        high[part] = _share((delta - target).abs() <= eta)
        effective[part] = posterior.effective[:, :levels].cpu()
    return Similarity(pairs.u, *map(processes.all_reduce, (low, high, effective)))


def compare_levels(
    denoiser: OptimalDenoiser,
    pairs: Pairs,
    eta: float,
    *,
    within_class: bool = False,
    progress: Progress | None = None,
    processes: ProcessGroup = SINGLE,
) -> Similarities:
    """Similarity and inner product of every two levels of a grid.

    Args:
        denoiser: The optimal denoiser of the set.
        pairs: The draws, all on the same levels.
        eta: Largest difference of eps* that counts as similar.
        within_class: Use posteriors within each image's class.
        progress: Called with the pairs done and their number.
        processes: The processes that share the pairs; all must call, and all get the result.

    Returns:
        One matrix a pair, on the CPU.
    """
    count, levels = pairs.u.shape
    similar, gram = torch.zeros(count, levels, levels), torch.zeros(count, levels, levels)
    effective = torch.zeros(count, levels)
    for part, _, noise in _parts(denoiser, pairs, progress, processes):
        posterior = denoiser.pairs(pairs.image[part], noise, pairs.sigma[part], within_class=within_class)
        delta = posterior.delta.flatten(2)
        effective[part] = posterior.effective.cpu()
        gram[part] = (delta @ delta.mT / delta.shape[2]).cpu()
        for pair, rows in zip(part.tolist(), delta, strict=True):
            similar[pair] = _share_matrix(rows, eta)
    return Similarities(*map(processes.all_reduce, (similar, gram, effective)))


def _parts(
    denoiser: OptimalDenoiser, pairs: Pairs, progress: Progress | None, processes: ProcessGroup
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """This process's pairs in small groups: their indices, images and noise; what other processes have, stays 0."""
    share = torch.arange(processes.rank, len(pairs.image), processes.size)
    done = 0
    for part in share.split(_PAIRS):
        if len(part):
            noise = rng.normal(pairs.seed, "cluster/noise", part.to(denoiser.device), denoiser.shape)
            yield part, denoiser.images(pairs.image[part]), noise
        done += len(part)
        if progress is not None:
            progress(done, len(share))


def _share(near: Tensor) -> Tensor:
    """Share of an image's entries."""
    return near.flatten(2).float().mean(2).cpu()


def _share_matrix(delta: Tensor, eta: float) -> Tensor:
    """Share of the entries in which two levels agree, for every two rows of `delta`, in parts of bounded memory."""
    levels, entries = delta.shape
    total = delta.new_zeros(levels, levels)
    for part in delta.split(max(1, _ELEMENTS // levels**2), dim=1):
        total += ((part[:, None] - part[None]).abs_() <= eta).sum(2)
    return total / entries


@dataclass(frozen=True)
class Crossings:
    """Where running means of similarity first fall below alpha, seen from each end.

    Attributes:
        edges: Shares u of the measure at the two edges.
        intervals: 95% bootstrap interval of each edge.
    """

    edges: tuple[float, float]
    intervals: tuple[tuple[float, float], tuple[float, float]]


def first_crossings(similarity: Similarity, alpha: float, *, resamples: int, seed: int) -> Crossings:
    """The two edges of Algorithm 1, by the first crossing from each end.

    The lower edge is the largest tau with E[S0 | u < tau] >= alpha that no smaller tau fails, the upper one the same of
    S1 from above. The literal arg max and arg min of the paper can land on the far side, because similarity to either
    end is high at both ends. Intervals come from resampling pairs.

    Args:
        similarity: Similarities of the draws.
        alpha: Least mean similarity of a stage to its end.
        resamples: Number of bootstrap resamples.
        seed: Seed of the resamples.

    Returns:
        The edges and their intervals.

    Raises:
        ConfigError: No level qualifies, all do, or the edges cross.
    """
    weights = bootstrap_weights(len(similarity.u), resamples, seed)
    low, high = edge_samples(similarity, weights, alpha)
    first, last = float(low[0]), float(high[0])
    hint = f"at alpha {alpha:g}"
    if first == 0.0 or last == 1.0:
        end = "low" if first == 0.0 else "high"
        raise ConfigError(f"no noise level is similar enough to the {end}-noise end {hint}; lower alpha or raise eta")
    if first == 1.0 or last == 0.0:
        end = "low" if first == 1.0 else "high"
        raise ConfigError(f"every noise level is similar to the {end}-noise end {hint}; raise alpha or lower eta")
    if first >= last:
        raise ConfigError(
            f"the edges cross {hint}: {first:.4f} and {last:.4f} of the noise levels; raise alpha, lower eta, or use "
            "another objective"
        )
    return Crossings((first, last), (interval(low[1:]), interval(high[1:])))


def edge_samples(similarity: Similarity, weights: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """The two edges for each row of weights.

    Args:
        similarity: Similarities of the draws.
        weights: Weight of each pair, one row a result.
        alpha: Least mean similarity of a stage to its end.

    Returns:
        Shares u at the lower and the upper edge; 0 and 1 where no level or every level qualifies (for the upper edge
        1 and 0).
    """
    u, order = similarity.u.flatten().sort()
    by_draw = weights.repeat_interleave(similarity.u.shape[1], 1)[:, order]
    low = _crossing(u, by_draw, similarity.low.flatten()[order], alpha)
    high = _crossing(1 - u.flip(0), by_draw.flip(1), similarity.high.flatten()[order].flip(0), alpha)
    return low, 1 - high


def _crossing(u: Tensor, weights: Tensor, values: Tensor, alpha: float) -> Tensor:
    """Where the running mean of `values` over increasing `u` first falls below alpha.

    With u uniform in the measure, the mean of the first draws estimates E[S | u < tau] at every tau in one pass; the
    edge is half-way between the draw that takes it below alpha and the one before.
    """
    mean = running_mean(weights, values)
    below = mean < alpha
    fewest = min(_FEWEST, len(u) - 1)
    below[:, :fewest] = False
    index = below.double().argmax(1)
    edge = (u[index] + u[index - 1]) / 2
    edge = torch.where(index == fewest, 0.0, edge)  # already below when first believed
    return torch.where(below.any(1), edge, 1.0)


def running_mean(weights: Float[Tensor, "rows draws"], values: Float[Tensor, " draws"]) -> Float[Tensor, "rows draws"]:
    """Weighted mean of the first draws, for each number of them and each row of weights; 1 where there is no weight."""
    total = weights.cumsum(1)
    return torch.where(total > 0, (weights * values).cumsum(1) / total.clamp(min=1e-12), 1.0)


def bootstrap_weights(pairs: int, resamples: int, seed: int) -> Float[Tensor, "rows pairs"]:
    """How often each pair occurs in each resample, `resamples + 1` rows; the first is the sample itself."""
    index = (rng.uniform(seed, "cluster/bootstrap", torch.arange(resamples), pairs) * pairs).long()
    counts = torch.zeros(resamples, pairs, dtype=torch.float64)
    counts.scatter_add_(1, index, torch.ones_like(index, dtype=torch.float64))
    return torch.cat((torch.ones(1, pairs, dtype=torch.float64), counts))


def interval(values: Float[Tensor, " samples"]) -> tuple[float, float]:
    """Central 95% of bootstrap results; NaN where there are none."""
    if not len(values):
        return float("nan"), float("nan")
    low, high = torch.quantile(values.double(), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high
