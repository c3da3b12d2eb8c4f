"""What a step knows of its gradients, which lie in the parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from torch import Tensor, nn

from multistage_diffusion.conditioning import Conditioning
from multistage_diffusion.denoiser import Denoiser
from multistage_diffusion.loss import denoising_loss
from multistage_diffusion.training.batches import Batch


@final
class Losses(nn.Module):
    """What is called in training, whole: one forward pass for each backward pass, as DDP wants it."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, batch: Batch, dropout_seed: Tensor | None) -> Tensor:
        """The loss of each image."""
        conditioning = Conditioning(batch.labels, batch.augment, dropout_seed)
        return denoising_loss(self.denoiser, batch.images, batch.noise, batch.sigma, conditioning, counts=batch.counts)


@dataclass(frozen=True)
class Gradients:
    """The gradients of a step, which lie in the parameters, as numbers.

    Attributes:
        loss: Importance-weighted mean loss.
        stage_loss: Mean loss of each stage, none where it has no image.
        counts: Images of each stage.
        norm: Norm of the gradient.
        norm_tensor: The same, on the device.
        measured: Losses by noise level, then the noise of the gradient by stage, where something learns from them.
        overflows: How often the step was repeated.
        stop: Signal that asks to stop.
    """

    loss: float
    stage_loss: tuple[float | None, ...]
    counts: tuple[int, ...]
    norm: float
    norm_tensor: Tensor
    measured: Tensor
    overflows: int
    stop: int | None


def by_stage(means: Sequence[float], counts: tuple[int, ...]) -> tuple[float | None, ...]:
    """One entry a stage, none where it has no rows."""
    remaining = iter(means)
    return tuple(next(remaining) if count else None for count in counts)
