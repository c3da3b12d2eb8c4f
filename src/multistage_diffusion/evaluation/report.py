"""A model's figures, or those of a set of images, as one document."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from multistage_diffusion.config import SamplingConfig
from multistage_diffusion.data import Images
from multistage_diffusion.data.examples import Codec
from multistage_diffusion.errors import ConfigError, suggest
from multistage_diffusion.evaluation.held_out import held_out_loss
from multistage_diffusion.evaluation.images import compare, describe, gather, generated, observe
from multistage_diffusion.metrics import distance, inception
from multistage_diffusion.metrics.cost import CONVENTION, network_cost
from multistage_diffusion.metrics.distance import with_limit
from multistage_diffusion.metrics.extractor import FeatureExtractor
from multistage_diffusion.models.denoiser import Denoiser
from multistage_diffusion.process_group import SINGLE, ProcessGroup
from multistage_diffusion.sampling import call_plan
from multistage_diffusion.stages import Stages

METRICS = (*distance.METRICS, "loss")


def evaluate(
    denoiser: Denoiser,
    reference: Images,
    *,
    metrics: Sequence[str] = ("fd", "loss"),
    extractor: Callable[[], FeatureExtractor] | None = None,
    num: int = 1_000,
    sampling: SamplingConfig = SamplingConfig(),  # noqa: B008  (frozen)
    seed: int = 0,
    batch_size: int = 256,
    stages: Stages | None = None,
    codec: Codec | None = None,
    stage_images: Sequence[int] | None = None,
    processes: ProcessGroup = SINGLE,
) -> dict[str, Any]:
    """Measure a model.

    Args:
        denoiser: The model.
        reference: Real images, held out from its training.
        metrics: Some of `METRICS`.
        extractor: Makes the feature extractor; needed for all metrics but `loss`.
        num: Number of generated images.
        sampling: Solver, steps, spacing.
        seed: Seed of the first image, and of the held-out loss.
        batch_size: Images at a time; changes nothing but rounding.
        stages: Partition for the losses by stage; by default the model's own.
        codec: Autoencoder of a model of latents: its images are decoded, and its loss is that of latents.
        stage_images: Images that each stage was trained on, for the training FLOPs.
        processes: The processes that share the work.

    Returns:
        One key a metric, and what they were measured with and what it cost. `fd_infinity` is added to `fd` where fewer
        images are drawn than is customary. Among several processes, the first has the document and the others nothing.

    Raises:
        ConfigError: Unknown metric, or no extractor where one is needed.
        NumericsError: An image is not finite.
        PeerError: Another process failed with its share.
    """
    for name in metrics:
        if name not in METRICS:
            raise ConfigError(f"no metric {name}{suggest(name, METRICS)}")
    begin, document = time.perf_counter(), dict[str, Any]()
    wanted = [name for name in metrics if name != "loss"]
    if wanted:
        if extractor is None:
            raise ConfigError(f"metrics {', '.join(wanted)} need features, and no extractor was given")
        document |= _drawn(denoiser, reference, wanted, extractor(), num, sampling, seed, batch_size, codec, processes)
    if "loss" in metrics:
        held_out = reference
        if codec is not None:
            with processes.local_main_first():
                held_out = codec.encode(reference)
        loss = held_out_loss(denoiser, held_out, stages=stages, batch_size=batch_size, seed=seed, processes=processes)
        document["loss"] = loss.loss
        document["loss_error"] = loss.error
        document["stage_loss"] = list(loss.stage_loss)
        document["sigma_loss"] = [
            {**asdict(part), "high": None if math.isinf(part.high) else part.high} for part in loss.bins
        ]
    if not processes.is_main:
        return {}
    return {
        **document,
        "samples": num if wanted else 0,
        "reference": _about(reference),
        **_cost(denoiser, sampling, stage_images),
        "seconds": round(time.perf_counter() - begin, 3),
    }


def evaluate_images(
    images: Images,
    reference: Images,
    extractor: FeatureExtractor,
    metrics: Sequence[str],
    *,
    processes: ProcessGroup = SINGLE,
) -> dict[str, Any]:
    """Measure a set of images, whoever made them.

    Args:
        images: The images.
        reference: Real images of the same shape.
        extractor: Gives the features.
        metrics: Some of `metrics.distance.METRICS`.
        processes: The processes that share the work.

    Returns:
        One key a metric, and what they were measured with; the first process has it, and the others nothing.

    Raises:
        ConfigError: Unknown metric, or `loss`, which needs a model.
        PeerError: Another process failed with its share.
    """
    if "loss" in metrics:
        raise ConfigError("the metric loss needs a run: a folder of images has no denoiser")
    begin, part = time.perf_counter(), processes.shard(len(images))
    batches = (images.floats(rows) for rows in torch.arange(part.start, part.stop).split(500))
    figures = _figures(extractor, reference, batches, metrics, len(images), processes)
    if not processes.is_main:
        return {}
    return {
        **figures,
        "features": describe(extractor),
        "samples": len(images),
        "reference": _about(reference),
        "seconds": round(time.perf_counter() - begin, 3),
    }


def _drawn(
    denoiser: Denoiser,
    reference: Images,
    metrics: Sequence[str],
    extractor: FeatureExtractor,
    num: int,
    sampling: SamplingConfig,
    seed: int,
    batch_size: int,
    codec: Codec | None,
    processes: ProcessGroup,
) -> dict[str, Any]:
    """Figures of images that are drawn now, this process's share of them; what they were seen with, and the time."""
    part, spent = processes.shard(num), [0.0]
    images = generated(
        denoiser, len(part), sampling, seed=seed + part.start, batch_size=batch_size, codec=codec
    )  # fmt: skip
    figures = _figures(extractor, reference, _timed(images, spent) if part else (), metrics, num, processes)
    return {**figures, "features": describe(extractor), "sampling_seconds": round(spent[0], 3)}


