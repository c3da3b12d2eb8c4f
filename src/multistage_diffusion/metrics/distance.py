"""Distances between two sets of images, from their statistics, in float64 on the CPU.

Written here, because the sums are cached, added over processes and reused: scipy and torchmetrics are what the tests
compare with. Only figures from Inception features may be called FID, KID and IS in a report.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from multistage_diffusion import rng
from multistage_diffusion.errors import ConfigError, DataError, suggest
from multistage_diffusion.metrics.statistics import SPLITS, Statistics

Metric: TypeAlias = Literal["fd", "fd_infinity", "kid", "is", "prdc"]
METRICS: tuple[Metric, ...] = get_args(Metric)
Figures: TypeAlias = dict[str, float | list[int] | dict[str, float]]

CUSTOMARY = 50_000  # generated images behind published figures; with fewer, the plain Fréchet distance needs its limit
_SUBSET = 1000  # images in a subset of the kernel distance and, at least, in a split of the inception score
_SUBSETS = 100  # Binkowski et al. 2018
_EXTRAPOLATED = 15  # sizes of the regression (Chong and Forsyth 2020)
_NEIGHBOURS = 5  # Naeem et al. 2020
_BLOCK = 1024  # rows of a distance matrix held at a time


def check_metrics(metrics: Sequence[str]) -> None:
    """Refuse names that are no metric.

    Args:
        metrics: Names.

    Raises:
        ConfigError: No metric, or an unknown one.
    """
    for name in metrics:
        if name not in METRICS:
            raise ConfigError(f"no metric {name}{suggest(name, METRICS)}")
    if not metrics:
        raise ConfigError(f"name at least one metric of {', '.join(METRICS)}")


def keeps_features(metrics: Sequence[str]) -> tuple[bool, bool]:
    """Which sets must keep their features for some metrics.

    Args:
        metrics: Some of `METRICS`.

    Returns:
        Whether the real and the generated images must.
    """
    both = bool({"kid", "prdc"} & set(metrics))
    return both, both or "fd_infinity" in metrics


def with_limit(metrics: Sequence[str], generated: int, num_features: int) -> tuple[str, ...]:
    """Metrics with `fd_infinity` behind `fd` where the plain figure says much about the number of images.

    Args:
        metrics: Some of `METRICS`.
        generated: Number of generated images.
        num_features: Length of a feature vector.

    Returns:
        The metrics; more than asked if fewer than `CUSTOMARY` images are drawn, but enough for the regression.
    """
    if "fd" in metrics and "fd_infinity" not in metrics and 4 * num_features <= generated < CUSTOMARY:
        return (*metrics, "fd_infinity")
    return tuple(metrics)


def measure(metrics: Sequence[str], real: Statistics, generated: Statistics, *, seed: int = 0) -> Figures:
    """Figures of generated images against real ones.

    Args:
        metrics: Some of `METRICS`.
        real: Statistics of the reference; with features where `keeps_features` says so. Not needed for `is`.
        generated: Statistics of generated images, likewise.
        seed: Of the random subsets.

    Returns:
        One key a metric, in the order asked; `kid_std` and `is_std` beside theirs, `fd_infinity_images` (least and most
        images of the regression) beside `fd_infinity`; `prdc` holds its four.

    Raises:
        ConfigError: No metric, an unknown one, or `is` where the features know no classes.
        DataError: Too few images for a metric.
    """
    check_metrics(metrics)
    for kind, count, least in (
        ("real", real.count, 0 if set(metrics) == {"is"} else 2),
        ("generated", generated.count, 2),
    ):
        if count < least:
            mend = "raise num" if kind == "generated" else "take a larger source"
            raise DataError(f"at least 2 {kind} images are needed for a distance, got {count}; {mend}")
    result: Figures = {}
    for name in metrics:
        match name:
            case "fd":
                result[name] = frechet_distance(real, generated)
            case "fd_infinity":
                result[name], result["fd_infinity_images"] = _limit(real, generated, seed)
            case "kid":
                result[name], result["kid_std"] = _kernel_distance(real.features, generated.features, seed)
            case "is":
                result[name], result["is_std"] = _inception_score(generated)
            case _:
                result[name] = prdc(real.features.double(), generated.features.double())
    return result


def cautions(metrics: Sequence[str], real: int, generated: int, num_features: int) -> tuple[str, ...]:
    """Reasons to doubt the figures, for the report.

    Args:
        metrics: What was measured.
        real: Number of real images.
        generated: Number of generated images.
        num_features: Length of a feature vector.

    Returns:
        One line each; none if there are enough images.
    """
    if not {"fd", "fd_infinity"} & set(metrics):
        return ()
    return tuple(
        f"{count} {kind} images, fewer than 2 x {num_features} features: "
        "the Fréchet distance says more about their number than about their quality"
        for kind, count in (("real", real), ("generated", generated))
        if count < 2 * num_features
    )


def frechet_distance(real: Statistics, generated: Statistics) -> float:
    """Squared 2-Wasserstein distance between normal distributions of the sets' means and covariances.

    Args:
        real: One set.
        generated: The other.

    Returns:
        |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), at least 0.

    Source: Heusel et al. 2017.
    """
    return _frechet(real.mean(), _root(real.covariance()), generated.mean(), _root(generated.covariance()))


def _frechet(mean: Tensor, root: Tensor, other_mean: Tensor, other_root: Tensor) -> float:
    """The same from roots, C = R R^T: the trace of (C1 C2)^(1/2) is the sum of the singular values of R1^T R2.

    That needs no root of a product, which is not symmetric, and is exact to rounding where covariances are singular.
    """
    cross = torch.linalg.svdvals(root.T @ other_root).sum()
    distance = (mean - other_mean).square().sum() + root.square().sum() + other_root.square().sum() - 2 * cross
    return max(0.0, float(distance))


def _root(covariance: Tensor) -> Tensor:
    """R with R R^T = C; eigenvalues that rounding made negative are 0."""
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp_min(0.0).sqrt()


def _limit(real: Statistics, generated: Statistics, seed: int) -> tuple[float, list[int]]:
    """The Fréchet distance of infinitely many generated images: its line in 1 / images, at 0; and the images used.

    Source: Chong and Forsyth 2020, "Effectively unbiased FID". They use plain and quasi-random noise; we, subsets.
    """
    features, num_features = generated.features, len(generated.total)
    count, least = len(features), 2 * num_features
    if count < 2 * least:
        raise DataError(
            f"fd_infinity needs at least {2 * least} generated images (4 for each of {num_features} features), got "
            f"{count}; raise num, or leave fd_infinity out of metrics"
        )
    sizes = torch.linspace(max(least, count // 10), count, _EXTRAPOLATED, dtype=torch.float64).long()
    mean, root, distances = real.mean(), _root(real.covariance()), list[float]()
    for i, size in enumerate(sizes.tolist()):
        chosen = features[rng.permutation(seed, "fd-infinity", i, count)[:size]].double()
        distances.append(_frechet(mean, root, chosen.mean(0), _root(chosen.T.cov())))
    design = torch.stack((torch.ones(_EXTRAPOLATED, dtype=torch.float64), 1.0 / sizes.double()), dim=1)
    line = torch.linalg.lstsq(design, torch.tensor(distances, dtype=torch.float64)[:, None]).solution
    return float(line[0, 0]), [int(sizes[0]), count]


def _kernel_distance(real: Tensor, generated: Tensor, seed: int) -> tuple[float, float]:
    """Unbiased squared maximum mean discrepancy with a cubic kernel: mean and deviation over random subsets.

    Source: Binkowski et al. 2018.
    """
    size = min(_SUBSET, len(real), len(generated))
    subsets = 1 if size == max(len(real), len(generated)) else _SUBSETS
    found = []
    for i in range(subsets):
        x, y = (
            rows[rng.permutation(seed, f"kid-{kind}", i, len(rows))[:size]].double()
            for kind, rows in (("real", real), ("generated", generated))
        )
        within = sum(float(_kernel(rows, rows).fill_diagonal_(0.0).sum()) for rows in (x, y)) / (size * (size - 1))
        found.append(within - 2 * float(_kernel(x, y).mean()))
    values = torch.tensor(found, dtype=torch.float64)
    return float(values.mean()), float(values.std(correction=0))


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1.0) ** 3


def _inception_score(generated: Statistics) -> tuple[float, float]:
    """Exponential of the information that an image gives about its class: mean and deviation over splits.

    Source: Salimans et al. 2016. Every tenth image makes a split; they are one set where there are too few.
    """
    if generated.split_probability.shape[1] == 0:
        raise ConfigError("the metric is needs features that know classes, like inception or source; these do not")
    parts = [generated.split_count, generated.split_probability, generated.split_information]
    if generated.count < SPLITS * _SUBSET:
        parts = [part.sum(0, keepdim=True) for part in parts]
    count, probability, information = parts
    mean = probability / count[:, None]
    scores = (information / count - torch.xlogy(mean, mean).sum(1)).exp()
    return float(scores.mean()), float(scores.std()) if len(scores) > 1 else 0.0


def prdc(
    real: Float[Tensor, "real features"], generated: Float[Tensor, "generated features"], neighbours: int = _NEIGHBOURS
) -> dict[str, float]:
    """Precision, recall, density and coverage: balls around each image, reaching to its k-th neighbour in its own set.

    Args:
        real: Features of the reference.
        generated: Features of generated images.
        neighbours: k.

    Returns:
        `precision`: share of generated images within a ball of a real one; `recall`: the reverse; `density`: balls of
        real images around a generated one, over k; `coverage`: share of real images with a generated one in their ball.

    Raises:
        DataError: A set is not larger than k.

    Source: Kynkaanniemi et al. 2019 (precision, recall); Naeem et al. 2020 (density, coverage).
    """
    if min(len(real), len(generated)) <= neighbours:
        raise DataError(
            f"prdc needs more than {neighbours} images of each kind, got {len(real)} real and {len(generated)} "
            "generated ones; raise num, or leave prdc out of metrics"
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
