"""The U-Net of latent diffusion, and the paper's."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from multistage_diffusion.backbones import UNet
from multistage_diffusion.errors import ConfigError
from multistage_diffusion.interop.layouts.base import Official, Weights, homes
from multistage_diffusion.noise import LDM

_BLOCK = ("in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3", "skip_connection")


def from_latent_diffusion(
    weights: Mapping[str, Tensor], *, resolution: int = 64, head_channels: int | None = None
) -> Official:
    """The U-Net of latent diffusion without text, and the paper's with a decoder a stage.

    Args:
        weights: By name, without the prefix `model.diffusion_model.`.
        resolution: Pixels a side of the latents.
        head_channels: Channels of an attention head; by default 32, as in the networks of faces and rooms.
    """
    read, encoder, size = Weights(weights), "encoders.0", head_channels or 32
    if "label_emb.weight" in weights or any("attn1" in name for name in weights):
        raise ConfigError("the network is told of classes or text inside its blocks; ours is not")
    downs = [int(name.split(".")[1]) for name in weights if re.fullmatch(r"input_blocks\.\d+\.0\.op\.weight", name)]
    if not downs:
        raise ConfigError("the network halves its images nowhere, or in its residual blocks; ours by a convolution")
    blocks, last = min(downs) - 1, len(downs)
    decoders = homes(weights, "de_modules")
    width, channels = read.shape("input_blocks.0.0.weight")[:2]
    read.move("time_embed.0", f"{encoder}.embedding.first")
    read.move("time_embed.2", f"{encoder}.embedding.second")
    read.move("input_blocks.0.0", f"{encoder}.stem")
    multipliers, attends, number = [], set[int](), 1
    for level in range(last + 1):
        for index in range(blocks):
            multipliers[level:] = [read.width(f"input_blocks.{number}.0.in_layers.2") // width]
            if _block(read, f"input_blocks.{number}", f"{encoder}.levels.{level}.{index}", size):
                attends.add(level)
            number += 1
        if level < last:
            read.move(f"input_blocks.{number}.0.op", f"{encoder}.downs.{level}.conv")
            number += 1
    read.block("middle_block.0", f"{encoder}.middle.0", _BLOCK)
    _attention(read, "middle_block.1", f"{encoder}.middle.0.attention", size)
    read.block("middle_block.2", f"{encoder}.middle.1", _BLOCK)
    widths, attending = [], []
    for stage, home in enumerate(decoders or ["output_blocks"]):
        decoder, number, count = f"decoders.{stage}", 0, 0
        widths.append(read.width(f"{home}.0.0.in_layers.2") // multipliers[last])
        for depth, level in enumerate(reversed(range(last + 1))):
            for index in range(blocks + 1):
                count += _block(read, f"{home}.{number}", f"{decoder}.levels.{depth}.{index}", size)
                for place in (1, 2) if index == blocks and level > 0 else ():
                    read.move(f"{home}.{number}.{place}.conv", f"{decoder}.ups.{depth}.conv")
                number += 1
        attending.append(count == len(attends) * (blocks + 1))
        out = f"outs.{stage}" if decoders else "out"
        read.move(f"{out}.0", f"{decoder}.norm")
        read.move(f"{out}.2", f"{decoder}.head")
    model = UNet(
        architecture="multistage" if decoders else "unified",
        width=width,
        decoder_widths=tuple(widths),
        multipliers=tuple(multipliers),
        blocks=blocks,
        attention=tuple(resolution >> level for level in sorted(attends)),
        decoder_attention="all" if all(attending) else "first-stage",
        head_channels=size,
        resampling="conv",
        skip_scale=1.0,
        groups=32,
        norm_eps=1e-5,
        dropout=0.0,
        frequency_shift=0,
    )
    name = "the paper's network of latents" if decoders else "the U-Net of latent diffusion"
    return Official(name, model, LDM(), channels, resolution, (2.1531, 5.3151) if decoders else (), read.done())


def _block(read: Weights, name: str, ours: str, head_channels: int) -> bool:
    """A block of latent diffusion; whether attention follows."""
    read.block(f"{name}.0", ours, _BLOCK)
    if f"{name}.1.qkv.weight" not in read.left:
        return False
    _attention(read, f"{name}.1", f"{ours}.attention", head_channels)
    return True


def _attention(read: Weights, name: str, ours: str, head_channels: int) -> None:
    """Attention with queries, keys and values of a head side by side, as convolutions over a row of pixels."""

    def reorder(tensor: Tensor) -> Tensor:
        if tensor.shape[0] % (3 * head_channels):
            raise ConfigError(f"heads of {head_channels} channels do not divide {name}; give --head-channels")
        tensor = tensor.unflatten(0, (-1, 3, head_channels)).transpose(0, 1).flatten(0, 2)
        return tensor[..., None] if tensor.ndim == 3 else tensor

    read.move(f"{name}.norm", f"{ours}.norm")
    read.move(f"{name}.qkv", f"{ours}.qkv", reorder)
    read.move(f"{name}.proj_out", f"{ours}.out", lambda tensor: tensor[..., None] if tensor.ndim == 3 else tensor)
