"""Images from seeds, streamed into the metrics; what several processes saw of them, put together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from multistage_diffusion import rng
from multistage_diffusion.config import SamplingConfig
from multistage_diffusion.data import Images, to_uint8
from multistage_diffusion.data.examples import Codec
from multistage_diffusion.metrics.distance import cautions, check_metrics, keeps_features, measure
from multistage_diffusion.metrics.extractor import FeatureExtractor
from multistage_diffusion.metrics.statistics import Statistics, reference_statistics
from multistage_diffusion.models.denoiser import Denoiser
from multistage_diffusion.process_group import ProcessGroup
from multistage_diffusion.sampling import sample_batches


def generated(
    denoiser: Denoiser,
    num: int,
    sampling: SamplingConfig,
    *,
    seed: int = 0,
    batch_size: int = 256,
    codec: Codec | None = None,
) -> Iterator[Float[Tensor, "batch channels height width"]]:
    """Images of a model as they would be saved: rounded to 8 bits. A class-conditional model draws all classes alike.

    Args:
        denoiser: The model.
        num: How many.
        sampling: Solver, steps, spacing.
        seed: Seed of the first image.
        batch_size: Images at a time; changes no image.
        codec: Decodes what a model of latents makes.

    Yields:
        Batches in [-1, 1].
    """
    labels = None
    if denoiser.classes:
        draws = rng.uniform(0, "class", torch.arange(seed, seed + num), 1)[:, 0]
        labels = (draws * denoiser.classes).long()
    for _, images in sample_batches(
        denoiser, num, solver=sampling.solver, steps=sampling.steps, spacing=sampling.spacing, seed=seed,
        batch_size=batch_size, labels=labels,
    ):  # fmt: skip
        yield to_uint8(images if codec is None else codec.decode(images)).float() / 127.5 - 1


def distances(
    extractor: FeatureExtractor,
    reference: Images,
    images: Iterable[Float[Tensor, "_ channels height width"]],
    metrics: Sequence[str],
    *,
    batch_size: int = 500,
) -> dict[str, Any]:
    """Distances between a set of images and generated ones, streamed.

    Args:
        extractor: Gives the features.
        reference: Real images; their statistics are kept in the cache.
        images: Batches of generated images in [-1, 1].
        metrics: Some of `metrics.distance.METRICS`.
        batch_size: Real images at a time.

    Returns:
        One key a metric; `prdc` is four figures; `cautions` where there are too few images.
    """
    return compare(extractor, reference, observe(extractor, images, metrics), metrics, batch_size=batch_size)


def observe(
    extractor: FeatureExtractor,
    images: Iterable[Float[Tensor, "_ channels height width"]],
    metrics: Sequence[str],
    *,
    first: int = 0,
) -> Statistics:
    """Statistics of generated images, batch by batch.

    Args:
        extractor: Gives the features.
        images: Batches of images in [-1, 1].
        metrics: What they will be measured with.
        first: Index of the first image in the whole set, for a process that makes a part of it.

    Returns:
        Their statistics.

    Raises:
        ConfigError: No metric, or an unknown one.
    """
    check_metrics(metrics)
    seen = Statistics(extractor.num_features, extractor.num_classes, keep=keeps_features(metrics)[1], first=first)
    for batch in images:
        seen.update(extractor(batch))
    return seen


def gather(seen: Statistics, processes: ProcessGroup) -> None:
    """Make the statistics of all processes those of one set, in the first process.

    Args:
        seen: This process's; in the others they are spoilt.
        processes: The processes, which come here at about the same time.
    """
    if processes.size > 1:
        seen.combine(lambda part: processes.all_reduce(part.clone()), lambda rows: _join(rows, processes))


def compare(
    extractor: FeatureExtractor, reference: Images, seen: Statistics, metrics: Sequence[str], *, batch_size: int = 500
) -> dict[str, Any]:
    """Figures of generated images against real ones.

    Args:
        extractor: What the generated images were seen with.
        reference: Real images; their statistics are kept in the cache.
        seen: Statistics of the generated images.
        metrics: Some of `metrics.distance.METRICS`.
        batch_size: Real images at a time.

    Returns:
        One key a metric; `prdc` is four figures; `cautions` where there are too few images.
    """
    if set(metrics) == {"is"}:
        real = Statistics(extractor.num_features, 0)
    else:
        real = reference_statistics(extractor, reference, keep=keeps_features(metrics)[0], batch_size=batch_size)
    figures: dict[str, Any] = dict(measure(metrics, real, seen))
    if lines := cautions(metrics, real.count, seen.count, extractor.num_features):
        figures["cautions"] = list(lines)
    return figures


def describe(extractor: FeatureExtractor) -> dict[str, Any]:
    """What a distance was measured with, to stand beside the figure.

    Args:
        extractor: The feature extractor.

    Returns:
        Name, how it resizes images, number of features, test accuracy (none where it was not measured), hash of the
        weights.
    """
    return {
        "name": extractor.name,
        "resize": extractor.resize,
        "num_features": extractor.num_features,
        "accuracy": extractor.accuracy,
        "digest": extractor.digest,
    }


def _join(rows: Tensor, processes: ProcessGroup) -> Tensor:
    """Rows of all processes one after the other, in the first process."""
    counts = processes.gather_objects(len(rows))
    if not processes.is_main:
        dist.send(rows, 0)
        return rows
    parts = [rows, *(rows.new_empty(count, *rows.shape[1:]) for count in counts[1:])]
    for rank, part in enumerate(parts[1:], start=1):
        dist.recv(part, rank)
    return torch.cat(parts)
