"""What every command shares: the options, the console, the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.text import Text

from multistage_diffusion.config import DataConfig, LabelMode, Scaling, check
from multistage_diffusion.errors import ConfigError
from multistage_diffusion.text import line

if TYPE_CHECKING:
    import torch


class Terminal(Console):
    """rich's console for text: nothing is markup, and each string is one line.

    The exit code of a closed pipe is left to the command.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """A string of a line, a title or a cell."""
        return super().render_str(line(text), **options)

    def on_broken_pipe(self) -> None:
        """Raise, where rich would exit with 1."""
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


@dataclass(frozen=True, kw_only=True)
class Reads(Compute):
    """Options of the commands that read a source as `msd train` does."""

    data_root: str | None = None
    """Folder that holds the source's files."""
    on_bad_file: Literal["error", "skip"] = "error"
    """What to do with a picture that cannot be read: stop and name it, or leave it out and count it."""
    max_bad: float = 0.01
    """With skip, the largest share of pictures that may be left out."""
    labels: LabelMode = "auto"
    """Labels of the source, if it has any, of all its images (auto), or no labels (none)."""
    scale: Scaling = "pictures"
    """What arrays hold: pictures, or numbers of any range, kept as they are or scaled, as --data.scale of msd train."""

    def data(self, source: str, resolution: int | None, autoencoder: str | None = None) -> DataConfig:
        """The section `data` of a run that reads the same.

        Args:
            source: The source.
            resolution: Pixels a side; None leaves the images as they are.
            autoencoder: Autoencoder whose latents are read, if any.

        Raises:
            ConfigError: An option is out of range.
        """
        check(0 <= self.max_bad < 1, "max-bad", "in [0, 1)", self.max_bad)
        check(resolution is None or resolution >= 4, "resolution", "at least 4", resolution)
        return DataConfig(
            source=source,
            root=self.data_root,
            resolution=resolution,
            on_bad_file=self.on_bad_file,
            max_bad=self.max_bad,
            autoencoder=autoencoder,
            scale=self.scale,
            labels=self.labels,
        )


def prepare(options: Compute) -> torch.device:
    """Set the number of threads and choose the device.

    Raises:
        ConfigError: The device does not exist here, or the number of threads is not positive.
    """
    import torch

    from multistage_diffusion.process_group import local_device

    if options.threads is not None:
        check(options.threads >= 1, "--threads", "at least 1", options.threads)
        torch.set_num_threads(options.threads)
    try:
        return local_device(options.device)
    except ConfigError as error:
        raise ConfigError(f"--{error}") from error
