"""Progress of what takes long: for training a live bar on a terminal, else plain lines."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from multistage_diffusion.cli.streams import printing_may_fail
from multistage_diffusion.config import TrainingConfig

if TYPE_CHECKING:
    import torch

    from multistage_diffusion.training.trainer import StepResult

_PATIENCE = 5.0  # seconds that nobody asks what is going on


@contextmanager
def training_progress(
    console: Console, config: TrainingConfig, name: str = "training", device: torch.device | None = None
) -> Iterator[Callable[[StepResult, int], None]]:
    """Show steps, images/s, loss of each stage, memory of a GPU and the time left.

    Args:
        console: Where to show it.
        config: Gives the batch size, and how often a plain line is printed.
        name: What the bar is called.
        device: Whose memory is shown, if it is a GPU.

    Yields:
        A function to call after each step, with its result and the number of steps wanted.
    """
    bar = Progress(
        TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(),
        TextColumn("{task.fields[text]}", markup=False), TimeRemainingColumn(),
        console=console, disable=not console.is_terminal,
    )  # fmt: skip
    task = bar.add_task(name, total=None, text="")
    clock = {"time": time.perf_counter(), "step": -1, "loss": float("nan"), "rate": 0.0}

    def on_step(result: StepResult, steps: int) -> None:
        if clock["step"] < 0:
            clock["step"] = result.step - 1
        smooth = clock["loss"] if clock["loss"] == clock["loss"] else result.loss
        clock["loss"] = 0.98 * smooth + 0.02 * result.loss
        due = result.step % config.log_every == 0 or result.step == steps
        now = time.perf_counter()
        if not due and now - clock["time"] < 0.5:
            return
        done = result.step - clock["step"]
        if done and now > clock["time"]:
            clock["rate"] = done * config.batch_size / (now - clock["time"])
            clock["time"], clock["step"] = now, result.step
        stages = " ".join("-" if loss is None else f"{loss:.3f}" for loss in result.stage_loss)
        text = (
            f"loss {clock['loss']:.4f} (smoothed, weighted; stages {stages})  {clock['rate']:.0f} images/s"
            f"{_memory(device)}"
        )
        bar.update(task, completed=result.step, total=steps, text=text)
        if due and not console.is_terminal:
            left = min((steps - result.step) * config.batch_size / max(clock["rate"], 1e-3), 1e9)
            console.print(f"{name} step {result.step}/{steps}  {text}  {timedelta(seconds=round(left))} left")

    with printing_may_fail(), bar:
        yield on_step


def _memory(device: torch.device | None) -> str:
    """What torch holds of a GPU's memory at most; asking does not wait for the GPU."""
    if device is None or device.type != "cuda":
        return ""
    import torch

    most, total = torch.cuda.max_memory_reserved(device), torch.cuda.get_device_properties(device).total_memory
    return f"  {most / 2**30:.1f}/{total / 2**30:.0f} GiB"


def encoding_progress(console: Console) -> Callable[[int, int], None]:
    """Say how far the images are encoded into latents, a line for each tenth.

    Args:
        console: Where to say it.

    Returns:
        A function of the number of images done, and of all.
    """
    said = [0]

    def on_encode(done: int, total: int) -> None:
        tenth = 10 * done // total
        if tenth > said[0]:
            said[0] = tenth
            console.print(f"encoding images into latents, once: {done}/{total}")

    return on_encode


def reading_progress(console: Console) -> Callable[[int, int], None]:
    """Say how far the pictures of a source are read: nothing for a quick one, and ever less often for a long one.

    Args:
        console: Where to say it.

    Returns:
        A function of the number of pictures read, and of all.
    """
    begin = time.monotonic()
    due = [begin + _PATIENCE]

    def on_read(done: int, total: int) -> None:
        if (now := time.monotonic()) >= due[0]:
            due[0] = now + max(_PATIENCE, now - begin)
            console.print(f"read {done:,} of {total:,} pictures, {done / (now - begin):.0f} a second")

    return on_read
