"""The demo's report: one self-contained HTML file."""

from __future__ import annotations

import itertools
import math
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from multistage_diffusion.clustering.plots import similarity_figure
from multistage_diffusion.data.pictures import STAGE_COLOURS, grid, stack
from multistage_diffusion.files import write_atomic
from multistage_diffusion.stages import Stages
from multistage_diffusion.studies.demo import DemoResult, ModelResult
from multistage_diffusion.studies.drawing import (
    MODEL_STYLE,
    SOFT,
    minus,
    new_figure,
    picture_url,
    plain_numbers,
    svg,
    tip,
)
from multistage_diffusion.studies.pages import render

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TRACED = 5  # images whose denoising is shown
COLUMNS = 10  # steps of it


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
    parts = []
    for name, low, high, error in _pairs(result):
        change = low / high - 1
        word = "lower" if change < 0 else "higher"
        within = "" if abs(low - high) > 2 * error else ", within two standard errors"
        parts.append(f"{name} {low:.3g} against {high:.3g} ({abs(change):.0%} {word}{within})")
    saved = _matched(result)
    reach = (
        f" It reaches the unified model's final held-out loss at {saved:.0%} of its training FLOPs." if saved else ""
    )
    return f"At equal training FLOPs the multistage model has {' and '.join(parts)}.{reach}"


def _pairs(result: DemoResult) -> list[tuple[str, float, float, float]]:
    """Each metric of the multistage and of the unified model at the end, with the error of their difference."""
    multistage, unified = result.models["multistage"].points[-1], result.models["unified"].points[-1]
    difference = result.models["multistage"].image_loss - result.models["unified"].image_loss  # same images and noise
    paired = float(difference.std() / len(difference) ** 0.5)
    distance = math.hypot(multistage.fd_error or 0, unified.fd_error or 0)
    return [
        ("Fréchet distance", multistage.fd, unified.fd, distance),
        ("held-out loss", multistage.loss, unified.loss, paired),
    ]


def _claims(result: DemoResult) -> list[dict[str, Any]]:
    """Each metric of both models with its error, and the difference in per cent with its interval of 95%."""
    rows = []
    ends = [result.models[name].points[-1] for name in result.models]
    errors = ([end.fd_error or 0.0 for end in ends], [end.loss_error for end in ends])
    for (name, low, high, error), own in zip(_pairs(result), errors, strict=True):
        places = 2 if name == "Fréchet distance" else 4
        change, half = low / high - 1, 1.96 * error / high
        rows.append(
            {
                "name": name,
                "values": [
                    {"mean": f"{mean:.{places}f}", "error": f"{each:.{places}f}"}
                    for mean, each in zip((low, high), own, strict=True)
                ],
                "difference": minus(f"{change:+.1%}"),
                "interval": minus(f"{change - half:+.1%} to {change + half:+.1%}"),
                "significant": abs(change) > half,
            }
        )
    return rows


def _spent(result: DemoResult) -> dict[str, list[str]]:
    """What both models cost, by words."""
    models = list(summary(result)["models"].values())
    return {
        "training TFLOPs": [f"{model['training_pflops'] * 1e3:.2f}" for model in models],
        "steps": [f"{model['steps']:,}" for model in models],
        "GFLOPs a sample": [f"{model['gflops_per_sample']:.2f}" for model in models],
    }


