"""The learning rate along a training: warm-up, then constant or falling."""

from __future__ import annotations

import math

from multistage_diffusion.backbones import Backbone, UNet
from multistage_diffusion.config import TrainingConfig


def learning_rate(training: TrainingConfig, step: int) -> float:
    """The rate of a step, a pure function of the options, so that a resumed run goes on where it was.

    After warm-up: `constant`; `linear` and `cosine` fall to 0 at `training.steps`; `inverse-sqrt` falls as the root of
    warm-up's images over the images seen, whatever the number of steps (Vaswani et al. 2017).

    Args:
        training: The options.
        step: The step, counted from 0.

    Returns:
        The rate; that of the last step of a falling one is the last above 0.
    """
    begun, warmup = step * training.batch_size, training.warmup_images
    seen, total = begun + training.batch_size, training.steps * training.batch_size
    if seen < warmup:
        return training.learning_rate * seen / warmup
    done = min(max(begun - warmup, 0) / max(total - warmup, 1), 1.0)  # of what comes after warm-up
    match training.schedule:
        case "constant":
            factor = 1.0
        case "linear":
            factor = 1.0 - done
        case "cosine":
            factor = 0.5 * (1.0 + math.cos(math.pi * done))
        case "inverse-sqrt":
            factor = math.sqrt(warmup / seen)
    return training.learning_rate * factor


def usual_rates(model: Backbone, training: TrainingConfig) -> tuple[float, float] | None:
    """Learning rates, from the lowest to the highest, beyond which few networks of that width train well.

    Rates that were best, or are published, times the encoder's width lie between .02 and .13 for U-Nets and Adam
    (docs/training.md). The range is wider on both sides by a factor of 4.

    Args:
        model: The network.
        training: The options.

    Returns:
        None where nothing was measured: other networks and optimisers.
    """
    if not isinstance(model, UNet) or training.optimizer != "adamw":
        return None
    return 0.005 / model.width, 0.5 / model.width
