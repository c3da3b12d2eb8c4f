"""The checkpoints of a run, read: which there are, whether they are whole, what they say of themselves."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from multistage_diffusion.denoiser import CONFIG
from multistage_diffusion.errors import CheckpointError, ConfigError
from multistage_diffusion.files import check_directory, read_json
from multistage_diffusion.text import short

RAW, EMA_WEIGHTS, OPTIMIZER, STATE = "model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json"
FILES = (RAW, EMA_WEIGHTS, OPTIMIZER, STATE, CONFIG)
_STATE_KEYS = {"step", "stage_images", "shape"}
_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk.

    Attributes:
        path: Its directory.
        step: Steps taken when it was written.
    """

    path: Path
    step: int

    def damage(self) -> str | None:
        """What is wrong with it, naming the file; none if every file agrees with the manifest."""
        return check_directory(self.path, FILES)

    def state(self) -> dict[str, Any]:
        """Its `state.json`.

        Raises:
            CheckpointError: It is unreadable, or not one of ours.
        """
        try:
            document = read_json(self.path / STATE)
        except ConfigError as error:
            raise CheckpointError(str(error)) from error
        if not isinstance(document, dict) or not _STATE_KEYS <= document.keys():
            raise CheckpointError(f"{self.path / STATE} lacks entries: it must have {', '.join(sorted(_STATE_KEYS))}")
        shape, images = document["shape"], document["stage_images"]
        right = {
            "step": _is_count(document["step"]),
            "shape": isinstance(shape, list) and len(shape) == 3 and all(_is_count(n, 1, 65_536) for n in shape),
            "stage_images": isinstance(images, list) and all(map(_is_count, images)),
            "trunk_images": _is_count(document.get("trunk_images", 0)),
        }
        for key, holds in right.items():
            if not holds:
                raise CheckpointError(f"{self.path / STATE}: {key} is {short(document.get(key))}, which no run writes")
        return document


def _is_count(value: Any, least: int = 0, most: int = 2**62) -> bool:
    return type(value) is int and least <= value <= most


def list_checkpoints(folder: Path) -> list[Checkpoint]:
    """The checkpoints of a run, oldest first, valid or not.

    Args:
        folder: The run's `checkpoints` folder; may be missing.

    Returns:
        Checkpoints by increasing step.
    """
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        if (match := _NAME.fullmatch(path.name)) and path.is_dir():
            found.append(Checkpoint(path, int(match[1])))
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def newest_valid(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint whose files agree with its manifest.

    Args:
        folder: The run's `checkpoints` folder.

    Returns:
        The checkpoint, or none if the folder holds none; and what was wrong with newer ones.

    Raises:
        CheckpointError: There are checkpoints, but all are damaged; nothing is deleted.
    """
    damages = []
    for checkpoint in reversed(list_checkpoints(folder)):
        damage = checkpoint.damage()
        if damage is None:
            return checkpoint, damages
        damages.append(damage)
    if damages:
        raise CheckpointError(f"every checkpoint in {folder} is damaged: {damages[0]}; nothing was deleted")
    return None, []


def newest_state(run: Path) -> dict[str, Any]:
    """The `state.json` of a run's newest checkpoint.

    Args:
        run: The run directory.

    Returns:
        The document.

    Raises:
        CheckpointError: The run has no checkpoint, or the newest one is damaged.
    """
    return newest(run).state()


def newest(run: Path) -> Checkpoint:
    """A run's newest checkpoint, checked.

    Args:
        run: The run directory.

    Returns:
        The checkpoint.

    Raises:
        CheckpointError: The run has no checkpoint, or the newest one is damaged.
    """
    checkpoints = list_checkpoints(run / "checkpoints")
    if not checkpoints:
        raise CheckpointError(f"{run} has no checkpoint yet; continue its training with the same msd train command")
    if damage := checkpoints[-1].damage():
        raise CheckpointError(f"{damage}; the same msd train command goes on from an older checkpoint")
    return checkpoints[-1]
