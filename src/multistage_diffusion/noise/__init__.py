"""Processes and schedules: each translates its own time, scale, training distribution and preconditioning to sigma.

`sigma` is the noise-to-signal ratio of x = s (x0 + sigma eps), the one coordinate in which all processes agree. Past
this door the library knows no timesteps. Tensors keep their device and dtype; schedules are float64.
"""

from multistage_diffusion.noise.base import Preconditioning, Process
from multistage_diffusion.noise.exploding import EDM, VE
from multistage_diffusion.noise.flow import Flow
from multistage_diffusion.noise.make import make_process
from multistage_diffusion.noise.preserving import LDM, VP, Cosine
from multistage_diffusion.noise.schedule import SPACINGS, Spacing, sigma_schedule

__all__ = [
    "EDM",
    "LDM",
    "SPACINGS",
    "VE",
    "VP",
    "Cosine",
    "Flow",
    "Preconditioning",
    "Process",
    "Spacing",
    "make_process",
    "sigma_schedule",
]
