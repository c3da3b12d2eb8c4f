"""Whether a run directory is one thing: its files beside the checkpoints are those that its weights were trained with.

A checkpoint's manifest covers its own configuration and, in `state.json`, digests of what else decides an image: edges,
names of classes, scales of latents and fields.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from multistage_diffusion.config import RunConfig
from multistage_diffusion.errors import ConfigError
from multistage_diffusion.files import read_json
from multistage_diffusion.records import flat, from_dict, to_dict

if TYPE_CHECKING:
    from multistage_diffusion.runs.checkpoints import Checkpoint
else:
    Checkpoint = Any

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
# Files beside the checkpoints that decide an image, and which of their values; none means all.
_DECIDING: dict[str, tuple[str, ...] | None] = {
    "stages.json": ("edges",),
    "classes.json": None,
    "latents.json": ("digest", "scale", "channels"),
    "scale.json": None,
}


def digests(run: Path) -> dict[str, str | None]:
    """A digest of each file beside the checkpoints that decides an image; none where there is no such file.

    Raises:
        ConfigError: A file is not JSON.
    """
    found: dict[str, str | None] = {}
    for name, keys in _DECIDING.items():
        path, found[name] = run / name, None
        if path.is_file():
            document = read_json(path)
            if keys is not None and isinstance(document, dict):
                document = {key: document.get(key) for key in keys}
            found[name] = hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
    return found


def first_difference(before: RunConfig, now: RunConfig, changeable: set[str]) -> tuple[str, Any, Any] | None:
    """The first option in which two runs differ, and its values; none if they are the same run."""
    values, others = flat(to_dict(before)), flat(to_dict(now))
    for key in sorted(values.keys() | others.keys()):
        if values.get(key) != others.get(key) and changeable.isdisjoint((key, key.split(".")[0])):
            return key.replace("_", "-"), values.get(key), others.get(key)
    return None


def strangeness(run: Path, config: RunConfig, checkpoint: Checkpoint) -> str | None:
    """What of a run directory is not of its checkpoint, or of a configuration with which it is to go on.

    Args:
        run: The run directory.
        config: Its configuration, as it is read or to be written.
        checkpoint: A valid checkpoint.

    Returns:
        None if all agrees, else what differs, naming file and option.
    """
    own = checkpoint.path / "config.json"
    try:
        trained, kept = from_dict(RunConfig, read_json(own), str(own)), checkpoint.state().get("files")
        now = digests(run)
    except ConfigError as error:
        return str(error)
    if (difference := first_difference(trained, config, CHANGEABLE)) is not None:
        option, value, other = difference
        return f"{run / 'config.json'} has {option} {other}, and the weights were trained with {value} ({own})"
    for name, digest in kept.items() if isinstance(kept, dict) else ():
        if now.get(name, digest) != digest:
            what = "is missing" if now[name] is None else "is not the one that the weights were trained with"
            return f"{run / name} {what}"
    return None
