"""`msd convert`: a U-Net of diffusers to a model of ours."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from multistage_diffusion.cli.common import Common
from multistage_diffusion.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Options(Common):
    """Turn a U-Net that diffusers saved (UNet2DModel, or a pipeline with one) into a model of ours.

    With stages, every stage gets a decoder of its own that starts as the U-Net's, ready to be trained apart. Outputs
    are compared with those of diffusers, which must be installed.

    example: msd convert ddpm-cifar10-32 models/ddpm --stages stages.json
    """

    source: tyro.conf.Positional[str]
    """Folder that diffusers saved."""
    out: tyro.conf.Positional[str]
    """Folder for the model."""
    stages: str | None = None
    """File with the stages, from msd cluster; by default one stage."""
    resolution: int | None = None
    """Pixels a side; by default the U-Net's sample_size."""


def run(options: Options, console: Console) -> dict[str, Any]:
    """Convert.

    Args:
        options: The command's options.
        console: Where people read.

    Returns:
        The command's document.
    """
    from multistage_diffusion.interop.diffusers import largest_difference, load_diffusers
    from multistage_diffusion.stages import Stages

    stages = Stages() if options.stages is None else Stages.load(Path(options.stages))
    denoiser = load_diffusers(options.source, stages=stages, resolution=options.resolution)
    error = largest_difference(denoiser, options.source)
    if not error < 1e-3:  # float32 rounding leaves a hundredth of this
        raise ConfigError(f"the converted network differs from that of diffusers by {error}; nothing was written")
    denoiser.save_pretrained(options.out)
    document = {
        "source": options.source,
        "out": options.out,
        "parameters": sum(parameter.numel() for parameter in denoiser.parameters()),
        "stages": len(denoiser.stages),
        "shape": list(denoiser.shape),
        "max_error": error,
    }
    console.print(
        f"wrote {options.out}: {document['parameters'] / 1e6:.2f} M parameters, {len(denoiser.stages)} stages, largest "
        f"difference from diffusers {error:.1e}"
    )
    return document
