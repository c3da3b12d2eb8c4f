"""`msd export`: write a run's weights as one safetensors file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console

from multistage_diffusion.cli.common import Common


@dataclass(frozen=True, kw_only=True)
class Options(Common):
    """Write a run's weights as one safetensors file, with the configuration in its metadata.

    example: msd export runs/digits --weights ema --out digits.safetensors
    """

    run: tyro.conf.Positional[str]
    """Run directory."""
    out: str
    """File to write."""
    weights: Literal["ema", "raw"] = "ema"
    """The averaged weights, or the trained ones."""
    sigma_rel: float | None = None
    """Relative width of another average, like 0.1, for a run trained with --training.sigma-rel."""


def run(options: Options, console: Console) -> dict[str, Any]:
    """Export."""
    import safetensors.torch

    from multistage_diffusion.data.latents import load_codec
    from multistage_diffusion.denoiser import METADATA
    from multistage_diffusion.files import sha256, write_atomic
    from multistage_diffusion.runs import load_run

    loaded = load_run(options.run, weights=options.weights, sigma_rel=options.sigma_rel, device="cpu")
    denoiser, path = loaded.denoiser, Path(options.out)
    about = {
        **denoiser.document(),
        "edges": list(denoiser.stages.edges),
        "decoded": load_codec(options.run) is not None,
        "weights": options.weights,
        "ema_length": options.sigma_rel,
        "step": loaded.step,
    }
    metadata = {METADATA: json.dumps(about)}  # one entry: safetensors writes several in random order
    write_atomic(path, safetensors.torch.save(denoiser.network.state_dict(), metadata))
    kind = f"{options.weights} weights" if options.sigma_rel is None else f"ema weights of length {options.sigma_rel}"
    console.print(f"wrote {kind} of {options.run} to {path}")
    return {
        "file": str(path),
        "sha256": sha256(path),
        "bytes": path.stat().st_size,
        "weights": options.weights,
        "ema_length": options.sigma_rel,
        "ema_error": loaded.rebuilt.error if loaded.rebuilt else None,
        "step": loaded.step,
    }
