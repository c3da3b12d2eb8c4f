"""DiT and SiT as our transformer: the names of diffusers' `DiTTransformer2DModel` and of the first releases, both ways.

The released names are the middle: diffusers' are brought to them, and they to ours.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from multistage_diffusion.backbones import Backbone, Transformer
from multistage_diffusion.denoiser import UNDIVIDED, Denoiser
from multistage_diffusion.errors import CheckpointError, ConfigError
from multistage_diffusion.noise import LDM, Flow, Process
from multistage_diffusion.stages import Stages

# What our blocks are, in diffusers' words; what a configuration does not say has diffusers' default.
_REQUIRED: dict[str, Any] = {
    "norm_type": "ada_norm_zero",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_elementwise_affine": False,
    "dropout": 0.0,
}
_DEFAULTS: dict[str, Any] = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": None,
    "num_layers": 28,
    "sample_size": 32,
    "patch_size": 2,
    "num_embeds_ada_norm": 1000,
    "norm_eps": 1e-5,
}
# Each layer by its released name: ours, and diffusers' modules; queries, keys and values are one layer but there.
_STEM = {"x_embedder.proj": ("stem", "pos_embed.proj")}
_EMBEDDING = {
    "t_embedder.mlp.0": ("embedding.first", "timestep_embedder.linear_1"),
    "t_embedder.mlp.2": ("embedding.second", "timestep_embedder.linear_2"),
    "y_embedder.embedding_table": ("embedding.label", "class_embedder.embedding_table"),
}
_BLOCK = {
    "adaLN_modulation.1": ("modulation", "norm1.linear"),
    "attn.qkv": ("attention.qkv", "attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn.proj": ("attention.out", "attn1.to_out.0"),
    "mlp.fc1": ("first", "ff.net.0.proj"),
    "mlp.fc2": ("second", "ff.net.2"),
}
_HEAD = {"final_layer.adaLN_modulation.1": ("modulation", "proj_out_1"), "final_layer.linear": ("last", "proj_out_2")}
CLASSES = ("DiTTransformer2DModel", "Transformer2DModel")  # the second is its name in early folders
NONE = 1000  # DiTPipeline's label for none


def is_transformer(options: Mapping[str, Any]) -> bool:
    """Whether a configuration of diffusers is that of a `DiTTransformer2DModel`, or of the class that it had before."""
    return options.get("_class_name") in CLASSES or "num_embeds_ada_norm" in options


def from_dit(
    options: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    process: Process | None = None,
    *,
    stages: Stages = UNDIVIDED,
    trunk: int | None = None,
) -> Denoiser:
    """A `DiTTransformer2DModel` of diffusers as a denoiser; undivided its network gives the same output.

    Args:
        options: Its `config.json`.
        weights: Its weights by name.
        process: What it was trained for; by default DiT's, 1000 steps with betas from 1e-4 to 0.02.
        stages: A partition: every stage gets a head of its own, all of which start as the last blocks.
        trunk: Blocks of the trunk; by default two thirds.

    Returns:
        The denoiser, in evaluation mode. Where the network predicts a variance, too, that is left out.

    Raises:
        ConfigError: It has a part that ours has not, or its blocks embed the timestep each in its own way, as none of
            the published ones do.
        CheckpointError: A weight is missing, left over or of another shape.
    """
    options = {**_DEFAULTS, **_REQUIRED, **options}
    for name, expected in _REQUIRED.items():
        if options[name] != expected:
            raise ConfigError(
                f"the transformer's {name} must be {json.dumps(expected)}, got {json.dumps(options[name])}"
            )
    channels, size = options["in_channels"], options["sample_size"]
    if options["out_channels"] not in (None, channels, 2 * channels):
        raise ConfigError(
            f"the transformer maps {channels} channels to {options['out_channels']}, not as many or twice"
        )
    model = Transformer(
        width=options["num_attention_heads"] * options["attention_head_dim"],
        depth=options["num_layers"],
        trunk=0,
        decoder_widths=(options["num_attention_heads"] * options["attention_head_dim"],),
        patch=options["patch_size"],
        head_channels=options["attention_head_dim"],
        classes=options["num_embeds_ada_norm"],
        norm_eps=options["norm_eps"],
    )
    return _denoiser(model, _released(weights, model), process, (channels, size, size), stages, trunk)


@torch.random.fork_rng(devices=[])
def from_released(
    weights: Mapping[str, Tensor],
    process: Process | None = None,
    *,
    head_channels: int | None = None,
    stages: Stages = UNDIVIDED,
    trunk: int | None = None,
) -> Denoiser:
    """A network with the names of DiT's and SiT's own releases as a denoiser; its sizes are read from its weights.

    Args:
        weights: Its weights by name.
        process: What it was trained for; by default DiT's. With a `Flow`, the network is SiT's: it predicts the data
            minus the noise at the time 1 - t, which its weights are turned for; `time_scale` must be 1.
        head_channels: Channels of an attention head; by default 72 for a width of 1152, and else 64.
        stages: A partition: every stage gets a head of its own, all of which start as the last blocks.
        trunk: Blocks of the trunk; by default two thirds.

    Returns:
        The denoiser, in evaluation mode.

    Raises:
        ConfigError: The process is a flow of another time scale.
        CheckpointError: A weight is missing, left over or of another shape.
    """
    if isinstance(process, Flow) and process.time_scale != 1:
        raise ConfigError(f"SiT needs process.time-scale 1, got {process.time_scale:g}")
    try:
        width, channels, patch, _ = weights["x_embedder.proj.weight"].shape
        tokens, labels = weights["pos_embed"].shape[-2], weights["y_embedder.embedding_table.weight"].shape[0]
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"the weights are not those of a DiT or SiT: {error} is missing or misshapen") from error
    depth, side = len({name.split(".")[1] for name in weights if name.startswith("blocks.")}), math.isqrt(tokens)
    model = Transformer(
        width=width,
        depth=max(depth, 1),
        trunk=0,
        decoder_widths=(width,),
        patch=patch,
        head_channels=head_channels or (72 if width == 1152 else 64),
        classes=labels - 1,
        frequency_shift=0,
    )
    state = dict(weights)
    del state["pos_embed"]
    if isinstance(process, Flow):
        state |= _turned(state)
    return _denoiser(model, state, process, (channels, side * patch, side * patch), stages, trunk)


def misfit(config: Backbone, shape: tuple[int, int, int]) -> str | None:
    """Why a network for images of a shape cannot be a `DiTTransformer2DModel`; none if it can."""
    if not isinstance(config, Transformer):
        return "its network is not a transformer of this package"
    (_, height, width), stages = shape, len(config.capacities)
    reasons = {
        f"it has {stages} stages": stages > 1,
        f"it has {config.classes} classes, more than 1000": config.classes > NONE,
        "it takes augmentation labels": config.augment_labels > 0,
        "it has other MLPs or norms than DiT": (config.mlp, config.norm, config.qk_norm) != ("gelu", "layer", False),
        "its sinusoids are those of the first release (model.frequency-shift 0)": config.frequency_shift != 1,
        f"its images are {height}x{width}": height != width,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def dit_options(denoiser: Denoiser) -> dict[str, Any]:
    """Arguments of the `DiTTransformer2DModel` that a denoiser's network is."""
    config, (channels, height, _) = denoiser.backbone, denoiser.shape
    assert isinstance(config, Transformer)
    return {
        "num_attention_heads": config.width // config.head_channels,
        "attention_head_dim": config.head_channels,
        "in_channels": channels,
        "out_channels": channels,
        "num_layers": config.depth,
        "sample_size": height,
        "patch_size": config.patch,
        "num_embeds_ada_norm": NONE,
        "norm_eps": config.norm_eps,
    }


