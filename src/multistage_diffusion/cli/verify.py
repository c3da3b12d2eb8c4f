"""`msd verify`: check every file of a run against its manifest."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from multistage_diffusion.cli.common import Common
from multistage_diffusion.errors import CheckpointError, ConfigError
from multistage_diffusion.files import MANIFEST, check_directory


@dataclass(frozen=True, kw_only=True)
class Options(Common):
    """Check every file of a run's checkpoints, snapshots and model, or of a saved model, against its SHA-256.

    example: msd verify runs/digits
    """

    run: tyro.conf.Positional[str]
    """Run directory, or folder of a saved model."""


def run(options: Options, console: Console) -> dict[str, Any]:
    """Check.

    Raises:
        ConfigError: No such run.
        CheckpointError: Something is damaged; with `--json` the document says what, and is printed first.
    """
    from multistage_diffusion.denoiser import CONFIG, WEIGHTS
    from multistage_diffusion.runs import Run
    from multistage_diffusion.runs.averages import list_snapshots
    from multistage_diffusion.runs.checkpoints import list_checkpoints
    from multistage_diffusion.runs.whole import strangeness

    folder = Path(options.run)
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} is not a run: it has no config.json")
    rows, damages, last = [], [], None
    for checkpoint in list_checkpoints(folder / "checkpoints"):
        damage = checkpoint.damage()
        rows.append({"step": checkpoint.step, "valid": damage is None, "damage": damage})
        console.print(f"{checkpoint.path}: {damage or 'valid'}")
        damages += [damage] if damage else []
        last = checkpoint if damage is None else last
    if last is not None:
        damage = strangeness(folder, Run.open(folder).config, last)
        console.print(f"{folder}: {damage or 'of one piece'}")
        damages += [damage] if damage else []
    document: dict[str, Any] = {"run": str(folder), "checkpoints": rows, "snapshots": [], "model": None}
    for path in list_snapshots(folder):
        damage = check_directory(path)
        document["snapshots"].append({"snapshot": path.name, "valid": damage is None, "damage": damage})
        console.print(f"{path}: {damage or 'valid'}")
        damages += [damage] if damage else []
    model = folder if (folder / MANIFEST).exists() or (folder / WEIGHTS).exists() else folder / "model"
    if model.is_dir():
        damage = check_directory(model, (CONFIG, WEIGHTS))
        document["model"] = {"valid": damage is None, "damage": damage}
        console.print(f"{model}: {damage or 'valid'}")
        damages += [damage] if damage else []
    if damages:
        raise CheckpointError(f"{damages[0]} ({len(damages)} damaged in all)", document)
    return document
