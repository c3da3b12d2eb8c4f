"""Samplers in sigma: solvers as functions of (denoise, x, sigmas), `Sampler`, and images from a denoiser.

All processes look variance-exploding in x = x0 + sigma eps, so no scale appears and each solver is written once.
Names are imported when they are first used; `Sampler` and the solvers import no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from multistage_diffusion.sampling.editing import Start, interpolate
    from multistage_diffusion.sampling.exponential import dpm, dpmpp_2s_ancestral, sde_dpmpp_2s
    from multistage_diffusion.sampling.images import Samples, consecutive_seeds, sample
    from multistage_diffusion.sampling.multistep import dpmpp_2m, dpmpp_3m, lms, sde_dpmpp_2m, sde_dpmpp_3m, unipc
    from multistage_diffusion.sampling.onestep import ancestral, ddim, euler, heun
    from multistage_diffusion.sampling.sampler import Sampler, SamplerOptions
    from multistage_diffusion.sampling.solvers import SOLVERS, Solver, evaluations
    from multistage_diffusion.sampling.steps import SolverFunction, SolverStep, Trace

__all__ = [
    "SOLVERS",
    "Sampler",
    "SamplerOptions",
    "Samples",
    "Solver",
    "SolverFunction",
    "SolverStep",
    "Start",
    "Trace",
    "ancestral",
    "consecutive_seeds",
    "ddim",
    "dpm",
    "dpmpp_2m",
    "dpmpp_2s_ancestral",
    "dpmpp_3m",
    "euler",
    "evaluations",
    "heun",
    "interpolate",
    "lms",
    "sample",
    "sde_dpmpp_2m",
    "sde_dpmpp_2s",
    "sde_dpmpp_3m",
    "unipc",
]

_MODULES = {
    "exponential": ("dpm", "dpmpp_2s_ancestral", "sde_dpmpp_2s"),
    "editing": ("Start", "interpolate"),
    "images": ("Samples", "consecutive_seeds", "sample"),
    "multistep": ("dpmpp_2m", "dpmpp_3m", "lms", "sde_dpmpp_2m", "sde_dpmpp_3m", "unipc"),
    "onestep": ("ancestral", "ddim", "euler", "heun"),
    "sampler": ("Sampler", "SamplerOptions"),
    "solvers": ("SOLVERS", "Solver", "evaluations"),
    "steps": ("SolverFunction", "SolverStep", "Trace"),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
