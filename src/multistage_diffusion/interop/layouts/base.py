"""What all layouts share: a network that was recognised, and weights on their way to our names."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from multistage_diffusion.backbones import UNet
from multistage_diffusion.errors import CheckpointError
from multistage_diffusion.noise import Process

BLOCK = ("norm0", "conv0", "affine", "norm1", "conv1", "shortcut")  # the layers of a residual block by our names


@dataclass(frozen=True)
class Official:
    """A published network, as its names and shapes tell.

    Attributes:
        what: What was recognised, for people.
        model: Its configuration.
        process: What it was trained for.
        channels: Channels of an image.
        resolution: Pixels a side.
        edges: Edges of its stages in sigma; none for one decoder.
        state: Its weights by our names.
    """

    what: str
    model: UNet
    process: Process
    channels: int
    resolution: int
    edges: tuple[float, ...]
    state: dict[str, Tensor]


@final
class Weights:
    """Weights that are taken one after the other, and the same under our names."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self.left, self.state = dict(weights), dict[str, Tensor]()

    def move(self, name: str, ours: str, change: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> None:
        """A layer's weight and bias, if it has them, under our name."""
        for kind in ("weight", "bias"):
            if f"{name}.{kind}" in self.left:
                self.state[f"{ours}.{kind}"] = change(self.left.pop(f"{name}.{kind}"))

    def block(self, name: str, ours: str, names: Sequence[str]) -> None:
        """The layers of a residual block, whose names there are in the order of `BLOCK`."""
        for layer, other in zip(BLOCK, names, strict=True):
            self.move(f"{name}.{other}", f"{ours}.{layer}")

    def width(self, name: str) -> int:
        """Output channels of a layer."""
        return self.shape(f"{name}.weight")[0]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a weight that is still there."""
        if name not in self.left:
            raise CheckpointError(f"the weights lack {name}")
        return tuple(self.left[name].shape)

    def done(self) -> dict[str, Tensor]:
        """All weights; a `CheckpointError` if one is left over."""
        if self.left:
            raise CheckpointError(f"the weights have {next(iter(self.left))}, which this network has no place for")
        return self.state


def swap(tensor: Tensor, dim: int) -> Tensor:
    """Sines before cosines to cosines before sines."""
    return torch.cat(tensor.chunk(2, dim=dim)[::-1], dim=dim)


def homes(weights: Mapping[str, Tensor], name: str) -> list[str]:
    """The decoders of a list of that name, in their order; none where there is no such list."""
    indices = {int(place[1]) for key in weights if (place := re.match(rf"{name}\.(\d+)\.", key))}
    return [f"{name}.{index}" for index in sorted(indices)]
