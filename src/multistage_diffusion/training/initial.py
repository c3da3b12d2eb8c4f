"""What a run's weights start from, kept in the run so that nobody starts it again from something else."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from multistage_diffusion.classes import TrainedClasses
from multistage_diffusion.denoiser import Denoiser
from multistage_diffusion.errors import ConfigError
from multistage_diffusion.files import read_json, write_json

RECORD = "initial.json"


@dataclass(frozen=True)
class Initial:
    """A trained denoiser that a run starts from.

    Attributes:
        denoiser: The denoiser, on the CPU; it stays as it is.
        name: What messages and the run call it, like its path.
    """

    denoiser: Denoiser
    name: str = "the initial weights"

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the names, shapes and values of its weights."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.denoiser.network.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


def initial_classes(folder: Path) -> TrainedClasses | None:
    """The classes that the model knew from which a run started; none for a run from random weights."""
    file = folder / RECORD
    document = read_json(file) if file.is_file() else None
    classes = document.get("classes") if isinstance(document, dict) else None
    return None if classes is None else TrainedClasses.parse(classes, str(file))


def require_same_initial(folder: Path, initial: Initial | None, *, started: bool) -> None:
    """Keep what a run starts from in its directory, and refuse to go on from something else.

    Args:
        folder: The run directory.
        initial: What this call starts from.
        started: Whether the run has a checkpoint: then its weights come from there, and `initial` may be left out.

    Raises:
        ConfigError: The run started from other weights, or from random ones.
    """
    file = folder / RECORD
    before = read_json(file) if file.is_file() else None
    if not isinstance(before, dict):
        if initial is None:
            return
        if started:
            raise ConfigError(f"{folder} started from random weights; drop --init, or choose another --out")
        classes = initial.denoiser.trained_classes
        document = None if classes is None else classes.document()
        write_json(file, {"source": initial.name, "sha256": initial.digest, "classes": document})
        return
    if initial is None and not started:
        raise ConfigError(f"{folder} starts from {before.get('source')} and has no checkpoint yet; repeat --init")
    if initial is not None and initial.digest != before.get("sha256"):
        raise ConfigError(
            f"{folder} started from other weights ({before.get('source')}) than those of {initial.name}; choose "
            "another --out"
        )
