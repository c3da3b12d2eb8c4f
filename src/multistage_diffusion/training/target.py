"""Where a run may be written: an empty folder, or one that holds the same run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from multistage_diffusion.classes import TrainedClasses, shown
from multistage_diffusion.config import RunConfig
from multistage_diffusion.data.examples import Examples
from multistage_diffusion.errors import ConfigError
from multistage_diffusion.files import is_leftover, read_json
from multistage_diffusion.records import from_dict
from multistage_diffusion.runs.whole import CHANGEABLE, first_difference


def check_target(folder: Path, config: RunConfig) -> None:
    """Refuse a directory that holds something else, before anything is read or written.

    Args:
        folder: Where the run is to be written; need not exist.
        config: The run.

    Raises:
        ConfigError: It is a file, or holds other files, another run or a saved model.
    """
    try:
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"--out {folder} is a file; choose another folder")
        entries = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    except OSError as error:
        raise ConfigError(f"--out {folder}: {error.strerror}; choose another folder") from error
    if all(name == ".lock" or is_leftover(name) for name in entries):
        return
    if not (folder / "config.json").is_file():
        raise ConfigError(f"--out {folder} holds files but no run; choose an empty or new folder")
    document = read_json(folder / "config.json")
    if isinstance(document, dict) and "format" in document:
        raise ConfigError(f"--out {folder} holds a saved model, not a run; choose another folder")
    before = from_dict(RunConfig, document, str(folder / "config.json"))
    # A schedule that falls to 0 at training.steps decides every rate by them, and a share of them where it branches.
    fixed = config.training.schedule in ("linear", "cosine") or 0 < config.training.branch_at < 1
    changeable = CHANGEABLE - {"training.steps"} if fixed else CHANGEABLE
    if (difference := first_difference(before, config, changeable)) is not None:
        option, value, other = difference
        raise ConfigError(
            f"{folder} holds another run: {option} is {value} there and {other} here; choose another --out, or repeat "
            "its options"
        )


def other_data(folder: Path, data: Examples, shape: Any, before: TrainedClasses | None) -> str:
    """Why a run is not continued on these data."""
    mend = "repeat the options of that run, or choose another --out"
    if shape != list(data.shape):
        return f"{folder} was trained on images of {shape}, and those of {data.name} are {list(data.shape)}; {mend}"
    if before is not None and before.names != data.classes:
        there, here = shown(before.names), shown(data.classes)
        return f"{folder} was trained on the classes {there}, and {data.name} has {here}; {mend}"
    return (
        f"the images or labels of {data.name} are not those that {folder} was trained on: some were changed, added or "
        "removed; choose another --out"
    )
