"""`msd cluster`: find the stages of a data set."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from multistage_diffusion.cli.common import Reads, prepare
from multistage_diffusion.clustering.options import PAPER, ClusterOptions
from multistage_diffusion.config import DataConfig, check
from multistage_diffusion.errors import ConfigError
from multistage_diffusion.recipes import recipe
from multistage_diffusion.records import check_needs

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from multistage_diffusion.clustering import Clustering
    from multistage_diffusion.data.examples import Examples
    from multistage_diffusion.denoiser import Denoiser
    from multistage_diffusion.noise import Process
    from multistage_diffusion.process_group import ProcessGroup


_MINUTES = 30.0  # that processes wait for one another's shares


@dataclass(frozen=True, kw_only=True)
class Options(Reads):
    """Cut the noise levels of a data set into stages, by the exact denoiser of its images or by a baseline.

    Example: msd cluster fashion-mnist --process vp --stages 3 --out stages.json
    """

    source: tyro.conf.Positional[str]
    """Source of the images, like digits, fashion-mnist or folder:PATH."""
    process: Literal["vp", "vp-cosine", "ve", "edm", "ldm", "flow"] = "vp"
    """Process that will be trained."""
    clustering: Annotated[ClusterOptions, tyro.conf.arg(name="")] = field(default_factory=ClusterOptions)
    paper: bool = False
    """The published reading: images in [0, 1], eta 2/256, alpha 0.9, data-mean, averages over time."""
    run: Annotated[str | None, tyro.conf.arg(metavar="RUN")] = None
    """Unified run whose gradients the method gradient compares; by default a short run of its own."""
    proxy_steps: int = 300
    """Steps of that short run, and of each proxy run of --allocate."""
    allocate: Annotated[float | None, tyro.conf.arg(metavar="BUDGET")] = None
    """Choose decoder widths too, from short proxy runs, under a budget: training PFLOPs in all, sampling GFLOPs of an
    image, or seconds of training on this machine."""
    allocate_for: Literal["training", "sampling", "seconds"] = "training"
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


def run(options: Options, console: Console) -> dict[str, Any]:
    """Find the stages, print a table, write the files of --out, --plot and --strip.

    Args:
        options: The command's options.
        console: Where the table goes.

    Returns:
        The JSON document; none but the first of several processes has it.
    """
    options = _checked(options)
    config = options.data(options.source, options.resolution, options.autoencoder)
    device = prepare(options)
    import torch

    from multistage_diffusion.cli.progress import encoding_progress
    from multistage_diffusion.data.latents import load_examples
    from multistage_diffusion.process_group import join

    with join(torch.device("cpu"), _MINUTES) as processes:  # only small results travel
        with processes.local_main_first():  # latents are encoded once
            data = load_examples(config, device, encoding_progress(console))
        clustering = _cluster(options, data, device, console, processes)
    if not processes.is_main:
        return {}  # the first process writes and prints
    _draw(options, data, clustering)
    allocation = None if options.allocate is None else _allocate(options, config, data, clustering, device, console)
    if options.out is not None:
        stages = clustering.stages
        replace(stages, provenance={**stages.provenance, **(allocation or {})}).save(options.out)
    document = {**_document(options, clustering), **(allocation or {})}
    _print(document, console)
    return document


def _checked(options: Options) -> Options:
    """The options with --paper spelled out; conflicts are refused before anything is read or trained."""
    criteria = options.clustering
    method = criteria.method
    check_needs(options.run is None or method == "gradient", "run", "method gradient", method)
    check_needs(options.plot is None or method == "optimal-denoiser", "plot", "method optimal-denoiser", method)
    pictures = {
        "method gradient": method == "gradient",
        "allocate": options.allocate is not None,
        "paper": options.paper,
    }
    for other, given in pictures.items():
        if options.autoencoder is not None and given:
            raise ConfigError(f"--{other} needs pictures, not latents of --autoencoder; leave one of the two out")
    if options.allocate is not None:
        check(options.allocate > 0, "allocate", "positive", options.allocate)
        kind = recipe(options.recipe or options.source).process.kind
        check_needs(options.process == kind, "allocate", f"process {kind}, that of the recipe", options.process)
    if not options.paper:
        return options
    for name, value in PAPER.items():
        given = getattr(criteria, name)
        check_needs(given in (value, getattr(ClusterOptions(), name)), "paper", f"{name} {value}", given)
    return replace(options, clustering=replace(criteria, **PAPER))


def _cluster(
    options: Options, data: Examples, device: torch.device, console: Console, processes: ProcessGroup
) -> Clustering:
    """Call the library, with a progress bar."""
    from rich.progress import Progress

    from multistage_diffusion.clustering import cluster
    from multistage_diffusion.noise import process_by_kind

    process = process_by_kind(options.process)
    network = _network(options, data, process, device) if options.clustering.method == "gradient" else None
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("comparing denoisers", total=None)
        return cluster(
            data,
            process,
            options.clustering,
            denoiser=network,
            device=device,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
            processes=processes,
        )


def _allocate(
    options: Options,
    source: DataConfig,
    data: Examples,
    clustering: Clustering,
    device: torch.device,
    console: Console,
) -> dict[str, Any]:
    """Decoder widths under the budget, from proxy runs of a recipe on these stages."""
    from multistage_diffusion.allocation import allocate
    from multistage_diffusion.config import StagesConfig
    from multistage_diffusion.data import Images

    base, edges = recipe(options.recipe or options.source), clustering.stages.edges
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


def _draw(options: Options, data: Examples, clustering: Clustering) -> None:
    """The figures of --plot and --strip."""
    from multistage_diffusion.clustering import plots
    from multistage_diffusion.clustering.find import choose_images

    if options.plot is not None:
        plots.save(plots.similarity_figure(clustering), options.plot)
    if options.strip is not None:
        seed = options.clustering.seed
        images, _ = choose_images(data, options.clustering.max_images, seed)
        plots.save(plots.strip_figure(images, clustering.stages, clustering.process, seed=seed), options.strip)


def _network(options: Options, data: Examples, process: Process, device: torch.device) -> Denoiser:
    """The trained network whose gradients are compared: a run's, or a small unified one trained for a moment."""
    from multistage_diffusion.config import DataConfig, ModelConfig, RunConfig, TrainingConfig
    from multistage_diffusion.runs import load_run
    from multistage_diffusion.training.run import build_trainer

    if options.run is not None:
        denoiser = load_run(options.run, device=device).denoiser
        unified = len(denoiser.stages) == 1
        check(unified, "run", "a unified run, so that all noise levels share their weights", options.run)
        same = denoiser.process == process and denoiser.shape == data.shape
        check(same, "run", f"of the process {options.process} on images of shape {data.shape}", options.run)
        return denoiser
    multipliers = (1, 2) if data.shape[1] % 2 == data.shape[2] % 2 == 0 else (1,)
    model = ModelConfig(
        architecture="unified",
        width=16,
        decoder_widths=(16,),
        multipliers=multipliers,
        blocks=1,
        attention=(),
        dropout=0.0,
    )
    training = TrainingConfig(
        steps=options.proxy_steps,
        batch_size=64,
        learning_rate=2e-3,
        warmup_images=3_200,
        ema_half_life=3_200.0,
        seed=options.clustering.seed,
    )
    config = RunConfig(data=DataConfig(source=data.name), process=process, model=model, training=training)
    trainer = build_trainer(config, data, device=device)
    for _ in trainer.run(options.proxy_steps):
        pass
    return trainer.averaged()


