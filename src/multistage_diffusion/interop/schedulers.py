"""Processes and the schedulers of diffusers: the same noise levels on two clocks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from multistage_diffusion.config import CosineConfig, EDMConfig, FlowConfig, LDMConfig, Prediction, VPConfig
from multistage_diffusion.errors import ConfigError
from multistage_diffusion.noise import Process

_BETAS: dict[str, Literal["sqrt-linear", "linear"]] = {"scaled_linear": "sqrt-linear", "linear": "linear"}
_PREDICTIONS: dict[str, Prediction] = {"epsilon": "eps", "v_prediction": "v"}
_VP_STEPS = 999  # what a variance-preserving network is told is 999 t, so t = 1 is the last of 1000 timesteps


def process_from_scheduler(options: Mapping[str, Any]) -> LDMConfig:
    """The process of a scheduler of diffusers.

    Args:
        options: Its configuration, like `scheduler_config.json`.

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
    return LDMConfig(
        num_steps=options.get("num_train_timesteps", 1000), beta_first=options.get("beta_start", 1e-4),
        beta_last=options.get("beta_end", 0.02), betas=_BETAS[schedule], prediction=_PREDICTIONS[prediction],
    )  # fmt: skip


def scheduler_options(process: Process) -> dict[str, Any]:
    """What makes a scheduler of diffusers that of a process.

    Args:
        process: The process.

    Returns:
        Options: betas and prediction for DDIM, DPM-Solver and their like; the range of sigma for EDM's schedulers;
        none for those of flow matching, which have only one clock.

    Raises:
        ConfigError: diffusers has no scheduler for the process.
    """
    match process.config:
        case LDMConfig() as config:
            names = {ours: theirs for theirs, ours in _BETAS.items()}
            betas: dict[str, Any] = {
                "beta_schedule": names[config.betas], "beta_start": config.beta_first, "beta_end": config.beta_last,
                "num_train_timesteps": config.num_steps,
            }  # fmt: skip
        case VPConfig() | CosineConfig() as config:
            steps = _levels(process)
            kept = 1 / (1 + steps**2)
            betas = {
                "trained_betas": (1 - kept / torch.cat((kept.new_ones(1), kept[:-1]))).tolist(),
                "num_train_timesteps": len(steps),
            }
        case EDMConfig() as config:
            return {
                "sigma_min": config.sigma_min, "sigma_max": config.sigma_max, "sigma_data": config.sigma_data,
                "prediction_type": "epsilon",
            }  # fmt: skip
        case FlowConfig():
            return {}
        case _:
            raise ConfigError(f"diffusers has no scheduler that fits the process {process.config.kind}")
    prediction = next(theirs for theirs, ours in _PREDICTIONS.items() if ours == config.prediction)
    return {**betas, "prediction_type": prediction, "timestep_spacing": "trailing"}  # it begins at the highest noise


def level(process: Process, timestep: Float[Tensor, "*steps"]) -> Float[Tensor, "*steps"]:
    """The noise level at a scheduler's timestep, which is what the network is told (`c_noise`).

    Args:
        process: The process.
        timestep: Timesteps, float64.

    Returns:
        Noise levels sigma.
    """
    match process.config:
        case EDMConfig():
            return torch.exp(4 * timestep)
        case FlowConfig():
            return process.sigma(timestep / 1000)
        case LDMConfig():
            return process.sigma(timestep)
        case VPConfig() | CosineConfig() as config:
            return process.sigma((timestep / _VP_STEPS).clamp(min=config.t_min))
        case _:
            raise ConfigError(f"diffusers has no scheduler that fits the process {process.config.kind}")


def require_fit(options: Mapping[str, Any], process: Process) -> None:
    """Refuse a scheduler that would run a network wrongly, and silently.

    Args:
        options: The scheduler's configuration.
        process: The network's process.

    Raises:
        ConfigError: Another prediction, other betas or another range; the message names the option.
    """
    for name, wanted in scheduler_options(process).items():
        found = options.get(name)
        close = isinstance(wanted, float) and isinstance(found, float) and math.isclose(wanted, found, rel_tol=1e-6)
        if name != "timestep_spacing" and not close and found != wanted:
            shown = (wanted, found) if name != "trained_betas" else ("the process's", "others")
            raise ConfigError(
                f"the scheduler's {name} must be {shown[0]}, got {shown[1]}; make it from the pipeline's own, like "
                "DDIMScheduler.from_config(pipeline.scheduler.config)"
            )
    if isinstance(process.config, FlowConfig) and "shift" not in options:
        raise ConfigError(
            "a flow-matching network needs a flow-matching scheduler, like FlowMatchEulerDiscreteScheduler"
        )


def _levels(process: Process) -> Tensor:
    """The noise level of each whole timestep of a variance-preserving process."""
    config = process.config
    assert isinstance(config, VPConfig | CosineConfig)
    last = math.floor(_VP_STEPS * (config.t_max if isinstance(config, CosineConfig) else 1.0))
    return level(process, torch.arange(last + 1, dtype=torch.float64))
