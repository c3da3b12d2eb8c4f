"""Finding the stages: one function for every method, process and number of stages."""

from __future__ import annotations

import copy
import math
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Int, Shaped
from torch import Tensor, nn

from multistage_diffusion import rng
from multistage_diffusion.clustering.gradient import gradient_affinity
from multistage_diffusion.clustering.levels import level
from multistage_diffusion.clustering.optimal import Found, algorithm_1, dynamic_programme
from multistage_diffusion.clustering.options import Options
from multistage_diffusion.clustering.partition import affinity_cost, distance_cost, partition, size_limits
from multistage_diffusion.clustering.similarity import Progress, Similarities, Similarity
from multistage_diffusion.config import to_dict
from multistage_diffusion.data.examples import Examples
from multistage_diffusion.data.user import Data, as_data
from multistage_diffusion.devices import memory_of
from multistage_diffusion.errors import ConfigError, DataError
from multistage_diffusion.noise import Process
from multistage_diffusion.stages import Stages

_BASELINE_LEVELS = 1000  # levels of the timestep and log-SNR baselines
_POINTS = 16  # noise levels at which the effective number of images is reported
_GRADIENT_LEVELS = 100  # levels of the gradient baseline
_WORKING_BYTES = 4  # a number of an image once more, centred, while denoisers are compared


@dataclass(frozen=True)
class Clustering:
    """Stages, and what they were found from.

    Attributes:
        stages: The partition; `stages.save(path)` writes it with everything `found` holds.
        edges_t: The edges in the process's own time.
        intervals: 95% bootstrap interval of each edge in sigma; empty for the baselines.
        seconds: Time it took.
        process: The process that gave the levels.
        measure: What u is uniform in.
        similarity: Similarity of each draw to both ends, where Algorithm 1 was run.
        matrices: Similarity of every two levels, where a dynamic programme was run on them.
        elbow: Objective of the best partition into 1, 2, ... 8 stages, where matrices were made.
    """

    stages: Stages
    edges_t: tuple[float, ...]
    intervals: tuple[tuple[float, float], ...]
    seconds: float
    process: Process
    measure: str
    similarity: Similarity | None = None
    matrices: Similarities | None = None
    elbow: tuple[float, ...] = ()

    @property
    def ceiling(self) -> float:
        """What `elbow` would reach with a stage for every level."""
        if self.matrices is None:
            return 1.0
        matrix = self.matrices.similar if self.stages.provenance["objective"] == "similarity" else self.matrices.gram
        return float(matrix.diagonal(dim1=1, dim2=2).mean())

    @property
    def effective(self) -> tuple[tuple[float, float], ...]:
        """Noise levels, each with the effective number of images in the posterior there (geometric mean over draws)."""
        if self.similarity is not None:
            u, counts = self.similarity.u, self.similarity.effective
        elif self.matrices is not None:
            counts = self.matrices.effective
            u = ((torch.arange(counts.shape[1], dtype=torch.float64) + 0.5) / counts.shape[1]).expand_as(counts)
        else:
            return ()
        order = u.flatten().argsort()
        sigma = level(self.process, self.measure, u.flatten()[order])
        pieces = zip(sigma.tensor_split(_POINTS), counts.flatten()[order].tensor_split(_POINTS), strict=True)
        return tuple((float(levels.median()), float(part.log().mean().exp())) for levels, part in pieces)

    @property
    def shares(self) -> list[float]:
        """Share of the training draws in each stage."""
        return list(self.stages.shares(self.process))