def _figures(
    extractor: FeatureExtractor,
    reference: Images,
    images: Iterable[Tensor],
    metrics: Sequence[str],
    num: int,
    processes: ProcessGroup,
) -> dict[str, Any]:
    """Figures of all processes' images, in the first process; the Fréchet distance is FID with Inception's features."""
    metrics = with_limit(metrics, num, extractor.num_features)
    with processes.all_or_none():
        seen = observe(extractor, images, metrics, first=processes.shard(num).start)
    gather(seen, processes)
    with processes.all_or_none():
        figures = compare(extractor, reference, seen, metrics) if processes.is_main else {}
    if extractor.name == inception.NAME and "fd" in figures:
        figures = {"fid": figures["fd"], **figures}
    return figures


def _timed(images: Iterator[Tensor], spent: list[float]) -> Iterator[Tensor]:
    """The same images; adds the seconds that making them took."""
    while True:
        begin = time.perf_counter()
        batch = next(images, None)
        spent[0] += time.perf_counter() - begin
        if batch is None:
            return
        yield batch


def _about(reference: Images) -> dict[str, Any]:
    return {
        "source": reference.name, "images": len(reference), "shape": list(reference.shape), "digest": reference.digest,
    }  # fmt: skip


def _cost(denoiser: Denoiser, sampling: SamplingConfig, stage_images: Sequence[int] | None) -> dict[str, Any]:
    """What an image costs to draw, what training cost, and how that is counted."""
    cost = network_cost(denoiser.network.config, denoiser.shape)
    calls = call_plan(denoiser, solver=sampling.solver, steps=sampling.steps, spacing=sampling.spacing)
    stage_calls = [calls.count(k) for k in range(len(cost.stages))]
    trained = {} if stage_images is None else {
        "training_images": sum(stage_images), "training_pflops": cost.training_flops(stage_images) / 1e15,
    }  # fmt: skip
    return {
        "solver": sampling.solver,
        "steps": sampling.steps,
        "precision": denoiser.precision,
        "nfe": len(calls),
        "stage_calls": stage_calls,
        "stage_gmacs": [stage.gmacs for stage in cost.stages],
        "gflops_per_sample": cost.flops(stage_calls) / 1e9,
        **trained,
        "flops": CONVENTION,
    }
