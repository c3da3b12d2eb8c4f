"""The runs of a sweep one after another, and one table of them at the end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from multistage_diffusion.config import RunConfig, to_dict
from multistage_diffusion.errors import NumericsError

if TYPE_CHECKING:
    import torch

TABLE = "sweep.json"


def sweep(
    runs: list[tuple[str, dict[str, Any], RunConfig]],
    out: Path,
    train: Callable[[RunConfig, str], dict[str, Any]],
    console: Console,
    device: torch.device,
) -> dict[str, Any]:
    """Train every run in a folder of its own, measure each on held-out images, and print them from best to worst.

    A run that is there already is continued, and a finished one is not trained again. A loss that is no longer finite
    ends its run, not the sweep.

    Args:
        runs: Folder, values and configuration of each run.
        out: Folder of the runs and of `sweep.json`.
        train: Trains a configuration in a folder and returns its document.
        console: Where people read.
        device: Where to measure.

    Returns:
        The document: `sweep`, a row a run, best first, and `best`, the folder of the first.
    """
    from multistage_diffusion.files import write_json

    rows = []
    for place, (folder, values, config) in enumerate(runs, 1):
        console.print(f"run {place} of {len(runs)}: {folder}")
        row: dict[str, Any] = {"run": str(out / folder), "values": values}
        try:
            document = train(config, str(out / folder))
            row |= {name: document[name] for name in ("step", "loss", "training_pflops", "seconds")}
            row |= _held_out(out / folder, config, device)
        except NumericsError as error:
            console.print(f"{folder} ended: {error}")
            row |= {"held_out_loss": None, "failed": str(error)}
        rows.append(row)
    rows.sort(key=lambda row: (row["held_out_loss"] is None, row["held_out_loss"] or 0.0))
    best = rows[0]["run"] if rows[0]["held_out_loss"] is not None else None
    document = {"sweep": rows, "best": best}
    write_json(out / TABLE, document)
    _print(console, rows)
    if best is not None:
        console.print(f"best: {best}; next: msd sample {best} --out samples")
    return document


def planned(runs: list[tuple[str, dict[str, Any], RunConfig]], console: Console) -> dict[str, Any]:
    """What a sweep would train: the document of a dry run."""
    for folder, _, _ in runs:
        console.print(folder)
    return {"sweep": [{"run": folder, "values": values, "config": to_dict(config)} for folder, values, config in runs]}


def _held_out(run: Path, config: RunConfig, device: torch.device) -> dict[str, float]:
    """The loss of the averaged weights on held-out images, the same images and noise for all runs of a process."""
    from multistage_diffusion.data.latents import load_codec, load_images
    from multistage_diffusion.metrics.held_out import held_out_loss
    from multistage_diffusion.runs import load_run

    images, codec = load_images(config.data, "test"), load_codec(str(run), device)
    loss = held_out_loss(load_run(run, device=device).denoiser, images if codec is None else codec.encode(images))
    return {"held_out_loss": loss.loss, "held_out_error": loss.error}


def _print(console: Console, rows: list[dict[str, Any]]) -> None:
    table = Table(title="Held-out loss of the averaged weights, best first; ±: a standard error over images", box=None)
    for option in rows[0]["values"]:
        table.add_column(option.replace("_", "-"))
    for name in ("held-out loss", "training loss", "steps", "seconds"):
        table.add_column(name, justify="right")
    for row in rows:
        words = [f"{value:g}" if isinstance(value, float) else str(value) for value in row["values"].values()]
        if row["held_out_loss"] is None:
            table.add_row(*words, "ended early", "", "", "")
            continue
        table.add_row(
            *words,
            f"{row['held_out_loss']:.4f} ± {row['held_out_error']:.4f}",
            "" if row["loss"] is None else f"{row['loss']:.4f}",
            f"{row['step']:,}",
            f"{row['seconds']:.0f}",
        )
    console.print(table)
