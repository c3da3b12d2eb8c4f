"""`msd export`: a run's weights as one safetensors file, or its stages as graphs that run without this package."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console

from multistage_diffusion.cli.common import Common
from multistage_diffusion.config import check


@dataclass(frozen=True, kw_only=True)
class Options(Common):
    """Write a run's weights as one safetensors file, with the configuration in its metadata; or a graph of each stage.

    A graph, of torch.export or ONNX, maps noisy images and their sigma to estimates of the clean images. Beside the
    graphs lies graphs.json, which says which graph serves which sigma. Each is compared with the network when written.

    example: msd export runs/digits --weights ema --out digits.safetensors
    example: msd export runs/digits --format torch-export --stage all --out graphs
    """

    run: tyro.conf.Positional[str]
    """Run directory."""
    out: str
    """File to write; of graphs, the folder."""
    format: Literal["safetensors", "torch-export", "onnx"] = "safetensors"
    """Weights alone, or a graph of each stage; ONNX needs the extra of that name."""
    stage: str = "all"
    """Of graphs: the stage to write, from 0 at the lowest noise, or all."""
    weights: Literal["ema", "raw"] = "ema"
    """The averaged weights, or the trained ones."""
    sigma_rel: float | None = None
    """Relative width of another average, like 0.1, for a run trained with --training.sigma-rel."""


def run(options: Options, console: Console) -> dict[str, Any]:
    """Export."""
    stages = _stages(options)

    from multistage_diffusion.runs import load_run

    loaded = load_run(options.run, weights=options.weights, sigma_rel=options.sigma_rel, device="cpu")
    about = {
        "weights": options.weights,
        "ema_length": options.sigma_rel,
        "ema_error": loaded.rebuilt.error if loaded.rebuilt else None,
        "step": loaded.step,
    }
    kind = f"{options.weights} weights" if options.sigma_rel is None else f"ema weights of length {options.sigma_rel}"
    if options.format == "safetensors":
        document = _save_weights(options, loaded)
        console.print(f"wrote {kind} of {options.run} to {options.out}")
        return {**document, **about}

    from multistage_diffusion.data.latents import load_codec
    from multistage_diffusion.interop.graphs import GRAPHS, save_graphs

    more = {**about, "decoded": load_codec(options.run) is not None}
    graphs = save_graphs(loaded.denoiser, options.out, format=options.format, stages=stages, about=more)
    for graph in graphs:
        levels = f"sigma above {graph.above:g}" + ("" if graph.up_to is None else f" up to {graph.up_to:g}")
        console.print(f"{graph.file}: {levels}; largest difference from the network {graph.max_error:.1e}")
    console.print(f"wrote {kind} of {options.run} as {options.format} to {options.out}, described in {GRAPHS}")
    return {
        "folder": options.out,
        "format": options.format,
        "stages": [vars(graph) for graph in graphs],
        **about,
    }


def _stages(options: Options) -> tuple[int] | None:
    """The stages that are asked for; none for all."""
    if options.stage == "all":
        return None
    graphs = options.format != "safetensors"
    check(graphs, "stage", "used with --format torch-export or onnx", options.stage)
    whole = options.stage.isascii() and options.stage.isdigit() and len(options.stage) < 10
    check(whole, "stage", "all or the number of a stage, from 0", options.stage)
    return (int(options.stage),)


def _save_weights(options: Options, loaded: Any) -> dict[str, Any]:
    """One file with the network's weights."""
    import safetensors.torch

    from multistage_diffusion.data.latents import load_codec
    from multistage_diffusion.denoiser import METADATA
    from multistage_diffusion.files import sha256, write_atomic

    denoiser, path = loaded.denoiser, Path(options.out)
    about = {
        **denoiser.document(),
        "edges": list(denoiser.stages.edges),
        "decoded": load_codec(options.run) is not None,
        "weights": options.weights,
        "ema_length": options.sigma_rel,
        "step": loaded.step,
    }
    metadata = {METADATA: json.dumps(about)}  # one entry: safetensors writes several in random order
    write_atomic(path, safetensors.torch.save(denoiser.network.state_dict(), metadata))
    return {"file": str(path), "sha256": sha256(path), "bytes": path.stat().st_size}
