"""The whole configuration of a run, as frozen dataclasses. Imports no torch, so `--help` and `--dry-run` are quick.

Recipes return a whole `RunConfig`; the command line changes single fields; a run's `config.json` holds it whole.
"""

from multistage_diffusion.backbones import Architecture, Backbone, UNet
from multistage_diffusion.config.run import (
    AugmentSigns,
    DataConfig,
    EngineConfig,
    LabelMode,
    LoggingConfig,
    ModelConfig,
    Precision,
    RunConfig,
    Scaling,
    StagesConfig,
    TrainingConfig,
)
from multistage_diffusion.records import check, flat, from_dict, old_names, to_dict
from multistage_diffusion.sampling.sampler import Sampler

SamplingConfig = Sampler  # its old name

__all__ = [
    "Architecture",
    "AugmentSigns",
    "Backbone",
    "DataConfig",
    "EngineConfig",
    "LabelMode",
    "LoggingConfig",
    "ModelConfig",
    "Precision",
    "RunConfig",
    "Sampler",
    "SamplingConfig",
    "Scaling",
    "StagesConfig",
    "TrainingConfig",
    "UNet",
    "check",
    "flat",
    "from_dict",
    "to_dict",
]

_NOISE = "multistage_diffusion.noise"
__getattr__ = old_names(
    __name__,
    {f"{name}Config": (_NOISE, name) for name in ("VP", "Cosine", "VE", "EDM", "LDM", "Flow")}
    | {"ProcessConfig": (_NOISE, "Process"), "process_config": (_NOISE, "process_by_kind")}
    | {name: (_NOISE, name) for name in ("Prediction", "Spacing")},
)