def write_report(result: DemoResult, path: Path, command: str) -> None:
    """Write the report.

    Args:
        result: The demo.
        path: The HTML file.
        command: The command that made it, shown in the report.

    Raises:
        CheckpointError: The file cannot be written.
    """
    pictures = {name: model.grid for name, model in result.models.items()} | {"real": result.real}
    document = render(
        "report.html.j2",
        result=result,
        summary=summary(result),
        colours=STAGE_COLOURS,
        claims=_claims(result),
        spent=_spent(result),
        stages=[_range(result.clustering.stages, index) for index in range(len(result.clustering.stages))],
        rows=_cost_rows(result),
        similarity=svg(similarity_figure(result.clustering), page=True),
        quality=[svg(_quality_figure(result, metric), page=True) for metric in ("fd", "loss")],
        grids={
            name: picture_url(grid(images, columns=5, scale=_scale(images, 96), gap=3, smooth=True))
            for name, images in pictures.items()
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


def _range(stages: Stages, index: int) -> str:
    """The noise levels of a stage in words."""
    low, high = stages.bounds(index)
    return f"{low:.3g} to {'∞' if math.isinf(high) else format(high, '.3g')}"


def _scale(images: Tensor, size: int) -> int:
    """The factor that makes an image about so many pixels wide."""
    return max(1, round(size / images.shape[-1]))


def _cost_rows(result: DemoResult) -> list[dict[str, Any]]:
    rows = []
    for name, model in result.models.items():
        stages = Stages(model.config.edges)
        final = model.points[-1].stage_loss
        for index, stage in enumerate(model.cost.stages):
            rows.append(
                {
                    "model": name,
                    "stage": index,
                    "single": len(stages) == 1,
                    "sigma": _range(stages, index),
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
    chosen = [model.trace[index] for index in chosen_steps([images for _, images in model.trace], COLUMNS)]
    frames = [stages.of(sigma) for sigma, _ in chosen]
    images = stack([denoised[:TRACED] for _, denoised in chosen])
    strip = grid(images, columns=len(frames), scale=_scale(images, 96), gap=4, frames=frames * TRACED, smooth=True)
    return {
        **picture_url(strip),
        "steps": len(model.trace),
        "sigmas": [f"{sigma:.0f}" if sigma >= 10 else f"{sigma:.2g}" for sigma, _ in chosen],
    }


def chosen_steps(estimates: Sequence[Tensor], count: int) -> list[int]:
    """Steps of a denoising at equal shares of the way that the estimates go, so that none looks like the one before.

    Args:
        estimates: Estimates of the clean images, one tensor a step.
        count: How many steps at most.

    Returns:
        Their indices, increasing; the first and the last are among them.
    """
    if len(estimates) <= count:
        return list(range(len(estimates)))
    moved = torch.tensor([float((after - before).abs().mean()) for before, after in itertools.pairwise(estimates)])
    way = torch.cat((torch.zeros(1), (moved + 1e-6 * moved.max() + 1e-12).cumsum(0)))
    marks = torch.linspace(0, float(way[-1]), count)
    nearest = torch.cdist(marks[:, None], way[:, None]).argmin(1).tolist()
    return sorted(set(nearest) | {0, len(estimates) - 1})


def _quality_figure(result: DemoResult, metric: str) -> Figure:
    """Fréchet distance or held-out loss against training FLOPs."""
    figure, (axis,) = new_figure(1, 1, 4.3, 3.2)
    words = "Fréchet distance" if metric == "fd" else "held-out denoising loss"
    for name, model in result.models.items():
        spent = [point.tflops for point in model.points]
        colour, marker, line = MODEL_STYLE[name]
        values = [point.fd if metric == "fd" else point.loss for point in model.points]
        errors = [(point.fd_error if metric == "fd" else point.loss_error) or 0.0 for point in model.points]
        axis.errorbar(
            spent, values, yerr=errors, color=colour, marker=marker, linestyle=line, markersize=5, capsize=3, label=name
        )
        for x, value, error in zip(spent, values, errors, strict=True):
            suffix = f" ± {error:.2g}" if error else ""
            tip(axis, x, value, f"{name}: {words} {value:.4g}{suffix} at {x:.3g} TFLOPs")
    if metric == "fd":
        axis.axhline(result.floor, color=SOFT, linewidth=0.8, linestyle=":", label="training images themselves")
        tip(axis, result.models["unified"].points[0].tflops, result.floor, f"training images: {result.floor:.3g}")
    axis.set(xlabel="training TFLOPs", ylabel=words, yscale="log", xlim=(0, None))
    plain_numbers(axis)
    axis.legend(frameon=False, fontsize=9)
    return figure
