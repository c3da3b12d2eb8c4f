"""From a run directory, or a folder of a saved model, to a denoiser. Imports neither trainer nor trackers."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import torch
from torch import nn

from multistage_diffusion.classes import TrainedClasses
from multistage_diffusion.config import RunConfig
from multistage_diffusion.denoiser import Denoiser
from multistage_diffusion.errors import CheckpointError, ConfigError
from multistage_diffusion.files import read_json
from multistage_diffusion.process_group import local_device
from multistage_diffusion.records import check, check_path, from_dict
from multistage_diffusion.runs.averages import Combination, rebuild
from multistage_diffusion.runs.checkpoints import EMA_WEIGHTS, RAW, Checkpoint, list_checkpoints, newest
from multistage_diffusion.runs.whole import strangeness
from multistage_diffusion.stages import Stages
from multistage_diffusion.weights import Unfilled, load_weights, persistent_buffers, require_fit

if TYPE_CHECKING:
    from matplotlib.figure import Figure
else:
    Figure = Any

METRICS = "metrics.jsonl"


def build_denoiser(
    config: RunConfig, shape: tuple[int, int, int], stages: Stages | None = None, *, network: nn.Module | None = None
) -> Denoiser:
    """The one bridge from a configuration to a denoiser; its weights depend on the configuration and its seed alone.

    Args:
        config: The run.
        shape: (C, H, W) of an image.
        stages: The partition with its provenance, if there is one; its edges are those of the configuration.
        network: A network of the user's, where no record says how to build it.

    Returns:
        The denoiser, on the CPU.

    Raises:
        ConfigError: The network does not fit the images or the stages, or must be passed and was not.
    """
    if stages is None or stages.edges != config.stages.edges:
        stages = Stages(config.stages.edges)
    if network is not None:
        denoiser = Denoiser(network, config.process, stages, shape=shape, classes=config.model.classes)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(config.training.seed))  # torch.manual_seed would seed the GPUs, too
            denoiser = Denoiser.from_backbone(config.model, config.process, shape, stages)
    denoiser.sampler, denoiser.label_optional = config.sampling, config.training.label_dropout > 0
    return denoiser


@final
@dataclass(frozen=True)
class Run:
    """A run directory, read.

    Attributes:
        path: The directory.
        config: Its configuration.

    Use `Run.open(path)`.
    """

    path: Path
    config: RunConfig

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """Read what a directory is.

        Args:
            path: The run directory.

        Returns:
            The run.

        Raises:
            ConfigError: It is no run, or its configuration is malformed.
        """
        folder = Path(path)
        document = _document(folder)
        if "format" in document:
            raise ConfigError(f"{folder} is a saved model, not a run; load it with Denoiser.from_pretrained")
        return cls(folder, from_dict(RunConfig, document, str(folder / "config.json")))

    @property
    def stages(self) -> Stages:
        """The partition with its provenance."""
        return Stages.load(self.path / "stages.json")

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """Its checkpoints, oldest first, valid or not."""
        return list_checkpoints(self.path / "checkpoints")

    def metrics(self) -> Iterator[dict[str, Any]]:
        """The lines of `metrics.jsonl` that are whole, in their order; others are passed over."""
        for line in (self.path / METRICS).read_bytes().splitlines() if (self.path / METRICS).is_file() else ():
            with contextlib.suppress(ValueError, RecursionError):
                record = json.loads(line)
                if isinstance(record, dict) and type(record.get("step")) is int and 0 <= record["step"] < 2**62:
                    yield record

    def plot(self) -> Figure:
        """The training loss of each stage over steps, from `metrics.jsonl`; also while the run trains."""
        from multistage_diffusion.runs.plots import loss_figure

        return loss_figure(list(self.metrics()), Stages(self.config.edges), str(self.path))

    def __repr__(self) -> str:
        """What it is, and how far."""
        model, steps = self.config.model, self.config.training.steps
        done = max((record["step"] for record in self.metrics()), default=0)
        stages = len(self.config.edges) + 1
        return f"Run({str(self.path)!r}: {model.architecture}, {stages} stages, logged to step {done} of {steps})"

    def load(
        self,
        *,
        weights: str = "ema",
        sigma_rel: float | None = None,
        device: torch.device | str = "auto",
        network: nn.Module | None = None,
    ) -> LoadedRun:
        """The denoiser of the newest checkpoint; arguments and errors as in `load_run`."""
        checkpoint = newest(self.path)
        state = checkpoint.state()
        channels, height, width = state["shape"]
        device = local_device(device)
        stage_images = tuple(state["stage_images"])
        # A run that is to branch later is a unified network until then.
        trunk = self.config.branch_step > 0 and checkpoint.step <= self.config.branch_step
        config = self.config.trunk if trunk else self.config
        if strange := strangeness(self.path, self.config, checkpoint):
            raise CheckpointError(f"{strange}; restore the file")
        if network is None and config.model.builds:  # before memory is taken for what a strange file asks
            with torch.device("meta"), Unfilled():
                require_fit(config.model.network((channels, height, width)), checkpoint.path / RAW)
        with Unfilled() if config.model.builds else contextlib.nullcontext():
            denoiser = build_denoiser(
                config, (channels, height, width), None if trunk else self.stages, network=network
            )
        denoiser.trained_classes = TrainedClasses.load(self.path)
        combination = None
        if sigma_rel is None:
            load_weights(denoiser.network, checkpoint.path / (EMA_WEIGHTS if weights == "ema" else RAW))
        else:
            if persistent_buffers(denoiser.network):
                load_weights(denoiser.network, checkpoint.path / RAW)
            combination = rebuild(self.path, checkpoint.path, sigma_rel, denoiser.network)
        denoiser = denoiser.to(device).eval()
        trunk_images = state.get("trunk_images", 0)
        return LoadedRun(denoiser, self.config, checkpoint.step, stage_images, trunk_images, combination)


@dataclass(frozen=True)
class LoadedRun:
    """A denoiser read from disk.

    Attributes:
        denoiser: In evaluation mode.
        config: The run's configuration; none for a bare folder.
        step: Steps taken; none for a bare folder.
        stage_images: Images that each stage was trained on; none for a bare folder.
        trunk_images: Images that the unified network was trained on from which it branched.
        rebuilt: What an average of another length was put together from; none for weights as they were stored.
    """

    denoiser: Denoiser
    config: RunConfig | None = None
    step: int | None = None
    stage_images: tuple[int, ...] | None = None
    trunk_images: int = 0
    rebuilt: Combination | None = None


def load_run(
    path: str | Path,
    *,
    weights: str = "ema",
    sigma_rel: float | None = None,
    device: torch.device | str = "auto",
    network: nn.Module | None = None,
) -> LoadedRun:
    """Load the newest checkpoint of a run, a folder written by `Denoiser.save_pretrained`, or a file of `msd export`.

    Args:
        path: The run directory, the folder or the file.
        weights: `ema` for the averaged weights, `raw` for the trained ones.
        sigma_rel: Relative width of another average, put together from the run's snapshots.
        device: Where the weights go; by default a GPU where there is one, as in the commands.
        network: The network, for a run of one of the user's own; its weights are replaced. Nothing that a folder names
            is imported.

    Returns:
        The denoiser in evaluation mode, and what is known of its run.

    Raises:
        ConfigError: No such run, unknown weights, or the run's network must be passed and was not.
        CheckpointError: The newest checkpoint is damaged, or there is none.
    """
    folder = check_path(path, "the run")
    if weights not in ("ema", "raw"):
        raise ConfigError(f"--weights must be ema or raw, got {weights}")
    if sigma_rel is not None:
        check(isinstance(sigma_rel, Real), "--sigma-rel", "a number", sigma_rel)
    if sigma_rel is not None and weights == "raw":
        raise ConfigError(f"--sigma-rel {sigma_rel} chooses an average, and --weights raw none; drop one of the two")
    if folder.is_file() or "format" in _document(folder):
        if sigma_rel is not None:
            raise ConfigError(f"--sigma-rel needs the snapshots of a run, and {folder} is a saved model")
        return LoadedRun(Denoiser.from_pretrained(folder, device=local_device(device), network=network))
    return Run.open(folder).load(weights=weights, sigma_rel=sigma_rel, device=device, network=network)


def _document(folder: Path) -> dict[str, Any]:
    """The configuration in a folder, as it is written."""
    if (folder / "model_index.json").is_file():
        raise ConfigError(
            f"{folder} is a folder for diffusers: draw with its pipeline, as its README.md says, or give the run itself"
        )
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"{folder} is not a run: it has no config.json; train one with msd train RECIPE --out {folder}"
        )
    document = read_json(folder / "config.json")
    if not isinstance(document, dict):
        raise ConfigError(f"{folder / 'config.json'} must hold named values, got {document!r}")
    return document
