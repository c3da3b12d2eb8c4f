"""The table of solvers by name, what each costs, and the stage of each of its network evaluations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from multistage_diffusion.errors import ConfigError, suggest
from multistage_diffusion.noise import Process, Spacing, sigma_schedule
from multistage_diffusion.records import check
from multistage_diffusion.sampling.exponential import dpm, dpmpp_2m, dpmpp_3m, sde_dpmpp_2m
from multistage_diffusion.sampling.onestep import ancestral, ddim, euler, heun
from multistage_diffusion.sampling.steps import Levels, Run
from multistage_diffusion.stages import Stages


@dataclass(frozen=True)
class Solver:
    """A solver and what is known of it before it runs.

    Attributes:
        name: Its name in `SOLVERS`.
        run: The function (denoise, x, sigmas, *, noise, callback) -> x.
        nfe: Network evaluations for a number of steps, on a schedule that ends in 0.
        stochastic: Whether it draws fresh noise.
        order: Its order of convergence (of a stochastic one: without its noise).
        default_spacing: The spacing of levels that suits it.
        option: The option it takes, if any: `churn` (`s_churn` of Karras et al. 2022) or `eta` (of DDIM).
    """

    name: str
    run: Run
    nfe: Callable[[int], int]
    stochastic: bool
    order: int
    default_spacing: Spacing
    option: Literal["churn", "eta"] | None = None


def _once(steps: int) -> int:
    return steps


def _twice_but_last(steps: int) -> int:
    return 2 * steps - 1


SOLVERS: dict[str, Solver] = {
    solver.name: solver
    for solver in (
        Solver("heun", heun, _twice_but_last, False, 2, "karras", "churn"),
        Solver("euler", euler, _once, False, 1, "karras", "churn"),
        Solver("ddim", ddim, _once, False, 1, "karras", "eta"),
        Solver("ancestral", ancestral, _once, True, 1, "karras"),
        Solver("dpm-1", partial(dpm, order=1), _once, False, 1, "log-snr"),
        Solver("dpm-2", partial(dpm, order=2), _once, False, 2, "log-snr"),
        Solver("dpm-3", partial(dpm, order=3), _once, False, 3, "log-snr"),
        Solver("dpmpp-2m", dpmpp_2m, _once, False, 2, "log-snr"),
        Solver("dpmpp-3m", dpmpp_3m, _once, False, 3, "log-snr"),
        Solver("sde-dpmpp-2m", sde_dpmpp_2m, _once, True, 2, "log-snr"),
    )
}


def find_solver(name: str, *, churn: float = 0.0, eta: float = 0.0) -> Solver:
    """A solver by name, with its option settled.

    Args:
        name: A key of `SOLVERS`.
        churn: Total noise added by `heun` and `euler`; above 0 they are stochastic.
        eta: Share of the ancestral noise in `ddim`, in [0, 1]; above 0 it is stochastic.

    Returns:
        The solver.

    Raises:
        ConfigError: There is no such solver, it does not take the option, or the option is out of range.
    """
    if name not in SOLVERS:
        raise ConfigError(f"no solver {name}{suggest(name, SOLVERS)}")
    solver = SOLVERS[name]
    for option, value in (("churn", churn), ("eta", eta)):
        if value != 0 and solver.option != option:
            takers = ", ".join(other.name for other in SOLVERS.values() if other.option == option)
            raise ConfigError(f"{name} takes no {option} (got {value}); it is for {takers}")
    check(churn >= 0, "churn", "at least 0", churn)
    check(0 <= eta <= 1, "eta", "between 0 and 1", eta)
    if churn == 0 and eta == 0:
        return solver
    settled: dict[str, Run] = {
        "heun": partial(heun, s_churn=churn),
        "euler": partial(euler, s_churn=churn),
        "ddim": partial(ddim, eta=eta),
    }
    return replace(solver, run=settled[name], stochastic=True)


def evaluations(solver: Solver | str, sigmas: Levels) -> tuple[float, ...]:
    """The noise level of every network evaluation, in order, known before sampling.

    Found by running the solver itself on a scalar, so that it cannot disagree with the solver.

    Args:
        solver: The solver, or its name.
        sigmas: The schedule.

    Returns:
        One level for each evaluation.

    Raises:
        ConfigError: Unknown solver, or levels that are not decreasing.
    """
    visited: list[float] = []

    def record(x: Tensor, sigma: float) -> Tensor:
        visited.append(sigma)
        return x

    zero = torch.zeros(())
    run = (find_solver(solver) if isinstance(solver, str) else solver).run
    run(record, zero, sigmas, noise=lambda step: zero)
    return tuple(visited)


def plan(solver: Solver | str, sigmas: Levels, stages: Stages) -> tuple[int, ...]:
    """The stage of every network evaluation, in order, known before sampling.

    Args:
        solver: The solver, or its name.
        sigmas: The schedule.
        stages: The partition of the noise levels.

    Returns:
        One stage for each evaluation.

    Raises:
        ConfigError: Unknown solver, or levels that are not decreasing.
    """
    return tuple(stages.of(sigma) for sigma in evaluations(solver, sigmas))


def sampling_shares(
    process: Process, stages: Stages, solver: str, steps: int, spacing: str | None = None
) -> tuple[float, ...]:
    """Share of each stage in the network evaluations of a solver.

    Args:
        process: Gives the schedule.
        stages: The partition of the noise levels.
        solver: A key of `SOLVERS`.
        steps: Steps of the solver.
        spacing: Spacing of the noise levels; by default the solver's own.

    Returns:
        Shares that sum to 1.

    Raises:
        ConfigError: An unknown solver or spacing, or steps below 1.
    """
    chosen = find_solver(solver)
    calls = plan(chosen, sigma_schedule(process, spacing or chosen.default_spacing, steps), stages)
    return tuple(calls.count(stage) / len(calls) for stage in range(len(stages)))
