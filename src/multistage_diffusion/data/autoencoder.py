"""The first stage of latent diffusion: an autoencoder of diffusers, from a folder or the hub. diffusers is an extra."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from multistage_diffusion.errors import ConfigError, DataError
from multistage_diffusion.files import read_json

_INSTALL = "pip install multistage-diffusion[diffusers]"
_KINDS = ("AutoencoderKL", "VQModel", "AutoencoderTiny")


@final
class Autoencoder:
    """Images to latents and back, one batch after the other, without gradients.

    Args:
        module: An `AutoencoderKL`, `VQModel` or `AutoencoderTiny` of diffusers.
        kind: Which of them.
        name: Where it came from.

    Attributes:
        digest: SHA-256 of its kind and weights.
    """

    def __init__(self, module: Any, kind: str, name: str) -> None:
        self.module, self.kind, self.name = module.eval(), kind, name
        self.channels = int(module.config["in_channels"])
        self.device = next(module.parameters()).device
        content = hashlib.sha256(kind.encode())
        for key, tensor in sorted(module.state_dict().items()):
            content.update(repr((key, tuple(tensor.shape))).encode())
            content.update(tensor.detach().float().cpu().contiguous().numpy().data)
        self.digest = content.hexdigest()

    @torch.no_grad()
    def encode(
        self, images: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch latent height2 width2"]:
        """Latents of images, on the CPU.

        Args:
            images: Images in [-1, 1]; grey ones are given to an autoencoder of colours as grey colours.

        Returns:
            Latents in the autoencoder's own unit: the mean of the posterior, where there is one.

        Raises:
            DataError: The autoencoder does not take images of this shape.
        """
        images = images.to(self.device)
        if images.shape[1] == 1:
            images = images.expand(-1, self.channels, -1, -1)
        try:
            encoded = self.module.encode(images)
        except RuntimeError as error:
            reason = str(error).splitlines()[0][:120]
            raise DataError(f"{self.name} cannot encode images of {tuple(images.shape[1:])}: {reason}") from error
        return (encoded.latent_dist.mode() if self.kind == "AutoencoderKL" else encoded.latents).float().cpu()

    @torch.no_grad()
    def decode(
        self, latents: Float[Tensor, "batch latent height2 width2"], channels: int
    ) -> Float[Tensor, "batch channels height width"]:
        """Images from latents, on the CPU.

        Args:
            latents: Latents in the autoencoder's own unit.
            channels: Channels of the images; 1 makes grey ones of colours.

        Returns:
            Images, nominally in [-1, 1].
        """
        images = self.module.decode(latents.to(self.device)).sample.float().cpu()
        return images.mean(dim=1, keepdim=True) if channels == 1 and images.shape[1] > 1 else images


def load_autoencoder(name: str, device: torch.device | str = "cpu") -> Autoencoder:
    """Read an autoencoder that diffusers saved.

    Args:
        name: A folder, or a hub id `OWNER/NAME`, with `/SUBFOLDER` behind it if it lies in one.
        device: Where it goes.

    Returns:
        The autoencoder, in evaluation mode.

    Raises:
        ConfigError: diffusers is not installed, there is no such folder or repository, or it holds something else.
    """
    try:
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
        from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
        from diffusers.models.autoencoders.vq_model import VQModel
    except (ImportError, RuntimeError) as error:
        raise ConfigError(f"diffusers is needed for {name} ({error}): {_INSTALL}") from error
    folder = _folder(name)
    options = read_json(folder / "config.json")
    kind = options.get("_class_name") if isinstance(options, dict) else None
    match kind:
        case "AutoencoderKL":
            family = AutoencoderKL
        case "AutoencoderTiny":
            family = AutoencoderTiny
        case "VQModel":
            family = VQModel
        case _:
            raise ConfigError(f"{folder}/config.json must be of one of {', '.join(_KINDS)}, got {kind}")
    try:
        module: Any = family.from_pretrained(
            str(folder.absolute()), use_safetensors=True, local_files_only=True, low_cpu_mem_usage=False
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"cannot read the weights in {folder}: {str(error).splitlines()[0][:200]}") from error
    return Autoencoder(module.requires_grad_(False).to(device), kind, name)


def _folder(name: str) -> Path:
    """The folder of that name, or of the files fetched from the hub."""
    if (Path(name) / "config.json").is_file():
        return Path(name)
    parts = name.split("/")
    if Path(name).exists() or name.startswith((".", "/", "runs/")) or len(parts) not in (2, 3):
        raise ConfigError(f"no autoencoder at {name}; train one with msd autoencoder SOURCE --out {name}")
    try:
        from huggingface_hub import snapshot_download

        pattern = f"{parts[2]}/*" if len(parts) == 3 else "*"
        wanted = [f"{pattern}.json", f"{pattern}.safetensors"]
        home = Path(snapshot_download("/".join(parts[:2]), allow_patterns=wanted))
    except (ImportError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0][:200]
        raise ConfigError(f"no autoencoder at {name}, neither a folder nor on the hub: {reason}") from error
    return home.joinpath(*parts[2:])
