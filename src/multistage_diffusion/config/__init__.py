"""The whole configuration of a run, as frozen dataclasses. Imports no torch, so `--help` and `--dry-run` are quick.

Recipes return a whole `RunConfig`; the command line changes single fields; a run's `config.json` holds it whole.
"""

from multistage_diffusion.config.document import flat, from_dict, to_dict
from multistage_diffusion.config.process import (
    PROCESSES,
    CosineConfig,
    EDMConfig,
    FlowConfig,
    LDMConfig,
    Prediction,
    ProcessConfig,
    ProcessKind,
    VEConfig,
    VPConfig,
    process_config,
)
from multistage_diffusion.config.run import (
    Architecture,
    DataConfig,
    EngineConfig,
    LoggingConfig,
    ModelConfig,
    Precision,
    RunConfig,
    SamplingConfig,
    StagesConfig,
    TrainingConfig,
)
from multistage_diffusion.config.values import Solver, Spacing, check

__all__ = [
    "PROCESSES",
    "Architecture",
    "CosineConfig",
    "DataConfig",
    "EDMConfig",
    "EngineConfig",
    "FlowConfig",
    "LDMConfig",
    "LoggingConfig",
    "ModelConfig",
    "Precision",
    "Prediction",
    "ProcessConfig",
    "ProcessKind",
    "RunConfig",
    "SamplingConfig",
    "Solver",
    "Spacing",
    "StagesConfig",
    "TrainingConfig",
    "VEConfig",
    "VPConfig",
    "check",
    "flat",
    "from_dict",
    "process_config",
    "to_dict",
]
