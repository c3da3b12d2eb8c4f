"""Finding the stages: one function for every method, process and number of stages."""

from __future__ import annotations

import copy
import math
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, Shaped
from torch import Tensor, nn

from multistage_diffusion import rng
from multistage_diffusion.clustering.gradient import gradient_affinity
from multistage_diffusion.clustering.levels import noise_levels
from multistage_diffusion.clustering.optimal import EdgeEstimate, algorithm_1, dynamic_programme
from multistage_diffusion.clustering.options import ClusterOptions, check_choices
from multistage_diffusion.clustering.partition import affinity_cost, distance_cost, partition, size_limits
from multistage_diffusion.clustering.similarity import Progress, Similarities, Similarity
from multistage_diffusion.config import to_dict
from multistage_diffusion.data.arrays import as_labels
from multistage_diffusion.data.examples import Examples
from multistage_diffusion.data.user import Data, as_data
from multistage_diffusion.devices import memory_of
from multistage_diffusion.errors import ConfigError, DataError
from multistage_diffusion.noise import Process, process_by_kind
from multistage_diffusion.process_group import SINGLE, ProcessGroup
from multistage_diffusion.records import check
from multistage_diffusion.stages import Stages

_BASELINE_LEVELS = 1000  # levels of the timestep and log-SNR baselines
_POINTS = 16  # noise levels at which the effective number of images is reported
_GRADIENT_LEVELS = 100  # levels of the gradient baseline
_DEFAULTS = ClusterOptions()
_WORKING_BYTES = 4  # a number of an image once more, centred, while denoisers are compared


@dataclass(frozen=True)
class Clustering:
    """Stages, and what they were found from.

    Attributes:
        stages: The partition; `stages.save(path)` writes it with its provenance.
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
        sigma = noise_levels(self.process, self.measure, u.flatten()[order])
        pieces = zip(sigma.tensor_split(_POINTS), counts.flatten()[order].tensor_split(_POINTS), strict=True)
        return tuple((float(levels.median()), float(part.log().mean().exp())) for levels, part in pieces)

    @property
    def shares(self) -> list[float]:
        """Share of the training draws in each stage."""
        return list(self.stages.shares(self.process))


def cluster(
    data: Data,
    process: Process | str,
    options: ClusterOptions = _DEFAULTS,
    *,
    labels: Int[Tensor, " count"] | None = None,
    denoiser: nn.Module | None = None,
    device: torch.device | str | None = None,
    source: str = "",
    digest: str | None = None,
    progress: Progress | None = None,
    processes: ProcessGroup = SINGLE,
    **changes: Any,
) -> Clustering:
    """Cut the noise levels of a data set into stages. docs/clustering.md says what to choose.

    Args:
        data: What `load_data` gives, or whatever `as_data` takes: uint8 pictures, floats of any number of channels.
            Of a set on disk only the images that are used are read.
        process: The process that will be trained, or its name for the defaults.
        options: How the stages are found.
        labels: Class of each image, in place of those of the data; posteriors are then within an image's class.
        denoiser: A trained module called as `denoiser(x, sigma)`, for the method `gradient`.
        device: Where to compute; by default where the images are (for the method `gradient`, where the denoiser is).
        source: Name of the data, for the record; by default that of `data`, if it has one.
        digest: SHA-256 of the data, for the record; by default that of `data`.
        progress: Called with the work done and all of it.
        processes: The processes that share the work of the optimal denoisers, from `process_group.join`; all must call.
            A group of `torch.distributed` by itself changes nothing.
        changes: Options by name that replace those of `options`: `cluster(data, process, stages=4)`.

    Returns:
        The stages, with intervals, and what they were found from.

    Raises:
        ConfigError: An option is out of range, or the criterion has no answer with these options.
        DataError: The images cannot be clustered: fewer than two, all equal, fewer than stages, or too many for memory.
    """
    start = time.perf_counter()
    check_choices(changes)
    if labels is not None:
        changes["by_class"] = True
    options = replace(options, **changes)
    process = process_by_kind(process) if isinstance(process, str) else process
    check(isinstance(process, Process), "process", "a process, or its name", process)
    examples = as_data(data, name=source or "the data")
    _check_number(len(examples), options)
    match options.method:
        case "timestep" | "snr":
            estimate = _baseline(process, options)
        case "gradient":
            estimate = _gradient(examples, process, denoiser, options, device, progress)
        case _:
            classes = _classes(examples, labels) if options.by_class else None
            estimate = _exact(examples, classes, process, options, device, progress, processes)
    about = {
        "source": source or examples.name,
        "sha256": digest or examples.digest,
        "images": len(examples),
        "shape": list(examples.shape),
    }
    return _result(estimate, process, options, about, time.perf_counter() - start)


def choose_images(
    data: Examples, most: int | None, seed: int, device: torch.device | str | None = None
) -> tuple[Shaped[Tensor, "some channels height width"], Int[Tensor, " some"] | None]:
    """All images, or some in the place of all: the first of a random order, so that a smaller choice is in a larger.

    Args:
        data: The data set; from disk no others are read.
        most: How many to choose at most; by default all.
        seed: Seed of the order.
        device: Where their denoisers will be compared; by default where the images are.

    Returns:
        The images, uint8 or floats, and their indices: None for all in the order they have.

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


