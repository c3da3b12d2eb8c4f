"""`msd merge`: from stages back to one unified network."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from multistage_diffusion.cli.common import Compute, prepare
from multistage_diffusion.config import check


@dataclass(frozen=True, kw_only=True)
class Options(Compute):
    """Merge the decoders of a run into one unified network: a weighted sum, its weights chosen on held-out images.

    The result is a folder of a saved model: sample from it, start a run from it (msd train --init), or convert it to
    diffusers (msd convert).

    example: msd merge runs/branched --trunk runs/trunk --out models/merged
    """

    run: tyro.conf.Positional[str]
    """Run directory, or folder of save_pretrained, with equal decoders of the encoder's width."""
    out: str
    """Folder for the merged model."""
    trunk: str | None = None
    """The unified run or model that the stages started from: their changes from it are summed."""
    weights: tuple[float, ...] = ()
    """Weight of each stage; by default chosen on the first half of the held-out images."""
    max_images: int = 1_000
    """Held-out images, at most: one half chooses the weights, the losses are those of the other."""
    steps: int = 60
    """Steps of the search for the weights."""


def run(options: Options, console: Console) -> dict[str, Any]:
    """Merge."""
    check(options.max_images >= 2, "max-images", "at least 2", options.max_images)
    check(options.steps >= 10, "steps", "at least 10", options.steps)
    device = prepare(options)

    import torch

    from multistage_diffusion.data.latents import LatentCodec, load_codec, load_images
    from multistage_diffusion.errors import ConfigError
    from multistage_diffusion.interop.merge import merge
    from multistage_diffusion.runs import load_run

    out = Path(options.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not (out / "config.json").is_file():
        raise ConfigError(f"--out {out} holds other files; choose an empty or new folder")
    loaded = load_run(options.run, device=device)
    trunk = None if options.trunk is None else load_run(options.trunk, device=device).denoiser
    images, codec = None, load_codec(options.run, device)
    if not options.weights:
        if loaded.config is None:
            raise ConfigError(f"{options.run} is a saved model, which names no images to choose on; give --weights")
        images = load_images(loaded.config.data, "test")
        images = codec.encode(images) if isinstance(codec, LatentCodec) else images
        images = images.take(torch.arange(min(len(images), options.max_images)))
    merged = merge(loaded.denoiser, images, trunk=trunk, weights=options.weights or None, steps=options.steps)
    merged.denoiser.save_pretrained(out)
    if codec is not None:
        codec.save(out)
    weights = ", ".join(f"{weight:.3f}" for weight in merged.weights)
    losses = "" if merged.loss is None else f": held-out loss {merged.loss:.4f}, in stages {merged.staged_loss:.4f}"
    console.print(f"wrote {out} with the weights {weights}{losses}")
    return {
        "run": options.run,
        "out": str(out),
        "weights": list(merged.weights),
        "loss": merged.loss,
        "staged_loss": merged.staged_loss,
    }
