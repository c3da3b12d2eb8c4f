"""The run directory: configuration, stages, metrics, checkpoints and the averaged model; the same command resumes."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn, final

import torch
from torch import nn

from multistage_diffusion.classes import TrainedClasses
from multistage_diffusion.config import DataConfig, LoggingConfig, RunConfig, StagesConfig
from multistage_diffusion.data import Images, load_parts
from multistage_diffusion.data.examples import Examples
from multistage_diffusion.data.feed import make_feed
from multistage_diffusion.data.latents import load_examples
from multistage_diffusion.errors import CheckpointError, ConfigError
from multistage_diffusion.files import remove_leftovers, write_json
from multistage_diffusion.metrics.cost import denoiser_cost
from multistage_diffusion.process_group import SINGLE, ProcessGroup, join, local_device
from multistage_diffusion.records import to_dict, with_new_keys
from multistage_diffusion.runs import Checkpoint, build_denoiser
from multistage_diffusion.runs.averages import FOLDER as SNAPSHOTS
from multistage_diffusion.runs.checkpoints import newest_valid
from multistage_diffusion.sampling import Sampler
from multistage_diffusion.stages import Stages
from multistage_diffusion.training.callbacks import Callback
from multistage_diffusion.training.checkpoint import prune, restore_checkpoint, save_checkpoint
from multistage_diffusion.training.guard import StoppedError, lock, signals
from multistage_diffusion.training.observe import Observer, require_metrics
from multistage_diffusion.training.report import Report, Window
from multistage_diffusion.training.snapshots import save_snapshot
from multistage_diffusion.training.target import check_target, other_data
from multistage_diffusion.training.trackers import require_installed
from multistage_diffusion.training.trainer import StepResult, Trainer

_SKIPPED = 100  # lines about the data that a checkpoint repeats
_UNSAID = {"timeout"}  # of the engine: no result depends on it


@dataclass(frozen=True)
class TrainingSummary:
    """How a run ended.

    Attributes:
        run: The run directory.
        step: Steps taken in all.
        images: Images seen in all.
        loss: Mean loss since the last line of `metrics.jsonl` but one, none if no step was taken.
        resumed: Step that this call started from.
        training_flops: Forward and backward FLOPs spent in all, from the images that each stage saw.
        seconds: Time of this call.
    """

    run: Path
    step: int
    images: int
    loss: float | None
    resumed: int
    training_flops: float
    seconds: float


def train(
    config: RunConfig,
    out: str | Path,
    *,
    data: Examples | None = None,
    stages: Stages | None = None,
    network: nn.Module | None = None,
    device: torch.device | str = "cpu",
    callbacks: Sequence[Callback] = (),
    on_step: Callable[[StepResult, int], None] | None = None,
    on_encode: Callable[[int, int], None] | None = None,
) -> TrainingSummary:
    """Train a model in a run directory; called again with the same arguments, resume it.

    Under `torchrun`, every process calls it alike; process 0 alone writes.

    Args:
        config: The whole configuration.
        out: The run directory.
        data: Training images or latents; by default loaded, and encoded, as `config.data` says.
        stages: The partition with its provenance, kept in `stages.json`; its edges are those of the configuration.
        network: A network of the user's, in place of the one that `config.model` describes.
        device: Where to train; `cuda` is the GPU of this process.
        callbacks: Whose `on_log` takes what metrics.jsonl and the grids show, in process 0.
        on_step: Called after each step with its result and the number of steps to take.
        on_encode: Called with the number of images encoded into latents, and of all, where that is not in the cache.

    Returns:
        How the run ended.

    Raises:
        ConfigError: The directory holds another run (of other options, or of other images), or something else.
        DataError: The source cannot be read.
        CheckpointError: The disk is full, or all checkpoints are damaged.
        NumericsError: The loss is not finite.
        StoppedError: A signal of `guard.SIGNALS` came; a checkpoint of the last step was written.
        PeerError: Another process of the run failed, and says why.
    """
    started, folder, device = time.perf_counter(), Path(out), local_device(device)
    with join(device, config.engine.timeout) as processes:
        processes.on_main(lambda: check_target(folder, config))
        require_installed(config.logging.trackers)
        if config.logging.evaluate_every:
            require_metrics(config.logging.metrics)
        # Latents are encoded once, for all; what else is read, each process reads.
        with processes.local_main_first() if config.data.autoencoder is not None else processes.all_or_none():
            data, images = _read(config, data, device, on_encode)
        if stages is None and (folder / "stages.json").is_file():
            stages = Stages.load(folder / "stages.json")  # with the provenance, from the call that knew it
        trainer = build_trainer(
            config, data, stages, network=network, device=device, processes=processes, callbacks=callbacks
        )
        return _Life(folder, config, trainer, on_step).run(images, started)


def build_trainer(
    config: RunConfig,
    data: Examples,
    stages: Stages | None = None,
    *,
    network: nn.Module | None = None,
    device: torch.device | str = "cpu",
    processes: ProcessGroup = SINGLE,
    callbacks: Sequence[Callback] = (),
) -> Trainer:
    """The bridge from a configuration to a trainer.

    Args:
        config: The run.
        data: Training images or latents.
        stages: The partition with its provenance, if there is one.
        network: A network of the user's, in place of the one that `config.model` describes.
        device: Where to train.
        processes: The processes that train together.
        callbacks: As in `train`.

    Returns:
        The trainer, at step 0.

    Raises:
        ConfigError: The configuration does not fit the data.
    """
    return Trainer(
        build_denoiser(config, data.shape, stages, network=network),
        data,
        config.training,
        config.engine,
        flip=config.data.flip and config.data.autoencoder is None,  # latents of mirrored images are among the latents
        augment_probability=config.data.augment_probability,
        feed=make_feed(data, torch.device(device), config.data),
        device=device,
        processes=processes,
        callbacks=callbacks,
    )


def fit(
    trainer: Trainer,
    out: str | Path,
    *,
    sampler: Sampler | None = None,
    logging: LoggingConfig = LoggingConfig(),  # noqa: B008  (frozen)
    test: Images | None = None,
    on_step: Callable[[StepResult, int], None] | None = None,
) -> TrainingSummary:
    """Train to the trainer's `training.steps` in a run directory; called again with the same objects, resume there.

    Args:
        trainer: What is trained, on which data and how.
        out: The run directory; `load_run(out, network=...)` reads it.
        sampler: How images are drawn from the model by default, kept in the run; none is `denoiser.sampler`.
        logging: What the run shows of itself.
        test: Held-out images, where `logging.evaluate_every` asks for evaluations.
        on_step: Called after each step with its result and the number of steps to take.

    Returns:
        How the run ended.

    Raises:
        ConfigError: The directory holds another run, or something else; or there are no images to evaluate on.
        CheckpointError: The disk is full, or all checkpoints are damaged.
        NumericsError: The loss is not finite.
        StoppedError: A signal of `guard.SIGNALS` came; a checkpoint of the last step was written.
    """
    started, folder, denoiser = time.perf_counter(), Path(out), trainer.denoiser
    denoiser.sampler = sampler or denoiser.sampler or Sampler()
    augmented = trainer.augment_probability > 0
    config = RunConfig(
        data=DataConfig(
            source=trainer.data.name,
            scale=trainer.data.scaling,
            flip=trainer.flip,
            augment_probability=trainer.augment_probability,
        ),
        process=denoiser.process,
        stages=StagesConfig(edges=denoiser.stages.edges),
        model=replace(denoiser.backbone, augment_labels=9 if augmented else 0),
        training=trainer.training,
        engine=trainer.engine,
        sampling=denoiser.sampler,
        logging=logging,
    )
    check_target(folder, config)
    require_installed(logging.trackers)
    images = None
    if logging.evaluate_every:
        require_metrics(logging.metrics)
        if test is None:
            raise ConfigError(f"logging.evaluate-every {logging.evaluate_every} needs held-out images: pass test=...")
        if not isinstance(trainer.data, Images):
            raise ConfigError("evaluations while training need a trainer of images, not of latents")
        images = (trainer.data, test)
    return _Life(folder, config, trainer, on_step).run(images, started)


@final
class _Life:
    """A trainer in its run directory, from the newest checkpoint to the end or to a signal.

    Args:
        folder: The run directory.
        config: What the run is, for its files.
        trainer: The trainer, at step 0.
        on_step: Called after each step.
    """

    def __init__(
        self, folder: Path, config: RunConfig, trainer: Trainer, on_step: Callable[[StepResult, int], None] | None
    ) -> None:
        self.folder, self.config, self.trainer, self.data = folder, config, trainer, trainer.data
        self.processes, self.window, self.on_step = trainer.processes, Window(), on_step

    def run(self, images: tuple[Images, Images] | None, started: float) -> TrainingSummary:
        """Train to the end.

        Args:
            images: Training and held-out images of the source; none where nothing is to be measured.
            started: When the call began.

        Returns:
            How it ended.
        """
        folder, config, trainer, processes = self.folder, self.config, self.trainer, self.processes
        cost = denoiser_cost(trainer.denoiser)
        with lock(folder) if processes.is_main else contextlib.nullcontext(), signals() as received:
            self._open()
            resumed = trainer.step
            with processes.local_main_first():  # what it needs may have to be fetched
                observer = Observer(folder, config, self.data, images, trainer.device, received)
            del images  # the observer keeps those that it needs
            with Report(folder, config, resumed, trainer.device, processes, trainer.callbacks) as report:
                processes.barrier()  # trackers may take their time to answer
                stop = observer.look(trainer, report)  # what a signal kept the run from drawing
                if stop is not None:
                    self._stop(stop, True, report)
                for result in trainer.run(config.training.steps, received):
                    self.window.add(result)
                    if result.step % config.training.log_every == 0:
                        report.training(result, self.window, cost.training_flops(trainer.stage_images))
                    if self.on_step is not None:
                        self.on_step(result, config.training.steps)
                    saved = self._save_what_is_due(report)
                    stop = received[0] if processes.size == 1 and received else result.stop
                    if stop is None:  # after the checkpoint, so that a kill while it draws costs no step
                        stop = observer.look(trainer, report)
                    if stop is not None:
                        self._stop(stop, saved, report)
            model = trainer.averaged()
            processes.on_main(lambda: model.save_pretrained(folder / "model"))
        flops, seconds = cost.training_flops(trainer.stage_images), time.perf_counter() - started
        loss = self.window.loss / self.window.steps if self.window.steps else self.window.last
        return TrainingSummary(folder, trainer.step, trainer.images, loss, resumed, flops, seconds)

    def _open(self) -> None:
        """Say what the run is, in a directory that this process holds, and go on from its newest checkpoint."""
        processes, checkpoint = self.processes, None
        processes.require_same("the options", repr(self.config))
        processes.require_same("the images", self.data.digest)
        if processes.is_main:
            check_target(self.folder, self.config)  # again: another process may have trained here meanwhile
            for place in (self.folder, self.folder / "checkpoints", self.folder / SNAPSHOTS):
                remove_leftovers(place)
            checkpoint = self._newest()  # before a word is written: it may refuse
            write_json(self.folder / "config.json", to_dict(self.config))
            self.trainer.denoiser.stages.save(self.folder / "stages.json")
            self.data.save_record(self.folder)
            if self.trainer.denoiser.trained_classes is not None:
                self.trainer.denoiser.trained_classes.save(self.folder)
        window = processes.broadcast(None if checkpoint is None else vars(self.window))
        if window is None:
            return
        self.window = Window(**window)
        restore_checkpoint(checkpoint, self.trainer)

    def _newest(self) -> Checkpoint | None:
        """The newest valid checkpoint, if there is one, after checking that it continues the same run."""
        folder, data = self.folder, self.data
        checkpoint, damages = newest_valid(folder / "checkpoints")
        for damage in damages:
            warnings.warn(f"{damage}; an older checkpoint is used", stacklevel=2)
        if checkpoint is None:
            return None
        state = checkpoint.state()
        try:
            window, digest, changes = Window(**state["window"]), state["data"], self._changes(state)
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{checkpoint.path}/state.json is of another version: it lacks {error}") from error
        if digest != data.digest:
            raise ConfigError(other_data(folder, data, state.get("shape"), TrainedClasses.load(folder)))
        for change in changes:
            warnings.warn(f"{folder} was trained {change}: equal up to rounding, not to the bit", stacklevel=2)
        if checkpoint.step > self.config.training.steps:
            raise ConfigError(
                f"{folder} has {checkpoint.step} steps already; training.steps {self.config.training.steps} is less"
            )
        self.window = window
        return checkpoint

    def _changes(self, state: dict[str, Any]) -> list[str]:
        """What makes a continued run differ, by rounding, from one that was not interrupted."""
        changes = []
        if state["threads"] != torch.get_num_threads():
            changes.append(f"with {state['threads']} threads and is continued with {torch.get_num_threads()}")
        if state["device"] != self.trainer.device.type:
            changes.append(f"on {state['device']} and is continued on {self.trainer.device.type}")
        before = with_new_keys(state["engine"], section="engine")
        for name, value in self._engine().items():
            if (old := before[name]) != value:
                changes.append(f"with engine.{name.replace('_', '-')} {old} and is continued with {value}")
        return changes

    def _engine(self) -> dict[str, Any]:
        """What decides about rounding."""
        options = {key: value for key, value in to_dict(self.trainer.engine).items() if key not in _UNSAID}
        return options | {"processes": self.processes.size}

    def _save_what_is_due(self, report: Report) -> bool:
        """Write snapshots and a checkpoint where they are due; whether there is a checkpoint of this step."""
        training, step = self.trainer.training, self.trainer.step
        if self.trainer.powers and step % training.ema_snapshot_every == 0:
            save_snapshot(self.folder, self.trainer)
        kept = training.keep_every > 0 and step % training.keep_every == 0
        due = kept or step == training.steps or step % training.save_every == 0
        if due:
            self._save(report)
        return due

    def _stop(self, number: int, saved: bool, report: Report) -> NoReturn:
        """End the run at a signal, with a checkpoint of this step."""
        if not saved:
            self._save(report)
        raise StoppedError(number, self.trainer.step)

    def _save(self, report: Report) -> None:
        """Write a checkpoint; all processes must call, as each may hold a shard."""
        report.sync()
        trainer, data, checkpoints = self.trainer, self.data, self.folder / "checkpoints"
        state = {
            "window": vars(self.window),
            "data": data.digest,
            "threads": torch.get_num_threads(),
            "device": trainer.device.type,
            "engine": self._engine(),
            "shape": list(data.shape),
            "skipped": {"count": len(data.skipped), "first": list(data.skipped[:_SKIPPED])},
        }
        save_checkpoint(checkpoints, trainer, state, to_dict(self.config))
        if self.processes.is_main:
            prune(checkpoints, trainer.training.keep, trainer.step, trainer.training.keep_every)
        self.processes.barrier()  # a slow disk is waited for without a limit


def _read(
    config: RunConfig, data: Examples | None, device: torch.device, on_encode: Callable[[int, int], None] | None
) -> tuple[Examples, tuple[Images, Images] | None]:
    """What is trained on, and where something is to be measured the training and held-out images; read once."""
    images = load_parts(config.data) if config.logging.evaluate_every else None
    if data is None:
        data = load_examples(config.data, device, on_encode, None if images is None else images[0])
    return data, (data, images[1]) if images is not None and isinstance(data, Images) else images
