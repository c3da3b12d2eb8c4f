"""EDM's networks, and the paper's."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from multistage_diffusion.backbones import UNet
from multistage_diffusion.errors import CheckpointError, ConfigError
from multistage_diffusion.interop.layouts.base import Official, Weights, homes, swap
from multistage_diffusion.noise import EDM, VE, VP, Process

Preconditioned = Literal["edm", "vp", "ve"]
_BLOCK = ("norm0", "conv0", "affine", "norm1", "conv1", "skip")


def from_edm(weights: Mapping[str, Tensor], *, kind: Preconditioned = "edm", groups: int | None = None) -> Official:
    """EDM's DDPM++ (or NCSN++ with sinusoids), and the paper's with a decoder a stage.

    Args:
        weights: By name, without the prefix `model.`.
        kind: Its preconditioning: EDM's, VP's or VE's.
        groups: Groups of its norms; by default 32 for one decoder, as EDM has, and 16 for several, as the paper has.
    """
    read = Weights(weights)
    if any(name.startswith(("out_norm", "map_noise")) for name in weights):
        raise ConfigError("the network is EDM's ADM, or its noise level has Fourier features; ours has neither")
    filters = [read.left.pop(name) for name in list(read.left) if name.endswith("resample_filter")]
    sides = sorted({int(place[1]) for name in weights if (place := re.match(r"enc\.(\d+)x", name))}, reverse=True)
    if not sides:
        raise CheckpointError("the weights have no encoder: names like enc.32x32_conv.weight")
    staged = any(name.startswith("decs.") for name in weights)
    decoders = homes(weights, "decs") or ["dec"]
    pyramid = any(name.endswith("aux_residual.weight") for name in weights)
    width, channels = read.shape(f"enc.{sides[0]}x{sides[0]}_conv.weight")[:2]
    attention = tuple(side for side in sides if f"enc.{side}x{side}_block0.qkv.weight" in weights)
    classes = read.shape("map_label.weight")[1] if "map_label.weight" in weights else 0
    model = UNet(
        architecture="multistage" if staged else "unified",
        width=width,
        decoder_widths=tuple(
            read.width(f"{home}.{sides[0]}x{sides[0]}_block0.conv0") // _multiplier(read, sides[0], width)
            for home in decoders
        ),
        multipliers=tuple(_multiplier(read, side, width) for side in sides),
        blocks=sum(f"enc.{sides[0]}x{sides[0]}_block{k}.conv0.weight" in weights for k in range(64)),
        attention=attention,
        middle="decoder",
        filter="fir" if pyramid or any(kernel.shape[-1] == 4 for kernel in filters) else "box",
        input_pyramid="ncsnpp" if pyramid else False,
        groups=groups or (16 if staged else 32),
        dropout=0.13,
        classes=classes,
        augment_labels=read.shape("map_augment.weight")[1] if "map_augment.weight" in weights else 0,
        initialisation="edm",
    )
    _embedding(read, classes)
    read.move(f"enc.{sides[0]}x{sides[0]}_conv", "encoders.0.stem")
    for level, side in enumerate(sides):
        name = f"enc.{side}x{side}"
        for index in range(model.blocks):
            _block(read, f"{name}_block{index}", f"encoders.0.levels.{level}.{index}")
        _block(read, f"{name}_down", f"encoders.0.downs.{level - 1}")
        read.move(f"{name}_aux_residual", f"encoders.0.pyramid.{level - 1}.1")
    for stage, home in enumerate(decoders):
        _decoder(read, home, f"decoders.{stage}", sides, model.blocks)
        if kind == "ve":  # it predicts the noise with the other sign
            for name in ("weight", "bias"):
                read.state[f"decoders.{stage}.head.{name}"].neg_()
    process: Process = {"edm": EDM(), "vp": VP(t_min=1e-5), "ve": VE(sigma_min=0.02, sigma_max=100.0)}[kind]
    name = "the paper's EDM network" if staged else f"EDM's {'NCSN++' if pyramid else 'DDPM++'}"
    edges = (2.5103, 7.6577) if staged else ()
    return Official(f"{name} for {kind}", model, process, channels, sides[0], edges, read.done())


def _decoder(read: Weights, home: str, ours: str, sides: list[int], blocks: int) -> None:
    """A decoder, which begins at the lowest resolution and with the blocks between the two halves."""
    last = len(sides) - 1
    for level, side in enumerate(sides):
        name = f"{home}.{side}x{side}"
        for index in range(2):
            _block(read, f"{name}_in{index}", f"{ours}.middle.{index}")
        _block(read, f"{name}_up", f"{ours}.ups.{last - 1 - level}")
        for index in range(blocks + 1):
            _block(read, f"{name}_block{index}", f"{ours}.levels.{last - level}.{index}")
    read.move(f"{home}.{sides[0]}x{sides[0]}_aux_norm", f"{ours}.norm")
    read.move(f"{home}.{sides[0]}x{sides[0]}_aux_conv", f"{ours}.head")


def _multiplier(read: Weights, side: int, width: int) -> int:
    return read.width(f"enc.{side}x{side}_block0.conv0") // width


def _embedding(read: Weights, classes: int) -> None:
    """Sinusoids, labels and augmentation add up with the sines first."""
    embedding = "encoders.0.embedding"
    read.move("map_layer0", f"{embedding}.first", lambda tensor: swap(tensor, 1) if tensor.ndim == 2 else tensor)
    read.move("map_layer1", f"{embedding}.second")
    read.move("map_augment", f"{embedding}.augment", lambda tensor: swap(tensor, 0))
    if classes:
        # A linear layer of one-hot labels times sqrt(classes); its bias is all that stays without a class.
        matrix, bias = read.left.pop("map_label.weight"), read.left.pop("map_label.bias")
        table = torch.cat((matrix.T * math.sqrt(classes) + bias, bias[None]))
        read.state[f"{embedding}.label.weight"] = swap(table, 1)


def _block(read: Weights, name: str, ours: str) -> None:
    """A block of EDM; queries, keys and values of a channel lie side by side there."""
    read.block(name, ours, _BLOCK)
    read.move(f"{name}.norm2", f"{ours}.attention.norm")
    read.move(
        f"{name}.qkv",
        f"{ours}.attention.qkv",
        lambda tensor: tensor.unflatten(0, (-1, 3)).transpose(0, 1).flatten(0, 1),
    )
    read.move(f"{name}.proj", f"{ours}.attention.out")