def cluster(
    images: Data,
    process: Process, *, method: str = "optimal-denoiser", stages: int = 3, eta: float = 2 / 256, alpha: float = 0.9,
    samples: int | None = None, reference: str = "data-mean", measure: str = "time", objective: str | None = None,
    unit_range: bool = False, labels: Int[Tensor, " count"] | None = None, max_images: int | None = None,
    resamples: int = 200, seed: int = 0, denoiser: nn.Module | None = None, device: torch.device | str | None = None,
    source: str = "", digest: str | None = None, progress: Progress | None = None,
) -> Clustering:  # fmt: skip
    """Cut the noise levels of a data set into stages. docs/clustering.md says what to choose.

    Args:
        images: What `load_data` gives, latents, or a tensor: floats in [-1, 1], or uint8 (a quarter of the memory) as
            levels of [-1, 1]. Of a set on disk only the images that are used are read.
        process: The process that will be trained.
        method: `optimal-denoiser` compares the exact denoiser of the images at different levels; `timestep`, `snr` and
            `gradient` are the baselines of Go et al. 2023.
        stages: Number of stages, 2 to 8.
        eta: Largest difference of optimal noise predictions that counts as similar.
        alpha: Least mean similarity of an outer stage to its end.
        samples: Number of draws (x0, eps, t); by default 4000 for Algorithm 1, 16000 for the matrices of a dynamic
            programme.
        reference: What the high-noise end is compared with: `data-mean` (the paper's code) or `definition` (its text).
        measure: What averages over noise levels are taken in: `time`, `log-sigma` or `training`.
        objective: `crossing` is Algorithm 1 (three stages); `similarity` and `variance` are exact partitions of a
            matrix over levels. By default `crossing` for three stages, else `variance`.
        unit_range: Read the images in [0, 1], as the paper's code does; the edges stay on the process's own clock.
        labels: Class of each image; posteriors are then within an image's class.
        max_images: Use at most so many images, chosen by `seed`, and extrapolate the lower edge of Algorithm 1 to all.
        resamples: Number of bootstrap resamples behind the intervals.
        seed: Seed of all draws.
        denoiser: A trained module called as `denoiser(x, sigma)`, for the method `gradient`.
        device: Where to compute; by default where the images are (for the method `gradient`, where the denoiser is).
        source: Name of the data, for the record; by default that of `images`, if it has one.
        digest: SHA-256 of the data, for the record; by default that of `images`.
        progress: Called with the work done and all of it.

    Returns:
        The stages, with intervals, and what they were found from.

    Raises:
        ConfigError: An option is out of range, or the criterion has no answer with these options.
        DataError: The images cannot be clustered: fewer than two, all equal, fewer than stages, or too many for memory.
    """
    start = time.perf_counter()
    options = Options(method=method, stages=stages, eta=eta, alpha=alpha, samples=samples, reference=reference,
                      measure=measure, objective=objective, unit_range=unit_range, within_class=labels is not None,
                      max_images=max_images, resamples=resamples, seed=seed)  # fmt: skip
    _check_number(len(images), options)
    data = as_data(images)
    match method:
        case "timestep" | "snr":
            found = _baseline(process, options)
        case "gradient":
            found = _gradient(data, process, denoiser, options, device, progress)
        case _:
            found = _exact(data, labels, process, options, device, progress)
    about = {
        "source": source or data.name,
        "sha256": digest or data.digest,
        "images": len(data),
        "shape": list(data.shape),
    }
    return _result(found, process, options, about, time.perf_counter() - start)


def chosen(
    data: Examples, most: int | None, seed: int, device: torch.device | str | None = None
) -> tuple[Shaped[Tensor, "some channels height width"], Int[Tensor, " some"] | None]:
    """All examples, or some in the place of all: the first of a random order, so that a smaller choice is in a larger.

    Args:
        data: The data set; from disk no others are read.
        most: How many to choose at most; by default all.
        seed: Seed of the order.
        device: Where their denoisers will be compared; by default where the examples are.

    Returns:
        The examples, uint8 or floats, and their indices: None for all in the order they have.

    Raises:
        DataError: They need more memory than there is, or one is damaged on disk.
    """
    count = len(data)
    index = None if most is None or most >= count else rng.permutation(seed, "cluster/subset", 0, count)[:most]
    count = count if index is None else len(index)
    each = math.prod(data.shape) * (data.images.dtype.itemsize + _WORKING_BYTES)
    memory = memory_of(torch.device(device or data.device or "cpu"))
    if count * each > memory:
        raise DataError(
            f"clustering {count:,} images takes {count * each / 2**30:.1f} GiB, more than the {memory / 2**30:.1f} GiB "
            f"here; choose max-images, like {memory // (2 * each):,}"
        )
    return data.values(index), index


