"""From a configuration to its process."""

from __future__ import annotations

from multistage_diffusion.config import (
    CosineConfig,
    EDMConfig,
    FlowConfig,
    LDMConfig,
    ProcessConfig,
    VEConfig,
    VPConfig,
    check,
)
from multistage_diffusion.noise.base import Process
from multistage_diffusion.noise.exploding import EDM, VE
from multistage_diffusion.noise.flow import Flow
from multistage_diffusion.noise.preserving import LDM, VP, Cosine


def make_process(config: ProcessConfig) -> Process:
    """Build a process from its configuration.

    Args:
        config: One of the process configurations.

    Returns:
        The process.

    Raises:
        ConfigError: Its noise levels are beyond what float32 can square.
    """
    process = _build(config)
    low, high = process.sigma_min, process.sigma_max
    check(1e-15 < low < high < 1e15, "process", "one whose noise levels lie in 1e-15..1e15", f"{low:g} to {high:g}")
    return process


def _build(config: ProcessConfig) -> Process:
    match config:
        case VPConfig():
            return VP(config)
        case CosineConfig():
            return Cosine(config)
        case VEConfig():
            return VE(config)
        case EDMConfig():
            return EDM(config)
        case LDMConfig():
            return LDM(config)
        case FlowConfig():
            return Flow(config)
