"""The demo's report: one self-contained HTML file."""

from __future__ import annotations

import itertools
import math
import platform
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from multistage_diffusion.clustering.plots import similarity_figure
from multistage_diffusion.data.pictures import STAGE_COLOURS, grid, stack
from multistage_diffusion.files import write_atomic
from multistage_diffusion.stages import Stages
from multistage_diffusion.studies.demo import DemoResult, ModelResult
from multistage_diffusion.studies.drawing import MODEL_STYLE, SOFT, new_figure, picture_url, svg
from multistage_diffusion.text import page_environment

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TRACED = 6  # images whose denoising is shown


def summary(result: DemoResult) -> dict[str, Any]:
    """The demo's figures as a JSON document.

    Returns:
        `stages`, `models.<architecture>.{fd, val_loss, gflops, training_pflops}`, `verdict`, `features`, `seconds`.
    """
    models = {}
    for name, model in result.models.items():
        last = model.points[-1]
        models[name] = {
            "fd": last.fd,
            "fd_error": last.fd_error,
            "val_loss": last.loss,
            "val_loss_error": last.loss_error,
            "stage_val_loss": list(last.stage_loss),
            "gflops": model.cost.flops(model.shares) / 1e9,
            "training_pflops": last.tflops / 1e3,
            "steps": model.steps,
            "parameters": model.cost.parameters,
            "nfe": model.nfe,
            "gflops_per_sample": model.sampling_gflops,
            "training_seconds": round(model.seconds, 1),
            "run": str(model.run),
        }
    edges = result.clustering.stages.edges
    return {
        "source": result.source,
        "stages": {"edges": list(edges), "edges_t": list(result.clustering.edges_t)},
        "models": models,
        "verdict": verdict(result),
        "features": result.features,
        "fd_of_training_images": result.floor,
        "seconds": round(result.seconds, 1),
    }


def verdict(result: DemoResult) -> str:
    """One sentence on which model is ahead at the end, and whether the difference is larger than its error.

    Returns:
        The sentence; it says so when the figures favour the unified model, or neither.
    """
    multistage, unified = result.models["multistage"].points[-1], result.models["unified"].points[-1]
    difference = result.models["multistage"].image_loss - result.models["unified"].image_loss  # same images and noise
    paired = float(difference.std() / len(difference) ** 0.5)
    parts = []
    for name, low, high, error in (
        ("Fréchet distance", multistage.fd, unified.fd, math.hypot(multistage.fd_error or 0, unified.fd_error or 0)),
        ("held-out loss", multistage.loss, unified.loss, paired),
    ):
        change = low / high - 1
        word = "lower" if change < 0 else "higher"
        within = "" if abs(low - high) > 2 * error else ", within two standard errors"
        parts.append(f"{name} {low:.3g} against {high:.3g} ({abs(change):.0%} {word}{within})")
    saved = _matched(result)
    reach = (
        f" It reaches the unified model's final held-out loss at {saved:.0%} of its training FLOPs." if saved else ""
    )
    return f"At equal training FLOPs the multistage model has {' and '.join(parts)}.{reach}"


