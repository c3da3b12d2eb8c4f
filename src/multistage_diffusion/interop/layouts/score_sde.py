"""Score SDE's networks, and the paper's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import final

import torch
from torch import Tensor

from multistage_diffusion.backbones import UNet
from multistage_diffusion.errors import ConfigError
from multistage_diffusion.interop.layouts.base import Official, Weights, homes, swap
from multistage_diffusion.noise import VP

_BLOCK = ("GroupNorm_0", "Conv_0", "Dense_0", "GroupNorm_1", "Conv_1", "Conv_2")


def from_score_sde(weights: Mapping[str, Tensor], *, resolution: int = 32, groups: int | None = None) -> Official:
    """Score SDE's DDPM++ and NCSN++ of the VP process, and the paper's with a decoder a stage.

    Args:
        weights: By name.
        resolution: Pixels a side.
        groups: Groups of its norms; by default 32 for one decoder, and 16 for several, as the paper has.
    """
    read = Weights(weights)
    read.left.pop("sigmas", None)
    decoders = homes(weights, "de_modules")
    walk = _Walk(read, "en_modules" if decoders else "all_modules")
    if walk.kind() != "linear":
        raise ConfigError("the network's noise level has Fourier features, as for VE; ours has sinusoids")
    kinds = walk.kinds()
    downs = kinds.count("resample") // (1 if decoders else 2)
    if not downs:
        raise ConfigError("the network halves its images nowhere, or not in a residual block; ours does so there")
    blocks, pyramid = kinds[: kinds.index("resample")].count("block"), "pyramid" in kinds
    width = read.shape(f"{walk.name}.weight")[1]
    channels = read.shape(f"{walk.home}.2.weight")[1]
    widths, attends = _encoder(walk, downs, blocks)
    multipliers = [level // width for level in widths]
    decoder_widths = []
    for stage, home in enumerate(decoders or ["all_modules"]):
        walk = _Walk(read, home) if decoders else walk
        decoder_widths.append(_decoder(walk, f"decoders.{stage}", blocks, attends) // multipliers[0])
    model = UNet(
        architecture="multistage" if decoders else "unified",
        width=width,
        decoder_widths=tuple(decoder_widths),
        multipliers=tuple(multipliers),
        blocks=blocks,
        attention=tuple(resolution >> level for level, attend in enumerate(attends) if attend),
        filter="fir" if pyramid else "box",
        input_pyramid="ncsnpp" if pyramid else False,
        groups=groups or (16 if decoders else 32),
    )
    edges = tuple(VP().sigma(torch.tensor([0.442, 0.6308], dtype=torch.float64)).tolist()) if decoders else ()
    name = "the paper's VP network" if decoders else f"score SDE's {'NCSN++' if pyramid else 'DDPM++'}"
    return Official(name, model, VP(), channels, resolution, edges, read.done())


def _encoder(walk: _Walk, downs: int, blocks: int) -> tuple[list[int], list[bool]]:
    """The downward half and the middle; the width of each resolution, and whether it attends."""
    widths, attends, encoder = [0] * (downs + 1), [False] * (downs + 1), "encoders.0"
    walk.move(f"{encoder}.embedding.first", lambda tensor: swap(tensor, 1) if tensor.ndim == 2 else tensor)
    walk.move(f"{encoder}.embedding.second")
    walk.move(f"{encoder}.stem")
    for level in range(downs + 1):
        for index in range(blocks):
            widths[level] = walk.block(f"{encoder}.levels.{level}.{index}")
            if walk.kind() == "attention":
                walk.attention(f"{encoder}.levels.{level}.{index}.attention")
                attends[level] = True
        if level < downs:
            walk.block(f"{encoder}.downs.{level}")
            if walk.kind() == "pyramid":
                walk.read.move(f"{walk.name}.Conv2d_0", f"{encoder}.pyramid.{level}.1")
                walk.index += 1
    walk.block(f"{encoder}.middle.0")
    walk.attention(f"{encoder}.middle.0.attention")
    walk.block(f"{encoder}.middle.1")
    return widths, attends


def _decoder(walk: _Walk, decoder: str, blocks: int, attends: list[bool]) -> int:
    """An upward half, from the lowest resolution; the width of the highest."""
    width = 0
    for depth, attend in enumerate(reversed(attends)):
        for index in range(blocks + 1):
            width = walk.block(f"{decoder}.levels.{depth}.{index}")
        if attend:
            walk.attention(f"{decoder}.levels.{depth}.{blocks}.attention")
        if depth + 1 < len(attends):
            walk.block(f"{decoder}.ups.{depth}")
    walk.move(f"{decoder}.norm")
    walk.move(f"{decoder}.head")
    return width


@final
class _Walk:
    """Score SDE's modules, a list without names: each is told from what it holds."""

    def __init__(self, read: Weights, home: str) -> None:
        self.read, self.home, self.index = read, home, 0

    @property
    def name(self) -> str:
        """Of the module whose turn it is."""
        return f"{self.home}.{self.index}"

    def kind(self, index: int | None = None) -> str:
        """What the module is, or that of another index."""
        name = f"{self.home}.{self.index if index is None else index}."
        shapes = {
            key.removeprefix(name): weight.shape for key, weight in self.read.left.items() if key.startswith(name)
        }
        if "Conv_1.weight" in shapes:
            outputs, inputs = shapes["Conv_0.weight"][:2]
            return "resample" if outputs == inputs and "Conv_2.weight" in shapes else "block"
        if "NIN_3.W" in shapes:
            return "attention"
        if "Conv2d_0.weight" in shapes:
            return "pyramid"
        dimensions = len(shapes.get("weight", ()))
        return {0: "end" if not shapes else "other", 1: "norm", 2: "linear", 4: "convolution"}.get(dimensions, "other")

    def kinds(self) -> list[str]:
        """Of all modules."""
        kinds: list[str] = []
        while (kind := self.kind(len(kinds))) != "end":
            kinds.append(kind)
        return kinds

    def move(self, ours: str, change: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> None:
        """A plain layer."""
        self.read.move(self.name, ours, change)
        self.index += 1

    def block(self, ours: str) -> int:
        """A residual block; returns its output channels."""
        if self.kind() not in ("block", "resample"):
            raise ConfigError(
                f"{self.name} is not the residual block (BigGAN) of a DDPM++ or NCSN++; ours has no other"
            )
        width = self.read.width(f"{self.name}.Conv_0")
        self.read.block(self.name, ours, _BLOCK)
        self.index += 1
        return width

    def attention(self, ours: str) -> None:
        """Attention, of four matrices from inputs to outputs."""
        if self.kind() != "attention":
            raise ConfigError(f"{self.name} is not the attention of a DDPM++ or NCSN++")
        pop, state = self.read.left.pop, self.read.state
        self.read.move(f"{self.name}.GroupNorm_0", f"{ours}.norm")
        matrices = [pop(f"{self.name}.NIN_{k}.W").T[:, :, None, None] for k in range(4)]
        biases = [pop(f"{self.name}.NIN_{k}.b") for k in range(4)]
        state[f"{ours}.qkv.weight"], state[f"{ours}.qkv.bias"] = torch.cat(matrices[:3]), torch.cat(biases[:3])
        state[f"{ours}.out.weight"], state[f"{ours}.out.bias"] = matrices[3].contiguous(), biases[3]
        self.index += 1
