"""U-Nets of diffusers as ours: the same weights, the same output; with stages, every decoder starts as a copy.

A U-Net is read from its configuration and weights, which are plain dictionaries; diffusers itself is imported only to
compare outputs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from multistage_diffusion import rng
from multistage_diffusion.config import LDMConfig, ModelConfig, Prediction, ProcessConfig
from multistage_diffusion.errors import CheckpointError, ConfigError
from multistage_diffusion.files import read_json
from multistage_diffusion.models.denoiser import UNDIVIDED, Denoiser
from multistage_diffusion.stages import Stages

# What our blocks are, in diffusers' words; what a configuration does not say has diffusers' default.
_REQUIRED: dict[str, Any] = {
    "center_input_sample": False, "time_embedding_type": "positional", "mid_block_type": "UNetMidBlock2D",
    "mid_block_scale_factor": 1, "downsample_type": "conv", "upsample_type": "conv", "act_fn": "silu",
    "resnet_time_scale_shift": "default", "add_attention": True, "class_embed_type": None, "num_class_embeds": None,
    "attn_norm_num_groups": None, "time_embedding_dim": None,
}  # fmt: skip
_DEFAULTS: dict[str, Any] = {
    "in_channels": 3, "out_channels": 3, "freq_shift": 0, "flip_sin_to_cos": True, "layers_per_block": 2,
    "downsample_padding": 1, "dropout": 0.0, "attention_head_dim": 8, "norm_num_groups": 32, "norm_eps": 1e-5,
    "sample_size": None, "block_out_channels": (224, 448, 672, 896),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip
_BETAS: dict[str, Literal["sqrt-linear", "linear"]] = {"scaled_linear": "sqrt-linear", "linear": "linear"}
_PREDICTIONS: dict[str, Prediction] = {"epsilon": "eps", "v_prediction": "v"}
_RESIDUAL = {
    "norm0": "norm1", "conv0": "conv1", "affine": "time_emb_proj", "norm1": "norm2", "conv1": "conv2",
    "shortcut": "conv_shortcut",
}  # fmt: skip


@runtime_checkable
class UNet(Protocol):
    """What is used of a `diffusers.UNet2DModel`."""

    @property
    def config(self) -> Any:
        """A mapping of its options."""
        ...

    def state_dict(self) -> Mapping[str, Tensor]:
        """Its weights by name."""
        ...


def from_diffusers(
    unet: UNet,
    process: ProcessConfig | None = None,
    *,
    stages: Stages = UNDIVIDED,
    resolution: int | None = None,
) -> Denoiser:
    """A `UNet2DModel` of diffusers as a denoiser; undivided its network gives the same output.

    Args:
        unet: The U-Net, like those of DDPM and latent diffusion: DownBlock2D, AttnDownBlock2D and the mirror image.
        process: What it was trained for; by default latent diffusion's. `process_from_scheduler` reads it from a
            scheduler.
        stages: A partition: every stage gets a decoder of its own, all of which start as the U-Net's.
        resolution: Pixels a side; by default the U-Net's `sample_size`.

    Returns:
        The denoiser, in evaluation mode.

    Raises:
        ConfigError: The U-Net has a part that ours has not; the message names the option.
    """
    return convert(dict(unet.config), unet.state_dict(), process, stages=stages, resolution=resolution)


def convert(
    options: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    process: ProcessConfig | None = None,
    *,
    stages: Stages = UNDIVIDED,
    resolution: int | None = None,
) -> Denoiser:
    """The same from a configuration and weights.

    Args:
        options: The U-Net's `config.json`.
        weights: Its weights by name.
        process: What it was trained for; by default latent diffusion's.
        stages: A partition; every decoder starts as the U-Net's.
        resolution: Pixels a side; by default `sample_size`.

    Returns:
        The denoiser, in evaluation mode.

    Raises:
        ConfigError: The U-Net has a part that ours has not; the message names the option.
        CheckpointError: A weight is missing, left over or of another shape.
    """
    found = {**_DEFAULTS, **_REQUIRED, **options}
    size = resolution or found["sample_size"]
    if not isinstance(size, int):
        raise ConfigError(f"the U-Net's sample_size is {size}; give the resolution in pixels a side")
    model = _model(found, size, len(stages))
    denoiser = Denoiser(model, process or LDMConfig(), (found["in_channels"], size, size), stages)
    remaining = dict(weights)
    network = denoiser.network
    state = {
        f"{part}.{index}.{name}": tensor.clone()
        for part, count, tensors in (
            ("encoders", 1, _encoder(model, remaining, flip=not found["flip_sin_to_cos"])),
            ("decoders", len(network.decoders), _decoder(model, remaining)),
        )
        for index in range(count)
        for name, tensor in tensors.items()
    }
    if remaining:
        raise CheckpointError(f"the U-Net has weights that ours has not, like {next(iter(remaining))}")
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(
            f"the weights do not fit the configuration: {str(error).splitlines()[1].strip()}"
        ) from error
    return denoiser.eval()


def load_diffusers(folder: str | Path, *, stages: Stages = UNDIVIDED, resolution: int | None = None) -> Denoiser:
    """Read a U-Net that diffusers saved, by itself or within a pipeline; its scheduler, if there, gives the process.

    Args:
        folder: A folder with `config.json` and safetensors weights, or of a pipeline with a folder `unet`.
        stages: A partition; every decoder starts as the U-Net's.
        resolution: Pixels a side; by default `sample_size`.

    Returns:
        The denoiser, in evaluation mode.

    Raises:
        ConfigError: The folder holds no U-Net, or one with a part that ours has not.
        CheckpointError: The weights are missing, damaged or of another shape.
    """
    folder = Path(folder)
    home = folder / "unet" if (folder / "unet").is_dir() else folder
    options = read_json(home / "config.json")
    if not isinstance(options, dict) or options.get("_class_name") != "UNet2DModel":
        kind = options.get("_class_name") if isinstance(options, dict) else None
        raise ConfigError(f"{home}/config.json must be of a UNet2DModel, got {kind}")
    path = home / "diffusion_pytorch_model.safetensors"
    try:
        weights = safetensors.torch.load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot read weights {path}: {error}; save them with save_pretrained(safe_serialization=True)"
        ) from error
    scheduler = folder / "scheduler" / "scheduler_config.json"
    process = process_from_scheduler(read_json(scheduler)) if scheduler.is_file() else None
    return convert(options, weights, process, stages=stages, resolution=resolution)


@torch.no_grad()
def largest_difference(denoiser: Denoiser, folder: str | Path) -> float:
    """Largest difference between the outputs of diffusers' U-Net and of each stage of ours, on random images.

    Args:
        denoiser: What `load_diffusers` read from the folder.
        folder: The folder.

    Returns:
        The difference, over the largest output.

    Raises:
        ConfigError: diffusers is not installed.
    """
    try:
        from diffusers.models.unets.unet_2d import UNet2DModel
    except (ImportError, RuntimeError) as error:
        raise ConfigError(f"diffusers is needed ({error}): pip install multistage-diffusion[diffusers]") from error
    home = Path(folder) / "unet" if (Path(folder) / "unet").is_dir() else Path(folder)
    theirs = UNet2DModel.from_pretrained(str(home.absolute()), local_files_only=True, low_cpu_mem_usage=False).eval()
    x = rng.normal(0, "convert", torch.arange(3), denoiser.shape)
    steps = torch.tensor([0, 371, 999])
    expected = theirs(x, steps).sample
    outputs = [denoiser.network(x, steps.float(), stage) for stage in range(len(denoiser.stages))]
    return max(float((output - expected).abs().max()) for output in outputs) / float(expected.abs().max())


def process_from_scheduler(options: Mapping[str, Any]) -> LDMConfig:
    """The process of a scheduler of diffusers.

    Args:
        options: Its configuration, like `scheduler_config.json`.

    Returns:
        The discrete process with the same betas and prediction.

    Raises:
        ConfigError: Betas or a prediction that the discrete process has not.
    """
    schedule, prediction = options.get("beta_schedule", "linear"), options.get("prediction_type", "epsilon")
    if schedule not in _BETAS or options.get("trained_betas") is not None:
        raise ConfigError(f"the scheduler's beta_schedule must be one of {', '.join(_BETAS)}, got {schedule}")
    if prediction not in _PREDICTIONS:
        raise ConfigError(f"the scheduler's prediction_type must be one of {', '.join(_PREDICTIONS)}, got {prediction}")
    return LDMConfig(
        num_steps=options.get("num_train_timesteps", 1000), beta_first=options.get("beta_start", 1e-4),
        beta_last=options.get("beta_end", 0.02), betas=_BETAS[schedule], prediction=_PREDICTIONS[prediction],
    )  # fmt: skip


def _model(options: Mapping[str, Any], size: int, stages: int) -> ModelConfig:
    """Our configuration of the same network."""
    for name, wanted in _REQUIRED.items():
        same_groups = name == "attn_norm_num_groups" and options[name] == options["norm_num_groups"]
        if options[name] != wanted and not same_groups:
            raise ConfigError(f"the U-Net's {name} must be {json.dumps(wanted)}, got {json.dumps(options[name])}")
    widths, groups = list(options["block_out_channels"]), options["norm_num_groups"]
    down, up = list(options["down_block_types"]), list(options["up_block_types"])
    attends = [name == "AttnDownBlock2D" for name in down]
    mirrored = ["AttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attends)]
    if not set(down) <= {"DownBlock2D", "AttnDownBlock2D"} or up != mirrored:
        raise ConfigError(
            f"the U-Net's blocks must be DownBlock2D or AttnDownBlock2D, mirrored on the way up, got {down} and {up}"
        )
    if any(width % widths[0] for width in widths) or widths[0] % 4 or groups > widths[0] // 4 or widths[0] % groups:
        raise ConfigError(
            f"the U-Net's block_out_channels {widths} must be multiples of the first, and norm_num_groups {groups} "
            "must divide it, with 4 channels a group"
        )
    if options["in_channels"] != options["out_channels"]:
        raise ConfigError(
            f"the U-Net maps {options['in_channels']} channels to {options['out_channels']}, not the same"
        )
    return ModelConfig(
        architecture="unified" if stages == 1 else "multistage", width=widths[0], decoder_widths=(widths[0],) * stages,
        multipliers=tuple(width // widths[0] for width in widths), blocks=options["layers_per_block"],
        attention=tuple(size >> level for level, attend in enumerate(attends) if attend), decoder_attention="all",
        head_channels=options["attention_head_dim"], middle="encoder",
        resampling="conv" if options["downsample_padding"] else "conv-after", skip_scale=1.0, groups=groups,
        norm_eps=options["norm_eps"], dropout=options["dropout"], frequency_shift=options["freq_shift"],
    )  # fmt: skip


def _take(weights: dict[str, Tensor], ours: str, theirs: str) -> dict[str, Tensor]:
    """Weight and bias of a layer, renamed."""
    found = {}
    for kind in ("weight", "bias"):
        if f"{theirs}.{kind}" not in weights:
            raise CheckpointError(f"the U-Net has no weight {theirs}.{kind}")
        found[f"{ours}.{kind}"] = weights.pop(f"{theirs}.{kind}")
    return found


def _residual(weights: dict[str, Tensor], ours: str, theirs: str, attention: str | None) -> dict[str, Tensor]:
    """A residual block, with the attention that follows it."""
    state: dict[str, Tensor] = {}
    for mine, name in _RESIDUAL.items():
        if name != "conv_shortcut" or f"{theirs}.conv_shortcut.weight" in weights:
            state |= _take(weights, f"{ours}.{mine}", f"{theirs}.{name}")
    if attention is not None:
        state |= _take(weights, f"{ours}.attention.norm", f"{attention}.group_norm")
        parts = [_take(weights, name, f"{attention}.{name}") for name in ("to_q", "to_k", "to_v")]
        for kind in ("weight", "bias"):
            joined = torch.cat([tensor for part in parts for name, tensor in part.items() if name.endswith(kind)])
            state[f"{ours}.attention.qkv.{kind}"] = joined if kind == "bias" else joined[:, :, None, None]
        out = _take(weights, f"{ours}.attention.out", f"{attention}.to_out.0")
        state |= {name: tensor[:, :, None, None] if tensor.ndim == 2 else tensor for name, tensor in out.items()}
    return state


def _encoder(model: ModelConfig, weights: dict[str, Tensor], *, flip: bool) -> dict[str, Tensor]:
    """Noise embedding, downward half and middle."""
    state = _take(weights, "stem", "conv_in")
    state |= _take(weights, "embedding.first", "time_embedding.linear_1")
    state |= _take(weights, "embedding.second", "time_embedding.linear_2")
    if flip:  # theirs has the sines first
        sines, cosines = state["embedding.first.weight"].chunk(2, dim=1)
        state["embedding.first.weight"] = torch.cat((cosines, sines), dim=1)
    for level in range(len(model.multipliers)):
        for block in range(model.blocks):
            here = f"down_blocks.{level}.attentions.{block}"
            attention = here if f"{here}.to_q.weight" in weights else None
            theirs = f"down_blocks.{level}.resnets.{block}"
            state |= _residual(weights, f"levels.{level}.{block}", theirs, attention)
        if level + 1 < len(model.multipliers):
            state |= _take(weights, f"downs.{level}.conv", f"down_blocks.{level}.downsamplers.0.conv")
    state |= _residual(weights, "middle.0", "mid_block.resnets.0", "mid_block.attentions.0")
    return state | _residual(weights, "middle.1", "mid_block.resnets.1", None)


def _decoder(model: ModelConfig, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Upward half and output."""
    state: dict[str, Tensor] = {}
    for level in range(len(model.multipliers)):
        for block in range(model.blocks + 1):
            here = f"up_blocks.{level}.attentions.{block}"
            attention = here if f"{here}.to_q.weight" in weights else None
            state |= _residual(weights, f"levels.{level}.{block}", f"up_blocks.{level}.resnets.{block}", attention)
        if level + 1 < len(model.multipliers):
            state |= _take(weights, f"ups.{level}.conv", f"up_blocks.{level}.upsamplers.0.conv")
    state |= _take(weights, "norm", "conv_norm_out")
    return state | _take(weights, "head", "conv_out")
