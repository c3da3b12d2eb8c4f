"""`msd profile`: parameters and FLOPs of a preset or a run, stage by stage."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table

from multistage_diffusion.cli.common import Common
from multistage_diffusion.config import Architecture, RunConfig, Sampler, from_dict, to_dict
from multistage_diffusion.errors import ConfigError
from multistage_diffusion.files import read_json
from multistage_diffusion.recipes import Preset, preset, recipe


@dataclass(frozen=True, kw_only=True)
class Options(Common):
    """Parameters and FLOPs, stage by stage, counted on every matrix product and convolution of one image.

    FLOPs an image are weighted over stages in three ways: time (length of a stage's interval in the process's time),
    training (its probability under the training distribution), sampling (its share of the sampler's calls).

    example: msd profile vp-cifar10 --architecture multistage
    """

    target: tyro.conf.Positional[str]
    """Preset, or run directory."""
    architecture: Architecture | None = None
    """Architecture in place of the preset's or the run's own."""
    paper: bool = False
    """Show the paper's GFLOPs too: multiply-accumulates of convolutions and linear layers outside attention."""


def run(options: Options, console: Console) -> dict[str, Any]:
    """Count.

    Args:
        options: The command's options.
        console: Where people read.

    Returns:
        The command's document.
    """
    target, sampling = _target(options.target, options.architecture)
    document = count(options.target, target, sampling)
    _show(document, options, console)
    return document


def count(name: str, target: Preset, sampling: Sampler) -> dict[str, Any]:
    """The document: parameters and FLOPs of a network, and its stages' shares.

    Args:
        name: What messages call it.
        target: The network with its process and edges.
        sampling: Whose calls weigh the stages.

    Raises:
        ConfigError: The network has not a decoder for each stage.
    """
    from multistage_diffusion.clustering.levels import time_shares
    from multistage_diffusion.metrics.cost import network_cost
    from multistage_diffusion.stages import Stages

    unified = target.model.architecture == "unified"
    if not unified and len(target.model.capacities) != len(target.edges) + 1:
        raise ConfigError(
            f"{name} has {len(target.model.capacities)} model.{target.model.capacity_option} for "
            f"{len(target.edges) + 1} stages; profile it with --architecture unified"
        )
    cost = network_cost(target.model, target.shape)
    stages = Stages() if unified else Stages(target.edges)
    shares = {
        "training": stages.shares(target.process),
        "time": time_shares(target.process, stages),
        "sampling": sampling.shares(target.process, stages),
    }
    rows = [
        {
            "stage": index,
            "sigma": [None if value == float("inf") else value for value in stages.bounds(index)],
            "parameters": stage.parameters,
            "gmacs": stage.gmacs,
            "gflops": stage.flops / 1e9,
            "training_gflops": stage.training_flops / 1e9,
            "paper_gflops": stage.paper_gflops,
            "share": {name: values[index] for name, values in shares.items()},
        }
        for index, stage in enumerate(cost.stages)
    ]
    return {
        "target": name,
        "architecture": target.model.architecture,
        "process": to_dict(target.process),
        "shape": list(target.shape),
        "sampling": to_dict(sampling),
        "parameters": {"total": cost.parameters, "encoder": cost.encoder, "decoders": list(cost.decoders)},
        "stages": rows,
        "gflops": cost.flops(shares["training"]) / 1e9,
        "weighted_gflops": {name: cost.flops(values) / 1e9 for name, values in shares.items()},
        "weighted_paper_gflops": {name: cost.paper_gflops(values) for name, values in shares.items()},
    }


def _target(name: str, architecture: Architecture | None) -> tuple[Preset, Sampler]:
    """A preset with its recipe's sampler, or the network of a run with the run's own."""
    if not (Path(name) / "config.json").is_file():
        return preset(name, architecture), recipe(name, architecture).sampling
    sampling, document = Sampler(), read_json(Path(name) / "config.json")
    if isinstance(document, dict) and "format" in document:
        from multistage_diffusion.denoiser import Denoiser

        denoiser = Denoiser.from_pretrained(name)
        model, process = denoiser.backbone, denoiser.process
        edges, shape, sampling = denoiser.stages.edges, denoiser.shape, denoiser.sampler or sampling
    else:
        from multistage_diffusion.runs.checkpoints import newest_state

        config = from_dict(RunConfig, document, f"{name}/config.json")
        model, process, edges, sampling = config.model, config.process, config.stages.edges, config.sampling
        size = newest_state(Path(name))["shape"]
        shape = (size[0], size[1], size[2])
    if architecture is not None:
        model = replace(model, architecture=architecture)
    return Preset(model=model, process=process, shape=shape, edges=edges), sampling


def _show(document: dict[str, Any], options: Options, console: Console) -> None:
    parameters = document["parameters"]
    channels, height, width = document["shape"]
    console.print(
        f"{options.target}, {document['architecture']}, {channels}x{height}x{width}: "
        f"{parameters['total'] / 1e6:.2f} M parameters, {parameters['encoder'] / 1e6:.2f} M in the encoder"
    )
    table = Table("stage", "sigma", "decoder M", "in use M", "GMACs", "GFLOPs", "time", "training", "sampling")
    if options.paper:
        table.add_column("paper's GFLOPs")
    for row, decoder in zip(document["stages"], parameters["decoders"], strict=True):
        low, high = row["sigma"]
        cells = [
            str(row["stage"]),
            f"{low:.4g} to {'inf' if high is None else format(high, '.4g')}",
            f"{decoder / 1e6:.2f}",
            f"{row['parameters'] / 1e6:.2f}",
            f"{row['gmacs']:.4g}",
            f"{row['gflops']:.4g}",
            *(f"{row['share'][name]:.1%}" for name in ("time", "training", "sampling")),
        ]
        table.add_row(*cells, *([f"{row['paper_gflops']:.4g}"] if options.paper else []))
    console.print(table)
    for title, key in (("GFLOPs", "weighted_gflops"), ("paper's GFLOPs", "weighted_paper_gflops"))[: 1 + options.paper]:
        weighted = ", ".join(f"{value:.4g} by {name}" for name, value in document[key].items())
        console.print(f"{title} an image, weighted over stages: {weighted}")
