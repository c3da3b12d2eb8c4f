"""The table of solvers by name, and the noise levels at which a solver calls the network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from multistage_diffusion.noise.schedule import Spacing
from multistage_diffusion.sampling.exponential import dpm, dpmpp_2s_ancestral, sde_dpmpp_2s
from multistage_diffusion.sampling.multistep import dpmpp_2m, dpmpp_3m, lms, sde_dpmpp_2m, sde_dpmpp_3m, unipc
from multistage_diffusion.sampling.onestep import ancestral, ddim, euler, heun
from multistage_diffusion.sampling.steps import SolverFunction

if TYPE_CHECKING:
    from torch import Tensor

    from multistage_diffusion.sampling.steps import Schedule


@dataclass(frozen=True)
class Solver:
    """A solver and what is known of it before it runs.

    Attributes:
        name: Its name in `SOLVERS`.
        solve: The function (denoise, x, sigmas, *, noise, callback) -> x.
        order: Its order of convergence (of a stochastic one: without its noise).
        default_spacing: The spacing of noise levels that suits it.
        stochastic: Whether it adds noise in its steps.
        option: The option it takes, if any: `churn` (`s_churn` of Karras et al. 2022), `eta` (of DDIM) or
            `lower_order_below` (of multistep solvers).
    """

    name: str
    solve: SolverFunction
    order: int
    default_spacing: Spacing
    stochastic: bool = False
    option: Literal["churn", "eta", "lower_order_below"] | None = None

    def nfe(self, steps: int) -> int:
        """Network evaluations for a number of steps, on a schedule that ends in 0."""
        return len(evaluations(self.solve, range(steps, -1, -1)))


SOLVERS: dict[str, Solver] = {
    solver.name: solver
    for solver in (
        Solver("heun", heun, 2, "karras", option="churn"),
        Solver("euler", euler, 1, "karras", option="churn"),
        Solver("ddim", ddim, 1, "karras", option="eta"),
        Solver("ancestral", ancestral, 1, "karras", stochastic=True),
        Solver("dpm-1", partial(dpm, order=1), 1, "log-snr"),
        Solver("dpm-2", partial(dpm, order=2), 2, "log-snr"),
        Solver("dpm-3", partial(dpm, order=3), 3, "log-snr"),
        Solver("dpmpp-2m", dpmpp_2m, 2, "log-snr", option="lower_order_below"),
        Solver("dpmpp-3m", dpmpp_3m, 3, "log-snr", option="lower_order_below"),
        Solver("sde-dpmpp-2m", sde_dpmpp_2m, 2, "log-snr", stochastic=True, option="lower_order_below"),
        Solver("sde-dpmpp-3m", sde_dpmpp_3m, 2, "log-snr", stochastic=True, option="lower_order_below"),
        Solver("sde-dpmpp-2s", sde_dpmpp_2s, 2, "log-snr", stochastic=True),
        Solver("dpmpp-2s-ancestral", dpmpp_2s_ancestral, 2, "log-snr", stochastic=True),
        Solver("unipc", unipc, 4, "log-snr", option="lower_order_below"),
        Solver("lms", lms, 4, "karras"),
    )
}

if TYPE_CHECKING:
    SolverLike = str | SolverFunction
else:  # files and command lines read the names, which stand here once
    SolverLike = Literal[tuple(SOLVERS)] | str | Callable[..., Any]


def evaluations(solve: SolverFunction, sigmas: Schedule) -> tuple[float, ...]:
    """The noise level of every network evaluation, in order, known before sampling.

    Found by running the solver itself on a scalar, so that it cannot disagree with the solver.

    Args:
        solve: The solver's function.
        sigmas: The schedule.

    Raises:
        ConfigError: The noise levels are not decreasing.
    """
    import torch

    visited: list[float] = []

    def record(x: Tensor, sigma: float) -> Tensor:
        visited.append(float(sigma))
        return x

    zero = torch.zeros(())
    solve(record, zero, sigmas, noise=lambda step: zero)
    return tuple(visited)
