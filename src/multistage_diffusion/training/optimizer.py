"""The optimiser of a training: Adam, with a learning rate for each part of the network where that is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from multistage_diffusion.config import TrainingConfig
from multistage_diffusion.errors import ConfigError
from multistage_diffusion.multidecoder import MultiDecoder

Parameters = Iterable[nn.Parameter] | list[dict[str, Any]]
MakeOptimizer = Callable[[Any], torch.optim.Optimizer]


def freeze(network: MultiDecoder, training: TrainingConfig) -> tuple[float, ...]:
    """The factor of the learning rate for each part of a network; a part whose factor is 0 gets no gradients.

    Args:
        network: The network, before the optimiser or other processes refer to its weights.
        training: `encoder_rate` and `stage_rates`.

    Returns:
        One factor a part, encoders first.

    Raises:
        ConfigError: There is not one factor for each stage.
    """
    stages = training.stage_rates or (1.0,) * network.stages
    if len(stages) != network.stages:
        raise ConfigError(
            f"training.stage-rates {training.stage_rates} must have one factor for each of {network.stages} stages"
        )
    encoders = (1.0,) if len(network.encoders) == 1 else stages
    rates = (*(training.encoder_rate * rate for rate in encoders), *stages)
    for part, rate in zip(network.parts, rates, strict=True):
        if rate == 0:
            part.requires_grad_(False)
    return rates


def parameter_groups(network: MultiDecoder, rates: tuple[float, ...]) -> Parameters:
    """What an optimiser gets: all parameters, in groups with the key `rate` where parts have factors of their own."""
    if all(rate == 1.0 for rate in rates):
        return network.parameters()
    return [{"params": list(part.parameters()), "rate": rate} for part, rate in zip(network.parts, rates, strict=True)]


def adam(parameters: Parameters, training: TrainingConfig, device: torch.device) -> torch.optim.Optimizer:
    """Adam, or AdamW with weight decay, as `training` says."""
    kind = torch.optim.AdamW if training.weight_decay else torch.optim.Adam
    return kind(
        parameters,
        lr=training.learning_rate,
        betas=training.betas,
        weight_decay=training.weight_decay,
        fused=device.type in ("cpu", "cuda"),
    )
