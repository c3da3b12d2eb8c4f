"""Distances between two sets of images, from statistics of their features, in float64 on the CPU.

Written here, because the sums are cached, added over processes and reused: scipy and torchmetrics are what the tests
compare with. Only figures from Inception features may be called FID, KID and IS in a report.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from multistage_diffusion import rng
from multistage_diffusion.errors import ConfigError, DataError
from multistage_diffusion.metrics.metric import FeatureMetric, Figures
from multistage_diffusion.metrics.statistics import SPLITS, Moments, Statistics

CUSTOMARY = 50_000  # generated images behind published figures; with fewer, the plain Fréchet distance needs its limit
_NEIGHBOURS = 5  # Naeem et al. 2020
_BLOCK = 1024  # rows of a distance matrix held at a time


class _Frechet(FeatureMetric):
    """The squared 2-Wasserstein distance between normal distributions with the sets' means and covariances.

    It is |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)).

    With roots C1 = R1 R1^T and C2 = R2 R2^T, the eigenvalues of C1 C2 are those of (R1^T R2) (R1^T R2)^T, so that the
    trace of its square root is the sum of the singular values of R1^T R2. That needs no root of the product, which is
    not symmetric, and is exact to rounding where covariances are singular.

    Source: Heusel et al. 2017.
    """

    def cautions(self, real: int | None, generated: int, num_features: int) -> tuple[str, ...]:
        """With fewer than twice as many images as features, covariances are close to singular."""
        return tuple(
            f"{count} {kind} images, fewer than 2 x {num_features} features: "
            "the Fréchet distance says more about their number than about their quality"
            for kind, count in (("real", real), ("generated", generated))
            if count is not None and count < 2 * num_features
        )


@final
@dataclass(frozen=True)
class FrechetDistance(_Frechet):
    """The Fréchet distance of the images as they are; `fid` is the same number where the features are Inception's."""

    name = "fd"
    companions = ("fid",)
    shown = ("fid", "fd")

    def measure(self, real: Moments, generated: Statistics, *, seed: int) -> Figures:
        """`fd`."""
        roots = (_root(each.covariance()) for each in (real, generated))
        return {self.name: _frechet(real.mean(), generated.mean(), *roots)}

    def followers(self, generated: int, num_features: int) -> tuple[FeatureMetric, ...]:
        """The limit, where fewer images than is customary are drawn, but enough for its regression."""
        return (FrechetDistanceLimit(),) if 4 * num_features <= generated < CUSTOMARY else ()