def dit_weights(denoiser: Denoiser) -> dict[str, Tensor]:
    """The weights of the `DiTTransformer2DModel` that a denoiser's network is.

    It has 1000 classes, as `DiTPipeline` means none by 1000: those beyond the network's own stand for none, too.
    """
    model, (channels, *_), state = denoiser.backbone, denoiser.shape, denoiser.network.state_dict()
    assert isinstance(model, Transformer)
    table = state.get("encoders.0.embedding.label.weight", torch.zeros(1, model.width))
    state["encoders.0.embedding.label.weight"] = torch.cat((table, table[-1:].expand(NONE + 1 - len(table), -1)))
    weights = dict[str, Tensor]()
    for released, (name, *_) in _names(model):
        for kind in ("weight", "bias"):
            tensor = state.get(f"{name}.{kind}")
            if tensor is None:
                continue
            if released == "x_embedder.proj" and kind == "weight":
                tensor = tensor.unflatten(1, (channels, model.patch, model.patch))
            if released == "final_layer.linear":
                tensor = tensor.unflatten(0, (channels, -1)).transpose(0, 1).flatten(0, 1)
            modules = _modules(released, model.depth)
            pieces = [tensor] * len(modules) if released in _EMBEDDING else tensor.chunk(len(modules))
            weights |= {f"{module}.{kind}": piece.clone() for module, piece in zip(modules, pieces, strict=True)}
    return weights


