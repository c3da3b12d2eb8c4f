"""From seeds to images to figures: what a model is worth, as one document."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from multistage_diffusion import rng
from multistage_diffusion.config import SamplingConfig
from multistage_diffusion.data import Images, to_uint8
from multistage_diffusion.data.latents import Examples, FirstStage
from multistage_diffusion.errors import ConfigError, suggest
from multistage_diffusion.loss import denoising_loss
from multistage_diffusion.metrics import distance
from multistage_diffusion.metrics.cost import network_cost
from multistage_diffusion.metrics.distance import Distances
from multistage_diffusion.metrics.features import FeatureExtractor
from multistage_diffusion.models.denoiser import Denoiser
from multistage_diffusion.sampling import call_plan, sample_batches
from multistage_diffusion.stages import Stages

METRICS = (*distance.METRICS, "loss")


@dataclass(frozen=True)
class HeldOutLoss:
    """Denoising loss on images that were not trained on.

    Attributes:
        loss: Mean under the training distribution of noise levels.
        stage_loss: Mean within each stage.
        error: Standard error of `loss`, over images.
        by_image: Mean loss of each image. Two models see the same noise, so their difference is best taken image by
            image: its error is smaller than that of either loss.
    """

    loss: float
    stage_loss: tuple[float | None, ...]
    error: float
    by_image: Float[Tensor, " images"]


def held_out_loss(
    denoiser: Denoiser,
    data: Examples,
    *,
    stages: Stages | None = None,
    repeats: int = 8,
    max_images: int = 2_000,
    batch_size: int = 256,
    seed: int = 0,
) -> HeldOutLoss:
    """Denoising loss with fixed images, noise and noise levels: the same for every model of a process.

    Args:
        denoiser: The model, in evaluation mode.
        data: Held-out images, or their latents.
        stages: Partition for the losses by stage; by default the model's own.
        repeats: Noise levels for each image; together they are a stratified draw from the training distribution.
        max_images: At most so many images are used, the first ones.
        batch_size: Images at a time; changes nothing.
        seed: Seed of noise and levels.

    Returns:
        The losses.
    """
    stages, device = stages or denoiser.stages, denoiser.device
    count = min(len(data), max_images)
    total = count * repeats
    index = torch.arange(total)
    cell = rng.permutation(seed, "held-out cells", 0, total)
    u = (cell + rng.uniform(seed, "held-out sigma", index, 1)[:, 0]) / total
    sigma = denoiser.process.icdf(u)
    order = sigma.argsort(descending=True)  # neighbours share a stage, so few decoders run on a batch
    losses = torch.empty(total, dtype=torch.float64)
    with torch.inference_mode():
        for rows in order.split(batch_size):
            images = data.floats(rows % count).to(device)
            noise = rng.normal(seed, "held-out noise", rows.to(device), images.shape[1:])
            labels = None if data.labels is None or not denoiser.classes else data.labels[rows % count].to(device)
            losses[rows] = denoising_loss(denoiser, images, noise, sigma[rows].to(device), labels).double().cpu()
    stage = stages.of(sigma)
    parts = [losses[stage == k] for k in range(len(stages))]
    by_image = losses.reshape(repeats, count).mean(dim=0)
    return HeldOutLoss(
        float(losses.mean()),
        tuple(float(part.mean()) if len(part) else None for part in parts),
        float(by_image.std() / count**0.5) if count > 1 else 0.0,
        by_image,
    )


def generated(
    denoiser: Denoiser,
    num: int,
    sampling: SamplingConfig,
    *,
    seed: int = 0,
    batch_size: int = 256,
    first_stage: FirstStage | None = None,
) -> Iterator[Float[Tensor, "batch chan high wide"]]:
    """Images of a model as they would be saved: rounded to 8 bits. A class-conditional model draws all classes alike.

    Args:
        denoiser: The model.
        num: How many.
        sampling: Solver, steps, spacing.
        seed: Seed of the first image.
        batch_size: Images at a time; changes no image.
        first_stage: Decodes what a model of latents makes.

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
        yield to_uint8(images if first_stage is None else first_stage.decode(images)).float() / 127.5 - 1


