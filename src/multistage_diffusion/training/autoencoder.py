"""Train a small autoencoder, so that latent diffusion runs whole and offline. diffusers is an extra."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from multistage_diffusion import rng
from multistage_diffusion.data.autoencoder import Autoencoder, load_autoencoder
from multistage_diffusion.data.images import Images
from multistage_diffusion.errors import ConfigError, NumericsError
from multistage_diffusion.files import whole_directory
from multistage_diffusion.records import check, check_seed


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """An `AutoencoderKL` and its training.

    Attributes:
        steps: Number of optimiser steps.
        batch_size: Images a step.
        learning_rate: Adam's, after 50 steps of warm-up; it falls to a tenth along a cosine.
        widths: Channels of each level; every level but the first halves the resolution.
        latent_channels: Channels of the latents.
        kl_weight: Weight of the posterior's divergence from a standard normal distribution (Rombach et al. 2022).
        seed: Seed of weights, order and noise.
    """

    steps: int = 600
    batch_size: int = 64
    learning_rate: float = 2e-3
    widths: tuple[int, ...] = (16, 32, 32)
    latent_channels: int = 4
    kl_weight: float = 1e-6
    seed: int = 0

    def __post_init__(self) -> None:
        check(self.steps >= 1, "steps", "at least 1", self.steps)
        check(self.batch_size >= 1, "batch-size", "at least 1", self.batch_size)
        check(self.learning_rate > 0, "learning-rate", "positive", self.learning_rate)
        check(len(self.widths) >= 1 and all(width % 8 == 0 for width in self.widths), "widths", "multiples of 8",
              self.widths)  # fmt: skip
        check(self.latent_channels >= 1, "latent-channels", "at least 1", self.latent_channels)
        check(self.kl_weight >= 0, "kl-weight", "at least 0", self.kl_weight)
        check_seed(self.seed)


def train_autoencoder(
    data: Images,
    config: AutoencoderConfig,
    out: str | Path,
    *,
    device: torch.device | str = "cpu",
    on_step: Callable[[int, float], None] | None = None,
) -> Autoencoder:
    """Train an autoencoder on absolute errors and write it as diffusers does.

    Args:
        data: Training images; their sides must be divisible by 2 for every level but the first.
        config: Network and training.
        out: Folder for it.
        device: Where to train.
        on_step: Called after each step with its number and loss.

    Returns:
        What was written, read back.

    Raises:
        ConfigError: diffusers is not installed, or the images cannot be halved so often.
        NumericsError: The loss is not finite.
        CheckpointError: The folder cannot be written.
    """
    module = _module(data, config).to(device).train()
    optimizer = torch.optim.Adam(module.parameters(), lr=config.learning_rate)
    for step in range(config.steps):
        index = torch.arange(step * config.batch_size, (step + 1) * config.batch_size)
        chosen = (rng.uniform(config.seed, "autoencoder", index, 1)[:, 0] * len(data)).long()
        images = data.floats(chosen).to(device)
        posterior = module.encode(images).latent_dist
        noise = rng.normal(config.seed, "autoencoder-noise", index.to(device), posterior.mean.shape[1:])
        reconstructed = module.decode(posterior.mean + posterior.std * noise).sample
        loss = F.l1_loss(reconstructed, images) + config.kl_weight * posterior.kl().mean()
        if not math.isfinite(float(loss.detach())):
            raise NumericsError(f"the autoencoder's loss is {float(loss.detach())} at step {step + 1}; lower the rate")
        rate = min(1.0, (step + 1) / 50) * (0.55 + 0.45 * math.cos(math.pi * step / config.steps))
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * rate
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if on_step is not None:
            on_step(step + 1, float(loss.detach()))
    with whole_directory(Path(out)) as temporary:
        module.save_pretrained(temporary, safe_serialization=True)
    return load_autoencoder(str(out), device)


def reconstruction_error(autoencoder: Autoencoder, data: Images, count: int = 500) -> float:
    """Mean squared error of decoded latents, in the unit of images in [-1, 1].

    Args:
        autoencoder: The autoencoder.
        data: Images that it was not trained on.
        count: At most so many of them, the first ones.

    Returns:
        The error.
    """
    images = data.floats(torch.arange(min(count, len(data))))
    decoded = autoencoder.decode(autoencoder.encode(images), images.shape[1])
    return float((decoded - images).square().mean())


def _module(data: Images, config: AutoencoderConfig) -> Any:
    """A freshly initialised AutoencoderKL."""
    try:
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    except (ImportError, RuntimeError) as error:
        raise ConfigError(f"diffusers is needed ({error}): pip install multistage-diffusion[diffusers]") from error
    channels, high, wide = data.shape
    levels = len(config.widths)
    if high % 2 ** (levels - 1) or wide % 2 ** (levels - 1):
        raise ConfigError(f"images of {high}x{wide} cannot be halved {levels - 1} times; set --resolution")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)  # torch.manual_seed would seed the GPUs, too
        return AutoencoderKL.from_config({
            "in_channels": channels, "out_channels": channels, "latent_channels": config.latent_channels,
            "block_out_channels": config.widths, "down_block_types": ("DownEncoderBlock2D",) * levels,
            "up_block_types": ("UpDecoderBlock2D",) * levels, "layers_per_block": 1, "norm_num_groups": 8,
            "sample_size": high, "mid_block_add_attention": False,
        })  # fmt: skip
