"""The first picture of the README and of the site, from the folder of a finished `msd demo`.

python scripts/pictures.py runs/demo docs/img
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from torch import Tensor

import multistage_diffusion as msd
from multistage_diffusion import rng
from multistage_diffusion.loss import denoising_loss
from multistage_diffusion.sampling import Trace, consecutive_seeds
from multistage_diffusion.stages import STAGE_COLOURS

LEVELS, COLUMNS, ROWS = 25, 14, 5
FAINT = 0.13
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "savefig.dpi": 200,
    "axes.labelcolor": "#374151",
    "xtick.color": "#374151",
    "ytick.color": "#374151",
}


def main() -> None:
    """Draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("demo", type=Path, help="folder of a finished msd demo")
    parser.add_argument("out", type=Path, help="folder for the pictures")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        first(arguments.demo).savefig(arguments.out / "first.png")


def first(demo: Path) -> Figure:
    """Where a staged model is better, what each stage costs, and images step by step."""
    staged, unified = (msd.Run.open(demo / name) for name in ("multistage", "unified"))
    figure = Figure(figsize=(8.4, 6.4), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1, 1.24))
    left, right = above.subplots(1, 2, width_ratios=(1.5, 1))
    compare(left, staged, unified)
    costs(right, staged, unified)
    steps(below, staged)
    return figure


def compare(axes: Any, staged: msd.Run, unified: msd.Run) -> None:
    """The held-out loss of one model over the other's, on the same images and noise, level by level."""
    models = [run.load().denoiser for run in (staged, unified)]
    test = msd.load_data(staged.config.data.source, split="test")
    images = test.floats(torch.arange(len(test)))
    noise = rng.normal(0, "pictures", torch.arange(len(test)), images.shape[1:])
    u = (torch.arange(LEVELS, dtype=torch.float64) + 0.5) / LEVELS
    sigmas, shares = staged.config.process.icdf(u), []
    for sigma in sigmas:
        with torch.inference_mode():
            one, other = (denoising_loss(model, images, noise, sigma.repeat(len(test))).double() for model in models)
        ratio = one.mean() / other.mean()
        error = (one - ratio * other).std() / len(test) ** 0.5 / other.mean()  # of a ratio of paired means
        shares.append((100 * float(ratio - 1), 196 * float(error)))
    change, interval = torch.tensor(shares).T
    stages, x = models[0].stages, sigmas.numpy()
    for stage in range(len(stages)):
        low, high = stages.bounds(stage)
        low, high = max(low, x[0]), min(high, x[-1])
        axes.axvspan(low, high, color=STAGE_COLOURS[stage], alpha=FAINT, lw=0)
        axes.text(
            (low * high) ** 0.5, 0.98, f"stage {stage}", ha="center", va="top", transform=axes.get_xaxis_transform()
        )
    axes.axhline(0, color="#8a8f98", ls="--", lw=1)
    axes.fill_between(x, (change - interval).numpy(), (change + interval).numpy(), color="#111827", alpha=0.18, lw=0)
    axes.plot(x, change.numpy(), color="#111827", lw=1.6, marker="o", ms=3)
    axes.set(xscale="log", xlim=(x[0], x[-1]), xlabel="noise level sigma", ylabel="loss, staged against unified (%)")
    axes.set_title("Where in the noise is it better?")


def costs(axes: Any, staged: msd.Run, unified: msd.Run) -> None:
    """FLOPs of an image in each stage beside those of the unified network."""
    denoiser, plain = staged.load().denoiser, msd.denoiser_cost(unified.load().denoiser)
    cost = msd.denoiser_cost(denoiser)
    whole, shares = plain.stages[0].flops / 1e6, denoiser.stages.shares(denoiser.process)
    for stage, (part, share) in enumerate(zip(cost.stages, shares, strict=True)):
        mega = part.flops / 1e6
        axes.barh(stage, mega, color=STAGE_COLOURS[stage], height=0.62)
        axes.text(mega, stage, f" {mega:.1f}, {share:.0%} of training", va="center", fontsize=8)
    axes.barh(len(cost.stages), whole, color="#c3c8d0", height=0.62)
    axes.text(whole, len(cost.stages), f" {whole:.1f}", va="center", fontsize=8)
    names = [f"stage {stage}" for stage in range(len(cost.stages))]
    axes.set_yticks(range(len(names) + 1), [*names, "unified"])
    axes.set(xlabel="MFLOPs an image", xlim=(0, 1.5 * whole))
    axes.set_title("What does each stage cost?")


def steps(figure: Any, staged: msd.Run) -> None:
    """Estimates of the clean image, in columns between which they change by as much."""
    denoiser, trace = staged.load().denoiser, Trace(ROWS)
    staged.config.sampling.draw(denoiser, consecutive_seeds(0, ROWS), callback=trace)
    kept = evenly_changing(trace.denoised, COLUMNS)
    grid = figure.subplots(ROWS, len(kept), squeeze=False)
    for column, step in enumerate(kept):
        sigma = trace.sigmas[step]
        colour = STAGE_COLOURS[denoiser.stages.of(sigma)]
        grid[0, column].set_title(
            f"{sigma:.0f}" if sigma >= 100 else f"{sigma:.2g}", fontsize=8, loc="center", weight="normal"
        )
        for row in range(ROWS):
            pixels = (trace.denoised[step][row].clamp(-1, 1) + 1) / 2
            shown = pixels.permute(1, 2, 0) if len(pixels) == 3 else pixels[0]
            grid[row, column].imshow(shown.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            grid[row, column].set(xticks=[], yticks=[])
            grid[row, column].spines[:].set(visible=True, color=colour, linewidth=2.2)
    figure.suptitle(
        "What does each stage decide?  Estimates of the image as the noise level sigma falls; frames: stages",
        x=0.01,
        ha="left",
        fontsize=10,
        weight="bold",
    )


def evenly_changing(estimates: list[Tensor], count: int) -> list[int]:
    """Steps between which the estimates change by about as much; the first and the last are among them."""
    change = [float((after - before).square().mean().sqrt()) for before, after in itertools.pairwise(estimates)]
    path = torch.tensor([0.0, *change], dtype=torch.float64).cumsum(0)
    marks = torch.linspace(0, float(path[-1]), count, dtype=torch.float64)
    return sorted({int((path - mark).abs().argmin()) for mark in marks})


if __name__ == "__main__":
    main()