def _classes(data: Examples, labels: Any) -> Tensor:
    """Class of each image, for posteriors within a class."""
    labels = data.labels if labels is None else labels
    if labels is None:
        raise ConfigError(f"--by-class needs data with classes; {data.name or 'the data'} has none")
    numbers = as_labels(data.name, labels, len(data))
    return torch.from_numpy(np.unique(numbers, return_inverse=True)[1] if numbers.dtype.kind == "U" else numbers)


def _exact(
    data: Examples,
    labels: Tensor | None,
    process: Process,
    options: ClusterOptions,
    device: torch.device | str | None,
    progress: Progress | None,
    processes: ProcessGroup,
) -> EdgeEstimate:
    """Read the images to compare, and compare their optimal denoisers."""
    images, index = choose_images(data, options.max_images, options.seed, device)
    labels = labels if labels is None or index is None else labels[index]
    _check_values(images)
    if options.criterion == "crossing":
        return algorithm_1(images, labels, len(data), process, options, device, progress, processes)
    return dynamic_programme(images, labels, process, options, device, progress, processes)


def _result(
    estimate: EdgeEstimate, process: Process, options: ClusterOptions, data: dict[str, Any], seconds: float
) -> Clustering:
    """Edges in sigma and in the process's time, with the record that `stages.json` holds."""
    edges = noise_levels(process, options.measure, torch.tensor(estimate.u, dtype=torch.float64))
    intervals = torch.tensor(estimate.intervals, dtype=torch.float64).reshape(-1, 2)
    bounds = noise_levels(process, options.measure, intervals)
    record = {
        "method": options.method,
        "objective": options.criterion if options.method == "optimal-denoiser" else None,
        "process": to_dict(process),
        "edges_t": process.t(edges).tolist(),
        "intervals": bounds.tolist(),
        "intervals_t": process.t(bounds).tolist(),
        "extrapolation": estimate.extrapolation,
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
        similarity=estimate.similarity,
        matrices=estimate.matrices,
        elbow=estimate.elbow,
    )


def _check_number(count: int, options: ClusterOptions) -> None:
    if count < 2:
        raise DataError(
            f"clustering needs at least two images to train on, got {count}; a part of each source is held out"
        )
    if count < options.stages:
        raise DataError(f"{count} images cannot tell {options.stages} stages apart; use more images")


def _check_values(images: Tensor) -> None:
    low, high = images.amin(0), images.amax(0)
    if not bool((low.isfinite() & high.isfinite()).all()):
        raise DataError("the images hold values that are not finite")
    if not bool((low < high).any()):
        raise DataError(f"all {len(images)} images are equal: every noise level has the same denoiser")


def _baseline(process: Process, options: ClusterOptions) -> EdgeEstimate:
    """Uniform in the measure's coordinate, or in log-SNR."""
    u = (torch.arange(_BASELINE_LEVELS, dtype=torch.float64) + 0.5) / _BASELINE_LEVELS
    values = u if options.method == "timestep" else noise_levels(process, options.measure, u).log()
    smallest, largest = size_limits(len(u), options.stages)
    cuts = partition(distance_cost(values), options.stages, smallest=smallest, largest=largest)
    return EdgeEstimate(tuple(cut / len(u) for cut in cuts))


def _gradient(
    data: Examples,
    process: Process,
    denoiser: nn.Module | None,
    options: ClusterOptions,
    device: torch.device | str | None,
    progress: Progress | None,
) -> EdgeEstimate:
    """Levels whose gradients point the same way."""
    if denoiser is None:
        raise ConfigError("the method gradient needs a trained denoiser")
    if device is not None and any(weight.device != torch.device(device) for weight in denoiser.parameters()):
        denoiser = copy.deepcopy(denoiser).to(device)  # the caller's stays where it is
    u = (torch.arange(_GRADIENT_LEVELS, dtype=torch.float64) + 0.5) / _GRADIENT_LEVELS
    index = rng.permutation(options.seed, "cluster/image", 0, len(data))[: -(-(options.samples or 4_000) // len(u))]
    affinity = gradient_affinity(
        denoiser,
        data.floats(index),
        noise_levels(process, options.measure, u),
        process,
        seed=options.seed,
        progress=progress,
    )
    smallest, largest = size_limits(len(u), options.stages)
    cuts = partition(affinity_cost(affinity), options.stages, smallest=smallest, largest=largest)
    return EdgeEstimate(tuple(cut / len(u) for cut in cuts))
