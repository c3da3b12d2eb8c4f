"""Processes and schedules: each translates its own time, scale, training distribution and preconditioning to sigma.

`sigma` is the noise-to-signal ratio of x = s (x0 + sigma eps), the one coordinate in which all processes agree; no
other package knows timesteps. Tensors keep their device and dtype; schedules are float64. Imports no torch.
"""

from typing import Any

from multistage_diffusion.noise.base import Levels, Preconditioning, Prediction, Process, process_by_kind
from multistage_diffusion.noise.exploding import EDM, VE
from multistage_diffusion.noise.flow import Flow
from multistage_diffusion.noise.preserving import LDM, VP, Cosine, VariancePreserving
from multistage_diffusion.noise.schedule import SPACINGS, Spacing, sigma_schedule

__all__ = [
    "EDM",
    "LDM",
    "SPACINGS",
    "VE",
    "VP",
    "Cosine",
    "Flow",
    "Levels",
    "Preconditioning",
    "Prediction",
    "Process",
    "Spacing",
    "VariancePreserving",
    "process_by_kind",
    "sigma_schedule",
]


def __getattr__(name: str) -> Any:
    if name != "make_process":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import warnings

    warnings.warn("make_process is no longer needed: a process is its own record", DeprecationWarning, stacklevel=2)
    return lambda process: process
