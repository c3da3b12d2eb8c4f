"""From the timesteps that a network of another project is given to noise levels."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from multistage_diffusion.errors import ConfigError
from multistage_diffusion.noise import EDM, Flow, Process
from multistage_diffusion.records import from_dict, to_dict
from multistage_diffusion.stages import Stages

_LEVELS = ("sigma", "sigmas")  # arguments that are noise levels themselves


@dataclass(frozen=True)
class NoiseLevels:
    """A translation of timesteps to noise levels.

    Attributes:
        sigma: Gives the noise levels of timesteps, both float64.
        low: Lowest noise level that is met.
        high: Highest noise level that is met.
        kinds: The processes of this package that have these timesteps; none if that is not known.
        document: What files say of it.
    """

    sigma: Callable[[Any], Any]
    low: float = 0.0
    high: float = math.inf
    kinds: tuple[str, ...] = ()
    document: Mapping[str, Any] = field(default_factory=dict)

    @property
    def are_given(self) -> bool:
        """Whether the timesteps are noise levels themselves."""
        return self.sigma is _same

    def __call__(self, timestep: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        """The noise levels of timesteps."""
        return torch.as_tensor(self.sigma(timestep)).double()

    def require(self, stages: Stages) -> None:
        """Refuse stages that were found for another process, or that no timestep meets.

        Raises:
            ConfigError: The message names the process, or the edge and the range.
        """
        process = stages.provenance.get("process")
        kind = process.get("kind") if isinstance(process, Mapping) else None
        if self.kinds and kind is not None and kind not in self.kinds:
            raise ConfigError(
                f"the stages were made for the process {kind}, and the timesteps are of {self.kinds[0]}; "
                "Stages(stages.edges) takes the edges as they are"
            )
        for edge in stages.edges:
            if not self.low < edge < self.high:
                raise ConfigError(f"the edge {edge:g} lies outside the noise levels {self.low:g} to {self.high:g}")


def noise_levels(process: Any, argument: str) -> NoiseLevels:
    """The translation of the timesteps of a network.

    Args:
        process: A process of this package, a scheduler of diffusers, a function of a float64 tensor, or none.
        argument: Name of the network's argument; "sigma" is a noise level itself, whatever the process.

    Raises:
        ConfigError: There is none, or the scheduler's timesteps have no known meaning.
    """
    if isinstance(process, NoiseLevels):
        return process
    if isinstance(process, Process):
        translate = _same if argument in _LEVELS else process.level
        document = {"process": to_dict(process)}
        return NoiseLevels(translate, process.sigma_min, process.sigma_max, (process.kind,), document)
    if argument in _LEVELS and process is None:
        return NoiseLevels(_same, document={"sigma": True})
    if isinstance(config := getattr(process, "config", None), Mapping):
        return _of_scheduler(process, config)
    if callable(process):
        return NoiseLevels(process)
    raise ConfigError(
        f"process must be a process, a scheduler of diffusers or a function from {argument} to sigma, got {process!r}"
    )


def read_levels(document: Mapping[str, Any], where: str) -> NoiseLevels:
    """Read what `NoiseLevels.document` wrote.

    Raises:
        ConfigError: It is malformed, or was made from a function.
    """
    if document.get("sigma") is True:
        return noise_levels(None, _LEVELS[0])
    if "process" in document:
        return noise_levels(from_dict(Process, document["process"], where, "process"), document["timestep_argument"])
    match document.get("sigmas"):
        case [*sigmas] if len(sigmas) > 1 and all(type(sigma) is float and sigma > 0 for sigma in sigmas):
            return _of_table(torch.tensor(sigmas, dtype=torch.float64))
    raise ConfigError(f"{where} names no process, as it was made with a function; give process")


def _of_scheduler(scheduler: Any, config: Mapping[str, Any]) -> NoiseLevels:
    """The meaning of a scheduler's timesteps, as its network gets them."""
    name = type(scheduler).__name__
    if config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction" or "shift" in config:
        return noise_levels(Flow(time_scale=float(config.get("num_train_timesteps", 1000))), "timestep")
    if config.get("timestep_type") == "continuous" or "sigma_data" in config:
        scale = getattr(scheduler, "precondition_noise", lambda sigma: 0.25 * torch.log(sigma))
        if not math.isclose(float(scale(torch.tensor(math.e))), 0.25, rel_tol=1e-4):
            raise ConfigError(f"the timesteps of {name} are not ln(sigma)/4; give a function from them to sigma")
        return noise_levels(EDM(), "timestep")
    kept = getattr(scheduler, "alphas_cumprod", None)
    if not isinstance(kept, Tensor):
        raise ConfigError(f"the timesteps of {name} are not known; give a function from them to sigma")
    kept = kept.detach().cpu().double().clamp(min=1e-12)
    return _of_table(((1 - kept) / kept).sqrt())


def _of_table(sigmas: Float[Tensor, " steps"]) -> NoiseLevels:
    """Whole timesteps have the levels of a table; between them ln sigma is interpolated."""
    low, high = sigmas[[0, -1]].tolist()
    translate = functools.partial(_interpolated, sigmas.log())
    return NoiseLevels(translate, low, high, ("ldm", "vp", "vp-cosine"), {"sigmas": sigmas.tolist()})


def _interpolated(logs: Float[Tensor, " steps"], timestep: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    index = timestep.floor().clamp(0, len(logs) - 2).long()
    return logs[index].lerp(logs[index + 1], timestep - index).exp()


def _same(sigma: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    return sigma
