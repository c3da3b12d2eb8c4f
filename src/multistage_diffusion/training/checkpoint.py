"""Checkpoints: directories of safetensors and JSON with a SHA-256 manifest, written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from multistage_diffusion.denoiser import CONFIG
from multistage_diffusion.errors import CheckpointError, NumericsError
from multistage_diffusion.files import whole_directory
from multistage_diffusion.runs.averages import file_name
from multistage_diffusion.runs.checkpoints import (
    EMA_WEIGHTS,
    OPTIMIZER,
    RAW,
    STATE,
    Checkpoint,
    list_checkpoints,
)
from multistage_diffusion.training.distributed import gather, put
from multistage_diffusion.training.ema import EMA
from multistage_diffusion.training.optimizer import plain_state, restore_plain_state
from multistage_diffusion.training.precision import LossScale
from multistage_diffusion.training.trainer import Trainer
from multistage_diffusion.training.weighting import Uncertainty
from multistage_diffusion.weights import read_weights, save_weights


def save_checkpoint(folder: Path, trainer: Trainer, extra: dict[str, Any], config: dict[str, Any]) -> Checkpoint:
    """Write everything that a bit-equal continuation needs, whatever the number of processes then.

    Args:
        folder: The run's `checkpoints` folder.
        trainer: What to save. All processes must call; process 0 writes.
        extra: More entries for `state.json`.
        config: The run's configuration.

    Returns:
        The new checkpoint.

    Raises:
        CheckpointError: The disk is full or the folder cannot be written; older checkpoints are untouched.
        NumericsError: A weight is not finite; nothing is written.
    """
    path = folder / f"step-{trainer.step:08d}"
    optimizer = {
        f"{index}.{key}": value
        for index, entry in trainer.optimizer.state_dict()["state"].items()
        for key, value in entry.items()
        if isinstance(value, torch.Tensor)
    }
    held = {RAW: trainer.denoiser.network.state_dict(), OPTIMIZER: optimizer}
    held |= {file: average.state() for file, average in _averages(trainer).items()}
    files = {file: gather(tensors, keep=trainer.processes.is_main) for file, tensors in held.items()}
    if not trainer.processes.is_main:
        return Checkpoint(path, trainer.step)
    state = {"step": trainer.step, "images": trainer.images, "stage_images": trainer.stage_images, **extra}
    state["trunk_images"] = trainer.trunk_images
    if trainer.scale is not None:
        state["loss_scale"] = vars(trainer.scale)
    if (levels := trainer.uncertainty) is not None:
        state["uncertainty"] = {"sums": levels.sums.tolist(), "counts": levels.counts.tolist()}
    if trainer.user_optimizer is not None:
        state["optimizer"] = plain_state(trainer.optimizer)
    if (noise := trainer.noise) is not None:
        state["gradient_noise"] = {"sums": noise.sums.tolist(), "counts": noise.counts.tolist()}
    _require_finite(files[RAW], trainer.step)
    size = sum(tensor.nbytes for tensors in files.values() for tensor in tensors.values())
    with whole_directory(path, size=size, replace=True) as temporary:  # a damaged one of this step gives way
        for file, tensors in files.items():
            save_weights(tensors, temporary / file)
        (temporary / STATE).write_text(json.dumps(state, indent=2) + "\n")
        (temporary / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    return Checkpoint(path, trainer.step)


def restore_checkpoint(checkpoint: Checkpoint | None, trainer: Trainer) -> None:
    """Load a checkpoint into a trainer of the same configuration.

    Args:
        checkpoint: A valid checkpoint, on process 0, which reads it; the others get it from there, and all must call.
        trainer: Its weights, averages, optimiser state, loss scale and step count are replaced.

    Raises:
        CheckpointError: A file is unreadable or belongs to another architecture.
    """
    processes, files, document = trainer.processes, None, None
    if processes.is_main:
        assert checkpoint is not None
        files, document = _read(checkpoint, trainer)
    document = processes.broadcast(document)
    for file in (RAW, *_averages(trainer), OPTIMIZER):
        tensors = processes.broadcast_tensors(None if files is None else files[file])
        try:
            _put(file, tensors, trainer)
        except (KeyError, ValueError, IndexError) as error:
            raise CheckpointError(f"cannot restore {checkpoint.path if checkpoint else file}: {error}") from error
    trainer.step, trainer.stage_images = document["step"], document["stage_images"]
    trainer.trunk_images = document["trunk_images"]
    if trainer.scale is not None:
        trainer.scale = LossScale(**document["loss_scale"])
    if trainer.uncertainty is not None:
        sums, counts = document["uncertainty"]
        trainer.uncertainty.sums, trainer.uncertainty.counts = torch.tensor([sums, counts], dtype=torch.float64)
    if trainer.user_optimizer is not None and document["optimizer"]:
        restore_plain_state(trainer.optimizer, document["optimizer"])
    if trainer.noise is not None:
        trainer.noise.sums, trainer.noise.counts = torch.tensor(document["gradient_noise"], dtype=torch.float64)
        trainer.batches.set_shares(trainer.noise.shares())


def _read(checkpoint: Checkpoint, trainer: Trainer) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]]:
    """The tensors of a checkpoint by file and name, and what else a trainer knows."""
    files = {RAW: read_weights(trainer.denoiser.network, checkpoint.path / RAW)}
    try:
        for file in (*_averages(trainer), OPTIMIZER):
            files[file] = safetensors.torch.load_file(checkpoint.path / file)
        state = checkpoint.state()
        images = [int(count) for count in state["stage_images"]]
        scale = LossScale(**state.get("loss_scale", {}))
        trunk_images = int(state.get("trunk_images", 0))
        document = {"step": int(state["step"]), "stage_images": images, "trunk_images": trunk_images}
        document["optimizer"] = state.get("optimizer")
        if trainer.uncertainty is not None:
            document["uncertainty"] = _table(state, "uncertainty", Uncertainty.cells)
            if min(map(min, document["uncertainty"])) <= 0:
                raise ValueError(f"{STATE} has no table of losses by noise level")
        if trainer.noise is not None:
            document["gradient_noise"] = _table(state, "gradient_noise", len(trainer.denoiser.stages))
        return files, {**document, "loss_scale": vars(scale)}
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"cannot restore {checkpoint.path}: {error}") from error


def _table(state: dict[str, Any], name: str, size: int) -> list[list[float]]:
    """Sums and counts of running means, two rows of a size."""
    table = torch.tensor([state[name]["sums"], state[name]["counts"]], dtype=torch.float64)
    if table.shape != (2, size) or not bool((table.isfinite() & (table >= 0)).all()):
        raise ValueError(f"{STATE} has no table {name} of {size} running means")
    return table.tolist()


def _put(file: str, tensors: dict[str, torch.Tensor], trainer: Trainer) -> None:
    """Write the tensors of a file where they belong."""
    if file == RAW:
        for name, target in trainer.denoiser.network.state_dict().items():
            put(target, tensors[name])
    elif file == OPTIMIZER:
        _put_optimizer(tensors, trainer.optimizer)
    else:
        _averages(trainer)[file].load(tensors)


def _put_optimizer(tensors: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Moments take the form of their parameters, in shards or whole; step counts stay as they are."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        index, key = name.split(".")
        if tensor.dim() > 0 or parameters[int(index)].dim() == 0:
            placed = torch.zeros_like(parameters[int(index)], dtype=tensor.dtype)
            put(placed, tensor)
            tensor = placed
        state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def _averages(trainer: Trainer) -> dict[str, EMA]:
    """The averages by the names of their files."""
    return {EMA_WEIGHTS: trainer.ema, **{file_name(length): power for length, power in trainer.powers.items()}}


def prune(folder: Path, keep: int, step: int, keep_every: int = 0) -> None:
    """Delete all but the newest checkpoints, and those kept for good.

    Args:
        folder: The run's `checkpoints` folder.
        keep: How many of the newest to keep, at least 1.
        step: The step just saved. Later ones are damaged checkpoints that training went back from, and go too: kept as
            the newest, they would drive out the valid ones.
        keep_every: Checkpoints at multiples of this step are kept for good; 0 keeps none.
    """
    checkpoints = list_checkpoints(folder)
    later = [checkpoint for checkpoint in checkpoints if checkpoint.step > step]
    older = [checkpoint for checkpoint in checkpoints if checkpoint.step <= step][:-keep]
    for checkpoint in later + [old for old in older if not keep_every or old.step % keep_every]:
        hidden = checkpoint.path.with_name(f".{checkpoint.path.name}.{os.getpid()}.tmp")
        with contextlib.suppress(OSError):
            checkpoint.path.rename(hidden)  # a kill among its files leaves no half checkpoint; the next call clears up
        shutil.rmtree(hidden, ignore_errors=True)


def _require_finite(weights: dict[str, torch.Tensor], step: int) -> None:
    """Keep a checkpoint that cannot be continued from ever being written."""
    for name, tensor in weights.items():
        if not bool(tensor.isfinite().all()):
            raise NumericsError(
                f"weight {name} is not finite after step {step}; no checkpoint was written, the older ones are whole; "
                "lower training.learning-rate"
            )
