"""The layers of our U-Net beside those of diffusers' `UNet2DModel`: configurations and weights, in both directions."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from multistage_diffusion.backbones import Backbone, UNet
from multistage_diffusion.denoiser import Denoiser
from multistage_diffusion.errors import CheckpointError, ConfigError

# What our blocks are, in diffusers' words; what a configuration does not say has diffusers' default.
_REQUIRED: dict[str, Any] = {
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "mid_block_type": "UNetMidBlock2D",
    "mid_block_scale_factor": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "act_fn": "silu",
    "resnet_time_scale_shift": "default",
    "add_attention": True,
    "class_embed_type": None,
    "num_class_embeds": None,
    "attn_norm_num_groups": None,
    "time_embedding_dim": None,
}
_DEFAULTS: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "layers_per_block": 2,
    "downsample_padding": 1,
    "dropout": 0.0,
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "sample_size": None,
    "block_out_channels": (224, 448, 672, 896),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
}
_RESIDUAL = {
    "norm0": "norm1",
    "conv0": "conv1",
    "affine": "time_emb_proj",
    "norm1": "norm2",
    "conv1": "conv2",
    "shortcut": "conv_shortcut",
}
# The names of attention layers in folders written before diffusers 0.17, as most of the early models are.
_OLD = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


def complete(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a `UNet2DModel` with those it does not name."""
    return {**_DEFAULTS, **_REQUIRED, **options}


