"""What a step knows of its gradients, which lie in the parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


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
