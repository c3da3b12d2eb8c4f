"""Multi-stage diffusion models: noise levels in stages, one shared encoder, one decoder per stage.

    import multistage_diffusion as msd

    config = msd.recipe("digits")
    run = msd.train(config, "runs/digits").run
    denoiser = msd.load_run(run).denoiser
    images = msd.sample(denoiser, 16).images  # (16, 1, 8, 8), float32, nominally in [-1, 1]

Names are imported when they are first used, so `import multistage_diffusion` is quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from multistage_diffusion.clustering import cluster
    from multistage_diffusion.config import ModelConfig, RunConfig
    from multistage_diffusion.data import load_data
    from multistage_diffusion.evaluation import evaluate
    from multistage_diffusion.models.denoiser import Denoiser
    from multistage_diffusion.models.presets import preset
    from multistage_diffusion.models.unet import MultiDecoderUNet
    from multistage_diffusion.recipes import recipe
    from multistage_diffusion.sampling import sample
    from multistage_diffusion.stages import Stages
    from multistage_diffusion.training.run import load_run, train

__all__ = [
    "Denoiser",
    "ModelConfig",
    "MultiDecoderUNet",
    "RunConfig",
    "Stages",
    "cluster",
    "evaluate",
    "load_data",
    "load_run",
    "preset",
    "recipe",
    "sample",
    "train",
]

_HOMES = {
    "Denoiser": "models.denoiser",
    "ModelConfig": "config",
    "MultiDecoderUNet": "models.unet",
    "RunConfig": "config",
    "Stages": "stages",
    "cluster": "clustering",
    "evaluate": "evaluation",
    "load_data": "data",
    "load_run": "training.run",
    "make_process": "noise",
    "preset": "models.presets",
    "recipe": "recipes",
    "sample": "sampling",
    "train": "training.run",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
