"""Images from seeds, streamed into the metrics; statistics of several processes, put together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from multistage_diffusion import rng
from multistage_diffusion.data import Images, to_uint8
from multistage_diffusion.data.examples import Codec
from multistage_diffusion.denoiser import Denoiser
from multistage_diffusion.errors import ConfigError
from multistage_diffusion.metrics import inception
from multistage_diffusion.metrics.extractor import FeatureExtractor
from multistage_diffusion.metrics.metric import FeatureMetric, Metric
from multistage_diffusion.metrics.reference import PublishedMoments
from multistage_diffusion.metrics.statistics import Moments, Statistics, reference_statistics
from multistage_diffusion.metrics.table import feature_metrics, keeps_features, measure
from multistage_diffusion.process_group import SINGLE, ProcessGroup
from multistage_diffusion.sampling import Sampler, consecutive_seeds


def generated(
    denoiser: Denoiser,
    num: int,
    sampler: Sampler,
    *,
    seed: int = 0,
    batch_size: int = 256,
    codec: Codec | None = None,
) -> Iterator[Float[Tensor, "batch channels height width"]]:
    """Images of a model as they would be saved: rounded to 8 bits.

    Of a class-conditional model, all classes that it was trained on alike.

    Args:
        denoiser: The model.
        num: How many.
        sampler: How they are drawn.
        seed: Seed of the first image.
        batch_size: Images at a time; changes no image.
        codec: Decodes the latents of a latent model.

    Yields:
        Batches in [-1, 1].
    """
    seeds, labels = consecutive_seeds(seed, num), None
    if classes := drawable_classes(denoiser):
        labels = torch.tensor(classes)[(rng.uniform(0, "class", seeds, 1)[:, 0] * len(classes)).long()]
    for _, images in sampler.batches(denoiser, seeds, batch_size=batch_size, labels=labels):
        yield to_uint8(images if codec is None else codec.decode(images)).float() / 127.5 - 1


def drawable_classes(denoiser: Denoiser) -> Sequence[int]:
    """Numbers of the classes that a model was trained on, all where that is not known; none if unconditional."""
    record = denoiser.trained_classes
    return range(denoiser.classes) if record is None else record.seen


def distances(
    extractor: FeatureExtractor,
    reference: Images | PublishedMoments | None,
    images: Iterable[Float[Tensor, "_ channels height width"]],
    metrics: Sequence[str | Metric],
    *,
    first: int = 0,
    processes: ProcessGroup = SINGLE,
) -> dict[str, Any]:
    """Figures of generated images against real ones, streamed.

    Args:
        extractor: Gives the features.
        reference: Real images, whose statistics are kept in the cache, or published statistics; none where no metric
            compares.
        images: Batches of generated images in [-1, 1]: the share of this process.
        metrics: Metrics of features.
        first: Index of the first image of this process in the whole set.
        processes: The processes that share the images.

    Returns:
        Each metric's figures, `fid` before `fd` where the features are Inception's, and `cautions` where there are too
        few images; the first process has them, and the others nothing.

    Raises:
        ConfigError: Unknown metric, or one of a model.
        PeerError: Another process failed with its share.
    """
    chosen = feature_metrics(metrics)
    keep_real, keep_generated = keeps_features(chosen)
    _check_reference(chosen, reference, extractor)
    statistics = Statistics(extractor.num_features, extractor.num_classes, keep=keep_generated, first=first)
    with processes.all_or_none():
        for batch in images:
            statistics.update(extractor(batch))
    if processes.size > 1:
        statistics.combine(lambda part: processes.all_reduce(part.clone()), processes.rows_on_main)
    with processes.all_or_none():
        if not processes.is_main:
            return {}
        real: Moments = Statistics(extractor.num_features, 0)
        if isinstance(reference, PublishedMoments):
            real = reference
        elif reference is not None and any(metric.compares for metric in chosen):
            real = reference_statistics(extractor, reference, keep=keep_real)
        figures = measure(chosen, real, statistics)
    if extractor.name == inception.NAME and "fd" in figures:
        figures = {"fid": figures["fd"], **figures}
    return figures


def _check_reference(
    metrics: Sequence[FeatureMetric], reference: Images | PublishedMoments | None, extractor: FeatureExtractor
) -> None:
    if reference is None and (names := [metric.name for metric in metrics if metric.compares]):
        raise ConfigError(f"metrics {', '.join(names)} compare with real images, and none were given")
    if not isinstance(reference, PublishedMoments):
        return
    if names := [metric.name for metric in metrics if metric.keeps == "both"]:
        raise ConfigError(
            f"metrics {', '.join(names)} need the features of real images, and {reference.source} holds their mean and "
            f"covariance only; leave them out of metrics"
        )
    if len(reference.mu) != extractor.num_features:
        raise ConfigError(
            f"{reference.source} is of {len(reference.mu)} features, and {extractor.name} gives "
            f"{extractor.num_features}; choose other features"
        )
