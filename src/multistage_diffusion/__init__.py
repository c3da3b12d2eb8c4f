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
    from multistage_diffusion.backbones import Backbone, Transformer, UNet
    from multistage_diffusion.clustering import ClusterOptions, OptimalDenoiser, cluster
    from multistage_diffusion.conditioning import Conditioning
    from multistage_diffusion.config import EngineConfig, LoggingConfig, ModelConfig, RunConfig, TrainingConfig
    from multistage_diffusion.data import Images, load_data
    from multistage_diffusion.data.user import as_data
    from multistage_diffusion.denoiser import Denoiser
    from multistage_diffusion.evaluation import evaluate
    from multistage_diffusion.inherit import branch
    from multistage_diffusion.interop.initial import load_initial
    from multistage_diffusion.interop.stage_module import StagedModule, load_staged, stage_module
    from multistage_diffusion.metrics.cost import denoiser_cost, network_cost
    from multistage_diffusion.multidecoder import MultiDecoder
    from multistage_diffusion.noise import EDM, LDM, VE, VP, Cosine, Flow, Process
    from multistage_diffusion.recipes import preset, recipe
    from multistage_diffusion.runs import Run, build_denoiser, load_run
    from multistage_diffusion.sampling import Sampler, Start, interpolate, sample
    from multistage_diffusion.stages import Stages
    from multistage_diffusion.training.callbacks import Callback, LogRecord
    from multistage_diffusion.training.initial import Initial
    from multistage_diffusion.training.run import build_trainer, fit, train
    from multistage_diffusion.training.trainer import Trainer

# Public names by chapter, and the modules that they come from.
_HOMES = {
    # noise levels
    **dict.fromkeys(("Process", "VP", "Cosine", "VE", "EDM", "LDM", "Flow"), "noise"),
    "make_process": "noise",  # for one version
    "Stages": "stages",
    **dict.fromkeys(("cluster", "ClusterOptions", "OptimalDenoiser"), "clustering"),
    # networks
    "Backbone": "backbones",
    "Transformer": "backbones",
    "UNet": "backbones",
    "ModelConfig": "config",
    "MultiDecoder": "multidecoder",
    "Conditioning": "conditioning",
    "Denoiser": "denoiser",
    "network_cost": "metrics.cost",
    "denoiser_cost": "metrics.cost",
    "branch": "inherit",
    **dict.fromkeys(("stage_module", "load_staged", "StagedModule"), "interop.stage_module"),
    # data
    "Images": "data",
    "load_data": "data",
    "as_data": "data.user",
    # training
    "RunConfig": "config",
    "TrainingConfig": "config",
    "EngineConfig": "config",
    "LoggingConfig": "config",
    "Trainer": "training.trainer",
    "train": "training.run",
    "fit": "training.run",
    "build_trainer": "training.run",
    "Initial": "training.initial",
    "load_initial": "interop.initial",
    "Callback": "training.callbacks",
    "LogRecord": "training.callbacks",
    "build_denoiser": "runs",
    "recipe": "recipes",
    "preset": "recipes",
    # use
    "Run": "runs",
    "load_run": "runs",
    "Sampler": "sampling",
    **dict.fromkeys(("sample", "interpolate", "Start"), "sampling"),
    "evaluate": "evaluation",
}
__all__ = [
    "EDM",
    "LDM",
    "VE",
    "VP",
    "Backbone",
    "Callback",
    "ClusterOptions",
    "Conditioning",
    "Cosine",
    "Denoiser",
    "EngineConfig",
    "Flow",
    "Images",
    "Initial",
    "LogRecord",
    "LoggingConfig",
    "ModelConfig",
    "MultiDecoder",
    "OptimalDenoiser",
    "Process",
    "Run",
    "RunConfig",
    "Sampler",
    "StagedModule",
    "Stages",
    "Start",
    "Trainer",
    "TrainingConfig",
    "Transformer",
    "UNet",
    "as_data",
    "branch",
    "build_denoiser",
    "build_trainer",
    "cluster",
    "denoiser_cost",
    "evaluate",
    "fit",
    "interpolate",
    "load_data",
    "load_initial",
    "load_run",
    "load_staged",
    "network_cost",
    "preset",
    "recipe",
    "sample",
    "stage_module",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
