"""`msd cluster`: find the stages of a data set."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from multistage_diffusion.cli.common import Reads, prepare
from multistage_diffusion.config import DataConfig, check
from multistage_diffusion.recipes import recipe

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from multistage_diffusion.clustering import Clustering
    from multistage_diffusion.data.examples import Examples
    from multistage_diffusion.denoiser import Denoiser
    from multistage_diffusion.noise import Process


_MINUTES = 30.0  # that processes wait for one another's shares


@dataclass(frozen=True, kw_only=True)
class Options(Reads):
    """Cut the noise levels of a data set into stages, by the exact denoiser of its images or by a baseline.

    Example: msd cluster fashion-mnist --process vp --stages 3 --eta 0.0078125 --alpha 0.9 --out stages.json
    """

    source: tyro.conf.Positional[str]
    """Source of the images, like digits, fashion-mnist or folder:PATH."""
    process: Literal["vp", "vp-cosine", "ve", "edm", "ldm", "flow"] = "vp"
    """Process that will be trained."""
    method: Literal["optimal-denoiser", "timestep", "snr", "gradient"] = "optimal-denoiser"
    """Compare optimal denoisers, or a baseline: uniform in time, log-SNR, gradients of a network."""
    stages: int = 3
    """Number of stages, 2 to 8."""
    eta: float = 2 / 256
    """Largest difference of optimal noise predictions that counts as similar."""
    alpha: float = 0.9
    """Least mean similarity of an outer stage to its end."""
    samples: int | None = None
    """Number of draws of image, noise and noise level; by default 4000, or 16000 for a matrix."""
    reference: Literal["data-mean", "definition"] = "data-mean"
    """What the high-noise end is: the constant denoiser (the paper's code) or the denoiser there (its text)."""
    measure: Literal["time", "log-sigma", "training"] = "time"
    """What averages over noise levels are taken in: the process's time, log sigma, its training distribution."""
    objective: Literal["crossing", "similarity", "variance"] | None = None
    """crossing: Algorithm 1, three stages; similarity, variance: exact partition of a matrix over noise levels. By
    default crossing for three stages, else variance."""
    paper: bool = False
    """The published reading: images in [0, 1], eta 2/256, alpha 0.9, data-mean, averages over time."""
    by_class: bool = False
    """Take posteriors within each image's class, for class-conditional models."""
    max_images: int | None = None
    """Use at most so many images, chosen by --seed; the lower edge of Algorithm 1 is extrapolated to all of them."""
    run: Annotated[str | None, tyro.conf.arg(metavar="RUN")] = None
    """Unified run whose gradients the method gradient compares; by default a short run of its own."""
    proxy_steps: int = 300
    """Steps of that short run, and of each proxy run of --allocate."""
    allocate: Annotated[float | None, tyro.conf.arg(metavar="BUDGET")] = None
    """Choose decoder widths too, from short proxy runs, under a budget: training PFLOPs in all, or sampling GFLOPs."""
    allocate_for: Literal["training", "sampling"] = "training"
    """What the budget of --allocate is for: training in all, or drawing one image with the recipe's sampler."""
    recipe: str | None = None
    """Recipe whose network and training the proxy runs take; by default the one named like the source."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Write the stages to this file, for msd train --stages FILE."""
    plot: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Draw the similarity with the edges into this file (png, svg or pdf)."""
    strip: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Draw what the optimal denoiser sees of a few images along the noise levels into this file."""
    resolution: int | None = None
    """Resize the images to this many pixels a side."""
    autoencoder: str | None = None
    """Cluster the latents of this autoencoder, which must be that of the run (data.autoencoder)."""
    seed: int = 0
    """Seed of all draws."""


def run(options: Options, console: Console) -> dict[str, Any]:
    """Find the stages, print a table, write the files asked for.

    Args:
        options: The command's options.
        console: Where the table goes.

    Returns:
        The JSON document; none but the first of several processes has it.
    """
    # What can be refused at once is, before anything is read or trained.
    check(2 <= options.stages <= 8, "stages", "from 2 to 8", options.stages)
    check(not options.by_class or options.method == "optimal-denoiser", "by-class", "used with optimal-denoiser", True)
    check(options.run is None or options.method == "gradient", "run", "used with the method gradient", options.run)
    check(
        options.plot is None or options.method == "optimal-denoiser", "plot", "used with optimal-denoiser", options.plot
    )
    if options.allocate is not None:
        check(options.allocate > 0, "allocate", "positive", options.allocate)
        recipe(options.recipe or options.source)
    latents_only = options.method != "gradient" and options.allocate is None and not options.paper
    check(options.autoencoder is None or latents_only, "autoencoder", "used without gradient, allocate and paper",
          options.autoencoder)  # fmt: skip
    config = options.data(options.source, options.resolution, options.autoencoder)
    device = prepare(options)
    import torch

    from multistage_diffusion.cli.progress import encoding_progress
    from multistage_diffusion.data.latents import load_examples
    from multistage_diffusion.process_group import join

    with join(torch.device("cpu"), _MINUTES) as processes:  # only small results travel
        with processes.local_main_first():  # latents are encoded once
            data = load_examples(config, device, encoding_progress(console))
        check(not options.by_class or data.labels is not None, "by-class", "used with a source that has classes", True)
        found = _cluster(options, data, device, console)
    if not processes.is_main:
        return {}  # the first process writes and prints
    _draw(options, data, found)
    allocation = None if options.allocate is None else _allocate(options, config, data, found, device, console)
    if options.out is not None:
        replace(found.stages, provenance={**found.stages.provenance, **(allocation or {})}).save(options.out)
    document = {**_document(options, found), **(allocation or {})}
    _print(document, console)
    return document


def _cluster(options: Options, data: Examples, device: torch.device, console: Console) -> Clustering:
    """Call the library, with a progress bar."""
    from rich.progress import Progress

    from multistage_diffusion.clustering import cluster
    from multistage_diffusion.noise import process_by_kind

    process = process_by_kind(options.process)
    network = _network(options, data, process, device) if options.method == "gradient" else None
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("comparing denoisers", total=None)
        found = cluster(
            data,
            process,
            method=options.method,
            stages=options.stages,
            eta=2 / 256 if options.paper else options.eta,
            alpha=0.9 if options.paper else options.alpha,
            samples=options.samples,
            reference="data-mean" if options.paper else options.reference,
            measure="time" if options.paper else options.measure,
            objective=options.objective,
            unit_range=options.paper,
            labels=data.labels if options.by_class else None,
            max_images=options.max_images,
            seed=options.seed,
            denoiser=network,
            device=device,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    return found


def _allocate(
    options: Options, source: DataConfig, data: Examples, found: Clustering, device: torch.device, console: Console
) -> dict[str, Any]:
    """Decoder widths under the budget, from proxy runs of a recipe on these stages."""
    from multistage_diffusion.allocation import allocate
    from multistage_diffusion.config import StagesConfig
    from multistage_diffusion.data import Images

    base = recipe(options.recipe or options.source)
    check(
        base.process.kind == options.process, "process", f"{base.process.kind}, the recipe's, with allocate",
        options.process,
    )  # fmt: skip
    edges = found.stages.edges
    model = base.model.with_capacities((base.model.capacity,) * (len(edges) + 1))
    config = replace(base, data=source, stages=StagesConfig(edges=edges), model=model)
    assert options.allocate is not None and isinstance(data, Images)  # latents were refused
    choice = allocate(
        config,
        data,
        options.allocate,
        options.allocate_for,
        steps=options.proxy_steps,
        device=device,
        say=console.print,
    )
    return choice.to_dict()


def _draw(options: Options, data: Examples, found: Clustering) -> None:
    """The pictures asked for."""
    from multistage_diffusion.clustering import plots
    from multistage_diffusion.clustering.find import chosen

    if options.plot is not None:
        plots.save(plots.similarity_figure(found), options.plot)
    if options.strip is not None:
        images, _ = chosen(data, options.max_images, options.seed)
        figure = plots.strip_figure(images, found.stages, found.process, seed=options.seed)
        plots.save(figure, options.strip)


def _network(options: Options, data: Examples, process: Process, device: torch.device) -> Denoiser:
    """The trained network whose gradients are compared: a run's, or a small unified one trained for a moment."""
    from multistage_diffusion.config import DataConfig, ModelConfig, RunConfig, TrainingConfig
    from multistage_diffusion.runs import load_run
    from multistage_diffusion.training.run import build_trainer

    if options.run is not None:
        denoiser = load_run(options.run, device=device).denoiser
        check(
            len(denoiser.stages) == 1, "run", "a unified run, so that all noise levels share their weights", options.run
        )
        same = denoiser.process == process and denoiser.shape == data.shape
        check(same, "run", f"of the process {options.process} on images of shape {data.shape}", options.run)
        return denoiser
    multipliers = (1, 2) if data.shape[1] % 2 == data.shape[2] % 2 == 0 else (1,)
    model = ModelConfig(
        architecture="unified", width=16, decoder_widths=(16,), multipliers=multipliers, blocks=1, attention=(),
        dropout=0.0,
    )  # fmt: skip
    training = TrainingConfig(
        steps=options.proxy_steps, batch_size=64, learning_rate=2e-3, warmup_images=3_200, ema_half_life=3_200.0,
        seed=options.seed,
    )  # fmt: skip
    config = RunConfig(data=DataConfig(source=data.name), process=process, model=model, training=training)
    trainer = build_trainer(config, data, device=device)
    for _ in trainer.run(options.proxy_steps):
        pass
    return trainer.averaged()


def _document(options: Options, found: Clustering) -> dict[str, Any]:
    record = found.stages.provenance
    return {
        "edges": list(found.stages.edges),
        "edges_t": list(found.edges_t),
        "intervals": record["intervals"],
        "intervals_t": record["intervals_t"],
        "method": options.method,
        "objective": record["objective"],
        "process": options.process,
        "images": record["data"]["images"],
        "extrapolation": record["extrapolation"],
        "elbow": list(found.elbow),
        "effective_images": [{"sigma": sigma, "images": count} for sigma, count in found.effective],
        "shares": found.shares,
        "out": None if options.out is None else str(options.out),
        "seconds": found.seconds,
    }


def _print(document: dict[str, Any], console: Console) -> None:
    """A row an edge, then what the stages hold."""
    from rich.table import Table

    table = Table(
        title=f"{document['process']}, {document['method']}, {document['images']} images", title_justify="left"
    )
    for heading in ("edge", "sigma", "95% interval", "t", "95% interval"):
        table.add_column(heading, justify="right")
    blank = [None] * len(document["edges"])
    rows = zip(document["edges"], document["intervals"] or blank, document["edges_t"],
               document["intervals_t"] or blank, strict=True)  # fmt: skip
    for number, (sigma, bounds, t, bounds_t) in enumerate(rows, 1):
        table.add_row(str(number), f"{sigma:.4f}", _span(bounds), f"{t:.4f}", _span(bounds_t))
    console.print(table)
    shares = ", ".join(f"{share:.1%}" for share in document["shares"])
    console.print(f"training draws in each stage, low to high noise: {shares}")
    if document["extrapolation"] is not None:
        sizes = ", ".join(str(size) for size in document["extrapolation"]["sizes"])
        console.print(f"edge 1 extrapolated in ln N from {sizes} images to {document['images']}")
    if "decoder_widths" in document:
        widths, told = document["decoder_widths"], document["allocation"]
        console.print(
            f"decoder widths {', '.join(map(str, widths))}: expected loss {told['loss']:.4f}, for equal ones of the "
            f"encoder's width {told['equal_loss']:.4f}, at {told['budget']:g} {told['unit']}"
        )
    written = f"; written to {document['out']}" if document["out"] else ""
    console.print(f"{document['seconds']:.1f} s{written}")


def _span(bounds: list[float] | None) -> str:
    return "-" if bounds is None else f"{bounds[0]:.4f} to {bounds[1]:.4f}"
