"""Samplers in sigma: solvers as functions of (denoise, x, sigmas), their table and plan, and images from a denoiser.

All processes look variance-exploding in x = x0 + sigma eps, so no scale appears and each solver is written once.
"""

from multistage_diffusion.sampling.exponential import dpm, dpmpp_2m, dpmpp_3m, sde_dpmpp_2m
from multistage_diffusion.sampling.images import Samples, call_plan, is_out_of_memory, sample, sample_batches
from multistage_diffusion.sampling.onestep import ancestral, ddim, euler, heun
from multistage_diffusion.sampling.steps import SolverStep, Trace
from multistage_diffusion.sampling.table import SOLVERS, Solver, evaluations, find_solver, plan, sampling_shares

__all__ = [
    "SOLVERS",
    "Samples",
    "Solver",
    "SolverStep",
    "Trace",
    "ancestral",
    "call_plan",
    "ddim",
    "dpm",
    "dpmpp_2m",
    "dpmpp_3m",
    "euler",
    "evaluations",
    "find_solver",
    "heun",
    "is_out_of_memory",
    "plan",
    "sample",
    "sample_batches",
    "sampling_shares",
    "sde_dpmpp_2m",
]