def _exact(
    data: Examples,
    labels: Tensor | None,
    process: Process,
    options: Options,
    device: torch.device | str | None,
    progress: Progress | None,
) -> Found:
    """Read the images asked for, and compare their optimal denoisers."""
    part, index = chosen(data, options.max_images, options.seed, device)
    labels = labels if labels is None or index is None else labels[index]
    _check_values(part)
    if options.chosen == "crossing":
        return algorithm_1(part, labels, len(data), process, options, device, progress)
    return dynamic_programme(part, labels, process, options, device, progress)


def _result(found: Found, process: Process, options: Options, data: dict[str, Any], seconds: float) -> Clustering:
    """Edges in sigma and in the process's time, with the record that `stages.json` holds."""
    edges = level(process, options.measure, torch.tensor(found.u, dtype=torch.float64))
    bounds = level(process, options.measure, torch.tensor(found.intervals, dtype=torch.float64).reshape(-1, 2))
    record = {
        "method": options.method,
        "objective": options.chosen if options.method == "optimal-denoiser" else None,
        "process": to_dict(process),
        "edges_t": process.t(edges).tolist(),
        "intervals": bounds.tolist(),
        "intervals_t": process.t(bounds).tolist(),
        "extrapolation": found.extrapolation,
        "options": asdict(options),
        "data": data,
    }
    return Clustering(
        stages=Stages(tuple(edges.tolist()), record),
        edges_t=tuple(record["edges_t"]),
        intervals=tuple((low, high) for low, high in bounds.tolist()),
        seconds=seconds,
        process=process,
        measure=options.measure,
        similarity=found.similarity,
        matrices=found.matrices,
        elbow=found.elbow,
    )


def _check_number(count: int, options: Options) -> None:
    if count < 2:
        raise DataError(f"clustering needs at least two images, got {count}")
    if count < options.stages:
        raise DataError(f"{count} images cannot tell {options.stages} stages apart; use more images")


def _check_values(images: Tensor) -> None:
    low, high = images.amin(0), images.amax(0)
    if not bool((low.isfinite() & high.isfinite()).all()):
        raise DataError("the images hold values that are not finite")
    if not bool((low < high).any()):
        raise DataError(f"all {len(images)} images are equal: every noise level has the same denoiser")


def _baseline(process: Process, options: Options) -> Found:
    """Uniform in the measure's coordinate, or in log-SNR."""
    u = (torch.arange(_BASELINE_LEVELS, dtype=torch.float64) + 0.5) / _BASELINE_LEVELS
    values = u if options.method == "timestep" else level(process, options.measure, u).log()
    smallest, largest = size_limits(len(u), options.stages)
    cuts = partition(distance_cost(values), options.stages, smallest=smallest, largest=largest)
    return Found(tuple(cut / len(u) for cut in cuts))


def _gradient(
    data: Examples,
    process: Process,
    denoiser: nn.Module | None,
    options: Options,
    device: torch.device | str | None,
    progress: Progress | None,
) -> Found:
    """Levels whose gradients point the same way."""
    if denoiser is None:
        raise ConfigError("the method gradient needs a trained denoiser")
    if device is not None and any(weight.device != torch.device(device) for weight in denoiser.parameters()):
        denoiser = copy.deepcopy(denoiser).to(device)  # the caller's own stays where it is
    u = (torch.arange(_GRADIENT_LEVELS, dtype=torch.float64) + 0.5) / _GRADIENT_LEVELS
    index = rng.permutation(options.seed, "cluster/image", 0, len(data))[: -(-(options.samples or 4_000) // len(u))]
    affinity = gradient_affinity(
        denoiser,
        data.floats(index),
        level(process, options.measure, u),
        process,
        seed=options.seed,
        progress=progress,
    )
    smallest, largest = size_limits(len(u), options.stages)
    cuts = partition(affinity_cost(affinity), options.stages, smallest=smallest, largest=largest)
    return Found(tuple(cut / len(u) for cut in cuts))
