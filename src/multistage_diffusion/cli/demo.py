"""`msd demo`: the main job on the embedded digits, with a report."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from multistage_diffusion.cli.common import Compute, prepare
from multistage_diffusion.recipes import recipe

if TYPE_CHECKING:
    from multistage_diffusion.training.trainer import StepResult


@dataclass(frozen=True, kw_only=True)
class Options(Compute):
    """The main job on real images, with a report.

    Clusters the noise levels, trains a multistage and a unified model at equal training FLOPs, samples both, evaluates
    both on held-out images and writes report.html. A few minutes on two CPU cores; an interrupted demo goes on where it
    was.

    example: msd demo --out runs/demo
    """

    out: str = "runs/demo"
    """Folder for the two runs and the report."""
    recipe: str = "digits"
    """Recipe of the multistage model; the unified one differs in its architecture alone."""
    tflops: float = 6.0
    """Training budget of each model, in TFLOPs."""
    points: int = 5
    """How many times each model is measured on its way."""
    samples: int = 500
    """Generated images behind each Fréchet distance."""
    seed: int = 0
    """Seed of weights, data order, noise and images."""
    quick: bool = False
    """See only that everything works, with figures that mean nothing: 0.2 TFLOPs, 2 points, 100 images."""


def run(options: Options, console: Console) -> dict[str, Any]:
    """Do the main job."""
    config = recipe(options.recipe)
    device = prepare(options)

    from multistage_diffusion.cli.progress import training_progress
    from multistage_diffusion.studies.demo import DemoOptions, run_demo
    from multistage_diffusion.studies.report import summary, write_report

    out = Path(options.out)
    tflops, points, samples = (0.2, 2, 100) if options.quick else (options.tflops, options.points, options.samples)
    demo_options = DemoOptions(tflops=tflops, points=points, samples=samples, seed=options.seed)
    with contextlib.ExitStack() as stack:

        def on_step(architecture: str) -> Callable[[StepResult, int], None]:
            stack.close()  # the bar of the model before
            return stack.enter_context(training_progress(console, config.training, architecture))

        result = run_demo(config, out, demo_options, device=device, say=console.print, on_step=on_step)
    report = out / "report.html"
    write_report(result, report, f"msd demo --recipe {options.recipe} --tflops {tflops:g} --seed {options.seed}")
    document = {**summary(result), "report": str(report)}
    table = Table("model", "steps", "training TFLOPs", "GFLOPs an image", "Fréchet distance", "held-out loss")
    for name, model in document["models"].items():
        table.add_row(
            name,
            str(model["steps"]),
            f"{model['training_pflops'] * 1e3:.2f}",
            f"{model['gflops']:.4f}",
            f"{model['fd']:.2f} ± {model['fd_error']:.2f}",
            f"{model['val_loss']:.4f} ± {model['val_loss_error']:.4f}",
        )
    console.print(table)
    console.print(document["verdict"])
    console.print(f"report: {report}  ({result.seconds:.0f} s)")
    return document
