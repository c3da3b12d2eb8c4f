"""Run directories, read; `training/run.py` writes them."""

from multistage_diffusion.runs.checkpoints import Checkpoint
from multistage_diffusion.runs.load import LoadedRun, Run, build_denoiser, load_run

__all__ = ["Checkpoint", "LoadedRun", "Run", "build_denoiser", "load_run"]
