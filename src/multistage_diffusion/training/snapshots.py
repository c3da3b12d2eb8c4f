"""Snapshots of the power-function averages; `runs/averages.py` puts averages of other lengths together from them."""

from __future__ import annotations

import json
from pathlib import Path

from multistage_diffusion.files import whole_directory
from multistage_diffusion.runs.averages import FOLDER, STATE, file_name
from multistage_diffusion.training.distributed import gather
from multistage_diffusion.training.trainer import Trainer
from multistage_diffusion.weights import save_weights


def save_snapshot(run: Path, trainer: Trainer) -> None:
    """Keep the power-function averages of a moment, for good; whole or not at all.

    Args:
        run: The run directory.
        trainer: All processes must call; process 0 writes.

    Raises:
        CheckpointError: The disk is full or the folder cannot be written; older snapshots are untouched.
    """
    leads = trainer.processes.is_main
    averages = {file_name(length): gather(power.state(), keep=leads) for length, power in trainer.powers.items()}
    if not leads:
        return
    size = sum(tensor.nbytes for average in averages.values() for tensor in average.values())
    with whole_directory(run / FOLDER / f"step-{trainer.step:08d}", size=size, replace=True) as temporary:
        for file, average in averages.items():
            save_weights(average, temporary / file)
        state = {"step": trainer.step, "images": trainer.images}
        (temporary / STATE).write_text(json.dumps(state, indent=2) + "\n")
