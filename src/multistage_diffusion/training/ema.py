"""Exponential moving average of the weights, in float32, apart from the trained weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor, nn


@final
class EMA:
    """Average of a module's parameters with a half-life counted in images.

    Args:
        module: The module whose parameters are averaged; the average starts as a copy of them.
        half_life: Half-life in images.
        ramp_up: The half-life is at most this share of the images seen, so that a young average forgets the random
            start; none: constant.

    Source: Karras et al. 2022, Sec. 5 and App. F.2 (half-life in images, ramp-up 0.05).
    """

    def __init__(self, module: nn.Module, half_life: float, ramp_up: float | None) -> None:
        self.half_life, self.ramp_up = half_life, ramp_up
        self.average = {
            name: parameter.detach().to(torch.float32, copy=True) for name, parameter in module.named_parameters()
        }

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

    @torch.no_grad()
    def update(self, module: nn.Module, images: int, batch_size: int) -> None:
        """Move the average towards the module's parameters.

        Args:
            module: The trained module.
            images: Images seen, this batch included.
            batch_size: Images of this batch.
        """
        current = [parameter.detach().float() for parameter in module.parameters()]
        share = 1.0 - self.decay(images, batch_size)
        torch._foreach_lerp_(list(self.average.values()), current, share)  # pyright: ignore[reportPrivateImportUsage]

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Write the average into a module's parameters.

        Args:
            module: A module other than the trained one.
        """
        for name, parameter in module.named_parameters():
            parameter.copy_(self.average[name])

    @torch.no_grad()
    def load(self, average: Mapping[str, Tensor]) -> None:
        """Restore a saved average.

        Args:
            average: Tensors by the parameters' names.

        Raises:
            ValueError: A name or a shape differs.
        """
        if average.keys() != self.average.keys():
            raise ValueError(f"the average has other names: {sorted(average.keys() ^ self.average.keys())[0]}")
        for name, tensor in self.average.items():
            if average[name].shape != tensor.shape:
                raise ValueError(f"the average of {name} has shape {tuple(average[name].shape)}")
        for name, tensor in self.average.items():
            tensor.copy_(average[name])