def write_report(result: DemoResult, path: Path, command: str) -> None:
    """Write the report.

    Args:
        result: The demo.
        path: The HTML file.
        command: The command that made it, shown in the report.

    Raises:
        CheckpointError: The file cannot be written.
    """
    source = files("multistage_diffusion.studies").joinpath("report.html.j2").read_text()
    environment = page_environment()
    pictures = {name: model.grid for name, model in result.models.items()} | {"real": result.real}
    document = environment.from_string(source).render(
        result=result,
        summary=summary(result),
        colours=STAGE_COLOURS,
        rows=_cost_rows(result),
        similarity=svg(similarity_figure(result.clustering)),
        quality=svg(_quality_figure(result)),
        grids={
            name: picture_url(grid(images, columns=8, scale=8, gap=4, smooth=True)) for name, images in pictures.items()
        },
        trace=_trace(result.models["multistage"]),
        command=command,
        versions={
            "multistage-diffusion": version("multistage-diffusion"),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        threads=torch.get_num_threads(),
    )
    write_atomic(path, document.encode())


def _matched(result: DemoResult) -> float | None:
    """Share of the unified model's FLOPs at which the multistage one reaches its final loss, interpolated."""
    target = result.models["unified"].points[-1]
    points = result.models["multistage"].points
    for before, after in itertools.pairwise(points):
        if before.loss > target.loss >= after.loss:
            place = (math.log(before.loss) - math.log(target.loss)) / (math.log(before.loss) - math.log(after.loss))
            return (before.tflops + place * (after.tflops - before.tflops)) / target.tflops
    return points[0].tflops / target.tflops if points[0].loss <= target.loss else None


def _cost_rows(result: DemoResult) -> list[dict[str, Any]]:
    rows = []
    for name, model in result.models.items():
        stages = Stages(model.config.edges)
        final = model.points[-1].stage_loss
        for index, stage in enumerate(model.cost.stages):
            low, high = stages.bounds(index)
            rows.append(
                {
                    "model": name,
                    "stage": index,
                    "single": len(stages) == 1,
                    "sigma": f"{low:.3g} to {'∞' if math.isinf(high) else format(high, '.3g')}",
                    "decoder": model.cost.decoders[index] / 1e6,
                    "parameters": stage.parameters / 1e6,
                    "mflops": stage.flops / 1e6,
                    "share": model.shares[index],
                    "images": model.stage_images[index],
                    "spent": model.stage_images[index] * stage.training_flops / 1e12,
                    "loss": final[index] if len(stages) > 1 else model.points[-1].loss,
                }
            )
    return rows


def _trace(model: ModelResult) -> dict[str, Any]:
    """A row an image, a column a step: PNGs with frames in the colour of the step's stage."""
    stages = Stages(model.config.edges)
    frames = [stages.of(sigma) for sigma, _ in model.trace]
    images = stack([denoised[:TRACED] for _, denoised in model.trace])
    strip = grid(images, columns=len(frames), scale=5, gap=2, frames=frames * TRACED, smooth=True)
    return {
        **picture_url(strip),
        "sigmas": [f"{sigma:.0f}" if sigma >= 10 else f"{sigma:.2g}" for sigma, _ in model.trace],
    }


def _quality_figure(result: DemoResult) -> Figure:
    """Fréchet distance and held-out loss against training FLOPs."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure, axes = new_figure(1, 2, 7.6, 3.1)
    for name, model in result.models.items():
        spent = [point.tflops for point in model.points]
        colour, marker, line = MODEL_STYLE[name]
        fd, loss = [point.fd for point in model.points], [point.loss for point in model.points]
        errors = [point.loss_error for point in model.points]
        axes[0].plot(spent, fd, color=colour, marker=marker, linestyle=line, markersize=4, label=name)
        axes[0].errorbar(spent[-1], fd[-1], yerr=model.points[-1].fd_error or 0, color=colour, capsize=3)
        axes[1].errorbar(spent, loss, yerr=errors, color=colour, marker=marker, linestyle=line, markersize=4, capsize=2)
    axes[0].axhline(result.floor, color=SOFT, linewidth=0.8)
    axes[0].text(
        0.98,
        result.floor,
        "training images",
        color=SOFT,
        fontsize=8,
        va="bottom",
        ha="right",
        transform=axes[0].get_yaxis_transform(),
    )
    axes[0].set(xlabel="training TFLOPs", ylabel="Fréchet distance", yscale="log", xlim=(0, None))
    axes[1].set(xlabel="training TFLOPs", ylabel="held-out denoising loss", yscale="log", xlim=(0, None))
    for axis in axes:
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if axis is axes[0] else (1, 1.2, 1.5, 2, 3, 5)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
    axes[0].legend(frameon=False, fontsize=8)
    return figure
