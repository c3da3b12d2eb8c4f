"""Where a run may be written: an empty folder, or one that holds the same run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from multistage_diffusion.classes import TrainedClasses, shown
from multistage_diffusion.config import RunConfig
from multistage_diffusion.data.examples import Examples
from multistage_diffusion.errors import ConfigError
from multistage_diffusion.files import is_leftover, read_json
from multistage_diffusion.records import flat, from_dict, to_dict

RATES = ("learning_rate", "encoder_rate", "stage_rates")  # a change is said
# What may change when a run is resumed, whole sections or single values: none of these changes what is computed, but
# for rounding by the engine, which is said. Where the images come from may change: their digest must be the same.
CHANGEABLE = {
    *(f"training.{name}" for name in ("steps", "save_every", "keep", "keep_every", "log_every", "ema_snapshot_every")),
    *(f"training.{name}" for name in RATES),
    *(f"data.{name}" for name in ("source", "root", "resolution", "on_bad_file", "max_bad")),
    *(f"data.{name}" for name in ("memory", "workers", "timeout")),
    "engine",
    "logging",
}


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
    before, now = flat(to_dict(from_dict(RunConfig, document, str(folder / "config.json")))), flat(to_dict(config))
    # A schedule that falls to 0 at training.steps decides every rate by them, and a share of them where it branches.
    fixed = config.training.schedule in ("linear", "cosine") or 0 < config.training.branch_at < 1
    changeable = CHANGEABLE - {"training.steps"} if fixed else CHANGEABLE
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key) and changeable.isdisjoint((key, key.split(".")[0])):
            raise ConfigError(
                f"{folder} holds another run: {key.replace('_', '-')} is {before.get(key)} there and {now.get(key)} "
                "here; choose another --out, or repeat its options"
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
