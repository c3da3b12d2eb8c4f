"""Moving averages of the weights, in float32, apart from the trained weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import final

import torch
from torch import Tensor, nn

from multistage_diffusion.runs.averages import power_exponent
from multistage_diffusion.training.distributed import local, put, whole_tensor
from multistage_diffusion.weights import persistent_buffers


@dataclass(frozen=True)
class HalfLife:
    """Exponential profile with a half-life counted in images.

    Attributes:
        half_life: Half-life in images.
        ramp_up: The half-life is at most this share of the images seen, so that a young average forgets the random
            start; none: constant.

    Source: Karras et al. 2022, Sec. 5 and App. F.2 (half-life in images, ramp-up 0.05).
    """

    half_life: float
    ramp_up: float | None

    def decay(self, images: int, batch_size: int) -> float:
        """Share of the old average that is kept by one update.

        Args:
            images: Images seen, this batch included.
            batch_size: Images of this batch.

        Returns:
            0.5^(batch_size / half-life).
        """
        half_life = self.half_life if self.ramp_up is None else min(self.half_life, self.ramp_up * images)
        return 0.5 ** (batch_size / half_life)


@dataclass(frozen=True)
class Power:
    """Power-function profile: after t images, the weights at image tau count in proportion to tau^exponent.

    It stretches with training, forgets the random start altogether, and has a closed form, from which averages of
    other lengths can be put together afterwards (`runs/averages.py`).

    Attributes:
        length: Standard deviation of the profile as a share of training so far (sigma_rel): 0.05 is short, 0.10 usual.

    Source: Karras et al. 2024, Sec. 3.1.
    """

    length: float

    @cached_property
    def exponent(self) -> float:
        """The exponent that has this length."""
        return power_exponent(self.length)

    def decay(self, images: int, batch_size: int) -> float:
        """Share of the old average that is kept by one update.

        Args:
            images: Images seen, this batch included.
            batch_size: Images of this batch.

        Returns:
            (1 - batch_size / images)^(exponent + 1): then the weights after a batch count exactly as the integral of
            the profile over that batch.
        """
        return (1.0 - batch_size / images) ** (self.exponent + 1.0)


@final
class EMA:
    """Average of a module's parameters.

    Args:
        module: The module whose parameters are averaged; the average starts as a copy of them. They may change in
            place only.
        profile: How fast the past is forgotten.
    """

    def __init__(self, module: nn.Module, profile: HalfLife | Power) -> None:
        self.profile = profile
        self._module = module
        self.average = {
            name: parameter.detach().to(torch.float32, copy=True) for name, parameter in module.named_parameters()
        }

    @cached_property
    def _weights(self) -> list[Tensor]:
        """The module's own memory; asked for after the first pass through it, before which FSDP may still move it."""
        return [local(parameter.detach()) for parameter in self._module.parameters()]

    @torch.no_grad()
    def update(self, images: int, batch_size: int) -> None:
        """Move the average towards the module's parameters.

        Args:
            images: Images seen, this batch included.
            batch_size: Images of this batch.
        """
        current = [weights.float() for weights in self._weights]
        averages = [local(average) for average in self.average.values()]
        share = 1.0 - self.profile.decay(images, batch_size)
        torch._foreach_lerp_(averages, current, share)  # pyright: ignore[reportPrivateImportUsage]

    def state(self) -> dict[str, Tensor]:
        """What a file holds, under all names of the module's state: the average, and buffers as they are now."""
        averages = {id(weights): self.average[name] for name, weights in self._module.named_parameters()}
        every = self._module.named_parameters(remove_duplicate=False)  # tied weights have several names
        return {name: averages[id(weights)] for name, weights in every} | persistent_buffers(self._module)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Write the average into a module's parameters, and the trained one's buffers into its buffers.

        Args:
            module: A module other than the trained one.
        """
        for name, parameter in module.named_parameters():
            parameter.copy_(whole_tensor(self.average[name]))
        buffers = persistent_buffers(self._module)
        for name, buffer in persistent_buffers(module).items():
            buffer.copy_(buffers[name])

    @torch.no_grad()
    def load(self, average: Mapping[str, Tensor]) -> None:
        """Restore a saved average.

        Args:
            average: Tensors by the parameters' names; others of `state` are left aside.

        Raises:
            ValueError: A name or a shape differs.
        """
        if strange := (self.average.keys() - average.keys()) | (average.keys() - self.state().keys()):
            raise ValueError(f"the average has other names: {min(strange)}")
        for name, tensor in self.average.items():
            if average[name].shape != tensor.shape:
                raise ValueError(f"the average of {name} has shape {tuple(average[name].shape)}")
        for name, tensor in self.average.items():
            put(tensor, average[name])