def model_config(options: Mapping[str, Any], resolution: int, stages: int) -> UNet:
    """Our configuration of a `UNet2DModel`.

    Args:
        options: Its options, complete.
        resolution: Pixels a side.
        stages: Number of stages, each with a decoder of its own.

    Raises:
        ConfigError: It has a part that ours has not; the message names the option.
    """
    for name, expected in _REQUIRED.items():
        same_groups = name == "attn_norm_num_groups" and options[name] == options["norm_num_groups"]
        if options[name] != expected and not same_groups:
            raise ConfigError(f"the U-Net's {name} must be {json.dumps(expected)}, got {json.dumps(options[name])}")
    widths, groups = list(options["block_out_channels"]), options["norm_num_groups"]
    down, up = list(options["down_block_types"]), list(options["up_block_types"])
    attends = [name == "AttnDownBlock2D" for name in down]
    mirrored = ["AttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attends)]
    if not set(down) <= {"DownBlock2D", "AttnDownBlock2D"} or up != mirrored:
        raise ConfigError(
            f"the U-Net's blocks must be DownBlock2D or AttnDownBlock2D, mirrored on the way up, got {down} and {up}"
        )
    if any(width % widths[0] for width in widths) or widths[0] % 4 or widths[0] % groups:
        raise ConfigError(
            f"the U-Net's block_out_channels {widths} must be multiples of the first, which must be one of 4 and of "
            f"norm_num_groups {groups}"
        )
    if options["in_channels"] != options["out_channels"]:
        raise ConfigError(
            f"the U-Net maps {options['in_channels']} channels to {options['out_channels']}, not the same"
        )
    return UNet(
        architecture="unified" if stages == 1 else "multistage",
        width=widths[0],
        decoder_widths=(widths[0],) * stages,
        multipliers=tuple(width // widths[0] for width in widths),
        blocks=options["layers_per_block"],
        attention=tuple(resolution >> level for level, attend in enumerate(attends) if attend),
        decoder_attention="all",
        head_channels=options["attention_head_dim"],
        middle="encoder",
        resampling="conv" if options["downsample_padding"] else "conv-after",
        skip_scale=1.0,
        groups=groups,
        group_channels=min(4, widths[0] // groups),
        norm_eps=options["norm_eps"],
        dropout=options["dropout"],
        frequency_shift=options["freq_shift"],
    )


def misfit(config: Backbone, shape: tuple[int, int, int]) -> str | None:
    """Why a network cannot be a `UNet2DModel`.

    Args:
        config: Its record.
        shape: (C, H, W) of an image.

    Returns:
        The first reason; none if it can.
    """
    if not isinstance(config, UNet):
        return "its network is not a U-Net of this package"
    with torch.device("meta"):
        network = config.network(shape)
    groups = {module.num_groups for module in network.modules() if isinstance(module, nn.GroupNorm)}
    widths, heads = _attention_widths(config, shape[1]), config.head_channels or 0
    reasons = {
        f"it has {network.stages} stages": network.stages > 1,
        f"it has {config.classes} classes": config.classes > 0,
        "it resamples inside residual blocks (model.resampling block)": config.resampling == "block",
        "it has an input pyramid (model.input-pyramid)": bool(config.input_pyramid),
        "its images enter halved (model.entry-levels)": any(config.entry_levels),
        f"it scales its skips by {config.skip_scale:.3g} (model.skip-scale)": config.skip_scale != 1,
        f"its group norms have {sorted(groups)} groups, not one number (model.groups)": len(groups) > 1,
        f"its attention heads are wider than {min(widths)} channels and not than {max(widths)}": min(widths)
        < heads
        <= max(widths),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _attention_widths(config: UNet, height: int) -> list[int]:
    """Channels of the attention layers, those of the middle among them."""
    attending = [config.width * factor for factor, attends in _resolutions(config, height) if attends]
    return [*attending, config.width * config.multipliers[-1]]


def unet_options(denoiser: Denoiser) -> dict[str, Any]:
    """The options of the `UNet2DModel` that a denoiser's network is.

    Returns:
        Arguments for its constructor.
    """
    config, (channels, height, width) = denoiser.backbone, denoiser.shape
    assert isinstance(config, UNet)
    attends = [attend for _, attend in _resolutions(config, height)]
    norm = next(module for module in denoiser.network.modules() if isinstance(module, nn.GroupNorm))
    one_head = (config.head_channels or 0) > max(_attention_widths(config, height))
    return {
        "sample_size": height if height == width else [height, width],
        "in_channels": channels,
        "out_channels": channels,
        "block_out_channels": [config.width * factor for factor in config.multipliers],
        "layers_per_block": config.blocks,
        "down_block_types": ["AttnDownBlock2D" if attend else "DownBlock2D" for attend in attends],
        "up_block_types": ["AttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attends)],
        "attention_head_dim": None if one_head else config.head_channels,
        "norm_num_groups": norm.num_groups,
        "norm_eps": config.norm_eps,
        "downsample_padding": 0 if config.resampling == "conv-after" else 1,
        "dropout": config.dropout,
        "freq_shift": config.frequency_shift,
        "flip_sin_to_cos": True,
    }


def our_weights(model: UNet, resolution: int, weights: Mapping[str, Tensor], *, sines_first: bool) -> dict[str, Tensor]:
    """A `UNet2DModel`'s weights by our names; every decoder gets a copy of its own.

    Args:
        model: Our configuration of it.
        resolution: Pixels a side.
        weights: Its weights.
        sines_first: Whether it embeds sines before cosines.

    Raises:
        CheckpointError: A weight is missing or left over.
    """
    remaining = {_renamed(name): tensor for name, tensor in weights.items()}
    decoders = 1 if model.architecture == "unified" else len(model.decoder_widths)
    state: dict[str, Tensor] = {}
    for part, layer, modules in _layers(model, resolution):
        if layer.endswith("shortcut") and f"{modules[0]}.weight" not in remaining:
            continue
        for kind in ("weight", "bias"):
            missing = next((name for name in modules if f"{name}.{kind}" not in remaining), None)
            if missing is not None:
                raise CheckpointError(f"the U-Net has no weight {missing}.{kind}")
            tensor = torch.cat([remaining.pop(f"{name}.{kind}") for name in modules])
            if ".attention." in layer and tensor.ndim == 2:
                tensor = tensor[:, :, None, None]
            if layer == "embedding.first" and kind == "weight" and sines_first:
                tensor = torch.cat(tensor.chunk(2, dim=1)[::-1], dim=1)
            for index in range(decoders if part == "decoders" else 1):
                state[f"{part}.{index}.{layer}.{kind}"] = tensor.clone()
    if remaining:
        raise CheckpointError(f"the U-Net has weights that ours has not, like {next(iter(remaining))}")
    return state


def unet_weights(denoiser: Denoiser) -> dict[str, Tensor]:
    """The weights of the `UNet2DModel` that a denoiser's network is, cosines before sines.

    Where a decoder attends after the last block of a resolution alone, the attention that a `UNet2DModel` has after the
    others gets weights that add nothing. Augmentation labels are left out: in sampling they are zero.

    Returns:
        Its state by diffusers' names.
    """
    assert isinstance(denoiser.backbone, UNet)
    state, weights = denoiser.network.state_dict(), dict[str, Tensor]()
    for part, layer, modules in _layers(denoiser.backbone, denoiser.shape[1]):
        for kind in ("weight", "bias"):
            tensor = state.get(f"{part}.0.{layer}.{kind}")
            if tensor is None and ".attention." in layer:
                channels = len(state[f"{part}.0.{layer.split('.attention.')[0]}.conv1.bias"])
                tensor = _no_attention(layer, kind, channels)
            if tensor is None:  # a block that needs no shortcut
                continue
            if ".attention." in layer and tensor.ndim == 4:
                tensor = tensor[:, :, 0, 0]
            parts = zip(modules, tensor.chunk(len(modules)), strict=True)
            weights |= {f"{name}.{kind}": piece.clone() for name, piece in parts}
    return weights


def _no_attention(layer: str, kind: str, channels: int) -> Tensor:
    """A weight of an attention layer that adds nothing to its input."""
    if layer.endswith("norm"):
        return torch.ones(channels) if kind == "weight" else torch.zeros(channels)
    rows = 3 * channels if layer.endswith("qkv") else channels
    return torch.zeros(rows, channels) if kind == "weight" else torch.zeros(rows)


def _resolutions(model: UNet, resolution: int) -> list[tuple[int, bool]]:
    """Multiplier of each resolution, and whether it attends."""
    return [(factor, resolution >> level in model.attention) for level, factor in enumerate(model.multipliers)]


def _layers(model: UNet, resolution: int) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Each layer: the part of our network, its name there, and diffusers' modules; attention joins three of them."""
    attends = [attend for _, attend in _resolutions(model, resolution)]
    last = len(attends) - 1
    yield "encoders", "stem", ("conv_in",)
    yield "encoders", "embedding.first", ("time_embedding.linear_1",)
    yield "encoders", "embedding.second", ("time_embedding.linear_2",)
    for level, attend in enumerate(attends):
        for block in range(model.blocks):
            yield from _block("encoders", f"levels.{level}.{block}", f"down_blocks.{level}", block, attend)
        if level < last:
            yield "encoders", f"downs.{level}.conv", (f"down_blocks.{level}.downsamplers.0.conv",)
    owner = "encoders" if model.middle == "encoder" else "decoders"
    yield from _block(owner, "middle.0", "mid_block", 0, True)
    yield from _block(owner, "middle.1", "mid_block", 1, False)
    for level, attend in enumerate(reversed(attends)):
        for block in range(model.blocks + 1):
            yield from _block("decoders", f"levels.{level}.{block}", f"up_blocks.{level}", block, attend)
        if level < last:
            yield "decoders", f"ups.{level}.conv", (f"up_blocks.{level}.upsamplers.0.conv",)
    yield "decoders", "norm", ("conv_norm_out",)
    yield "decoders", "head", ("conv_out",)


def _block(part: str, layer: str, module: str, index: int, attends: bool) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """The layers of a residual block, with the attention that follows it."""
    for name, counterpart in _RESIDUAL.items():
        yield part, f"{layer}.{name}", (f"{module}.resnets.{index}.{counterpart}",)
    if attends:
        home = f"{module}.attentions.{index}"
        yield part, f"{layer}.attention.norm", (f"{home}.group_norm",)
        yield part, f"{layer}.attention.qkv", (f"{home}.to_q", f"{home}.to_k", f"{home}.to_v")
        yield part, f"{layer}.attention.out", (f"{home}.to_out.0",)


def _renamed(name: str) -> str:
    for old, new in _OLD.items():
        name = name.replace(old, new)
    return name
