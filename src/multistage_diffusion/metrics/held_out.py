"""The denoising loss on images that were not trained on, as a whole, by stage and by noise level."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from multistage_diffusion import rng
from multistage_diffusion.conditioning import Conditioning
from multistage_diffusion.data.examples import Examples
from multistage_diffusion.denoiser import Denoiser
from multistage_diffusion.devices import evaluating
from multistage_diffusion.errors import ConfigError
from multistage_diffusion.loss import denoising_loss
from multistage_diffusion.metrics.metric import Figures, ModelMetric
from multistage_diffusion.process_group import SINGLE, ProcessGroup
from multistage_diffusion.stages import Stages

BINS = Stages(tuple(10.0 ** (power / 2) for power in range(-6, 6)))  # two a decade; the same for every process


@dataclass(frozen=True)
class SigmaBin:
    """Loss between two noise levels.

    Attributes:
        low: Noise levels above this, sigma.
        high: Up to this one.
        loss: Mean loss of the draws.
        error: Its standard error, over draws.
        draws: Number of draws.
    """

    low: float
    high: float
    loss: float
    error: float
    draws: int


@dataclass(frozen=True)
class HeldOutLoss:
    """Denoising loss on images that were not trained on.

    Attributes:
        loss: Mean under the training distribution of noise levels.
        stage_loss: Mean within each stage.
        error: Standard error of `loss`, over images.
        by_image: Mean loss of each image. Two models see the same noise, so their difference is best taken image by
            image: its error is smaller than that of either loss.
        bins: Losses by noise level, lowest first, where there are draws.
    """

    loss: float
    stage_loss: tuple[float | None, ...]
    error: float
    by_image: Float[Tensor, " images"]
    bins: tuple[SigmaBin, ...] = ()


def held_out_loss(
    denoiser: Denoiser,
    data: Examples,
    *,
    stages: Stages | None = None,
    repeats: int = 8,
    max_images: int = 2_000,
    batch_size: int = 256,
    seed: int = 0,
    processes: ProcessGroup = SINGLE,
) -> HeldOutLoss:
    """Denoising loss with fixed images, noise and noise levels: the same for every model of a process.

    Args:
        denoiser: The model; its dropout is off meanwhile.
        data: Held-out images, or their latents.
        stages: Partition for the losses by stage; by default that of the model.
        repeats: Noise levels for each image; together they are a stratified sample of the training distribution.
        max_images: At most so many images are used, the first ones.
        batch_size: Images at a time; changes no loss.
        seed: Seed of noise and noise levels.
        processes: The processes that share the batches.

    Returns:
        The losses, the same in each process.

    Raises:
        ConfigError: The classes of the images are not those of a conditional model.
        PeerError: Another process failed with its share.
    """
    stages, device = stages or denoiser.stages, denoiser.device
    count = min(len(data), max_images)
    classes = model_labels(denoiser, data)
    total = count * repeats
    # Draw i is of image i modulo count. Its u is uniform in a cell of its own of total equal cells of [0, 1], dealt out
    # at random, so that the levels icdf(u) are a stratified sample of the training distribution.
    index = torch.arange(total)
    cell = rng.permutation(seed, "held-out cells", 0, total)
    u = (cell + rng.uniform(seed, "held-out sigma", index, 1)[:, 0]) / total
    sigma = denoiser.process.icdf(u)
    order, stage = sigma.argsort(), denoiser.stages.of(sigma)  # in order, few decoders run on a batch
    losses = torch.zeros(total, dtype=torch.float64)
    with processes.all_or_none(), evaluating(denoiser), torch.inference_mode():
        for rows in order.split(batch_size)[processes.rank :: processes.size]:
            images = data.floats(rows % count).to(device)
            noise = rng.normal(seed, "held-out noise", rows.to(device), images.shape[1:])
            labels = None if classes is None else classes[rows % count].to(device)
            counts = torch.bincount(stage[rows], minlength=len(denoiser.stages)).tolist()
            loss = denoising_loss(denoiser, images, noise, sigma[rows].to(device), Conditioning(labels), counts=counts)
            losses[rows] = loss.double().cpu()
    processes.all_reduce(losses)  # zeros in place of other processes' shares, so the sum is exact
    stage = stages.of(sigma)
    parts = [losses[stage == k] for k in range(len(stages))]
    by_image = losses.reshape(repeats, count).mean(dim=0)
    return HeldOutLoss(
        float(losses.mean()),
        tuple(float(part.mean()) if len(part) else None for part in parts),
        _error(by_image),
        by_image,
        _bins(sigma, losses),
    )


def model_labels(denoiser: Denoiser, data: Examples) -> Int[Tensor, " n"] | None:
    """Labels of the images as numbers of the model, by the names of the classes; none for an unconditional model.

    Raises:
        ConfigError: The images have no labels, or classes that the model was not trained on.
    """
    if not denoiser.classes:
        return None
    if data.labels is None:
        why = f" ({data.notes['labels']})" if "labels" in data.notes else ""
        raise ConfigError(f"the model is conditional, and {data.name} has no labels{why}; choose labelled data")
    if denoiser.trained_classes is not None:
        return denoiser.trained_classes.match(data.name, data.classes, data.labels)
    most = int(data.labels.max())
    if most >= denoiser.classes:
        raise ConfigError(
            f"{data.name} has a class of number {most}, and the model has {denoiser.classes} classes, from 0"
        )
    return data.labels


@final
@dataclass(frozen=True)
class DenoisingLoss(ModelMetric):
    """`held_out_loss` as a metric: `loss`, its standard error, and the losses by stage and by noise level.

    Attributes:
        stages, repeats, max_images: Those of `held_out_loss`.
    """

    stages: Stages | None = None
    repeats: int = 8
    max_images: int = 2_000

    name = "loss"
    companions = ("loss_error", "stage_loss")

    def measure(
        self, denoiser: Denoiser, examples: Examples, *, seed: int, batch_size: int, processes: ProcessGroup
    ) -> Figures:
        """The losses; `sigma_loss` is a list of records, and the highest noise level of the last one may be none."""
        result = held_out_loss(
            denoiser,
            examples,
            stages=self.stages,
            repeats=self.repeats,
            max_images=self.max_images,
            batch_size=batch_size,
            seed=seed,
            processes=processes,
        )
        return {
            self.name: result.loss,
            "loss_error": result.error,
            "stage_loss": list(result.stage_loss),
            "sigma_loss": [
                {**asdict(part), "high": None if math.isinf(part.high) else part.high} for part in result.bins
            ],
        }


def _bins(sigma: Tensor, losses: Tensor) -> tuple[SigmaBin, ...]:
    """Losses between the levels of `BINS`."""
    which, bins = BINS.of(sigma), []
    for k in which.unique().tolist():
        part = losses[which == k]
        bins.append(SigmaBin(*BINS.bounds(k), float(part.mean()), _error(part), len(part)))
    return tuple(bins)


def _error(values: Tensor) -> float:
    """Standard error of a mean; 0 for a single value."""
    return float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else 0.0