def _document(options: Options, clustering: Clustering) -> dict[str, Any]:
    record = clustering.stages.provenance
    return {
        "edges": list(clustering.stages.edges),
        "edges_t": list(clustering.edges_t),
        "intervals": record["intervals"],
        "intervals_t": record["intervals_t"],
        "method": record["method"],
        "objective": record["objective"],
        "process": options.process,
        "images": record["data"]["images"],
        "extrapolation": record["extrapolation"],
        "elbow": list(clustering.elbow),
        "effective_images": [{"sigma": sigma, "images": count} for sigma, count in clustering.effective],
        "shares": clustering.shares,
        "out": None if options.out is None else str(options.out),
        "seconds": clustering.seconds,
    }


def _print(document: dict[str, Any], console: Console) -> None:
    """A row an edge, then what the stages hold."""
    from rich.table import Table

    title = f"{document['process']}, {document['method']}, {document['images']} images"
    table = Table(title=title, title_justify="left")
    for heading in ("edge", "sigma", "95% interval", "t", "95% interval"):
        table.add_column(heading, justify="right")
    blank = [None] * len(document["edges"])
    columns = (
        document["edges"],
        document["intervals"] or blank,
        document["edges_t"],
        document["intervals_t"] or blank,
    )
    for number, (sigma, bounds, t, bounds_t) in enumerate(zip(*columns, strict=True), 1):
        table.add_row(str(number), f"{sigma:.4f}", _span(bounds), f"{t:.4f}", _span(bounds_t))
    console.print(table)
    shares = ", ".join(f"{share:.1%}" for share in document["shares"])
    console.print(f"training draws in each stage, low to high noise: {shares}")
    if document["extrapolation"] is not None:
        sizes = ", ".join(str(size) for size in document["extrapolation"]["sizes"])
        console.print(f"edge 1 extrapolated in ln N from {sizes} images to {document['images']}")
    if "decoder_widths" in document:
        widths, allocation = document["decoder_widths"], document["allocation"]
        console.print(
            f"decoder widths {', '.join(map(str, widths))}: expected loss {allocation['loss']:.4f}, for equal ones of "
            f"the encoder's width {allocation['equal_loss']:.4f}, at {allocation['budget']:g} {allocation['unit']}"
        )
    written = f"; written to {document['out']}" if document["out"] else ""
    console.print(f"{document['seconds']:.1f} s{written}")


def _span(bounds: list[float] | None) -> str:
    return "-" if bounds is None else f"{bounds[0]:.4f} to {bounds[1]:.4f}"