def distances(
    extractor: FeatureExtractor,
    reference: Images,
    images: Iterable[Float[Tensor, "_ chan high wide"]],
    metrics: Sequence[str],
    *,
    batch_size: int = 500,
) -> dict[str, Any]:
    """Distances between a set of images and generated ones, streamed.

    Args:
        extractor: Gives the features.
        reference: Real images.
        images: Batches of generated images in [-1, 1].
        metrics: Some of `metrics.distance.METRICS`.
        batch_size: Real images at a time.

    Returns:
        One key a metric; `prdc` is four figures; `cautions` where there are too few images.
    """
    measured = Distances(metrics, extractor.num_features)
    for rows in torch.arange(len(reference)).split(batch_size):
        measured.update(extractor(reference.floats(rows)), real=True)
    for batch in images:
        measured.update(extractor(batch), real=False)
    figures: dict[str, Any] = dict(measured.figures())
    if cautions := measured.cautions():
        figures["cautions"] = list(cautions)
    return figures


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
    first_stage: FirstStage | None = None,
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
        first_stage: Autoencoder of a model of latents: its images are decoded, and its loss is that of latents.

    Returns:
        One key a metric, and what they were measured with: `features`, `samples`, `reference`, `nfe`,
        `gflops_per_sample`, `seconds`.

    Raises:
        ConfigError: Unknown metric, or no extractor where one is needed.
    """
    for name in metrics:
        if name not in METRICS:
            raise ConfigError(f"no metric {name}{suggest(name, METRICS)}")
    begin, document = time.perf_counter(), dict[str, Any]()
    wanted = [name for name in metrics if name != "loss"]
    if wanted:
        if extractor is None:
            raise ConfigError(
                f"metrics {', '.join(wanted)} need features, and {reference.name} has no labels to learn them"
            )
        features = extractor()
        images = generated(denoiser, num, sampling, seed=seed, batch_size=batch_size, first_stage=first_stage)
        document |= distances(features, reference, images, wanted)
        document["features"] = describe(features)
    if "loss" in metrics:
        held_out = reference if first_stage is None else first_stage.encode(reference)
        loss = held_out_loss(denoiser, held_out, stages=stages, batch_size=batch_size, seed=seed)
        document["loss"] = loss.loss
        document["loss_error"] = loss.error
        document["stage_loss"] = list(loss.stage_loss)
    cost = network_cost(denoiser.network.config, denoiser.shape)
    calls = call_plan(denoiser, solver=sampling.solver, steps=sampling.steps, spacing=sampling.spacing)
    return {
        **document,
        "samples": num if wanted else 0,
        "reference": {"source": reference.name, "images": len(reference), "digest": reference.digest},
        "solver": sampling.solver,
        "steps": sampling.steps,
        "nfe": len(calls),
        "gflops_per_sample": cost.flops([calls.count(k) for k in range(len(cost.stages))]) / 1e9,
        "seconds": round(time.perf_counter() - begin, 3),
    }


def evaluate_images(
    images: Images, reference: Images, extractor: FeatureExtractor, metrics: Sequence[str]
) -> dict[str, Any]:
    """Measure a set of images, whoever made them.

    Args:
        images: The images.
        reference: Real images of the same shape.
        extractor: Gives the features.
        metrics: Some of `metrics.distance.METRICS`.

    Returns:
        One key a metric, and what they were measured with.

    Raises:
        ConfigError: Unknown metric, or `loss`, which needs a model.
    """
    if "loss" in metrics:
        raise ConfigError("the metric loss needs a run: a folder of images has no denoiser")
    begin = time.perf_counter()
    batches = (images.floats(rows) for rows in torch.arange(len(images)).split(500))
    figures = distances(extractor, reference, batches, metrics)
    return {
        **figures,
        "features": describe(extractor),
        "samples": len(images),
        "reference": {"source": reference.name, "images": len(reference), "digest": reference.digest},
        "seconds": round(time.perf_counter() - begin, 3),
    }


def describe(extractor: FeatureExtractor) -> dict[str, Any]:
    """What a distance was measured with, to stand beside the figure.

    Args:
        extractor: The feature extractor.

    Returns:
        Name, number of features, test accuracy, hash of the weights.
    """
    return {
        "name": extractor.name,
        "num_features": extractor.num_features,
        "accuracy": extractor.accuracy,
        "digest": extractor.digest,
    }
