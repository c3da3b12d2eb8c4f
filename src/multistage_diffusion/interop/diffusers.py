"""Networks of diffusers as ours: the same weights, the same output; with stages, every decoder starts as a copy.

A network, `UNet2DModel` or `DiTTransformer2DModel`, is read from its configuration and weights, which are plain
dictionaries; diffusers itself is imported only to compare outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from multistage_diffusion import rng
from multistage_diffusion.backbones import Transformer
from multistage_diffusion.conditioning import Conditioning
from multistage_diffusion.data.autoencoder import load_autoencoder
from multistage_diffusion.data.latents import RECORD, LatentCodec
from multistage_diffusion.denoiser import UNDIVIDED, Denoiser
from multistage_diffusion.errors import CheckpointError, ConfigError
from multistage_diffusion.files import read_json
from multistage_diffusion.interop import transformers
from multistage_diffusion.interop.schedulers import process_from_scheduler
from multistage_diffusion.interop.weights import complete, model_config, our_weights
from multistage_diffusion.noise import LDM, Process
from multistage_diffusion.stages import Stages


@runtime_checkable
class UNet(Protocol):
    """What is used of a `diffusers.UNet2DModel` or `DiTTransformer2DModel`."""

    @property
    def config(self) -> Any:
        """A mapping of its options."""
        ...

    def state_dict(self) -> Mapping[str, Tensor]:
        """Its weights by name."""
        ...


def from_diffusers(
    unet: UNet,
    process: Process | None = None,
    *,
    stages: Stages = UNDIVIDED,
    resolution: int | None = None,
) -> Denoiser:
    """A `UNet2DModel` or `DiTTransformer2DModel` of diffusers as a denoiser; undivided it gives the same output.

    Args:
        unet: The U-Net, like those of DDPM and latent diffusion: DownBlock2D, AttnDownBlock2D and the mirror image; or
            the transformer, whose heads start as its last third.
        process: What it was trained for; by default latent diffusion's, or DiT's. `process_from_scheduler` reads it
            from a scheduler.
        stages: A partition: every stage gets a decoder of its own, all of which start as the U-Net's.
        resolution: Pixels a side; by default the U-Net's `sample_size`.

    Raises:
        ConfigError: The U-Net has a part that ours has not; the message names the option.
    """
    return convert(dict(unet.config), unet.state_dict(), process, stages=stages, resolution=resolution)


def convert(
    options: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    process: Process | None = None,
    *,
    stages: Stages = UNDIVIDED,
    resolution: int | None = None,
) -> Denoiser:
    """The same from a configuration and weights.

    Args:
        options: The U-Net's `config.json`.
        weights: Its weights by name.
        process: What it was trained for; by default latent diffusion's, or DiT's.
        stages: A partition; every decoder starts as the U-Net's.
        resolution: Pixels a side; by default `sample_size`.

    Returns:
        The denoiser, in evaluation mode.

    Raises:
        ConfigError: The U-Net has a part that ours has not; the message names the option.
        CheckpointError: A weight is missing, left over or of another shape.
    """
    if transformers.is_transformer(options):
        return transformers.from_dit(options, weights, process, stages=stages)
    options = complete(options)
    match resolution or options["sample_size"]:
        case int(height) | [int(height)]:
            width = height
        case [int(height), int(width)]:
            pass
        case size:
            raise ConfigError(f"the U-Net's sample_size is {size}; give the resolution in pixels a side")
    model = model_config(options, height, len(stages))
    denoiser = Denoiser.from_backbone(model, process or LDM(), (options["in_channels"], height, width), stages)
    state = our_weights(model, height, weights, sines_first=not options["flip_sin_to_cos"])
    try:
        denoiser.network.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(
            f"the weights do not fit the configuration: {str(error).splitlines()[1].strip()}"
        ) from error
    return denoiser.eval()


@torch.random.fork_rng(devices=[])
def load_diffusers(folder: str | Path, *, stages: Stages = UNDIVIDED, resolution: int | None = None) -> Denoiser:
    """Read a U-Net that diffusers saved, by itself or within a pipeline; its scheduler, if there, gives the process.

    Args:
        folder: A folder with `config.json` and safetensors weights, or of a pipeline with `unet` or `transformer`.
        stages: A partition; every decoder starts as the U-Net's.
        resolution: Pixels a side; by default `sample_size`.

    Returns:
        The denoiser, in evaluation mode.

    Raises:
        ConfigError: The folder holds no U-Net, or one with a part that ours has not.
        CheckpointError: The weights are missing, damaged or of another shape.
    """
    folder = Path(folder)
    home = _home(folder)
    options = read_json(home / "config.json")
    kind = options.get("_class_name") if isinstance(options, dict) else None
    if kind != "UNet2DModel" and kind not in transformers.CLASSES:
        raise ConfigError(f"{home}/config.json must be of a UNet2DModel or DiTTransformer2DModel, got {kind}")
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
    """Largest difference between the outputs of diffusers' network and of each stage of ours, on random images.

    Returns:
        The difference, over the largest output.

    Raises:
        ConfigError: diffusers is not installed.
    """
    try:
        from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
        from diffusers.models.unets.unet_2d import UNet2DModel
    except (ImportError, RuntimeError) as error:
        raise ConfigError(f"diffusers is needed ({error}): pip install multistage-diffusion[diffusers]") from error
    kind: Any = DiTTransformer2DModel if isinstance(denoiser.backbone, Transformer) else UNet2DModel
    network = kind.from_pretrained(str(_home(Path(folder)).absolute()), local_files_only=True, low_cpu_mem_usage=False)
    x = rng.normal(0, "convert", torch.arange(3), denoiser.shape)
    steps, labels = torch.tensor([0, 371, 999]), torch.tensor([0, denoiser.classes, denoiser.classes // 2])
    expected = network.eval()(x, steps, labels if denoiser.classes else None).sample[:, : denoiser.shape[0]]
    conditioning = Conditioning(labels if denoiser.classes else None)
    outputs = [denoiser.network(x, steps.float(), stage, conditioning) for stage in range(len(denoiser.stages))]
    return max(float((output - expected).abs().max()) for output in outputs) / float(expected.abs().max())


def _home(folder: Path) -> Path:
    """Where the network of a pipeline lies, or a network by itself."""
    return next((folder / name for name in ("unet", "transformer") if (folder / name).is_dir()), folder)


def save_converted(source: str | Path, denoiser: Denoiser, out: str | Path) -> None:
    """Save a converted denoiser; with the autoencoder of its pipeline, if that has one, so that sampling decodes.

    Args:
        source: The folder of diffusers.
        denoiser: What `load_diffusers` read from it.
        out: The folder for it.

    Raises:
        ConfigError: The autoencoder is of a kind that latents are not made with, or diffusers is not installed.
        CheckpointError: The folder cannot be written.
    """
    home = next((path for name in ("vqvae", "vae") if (path := Path(source) / name).is_dir()), None)
    codec = None
    if home is not None:
        autoencoder = load_autoencoder(str(home.absolute()))
        about = autoencoder.module.config
        if about["latent_channels"] != denoiser.shape[0]:
            raise ConfigError(
                f"{home} makes latents of {about['latent_channels']} channels, but the network has {denoiser.shape[0]}"
            )
        codec = LatentCodec(autoencoder, float(about["scaling_factor"]), int(about["out_channels"]))
    (Path(out) / RECORD).unlink(missing_ok=True)
    denoiser.save_pretrained(out)
    if codec is not None:
        codec.save(Path(out))
