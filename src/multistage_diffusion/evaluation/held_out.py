"""The denoising loss on images that were not trained on, as a whole, by stage and by noise level."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from multistage_diffusion import rng
from multistage_diffusion.data.examples import Examples
from multistage_diffusion.loss import denoising_loss
from multistage_diffusion.models.denoiser import Denoiser
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
        denoiser: The model, in evaluation mode.
        data: Held-out images, or their latents.
        stages: Partition for the losses by stage; by default the model's own.
        repeats: Noise levels for each image; together they are a stratified draw from the training distribution.
        max_images: At most so many images are used, the first ones.
        batch_size: Images at a time; changes nothing.
        seed: Seed of noise and levels.
        processes: The processes that share the batches.

    Returns:
        The losses, the same in each process.

    Raises:
        PeerError: Another process failed with its share.
    """
    stages, device = stages or denoiser.stages, denoiser.device
    count = min(len(data), max_images)
    total = count * repeats
    index = torch.arange(total)
    cell = rng.permutation(seed, "held-out cells", 0, total)
    u = (cell + rng.uniform(seed, "held-out sigma", index, 1)[:, 0]) / total
    sigma = denoiser.process.icdf(u)
    order, ours = sigma.argsort(), denoiser.stages.of(sigma)  # neighbours share a stage: few decoders run on a batch
    losses = torch.zeros(total, dtype=torch.float64)
    with processes.all_or_none(), torch.inference_mode():
        for rows in order.split(batch_size)[processes.rank :: processes.size]:
            images = data.floats(rows % count).to(device)
            noise = rng.normal(seed, "held-out noise", rows.to(device), images.shape[1:])
            labels = None if data.labels is None or not denoiser.classes else data.labels[rows % count].to(device)
            counts = torch.bincount(ours[rows], minlength=len(denoiser.stages)).tolist()
            found = denoising_loss(denoiser, images, noise, sigma[rows].to(device), labels, counts=counts)
            losses[rows] = found.double().cpu()
    processes.all_reduce(losses)  # zeros in place of the others' shares, so to the bit
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


def _bins(sigma: Tensor, losses: Tensor) -> tuple[SigmaBin, ...]:
    """Losses between the levels of `BINS`."""
    where, found = BINS.of(sigma), []
    for k in where.unique().tolist():
        part = losses[where == k]
        found.append(SigmaBin(*BINS.bounds(k), float(part.mean()), _error(part), len(part)))
    return tuple(found)


def _error(values: Tensor) -> float:
    """Standard error of a mean; 0 for a single value."""
    return float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else 0.0
