"""What every command shares: the options, the console, the device."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Console

from multistage_diffusion.errors import ConfigError

if TYPE_CHECKING:
    import torch


class Terminal(Console):
    """rich's console; where the reader went away, it leaves the exit code to the command."""

    def on_broken_pipe(self) -> None:
        """Let the error rise, where rich would exit with 1."""
        raise BrokenPipeError


@dataclass(frozen=True, kw_only=True)
class Common:
    """Options that every command has."""

    json: bool = False
    """Print one JSON document alone on stdout; everything else goes to stderr."""
    debug: bool = False
    """Show the traceback of an error."""


@dataclass(frozen=True, kw_only=True)
class Compute(Common):
    """Options of the commands that compute."""

    device: str = "auto"
    """Device to compute on, like cpu or cuda; auto takes a GPU where there is one."""
    threads: int | None = None
    """CPU threads; results repeat to the bit only with the same number."""


def prepare(options: Compute) -> torch.device:
    """Set the number of threads and choose the device.

    Args:
        options: The command's options.

    Returns:
        The device.

    Raises:
        ConfigError: The device does not exist here, or the number of threads is not positive.
    """
    import torch

    if options.threads is not None:
        if options.threads < 1:
            raise ConfigError(f"--threads must be at least 1, got {options.threads}")
        torch.set_num_threads(options.threads)
    name = options.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ and torch.cuda.is_available():  # a GPU for each of its processes
        name = f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(f"--device {name} is not available here; use cpu, cuda or auto") from error
    if device.type not in ("cpu", "cuda"):  # noise levels are float64, which mps lacks; meta holds no numbers
        raise ConfigError(f"--device {name} is not supported; use cpu, cuda or auto")
    return device
