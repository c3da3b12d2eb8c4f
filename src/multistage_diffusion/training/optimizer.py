"""The optimiser of a training: AdamW or Muon, with a learning rate for each part where that is asked for."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from multistage_diffusion.config import EngineConfig, TrainingConfig
from multistage_diffusion.errors import ConfigError
from multistage_diffusion.multidecoder import MultiDecoder
from multistage_diffusion.records import check

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


def make_optimizer(
    network: MultiDecoder,
    rates: tuple[float, ...],
    training: TrainingConfig,
    engine: EngineConfig,
    device: torch.device,
) -> torch.optim.Optimizer:
    """The optimiser that `training.optimizer` names.

    Args:
        network: What it moves.
        rates: Factor of the learning rate for each part.
        training: The options.
        engine: Says whether weights are in shards.
        device: Where the weights are.

    Returns:
        AdamW (Adam where there is no weight decay), or Muon.

    Raises:
        ConfigError: Muon with weights in shards.
    """
    options: dict[str, Any] = {
        "lr": training.learning_rate,
        "betas": training.betas,
        "weight_decay": training.weight_decay,
        "fused": device.type in ("cpu", "cuda"),
    }
    groups = parameter_groups(network, rates)
    if training.optimizer == "muon":
        whole = "adamw with engine.parallel fsdp, as muon needs whole weights"
        check(engine.parallel != "fsdp", "training.optimizer", whole, "muon")
        tables = {module.weight for module in network.modules() if isinstance(module, nn.Embedding)}
        return Muon(groups, tables, **options)
    return (torch.optim.AdamW if training.weight_decay else torch.optim.Adam)(groups, **options)


def plain_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What an optimiser of the user's keeps beside tensors, like a count of steps in its groups or by parameter.

    Returns:
        Plain JSON types: `groups`, without learning rates, which the configuration gives; and `parameters`, by index.

    Raises:
        ConfigError: Something that a checkpoint cannot hold.
    """
    parameters = optimizer.state_dict()["state"].items()
    state = {
        "groups": [
            {name: value for name, value in group.items() if name not in ("params", "lr", "rate")}
            for group in optimizer.param_groups
        ],
        "parameters": {
            index: {name: value for name, value in values.items() if not isinstance(value, Tensor)}
            for index, values in parameters
        },
    }
    try:
        return json.loads(json.dumps(state, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"the optimiser {type(optimizer).__name__} keeps what no checkpoint can hold ({error}); let it keep "
            "tensors in `state`, and numbers, switches and text there or in its groups"
        ) from error


def restore_plain_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Give an optimiser what `plain_state` had of it, after its tensors."""
    for group, values in zip(optimizer.param_groups, state["groups"], strict=True):
        for name, value in values.items():
            group[name] = tuple(value) if isinstance(group.get(name), tuple) else value
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, values in state["parameters"].items():
        if values:
            optimizer.state[parameters[int(index)]].update(values)


@final
class Muon(torch.optim.AdamW):
    """Muon for weights of two or more dimensions, AdamW for biases, norms and embeddings (Jordan et al. 2024).

    The Nesterov momentum of a weight is made nearly orthogonal, a convolution's kernel as the matrix (out, everything
    else). It is scaled by 0.2 sqrt(longer side), which gives it the size of AdamW's updates, so that one learning rate
    and one weight decay serve both kinds (Liu et al. 2025).

    Args:
        groups: Parameters, or groups of them.
        tables: Weights of embeddings, whose rows are not one matrix.
        momentum: Decay rate of the gradients' average.
        options: Of AdamW.
    """

    def __init__(self, groups: Parameters, tables: set[Tensor], momentum: float = 0.95, **options: Any) -> None:
        super().__init__(groups, **options)
        self.momentum = momentum
        listed = (parameter for group in self.param_groups for parameter in group["params"])
        self._matrices: set[Tensor] = {parameter for parameter in listed if parameter.dim() > 1} - tables

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Move the weights; gradients of the matrices are gone afterwards."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            alike = defaultdict[torch.Size, list[nn.Parameter]](list)
            for parameter in group["params"]:
                if parameter in self._matrices and parameter.grad is not None:
                    alike[parameter.flatten(1).shape].append(parameter)
            for (rows, columns), parameters in alike.items():
                factor = group["lr"] * 0.2 * math.sqrt(max(rows, columns))
                directions = orthogonal(torch.stack([self._momentum(parameter).flatten(1) for parameter in parameters]))
                for parameter, direction in zip(parameters, directions, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.sub_(direction.view(parameter.shape), alpha=factor)
                    parameter.grad = None  # AdamW passes over it
        super().step()
        return loss

    def _momentum(self, parameter: nn.Parameter) -> Tensor:
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
            state["step"] = torch.zeros(())  # AdamW reads it of every state that is loaded
        state["step"] += 1
        average = state["momentum_buffer"].lerp_(gradient, 1 - self.momentum)
        return gradient.lerp(average, self.momentum)


def orthogonal(matrices: Float[Tensor, "count rows columns"], steps: int = 5) -> Float[Tensor, "count rows columns"]:
    """Matrices with the same singular vectors and singular values near 1, by Newton and Schulz's iteration.

    With X scaled to a norm of 1, each step is X <- a X + (b A + c A^2) X with A = X X^T. Its coefficients move small
    values away from 0 fast, and end between .7 and 1.2 rather than at 1. GPUs compute in bfloat16, CPUs in float32.

    Source: Jordan et al. 2024, Muon.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if wide else matrices.mT
    x = x.to(torch.float32 if x.device.type == "cpu" else torch.bfloat16)
    x = x / x.flatten(1).norm(dim=1).clamp(min=1e-7)[:, None, None]
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.mT).to(matrices)
