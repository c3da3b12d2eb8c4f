"""`msd autoencoder`: train a small autoencoder for latent diffusion."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import tyro
from rich.console import Console

from multistage_diffusion.cli.common import Reads, prepare


@dataclass(frozen=True, kw_only=True)
class Options(Reads):
    """Train a small AutoencoderKL of diffusers: minutes on a CPU, for the recipe fashion-mnist-latent and its like.

    example: msd autoencoder fashion-mnist --out runs/fashion-mnist-autoencoder
    """

    source: tyro.conf.Positional[str]
    """Source of the images."""
    out: str
    """Folder for the autoencoder, in the form of diffusers."""
    resolution: int | None = 32
    """Resize the images to this many pixels a side."""
    steps: int = 600
    """Number of optimiser steps."""
    batch_size: int = 64
    """Images a step."""
    learning_rate: float = 2e-3
    """Learning rate of Adam."""
    widths: tuple[int, ...] = (16, 32, 32)
    """Channels of each level; every level but the first halves the resolution."""
    latent_channels: int = 4
    """Channels of the latents."""
    kl_weight: float = 1e-6
    """Weight of the posterior's divergence from a standard normal distribution."""
    seed: int = 0
    """Seed of weights, order and noise."""


def run(options: Options, console: Console) -> dict[str, Any]:
    """Train.

    Args:
        options: The command's options.
        console: Where people read.

    Returns:
        The command's document.
    """
    begin = time.perf_counter()
    data = options.data(options.source, options.resolution)
    device = prepare(options)

    import torch
    from rich.progress import Progress

    from multistage_diffusion.data import load_parts
    from multistage_diffusion.training.autoencoder import AutoencoderConfig, reconstruction_error, train_autoencoder

    config = AutoencoderConfig(
        steps=options.steps, batch_size=options.batch_size, learning_rate=options.learning_rate, widths=options.widths,
        latent_channels=options.latent_channels, kl_weight=options.kl_weight, seed=options.seed,
    )  # fmt: skip
    train, test = load_parts(data)
    losses: list[float] = []
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("training the autoencoder", total=config.steps)

        def on_step(step: int, loss: float) -> None:
            losses.append(loss)
            bar.update(task, completed=step)

        autoencoder = train_autoencoder(train, config, options.out, device=device, on_step=on_step)
    latents = autoencoder.encode(test.floats(torch.arange(1)))
    document = {
        "out": options.out,
        "source": options.source,
        "steps": config.steps,
        "loss": losses[-1],
        "held_out_mse": reconstruction_error(autoencoder, test),
        "shape": list(train.shape),
        "latent_shape": list(latents.shape[1:]),
        "parameters": sum(parameter.numel() for parameter in autoencoder.module.parameters()),
        "digest": autoencoder.digest,
        "seconds": round(time.perf_counter() - begin, 3),
    }
    console.print(
        f"wrote {options.out}: {'x'.join(map(str, train.shape))} images to {'x'.join(map(str, latents.shape[1:]))} "
        f"latents, held-out squared error {document['held_out_mse']:.5f}, {document['seconds']:.0f} s"
    )
    return document