@final
@dataclass(frozen=True)
class FrechetDistanceLimit(_Frechet):
    """The Fréchet distance of infinitely many generated images.

    The distance of n images is too large by about c / n, so it is measured for several n and the line through the
    points (1 / n, distance) is read at 0.

    Source: Chong and Forsyth 2020, "Effectively unbiased FID", who use plain and quasi-random noise; here, subsets.
    """

    sizes: int = 15

    name = "fd_infinity"
    keeps = "generated"

    def measure(self, real: Moments, generated: Statistics, *, seed: int) -> Figures:
        """`fd_infinity`, and the least and the most images of the line: `fd_infinity_images`."""
        features, num_features = generated.features, len(generated.total)
        count, least = len(features), 2 * num_features
        if count < 2 * least:
            raise DataError(
                f"fd_infinity needs at least {2 * least} generated images (4 for each of {num_features} features), "
                f"got {count}; raise num, or leave fd_infinity out of metrics"
            )
        sizes = torch.linspace(max(least, count // 10), count, self.sizes, dtype=torch.float64).long()
        mean, root, distances = real.mean(), _root(real.covariance()), list[float]()
        for i, size in enumerate(sizes.tolist()):
            chosen = features[rng.permutation(seed, "fd-infinity", i, count)[:size]].double()
            distances.append(_frechet(mean, chosen.mean(0), root, _root(chosen.T.cov())))
        design = torch.stack((torch.ones(self.sizes, dtype=torch.float64), 1.0 / sizes.double()), dim=1)
        line = torch.linalg.lstsq(design, torch.tensor(distances, dtype=torch.float64)[:, None]).solution
        return {self.name: float(line[0, 0]), "fd_infinity_images": [int(sizes[0]), count]}


@final
@dataclass(frozen=True)
class KernelDistance(FeatureMetric):
    """Squared maximum mean discrepancy with the kernel k(x, y) = (x.y / d + 1)^3, over random subsets.

    The unbiased estimate is the mean of k over pairs of different real images, plus that over pairs of different
    generated ones, minus twice that over pairs of a real and a generated one.

    Source: Binkowski et al. 2018.
    """

    subset_size: int = 1000
    subsets: int = 100

    name = "kid"
    companions = ("kid_std",)
    keeps = "both"

    def measure(self, real: Moments, generated: Statistics, *, seed: int) -> Figures:
        """Mean and standard deviation over the subsets: `kid`, `kid_std`."""
        sets = {"real": real.features, "generated": generated.features}
        counts = [len(rows) for rows in sets.values()]
        size = min(self.subset_size, *counts)
        values = []
        for i in range(1 if size == max(counts) else self.subsets):
            x, y = (
                rows[rng.permutation(seed, f"kid-{kind}", i, len(rows))[:size]].double() for kind, rows in sets.items()
            )
            within = sum(float(_kernel(rows, rows).fill_diagonal_(0.0).sum()) for rows in (x, y)) / (size * (size - 1))
            values.append(within - 2 * float(_kernel(x, y).mean()))
        result = torch.tensor(values, dtype=torch.float64)
        return {self.name: float(result.mean()), "kid_std": float(result.std(correction=0))}


@final
@dataclass(frozen=True)
class InceptionScore(FeatureMetric):
    """Exponential of the information that an image x gives about its class c, E_x KL(p(c | x) || p(c)).

    That is E_x sum_c p log p - sum_c m log m with the mean probabilities m. Image i is in split i modulo 10; with fewer
    than `split_size` images a split, all images are one split.

    Source: Salimans et al. 2016.
    """

    split_size: int = 1000

    name = "is"
    companions = ("is_std",)
    compares = False

    def cautions(self, real: int | None, generated: int, num_features: int) -> tuple[str, ...]:
        """With few images there are no splits."""
        least = SPLITS * self.split_size
        if not 0 < generated < least:
            return ()
        return (f"is is of one split of {generated} images; from {least} on it is a mean over {SPLITS}, as published",)

    def measure(self, real: Moments, generated: Statistics, *, seed: int) -> Figures:
        """Mean and standard deviation over the splits, and their number: `is`, `is_std`, `is_splits`."""
        if generated.split_probability.shape[1] == 0:
            raise ConfigError(
                "the metric is needs features that know classes, like inception or classifier; these do not"
            )
        parts = [generated.split_count, generated.split_probability, generated.split_information]
        if generated.count < SPLITS * self.split_size:
            parts = [part.sum(0, keepdim=True) for part in parts]
        count, probability, information = parts
        mean = probability / count[:, None]
        scores = (information / count - torch.xlogy(mean, mean).sum(1)).exp()
        deviation = float(scores.std()) if len(scores) > 1 else 0.0
        return {self.name: float(scores.mean()), "is_std": deviation, "is_splits": len(scores)}


@final
@dataclass(frozen=True)
class PrecisionRecall(FeatureMetric):
    """Precision, recall, density and coverage: the function `prdc`."""

    neighbours: int = _NEIGHBOURS

    name = "prdc"
    shown = ("precision", "recall", "density", "coverage")
    keeps = "both"

    def measure(self, real: Moments, generated: Statistics, *, seed: int) -> Figures:
        """`prdc`, which holds its four."""
        return {self.name: prdc(real.features.double(), generated.features.double(), self.neighbours)}


def prdc(
    real: Float[Tensor, "real features"], generated: Float[Tensor, "generated features"], neighbours: int = _NEIGHBOURS
) -> dict[str, float]:
    """Precision, recall, density and coverage: balls around each image, reaching to its k-th neighbour in its own set.

    Returns:
        `precision`: share of generated images within a ball of a real one; `recall`: the reverse; `density`: balls of
        real images around a generated one, over k; `coverage`: share of real images with a generated one in their ball.

    Raises:
        DataError: A set is not larger than k.

    Source: Kynkaanniemi et al. 2019 (precision, recall); Naeem et al. 2020 (density, coverage).
    """
    if min(len(real), len(generated)) <= neighbours:
        mend = "raise num, or take a folder of more images" if len(generated) <= neighbours else "take a larger source"
        raise DataError(
            f"prdc needs more than {neighbours} images of each kind, got {len(real)} real and {len(generated)} "
            f"generated ones; {mend}, or leave prdc out of metrics"
        )
    radius_real, radius_generated = _radii(real, neighbours), _radii(generated, neighbours)
    inside, recalled, covered = [], torch.zeros(len(real), dtype=torch.bool), torch.zeros(len(real), dtype=torch.bool)
    for rows, radius in zip(generated.split(_BLOCK), radius_generated.split(_BLOCK), strict=True):
        distance = torch.cdist(rows, real)
        within = distance < radius_real
        inside.append(within.sum(1))
        covered |= within.any(0)
        recalled |= (distance < radius[:, None]).any(0)
    balls = torch.cat(inside).double()
    return {
        "precision": float((balls > 0).double().mean()),
        "recall": float(recalled.double().mean()),
        "density": float(balls.mean() / neighbours),
        "coverage": float(covered.double().mean()),
    }


def _radii(features: Tensor, neighbours: int) -> Tensor:
    """Distance of each row to its k-th neighbour among the others."""
    return torch.cat([torch.cdist(rows, features).kthvalue(neighbours + 1).values for rows in features.split(_BLOCK)])


def _frechet(mean: Tensor, other_mean: Tensor, root: Tensor, other_root: Tensor) -> float:
    """The Fréchet distance from means and roots of covariances."""
    cross = torch.linalg.svdvals(root.T @ other_root).sum()
    distance = (mean - other_mean).square().sum() + root.square().sum() + other_root.square().sum() - 2 * cross
    return max(0.0, float(distance))


def _root(covariance: Tensor) -> Tensor:
    """R with R R^T = C; eigenvalues that rounding made negative are 0."""
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp_min(0.0).sqrt()


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1.0) ** 3
