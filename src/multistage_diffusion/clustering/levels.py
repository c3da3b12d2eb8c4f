"""The measure over noise levels that a clustering averages in, as a map from u in (0, 1) to sigma."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from multistage_diffusion.errors import ConfigError, suggest
from multistage_diffusion.noise import Process

MEASURES = ("time", "log-sigma", "training")


def level(process: Process, measure: str, u: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Noise level below which a share u of the measure lies.

    Args:
        process: Gives the range of levels, its time and its training distribution.
        measure: `time`: uniform in the time of `process.clock()`, its own (for EDM, whose time is sigma, VP's);
            `log-sigma`: uniform in ln sigma; `training`: the process's distribution of sigma in training.
        u: Shares in [0, 1], float64; for `training` in (0, 1).

    Returns:
        Noise levels sigma.

    Raises:
        ConfigError: No such measure.
    """
    ends = torch.tensor([process.sigma_min, process.sigma_max], dtype=torch.float64, device=u.device)
    match measure:
        case "time":
            clock = process.clock()
            first, last = clock.t(ends)
            return clock.sigma(first + u * (last - first))
        case "log-sigma":
            return torch.exp(torch.lerp(ends[0].log(), ends[1].log(), u))
        case "training":
            return process.icdf(u)
    raise ConfigError(f"no measure {measure}{suggest(measure, MEASURES)}")
