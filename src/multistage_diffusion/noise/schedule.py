"""The noise levels that sampling visits."""

from __future__ import annotations

from typing import Literal, get_args

from multistage_diffusion.errors import ConfigError, suggest
from multistage_diffusion.noise.base import Levels, Process
from multistage_diffusion.records import check

Spacing = Literal["karras", "log-snr", "uniform-t", "quadratic-t"]
SPACINGS: tuple[Spacing, ...] = get_args(Spacing)


def sigma_schedule(process: Process, spacing: str, steps: int, *, rho: float = 7.0) -> Levels:
    """The noise levels that sampling visits, from sigma_max down to sigma_min, then 0.

    Args:
        process: Gives the range, and the time for the spacings in t.
        spacing: `karras` (uniform in sigma^(1/rho), Karras et al. 2022, Eq. 5), `log-snr` (geometric), `uniform-t`,
            `quadratic-t` (uniform in sqrt t).
        steps: Number of steps, at least 1.
        rho: Exponent of `karras`.

    Returns:
        `steps + 1` decreasing levels, float64, the last one 0.

    Raises:
        ConfigError: Unknown spacing, or fewer than 1 step.
    """
    import torch

    check(steps >= 1, "steps", "at least 1", steps)
    ends = torch.tensor([process.sigma_max, process.sigma_min], dtype=torch.float64)
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    match spacing:
        case "karras":
            roots = ends ** (1 / rho)
            levels = torch.lerp(roots[0], roots[1], ramp) ** rho
        case "log-snr":
            levels = torch.lerp(ends[0].log(), ends[1].log(), ramp).exp()
        case "uniform-t":
            times = process.t(ends)
            levels = process.sigma(torch.lerp(times[0], times[1], ramp))
        case "quadratic-t":
            times = process.t(ends).sqrt()
            levels = process.sigma(torch.lerp(times[0], times[1], ramp) ** 2)
        case _:
            raise ConfigError(f"no spacing {spacing}{suggest(spacing, SPACINGS)}")
    return torch.cat((levels, levels.new_zeros(1)))
