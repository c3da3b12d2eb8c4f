"""The noise levels that sampling visits."""

from __future__ import annotations

from typing import Literal, get_args

from multistage_diffusion.errors import ConfigError, suggest
from multistage_diffusion.noise.base import Levels, Process
from multistage_diffusion.records import check

Spacing = Literal["karras", "log-snr", "uniform-t", "quadratic-t", "singlestep"]
SPACINGS: tuple[Spacing, ...] = get_args(Spacing)


def sigma_schedule(
    process: Process, spacing: str, steps: int, *, rho: float = 7.0, order: int = 3, start: float | None = None
) -> Levels:
    """The noise levels that sampling visits, from sigma_max down to sigma_min, then 0.

    Args:
        process: Gives the range, and the time for the spacings in t.
        spacing: `karras` (uniform in sigma^(1/rho), Karras et al. 2022, Eq. 5), `log-snr` (geometric), `uniform-t`,
            `quadratic-t` (uniform in sqrt t), `singlestep` (DPM-Solver's: steps of equal length in log-SNR whatever
            their order, where a step of order k is k intervals; it ends at sigma_min).
        steps: Number of steps, at least 1; of `singlestep`: network evaluations.
        rho: Exponent of `karras`.
        order: Order of the solver, for `singlestep`.
        start: The first level, above sigma_min; by default sigma_max.

    Returns:
        `steps + 1` decreasing levels, float64, the last one 0 but for `singlestep`.

    Raises:
        ConfigError: Unknown spacing, or fewer than 1 step.
    """
    import torch

    check(steps >= 1, "steps", "at least 1", steps)
    ends = torch.tensor([process.sigma_max if start is None else start, process.sigma_min], dtype=torch.float64)
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
        case "singlestep":
            orders = step_orders(steps, order, to_zero=False)
            places = [step + part / size for step, size in enumerate(orders) for part in range(size)]
            ramp = torch.tensor([*places, len(orders)], dtype=torch.float64) / len(orders)
            return torch.lerp(ends[0].log(), ends[1].log(), ramp).exp()
        case _:
            raise ConfigError(f"no spacing {spacing}{suggest(spacing, SPACINGS)}")
    return torch.cat((levels, levels.new_zeros(1)))


def step_orders(evaluations: int, order: int, *, to_zero: bool) -> list[int]:
    """Orders of the singlestep solver's steps; they add up to the evaluations.

    Args:
        evaluations: The budget, at least 1.
        order: The order of most steps: 1, 2 or 3.
        to_zero: Whether the last step goes to sigma = 0, where only order 1 exists.

    Returns:
        The paper's orders (3, ..., 3, then 2 and 1, or 1, or 2); a last 2 that would go to 0 is split in 1 and 1.
    """
    assert order in (1, 2, 3) and evaluations >= 1, "orders 1 to 3 exist"
    full, rest = divmod(evaluations, order)
    if order == 3 and rest == 0:
        orders = [3] * (full - 1) + [2, 1]
    else:
        orders = [order] * full + [rest] * (rest > 0)
    if to_zero and orders[-1] > 1:
        orders[-1:] = [1] * orders[-1]
    return orders
