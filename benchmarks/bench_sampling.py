"""Solvers side by side: error at equal evaluations on a closed form, and the time that a step takes beside diffusers.

    python benchmarks/bench_sampling.py --out benchmarks/results/sampling.json

Needs the `dev` extra (diffusers).
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from diffusers.schedulers.scheduling_edm_dpmsolver_multistep import EDMDPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_edm_euler import EDMEulerScheduler
from torch import Tensor

from multistage_diffusion.noise import EDM, SPACINGS, VP, Flow, Process, sigma_schedule
from multistage_diffusion.sampling import SOLVERS, dpmpp_3m, heun

MEANS = torch.tensor([-0.9, -0.2, 0.5, 0.8], dtype=torch.float64)
SHARES = torch.tensor([0.3, 0.3, 0.25, 0.15], dtype=torch.float64)
WIDTH = 0.05
DRAWS = 4000
BUDGETS = (10, 20, 35, 50)
REPEATS = 15


def mixture(x: Tensor, sigma: float) -> Tensor:
    """The exact denoiser of a mixture of narrow Gaussians: sharp where images are sharp."""
    total = WIDTH**2 + sigma**2
    share = (SHARES.log() - (x[:, None] - MEANS) ** 2 / (2 * total)).softmax(dim=1)
    return (share * (WIDTH**2 * x[:, None] + sigma**2 * MEANS) / total).sum(dim=1)


def accuracy(process: Process) -> list[dict[str, object]]:
    """Mean distance from the end point of the probability flow (2400 evaluations of Heun), for each solver."""
    noise = torch.randn(DRAWS, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * process.sigma_max
    exact = heun(mixture, noise, sigma_schedule(process, "karras", 1200))
    released = replace(SOLVERS["dpmpp-3m"], name="dpmpp-3m, released weight", solve=partial(dpmpp_3m, released=True))
    rows = []
    for budget in BUDGETS:
        for solver in (*SOLVERS.values(), released):
            if solver.stochastic or solver.name in ("ddim", "dpm-1"):  # the same as euler
                continue
            steps = next(n for n in range(budget, 0, -1) if solver.nfe(n) <= budget)
            ends = {
                spacing: solver.solve(mixture, noise, sigma_schedule(process, spacing, steps)) for spacing in SPACINGS
            }
            errors = {spacing: round(float((end - exact).abs().mean()), 5) for spacing, end in ends.items()}
            rows.append({"solver": solver.name, "nfe": solver.nfe(steps), "errors": errors})
    return rows


def cheap(x: Tensor, sigma: float) -> Tensor:
    """A denoiser that costs next to nothing, so that the solver's own time shows."""
    return x * (0.25 / (0.25 + sigma**2))


def theirs(scheduler: EDMEulerScheduler | EDMDPMSolverMultistepScheduler, x: Tensor, steps: int) -> Tensor:
    """The loop of a pipeline; the model returns what a raw EDM network would for `cheap`: zero."""
    scheduler.set_timesteps(steps)
    for when in scheduler.timesteps:
        scheduler.scale_model_input(x, when)
        x = scheduler.step(torch.zeros_like(x), when, x, return_dict=False)[0]
    return x


def timing(device: str) -> list[dict[str, object]]:
    """Milliseconds of one step of 64 images of 3x32x32, median of interleaved runs."""
    steps, x = 50, torch.randn(64, 3, 32, 32, device=device) * 80
    sigmas = sigma_schedule(EDM(), "karras", steps)
    rows = []
    for name, make in (
        ("euler", EDMEulerScheduler),
        ("dpmpp-2m", EDMDPMSolverMultistepScheduler),
        ("dpmpp-3m", lambda: EDMDPMSolverMultistepScheduler(solver_order=3)),
    ):
        runs: dict[str, Callable[[], Tensor]] = {
            "ours": lambda name=name: SOLVERS[name].solve(cheap, x, sigmas),
            "diffusers": lambda make=make: theirs(make(), x, steps),
        }
        seconds: dict[str, list[float]] = {who: [] for who in runs}
        for _ in range(REPEATS):
            for who, run in runs.items():
                begin = time.perf_counter()
                run().sum().item()
                seconds[who].append(time.perf_counter() - begin)
        rows.append(
            {
                "solver": name,
                **{f"{who}_ms": round(statistics.median(s) / steps * 1e3, 4) for who, s in seconds.items()},
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the results here too")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    name = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU ({platform.machine()}), 1 thread"
    document = {
        "command": " ".join(["python", *sys.argv]),
        "device": name,
        "torch": torch.__version__,
        "error": {kind: accuracy(process) for kind, process in (("edm", EDM()), ("vp", VP()), ("flow", Flow()))},
        "step": timing(options.device),
    }
    text = json.dumps(document, indent=1)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
