"""Distances between two sets of images, from their features: streamed in, in float64 on the CPU.

The Fréchet distance, the kernel distance and the inception score are torchmetrics'; precision, recall, density and
coverage are ours. Only figures from Inception features may be called FID, KID and IS in a report.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias, final, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from multistage_diffusion import rng
from multistage_diffusion.errors import ConfigError, DataError, NumericsError, suggest
from multistage_diffusion.metrics.features import Features

Metric: TypeAlias = Literal["fd", "fd_infinity", "kid", "is", "prdc"]
METRICS: tuple[Metric, ...] = get_args(Metric)
Figures: TypeAlias = dict[str, float | dict[str, float]]

_SUBSET = (
    1000  # images in a subset of the kernel distance and in a split of the inception score (Binkowski et al. 2018)
)
_SUBSETS = 100
_SPLITS = 10  # Salimans et al. 2016
_EXTRAPOLATED = 15  # sizes of the regression (Chong and Forsyth 2020)
_NEIGHBOURS = 5  # Naeem et al. 2020
_BLOCK = 1024  # rows of a distance matrix held at a time


@final
class Distances:
    """Takes features batch by batch and returns the figures at the end; how they were batched does not matter.

    The Fréchet distance keeps sums only; the other metrics keep the features, 8 bytes a number.
    """

    def __init__(self, metrics: Sequence[str], num_features: int, *, seed: int = 0) -> None:
        """Start with nothing seen.

        Args:
            metrics: What to measure: any of `METRICS`.
            num_features: Length of a feature vector.
            seed: Of the random subsets.

        Raises:
            ConfigError: No metric, or an unknown one.
        """
        for name in metrics:
            if name not in METRICS:
                raise ConfigError(f"no metric {name}{suggest(name, METRICS)}")
        if not metrics:
            raise ConfigError(f"name at least one metric of {', '.join(METRICS)}")
        self.metrics, self.num_features, self._seed = tuple(metrics), num_features, seed
        self._counts = {True: 0, False: 0}
        self._kept: dict[bool, list[Tensor]] = {True: [], False: []}
        self._logits: list[Tensor] = []
        self._frechet = _frechet_metric(num_features) if {"fd", "fd_infinity"} & set(metrics) else None

    def update(self, batch: Features, *, real: bool) -> None:
        """Take a batch.

        Args:
            batch: Features of some images.
            real: Whether they are of the reference or generated.

        Raises:
            DataError: Features of another length.
            NumericsError: A feature is NaN or infinite.
        """
        features = batch.features.detach().cpu().double()
        if features.shape[1] != self.num_features:
            raise DataError(f"features must have {self.num_features} numbers, got {features.shape[1]}")
        if not bool(features.isfinite().all() and batch.logits.isfinite().all()):
            raise NumericsError(f"the features of {'real' if real else 'generated'} images hold NaN or infinite values")
        self._counts[real] += len(features)
        if self._frechet is not None and (real or "fd" in self.metrics):
            self._frechet.update(features, real=real)
        if {"kid", "prdc"} & set(self.metrics) or (not real and "fd_infinity" in self.metrics):
            self._kept[real].append(features)
        if not real and "is" in self.metrics:
            self._logits.append(batch.logits.detach().cpu().double())

    def figures(self) -> Figures:
        """What was asked for, one key a metric; `kid_std` and `is_std` beside theirs; `prdc` holds its four.

        Returns:
            Figures in the order asked.

        Raises:
            DataError: Too few images for a metric.
        """
        for real, least in ((True, 0 if self.metrics == ("is",) else 2), (False, 2)):
            if self._counts[real] < least:
                kind = "real" if real else "generated"
                raise DataError(f"at least 2 {kind} images are needed for a distance, got {self._counts[real]}")
        result: Figures = {}
        for name in self.metrics:
            match name:
                case "fd":
                    assert self._frechet is not None
                    result[name] = max(0.0, float(self._frechet.compute()))
                case "fd_infinity":
                    result[name] = self._extrapolated()
                case "kid":
                    result[name], result["kid_std"] = self._kernel()
                case "is":
                    result[name], result["is_std"] = self._score()
                case "prdc":
                    result[name] = prdc(torch.cat(self._kept[True]), torch.cat(self._kept[False]))
        return result

    def cautions(self) -> tuple[str, ...]:
        """Reasons to doubt the figures, for the report.

        Returns:
            One line each; none if there are enough images.
        """
        few = [
            f"{count} {'real' if real else 'generated'} images, fewer than 2 x {self.num_features} features: "
            "the Fréchet distance says more about their number than about their quality"
            for real, count in self._counts.items()
            if count < 2 * self.num_features
        ]
        return tuple(few) if self._frechet is not None else ()

    def _kernel(self) -> tuple[float, float]:
        """Squared maximum mean discrepancy with a cubic kernel: mean and deviation over random subsets."""
        from torchmetrics.image.kid import KernelInceptionDistance

        size = min(_SUBSET, *self._counts.values())
        subsets = 1 if size == max(self._counts.values()) else _SUBSETS
        with _quiet(self._seed):
            metric = KernelInceptionDistance(
                _Identity(self.num_features), subsets=subsets, subset_size=size, sync_on_compute=False
            )
            for real, kept in self._kept.items():
                metric.update(torch.cat(kept), real=real)
            mean, deviation = metric.compute()
        return float(mean), float(deviation)

    def _score(self) -> tuple[float, float]:
        """Exponential of the information that an image gives about its class: mean and deviation over splits."""
        from torchmetrics.image.inception import InceptionScore

        logits = torch.cat(self._logits)
        splits = min(_SPLITS, max(1, len(logits) // _SUBSET))
        with _quiet(self._seed):
            metric = InceptionScore(_Identity(logits.shape[1]), splits=splits, sync_on_compute=False)
            metric.update(logits)
            mean, deviation = metric.compute()
        return float(mean), float(deviation) if splits > 1 else 0.0

    def _extrapolated(self) -> float:
        """The Fréchet distance of infinitely many generated images: its line in 1 / images, at 0.

        Source: Chong and Forsyth 2020, "Effectively unbiased FID". They use plain and quasi-random noise; we, subsets.
        """
        assert self._frechet is not None
        features = torch.cat(self._kept[False])
        count, least = len(features), 2 * self.num_features
        if count < 2 * least:
            raise DataError(f"fd_infinity needs at least {2 * least} generated images, got {count}")
        sizes = torch.linspace(max(least, count // 10), count, _EXTRAPOLATED, dtype=torch.float64).long()
        distances = []
        for i, size in enumerate(sizes.tolist()):
            chosen = features[rng.permutation(self._seed, "fd-infinity", i, count)[:size]]
            metric = _frechet_metric(self.num_features)
            _copy_real(self._frechet, metric)
            metric.update(chosen, real=False)
            distances.append(float(metric.compute()))
        design = torch.stack((torch.ones(_EXTRAPOLATED, dtype=torch.float64), 1.0 / sizes.double()), dim=1)
        line = torch.linalg.lstsq(design, torch.tensor(distances, dtype=torch.float64)[:, None]).solution
        return float(line[0, 0])


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
        raise DataError(f"prdc needs more than {neighbours} images of each kind, got {len(real)} and {len(generated)}")
    radius_real, radius_generated = _radii(real, neighbours), _radii(generated, neighbours)
    inside, recalled, covered = [], [], torch.zeros(len(real), dtype=torch.bool)
    for rows in generated.split(_BLOCK):
        within = torch.cdist(rows, real) < radius_real
        inside.append(within.sum(1))
        covered |= within.any(0)
    for rows in real.split(_BLOCK):
        recalled.append((torch.cdist(rows, generated) < radius_generated).any(1))
    balls = torch.cat(inside).double()
    return {
        "precision": float((balls > 0).double().mean()),
        "recall": float(torch.cat(recalled).double().mean()),
        "density": float(balls.mean() / neighbours),
        "coverage": float(covered.double().mean()),
    }


def _radii(features: Tensor, neighbours: int) -> Tensor:
    """Distance of each row to its k-th neighbour among the others."""
    return torch.cat([torch.cdist(rows, features).kthvalue(neighbours + 1).values for rows in features.split(_BLOCK)])


class _Identity(nn.Module):
    """Lets features through: torchmetrics takes a network, and ours has run already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def _frechet_metric(num_features: int) -> Any:
    """Torchmetrics' Fréchet distance on bare features; importing it takes a second."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    return FrechetInceptionDistance(_Identity(num_features), sync_on_compute=False)


def _copy_real(source: Any, target: Any) -> None:
    """Give a metric the reference that another has seen."""
    for name in ("real_features_sum", "real_features_cov_sum", "real_features_num_samples"):
        setattr(target, name, getattr(source, name).clone())


@contextmanager
def _quiet(seed: int) -> Iterator[None]:
    """Torchmetrics draws subsets from torch's global generator and warns of the memory it keeps: lend it a seed."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        torch.default_generator.manual_seed(seed)
        yield