def _denoiser(
    model: Transformer,
    released: dict[str, Tensor],
    process: Process | None,
    shape: tuple[int, int, int],
    stages: Stages,
    trunk: int | None,
) -> Denoiser:
    """Divide a network and load its weights."""
    model = replace(model, trunk=2 * model.depth // 3 if trunk is None else trunk)
    model = model.with_capacities((model.capacity,) * len(stages))
    model = replace(model, architecture="unified" if len(stages) == 1 else "multistage")
    process = process or LDM(beta_first=1e-4, beta_last=0.02, betas="linear")
    denoiser = Denoiser.from_backbone(model, process, shape, stages)
    state, remaining = dict[str, Tensor](), dict(released)
    for name, places in _names(model):
        for kind in ("weight",) if name == "y_embedder.embedding_table" else ("weight", "bias"):
            tensor = remaining.pop(f"{name}.{kind}", None)
            if tensor is None:
                raise CheckpointError(f"the transformer has no weight {name}.{kind}")
            if name == "x_embedder.proj":
                tensor = tensor.flatten(1) if kind == "weight" else tensor
            if name == "final_layer.linear":  # patch by channel to channel by patch; a predicted variance goes
                tensor = tensor.unflatten(0, (model.patch**2, -1))[:, : shape[0]].transpose(0, 1).flatten(0, 1)
            state |= {f"{place}.{kind}": tensor.clone() for place in places}
    if remaining:
        raise CheckpointError(f"the transformer has weights that ours has not, like {next(iter(remaining))}")
    try:
        denoiser.network.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(f"the weights do not fit: {str(error).splitlines()[1].strip()}") from error
    return denoiser.eval()


def _names(model: Transformer) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Each layer's released name, and its places in our network: one in the trunk, or one in every head."""
    heads = [f"decoders.{stage}" for stage in range(len(model.heads))]
    for released, (name, _) in {**_STEM, **_EMBEDDING}.items():
        yield released, (f"encoders.0.{name}",)
    for block in range(model.depth):
        homes, index = (["encoders.0"], block) if block < model.trunk else (heads, block - model.trunk)
        for released, (name, *_) in _BLOCK.items():
            yield f"blocks.{block}.{released}", tuple(f"{home}.layers.{index}.{name}" for home in homes)
    for released, (name, _) in _HEAD.items():
        yield released, tuple(f"{head}.{name}" for head in heads)


def _modules(released: str, depth: int) -> tuple[str, ...]:
    """Diffusers' modules of a layer; each block has a copy of the embeddings there."""
    if released in _EMBEDDING:
        return tuple(f"transformer_blocks.{block}.norm1.emb.{_EMBEDDING[released][1]}" for block in range(depth))
    if released.startswith("blocks."):
        _, block, layer = released.split(".", 2)
        return tuple(f"transformer_blocks.{block}.{module}" for module in _BLOCK[layer][1:])
    return ({**_STEM, **_HEAD}[released][1],)


def _released(weights: Mapping[str, Tensor], model: Transformer) -> dict[str, Tensor]:
    """Diffusers' weights under the released names."""
    remaining, state = dict(weights), dict[str, Tensor]()
    remaining.pop("pos_embed.pos_embed", None)  # computed; older versions wrote it
    for name, _ in _names(model):
        modules = _modules(name, model.depth)
        for kind in ("weight", "bias"):
            pieces = [remaining.pop(f"{module}.{kind}", None) for module in modules]
            present = [piece for piece in pieces if piece is not None]
            if len(present) < len(modules):
                if present or kind == "weight":
                    missing = modules[next(index for index, piece in enumerate(pieces) if piece is None)]
                    raise CheckpointError(f"the transformer has no weight {missing}.{kind}")
                continue
            if name in _EMBEDDING:
                if any(not torch.equal(present[0], piece) for piece in present[1:]):
                    raise ConfigError(
                        f"the transformer's blocks have different embeddings ({modules[0]} and others); ours has one "
                        "for all, like every published DiT"
                    )
                present = present[:1]
            state[f"{name}.{kind}"] = torch.cat(present)
    if remaining:
        raise CheckpointError(f"the transformer has weights that ours has not, like {next(iter(remaining))}")
    return state


def _turned(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """SiT's first and last layer for our convention: time 1 - t becomes t, and data minus noise its negative.

    cos((1 - t) f) = cos f cos t f + sin f sin t f and sin((1 - t) f) = sin f cos t f - cos f sin t f at a frequency f.
    """
    first = state["t_embedder.mlp.0.weight"].double()
    cosines, sines = first.chunk(2, dim=1)
    half = cosines.shape[1]
    rates = torch.exp(-math.log(10_000) * torch.arange(half, dtype=torch.float64) / half).to(first.device)
    turned = torch.cat(
        (cosines * rates.cos() + sines * rates.sin(), cosines * rates.sin() - sines * rates.cos()), dim=1
    )
    last = {name: -state[name] for name in ("final_layer.linear.weight", "final_layer.linear.bias")}
    return {"t_embedder.mlp.0.weight": turned.to(state["t_embedder.mlp.0.weight"].dtype), **last}
