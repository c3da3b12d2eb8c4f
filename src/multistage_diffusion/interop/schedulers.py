"""Processes and the schedulers of diffusers: the same noise levels on two time scales."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from multistage_diffusion.errors import ConfigError
from multistage_diffusion.noise import EDM, LDM, VP, Cosine, Flow, Prediction, Process

_BETAS: dict[str, Literal["sqrt-linear", "linear"]] = {"scaled_linear": "sqrt-linear", "linear": "linear"}
_PREDICTIONS: dict[str, Prediction] = {"epsilon": "eps", "v_prediction": "v"}
_VP_STEPS = 999  # what a variance-preserving network gets is 999 t, so t = 1 is the last of 1000 timesteps


def process_from_scheduler(options: Mapping[str, Any]) -> LDM:
    """The process of a scheduler of diffusers.

    Returns:
        The discrete process with the same betas and prediction.

    Raises:
        ConfigError: Betas or a prediction that the discrete process has not.
    """
    schedule, prediction = options.get("beta_schedule", "linear"), options.get("prediction_type", "epsilon")
    if schedule not in _BETAS or options.get("trained_betas") is not None:
        raise ConfigError(f"the scheduler's beta_schedule must be one of {', '.join(_BETAS)}, got {schedule}")
    if prediction not in _PREDICTIONS:
        raise ConfigError(f"the scheduler's prediction_type must be one of {', '.join(_PREDICTIONS)}, got {prediction}")
    return LDM(
        num_steps=options.get("num_train_timesteps", 1000),
        beta_first=options.get("beta_start", 1e-4),
        beta_last=options.get("beta_end", 0.02),
        betas=_BETAS[schedule],
        prediction=_PREDICTIONS[prediction],
    )


def scheduler_options(process: Process) -> dict[str, Any]:
    """What makes a scheduler of diffusers that of a process.

    Returns:
        Options: betas and prediction for DDIM, DPM-Solver and their like; the range of sigma for EDM's schedulers;
        none for those of flow matching, which have only one time scale.

    Raises:
        ConfigError: diffusers has no scheduler for the process.
    """
    match process:
        case LDM():
            names = {betas: schedule for schedule, betas in _BETAS.items()}
            betas: dict[str, Any] = {
                "beta_schedule": names[process.betas],
                "beta_start": process.beta_first,
                "beta_end": process.beta_last,
                "num_train_timesteps": process.num_steps,
            }
        case VP() | Cosine():
            steps = _levels(process)
            kept = 1 / (1 + steps**2)
            betas = {
                "trained_betas": (1 - kept / torch.cat((kept.new_ones(1), kept[:-1]))).tolist(),
                "num_train_timesteps": len(steps),
            }
        case EDM():
            return {
                "sigma_min": process.sigma_min,
                "sigma_max": process.sigma_max,
                "sigma_data": process.sigma_data,
                "prediction_type": "epsilon",
            }
        case Flow():
            if process.time_scale != 1000:
                raise ConfigError(
                    f"diffusers has no scheduler with process.time-scale {process.time_scale:g}, but 1000"
                )
            return {}
        case _:
            raise ConfigError(f"diffusers has no scheduler that fits the process {process.kind}")
    prediction = next(name for name, kind in _PREDICTIONS.items() if kind == process.prediction)
    return {**betas, "prediction_type": prediction, "timestep_spacing": "trailing"}  # it begins at the highest noise


def _levels(process: Process) -> Tensor:
    """The noise level of each whole timestep of a variance-preserving process."""
    assert isinstance(process, VP | Cosine)
    last = math.floor(_VP_STEPS * process.times[1])
    return process.level(torch.arange(last + 1, dtype=torch.float64))
