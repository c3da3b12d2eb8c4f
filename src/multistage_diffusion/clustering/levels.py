"""The measure over noise levels that a clustering averages in, as a map from u in (0, 1) to sigma."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from multistage_diffusion.clustering.options import MEASURES
from multistage_diffusion.errors import ConfigError, suggest
from multistage_diffusion.noise import VP, Process
from multistage_diffusion.stages import Stages


def noise_levels(process: Process, measure: str, u: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Noise levels below which shares u of the measure lie.

    Args:
        process: Gives the range of levels, its time and its training distribution.
        measure: `time`: uniform in the time of the process (for EDM, whose time is sigma, in that of VP);
            `log-sigma`: uniform in ln sigma; `training`: the process's distribution of sigma in training.
        u: Shares in [0, 1], float64; for `training` in (0, 1).

    Raises:
        ConfigError: No such measure.
    """
    ends = torch.tensor([process.sigma_min, process.sigma_max], dtype=torch.float64, device=u.device)
    match measure:
        case "time":
            timed = with_time(process)
            first, last = timed.t(ends)
            return timed.sigma(first + u * (last - first))
        case "log-sigma":
            return torch.exp(torch.lerp(ends[0].log(), ends[1].log(), u))
        case "training":
            return process.icdf(u)
    raise ConfigError(f"no measure {measure}{suggest(measure, MEASURES)}")


def with_time(process: Process) -> Process:
    """The process whose time averages over noise levels are taken in.

    Args:
        process: A process.

    Returns:
        Itself; VP where its time is sigma, since evenly in sigma nearly all levels lie where images are noise.
    """
    ends = torch.tensor([process.sigma_min, process.sigma_max], dtype=torch.float64)
    return VP() if torch.equal(process.t(ends), ends) else process


def time_shares(process: Process, stages: Stages) -> tuple[float, ...]:
    """Length of each stage in time, as a share of the range of sampling; in VP's time where the process's is sigma.

    Args:
        process: The process.
        stages: The partition.

    Returns:
        Shares that sum to 1.
    """
    ends = torch.tensor([process.sigma_min, *stages.edges, process.sigma_max], dtype=torch.float64)
    times = with_time(process).t(ends.clamp(process.sigma_min, process.sigma_max))
    return tuple((times.diff() / (times[-1] - times[0])).tolist())
