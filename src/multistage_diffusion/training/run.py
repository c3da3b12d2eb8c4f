"""The run directory: configuration, stages, metrics, checkpoints and the averaged model; the same command resumes."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from multistage_diffusion.config import EngineConfig, RunConfig, flat, from_dict, to_dict
from multistage_diffusion.data import Images, load_parts
from multistage_diffusion.data.examples import Examples
from multistage_diffusion.data.latents import load_examples
from multistage_diffusion.errors import CheckpointError, ConfigError
from multistage_diffusion.files import is_leftover, read_json, remove_leftovers, write_json
from multistage_diffusion.metrics.cost import network_cost
from multistage_diffusion.models.denoiser import Denoiser, load_weights
from multistage_diffusion.process_group import ProcessGroup, join, local_device
from multistage_diffusion.records import with_new_keys
from multistage_diffusion.stages import Stages
from multistage_diffusion.training.checkpoint import (
    EMA_WEIGHTS,
    RAW,
    Checkpoint,
    newest,
    newest_valid,
    prune,
    restore_checkpoint,
    save_checkpoint,
)
from multistage_diffusion.training.guard import StoppedError, lock, signals
from multistage_diffusion.training.loop import StepResult, Trainer, build_denoiser
from multistage_diffusion.training.observe import Observer, require_metrics
from multistage_diffusion.training.report import Report, Window
from multistage_diffusion.training.snapshots import FOLDER as SNAPSHOTS
from multistage_diffusion.training.snapshots import Combination, rebuild, save_snapshot
from multistage_diffusion.training.trackers import require_installed

# What may change when a run is resumed, whole sections or single values: none of these changes what is computed, but
# for rounding by the engine, which is said. Where the images come from may change: their digest must be the same.
CHANGEABLE = {
    "training.steps", "training.save_every", "training.keep", "training.keep_every", "training.log_every",
    "training.ema_snapshot_every", "data.source", "data.root", "data.resolution", "data.on_bad_file", "data.max_bad",
    "data.memory", "data.workers", "data.timeout", "engine", "logging",
}  # fmt: skip
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
    device: torch.device | str = "cpu",
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
        device: Where to train; `cuda` is the GPU of this process.
        on_step: Called after each step with its result and the number of steps wanted.
        on_encode: Told how many images are encoded into latents, of how many, where that is not in the cache.

    Returns:
        How the run ended.

    Raises:
        ConfigError: The directory holds another run (of other options, or of other images), or something else.
        DataError: The source cannot be read.
        CheckpointError: The disk is full, or all checkpoints are damaged.
        NumericsError: The loss is not finite.
        StoppedError: SIGTERM or SIGINT came; a checkpoint of the last step was written.
        PeerError: Another process of the run failed, and says why.
    """
    started, folder, device = time.perf_counter(), Path(out), local_device(device)
    with join(device, config.engine.timeout) as processes:
        processes.on_main(lambda: _check_target(folder, config))
        require_installed(config.logging.trackers)
        if config.logging.evaluate_every:
            require_metrics(config.logging.metrics)
        # Latents are encoded once, for all; what else is read, each process reads.
        with processes.local_main_first() if config.data.autoencoder is not None else processes.all_or_none():
            data, images = _read(config, data, device, on_encode)
        if stages is None and (folder / "stages.json").is_file():
            stages = Stages.load(folder / "stages.json")  # how they were found, from the call that knew
        trainer = Trainer(config, data, device, stages, processes)
        cost = network_cost(config.model, data.shape)
        with lock(folder) if processes.is_main else contextlib.nullcontext(), signals() as received:
            window = _open(folder, trainer, data)
            resumed = trainer.step
            with processes.local_main_first():  # what it needs may have to be fetched
                observer = Observer(folder, config, data, images, device, received)
            del images  # the observer keeps those that it needs
            with Report(folder, config, resumed, device, processes) as report:
                processes.barrier()  # trackers may take their time to answer
                stop = observer.look(trainer, report)  # what a signal kept the run from drawing
                if stop is not None:
                    _stop(stop, True, folder, trainer, window, report, data)
                for result in trainer.run(config.training.steps, received):
                    window.add(result)
                    if result.step % config.training.log_every == 0:
                        report.training(result, window, cost.training_flops(trainer.stage_images))
                    if on_step is not None:
                        on_step(result, config.training.steps)
                    saved = _save_what_is_due(folder, trainer, window, report, data)
                    stop = received[0] if processes.size == 1 and received else result.stop
                    if stop is None:  # after the checkpoint, so that a kill while it draws costs no step
                        stop = observer.look(trainer, report)
                    if stop is not None:
                        _stop(stop, saved, folder, trainer, window, report, data)
            model = trainer.averaged()
            processes.on_main(lambda: model.save_pretrained(folder / "model"))
    flops, seconds = cost.training_flops(trainer.stage_images), time.perf_counter() - started
    loss = window.loss / window.steps if window.steps else window.last
    return TrainingSummary(folder, trainer.step, trainer.images, loss, resumed, flops, seconds)


def _read(
    config: RunConfig, data: Examples | None, device: torch.device, on_encode: Callable[[int, int], None] | None
) -> tuple[Examples, tuple[Images, Images] | None]:
    """What is trained on, and where something is to be measured the training and held-out images; read once."""
    images = load_parts(config.data) if config.logging.evaluate_every else None
    if data is None:
        data = load_examples(config.data, device, on_encode, None if images is None else images[0])
    return data, (data, images[1]) if images is not None and isinstance(data, Images) else images


@dataclass(frozen=True)
class LoadedRun:
    """A denoiser read from disk.

    Attributes:
        denoiser: In evaluation mode.
        config: The run's configuration; none for a bare folder.
        step: Steps taken; none for a bare folder.
        stage_images: Images that each stage was trained on; none for a bare folder.
        rebuilt: What an average of another length was put together from; none for weights as they were stored.
    """

    denoiser: Denoiser
    config: RunConfig | None = None
    step: int | None = None
    stage_images: tuple[int, ...] | None = None
    rebuilt: Combination | None = None


def load_run(
    path: str | Path,
    *,
    weights: str = "ema",
    sigma_rel: float | None = None,
    device: torch.device | str = "cpu",
    ema_length: float | None = None,
) -> LoadedRun:
    """Load the newest checkpoint of a run, or a folder written by `Denoiser.save_pretrained`.

    Args:
        path: The run directory or the folder.
        weights: `ema` for the averaged weights, `raw` for the trained ones.
        sigma_rel: Relative width of another average, put together from the run's snapshots.
        device: Where the weights go.
        ema_length: The old name of `sigma_rel`.

    Returns:
        The denoiser in evaluation mode, and what is known of its run.

    Raises:
        ConfigError: No such run, or unknown weights.
        CheckpointError: The newest checkpoint is damaged, or there is none.
    """
    folder = Path(path)
    if weights not in ("ema", "raw"):
        raise ConfigError(f"--weights must be ema or raw, got {weights}")
    if ema_length is not None:
        warnings.warn("load_run's ema_length is now called sigma_rel", DeprecationWarning, stacklevel=2)
        sigma_rel = ema_length
    if sigma_rel is not None and weights == "raw":
        raise ConfigError(f"--sigma-rel {sigma_rel} is the length of an average: leave --weights raw away")
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"{folder} is not a run: it has no config.json; train one with msd train RECIPE --out {folder}"
        )
    document = read_json(folder / "config.json")
    if isinstance(document, dict) and "format" in document:
        if sigma_rel is not None:
            raise ConfigError(f"--sigma-rel needs the snapshots of a run, and {folder} is a saved model")
        return LoadedRun(Denoiser.from_pretrained(folder, device=device))
    config = from_dict(RunConfig, document, str(folder / "config.json"))
    checkpoint = newest(folder)
    state = checkpoint.state()
    shape = state["shape"]
    denoiser = build_denoiser(config, (shape[0], shape[1], shape[2]), Stages.load(folder / "stages.json"))
    rebuilt = None
    if sigma_rel is None:
        load_weights(denoiser.network, checkpoint.path / (EMA_WEIGHTS if weights == "ema" else RAW))
    else:
        rebuilt = rebuild(folder, checkpoint.path, sigma_rel, denoiser.network)
    return LoadedRun(denoiser.to(device).eval(), config, checkpoint.step, tuple(state["stage_images"]), rebuilt)


def _check_target(folder: Path, config: RunConfig) -> None:
    """Refuse a directory that holds something else, before anything is read or written."""
    try:
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"--out {folder} is a file; choose another folder")
        entries = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    except OSError as error:
        raise ConfigError(f"--out {folder}: {error.strerror}; choose another folder") from error
    if all(name == ".lock" or is_leftover(name) for name in entries):
        return
    if not (folder / "config.json").is_file():
        raise ConfigError(f"--out {folder} holds files but no run; choose an empty or new folder")
    document = read_json(folder / "config.json")
    if isinstance(document, dict) and "format" in document:
        raise ConfigError(f"--out {folder} holds a saved model, not a run; choose another folder")
    theirs, ours = flat(to_dict(from_dict(RunConfig, document, str(folder / "config.json")))), flat(to_dict(config))
    for key in sorted(theirs.keys() | ours.keys()):
        if theirs.get(key) != ours.get(key) and CHANGEABLE.isdisjoint((key, key.split(".")[0])):
            raise ConfigError(
                f"{folder} holds another run: {key.replace('_', '-')} is {theirs.get(key)} there and {ours.get(key)} "
                "here; choose another --out, or repeat its options"
            )


def _open(folder: Path, trainer: Trainer, data: Examples) -> Window:
    """Say what the run is, in a directory that this process holds, and go on from its newest checkpoint."""
    processes, checkpoint, window = trainer.processes, None, Window()
    processes.require_same("the options", repr(trainer.config))
    processes.require_same("the images", data.digest)
    if processes.is_main:
        _check_target(folder, trainer.config)  # again: another process may have trained here while the data was read
        for place in (folder, folder / "checkpoints", folder / SNAPSHOTS):
            remove_leftovers(place)
        checkpoint, window = _newest(folder, trainer, data)  # before a word is written: it may refuse
        write_json(folder / "config.json", to_dict(trainer.config))
        trainer.denoiser.stages.save(folder / "stages.json")
        data.save_record(folder)
    sums = processes.broadcast(None if checkpoint is None else vars(window))
    if sums is None:
        return window
    window = Window(**sums)
    restore_checkpoint(checkpoint, trainer)
    return window


def _newest(folder: Path, trainer: Trainer, data: Examples) -> tuple[Checkpoint | None, Window]:
    """The newest valid checkpoint, if there is one, after checking that it continues the same run."""
    checkpoint, damages = newest_valid(folder / "checkpoints")
    for damage in damages:
        warnings.warn(f"{damage}; an older checkpoint is used", stacklevel=2)
    if checkpoint is None:
        return None, Window()
    state = checkpoint.state()
    try:
        window, digest, changes = Window(**state["window"]), state["data"], _changes(state, trainer)
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{checkpoint.path}/state.json is of another version: it lacks {error}") from error
    if digest != data.digest:
        raise ConfigError(f"the images of {data.name} are not those that {folder} was trained on; choose another --out")
    for change in changes:
        warnings.warn(f"{folder} was trained {change}: equal up to rounding, not to the bit", stacklevel=2)
    if checkpoint.step > trainer.config.training.steps:
        raise ConfigError(
            f"{folder} has {checkpoint.step} steps already; training.steps {trainer.config.training.steps} is less"
        )
    return checkpoint, window


def _changes(state: dict[str, Any], trainer: Trainer) -> list[str]:
    """What makes a continued run differ, by rounding, from one that was not interrupted."""
    changes = []
    if state["threads"] != torch.get_num_threads():
        changes.append(f"with {state['threads']} threads and is continued with {torch.get_num_threads()}")
    if state["device"] != trainer.device.type:
        changes.append(f"on {state['device']} and is continued on {trainer.device.type}")
    before = with_new_keys(state["engine"], section="engine")
    for key, value in _engine(trainer.config.engine, trainer.processes).items():
        if before[key] != value:
            changes.append(f"with engine.{key.replace('_', '-')} {before[key]} and is continued with {value}")
    return changes


def _engine(config: EngineConfig, processes: ProcessGroup) -> dict[str, Any]:
    """What decides about rounding."""
    return {key: value for key, value in to_dict(config).items() if key not in _UNSAID} | {"processes": processes.size}


def _save_what_is_due(folder: Path, trainer: Trainer, window: Window, report: Report, data: Examples) -> bool:
    """Write snapshots and a checkpoint where they are due; whether there is a checkpoint of this step."""
    training, step = trainer.config.training, trainer.step
    if trainer.powers and step % training.ema_snapshot_every == 0:
        save_snapshot(folder, trainer)
    kept = training.keep_every > 0 and step % training.keep_every == 0
    due = kept or step == training.steps or step % training.save_every == 0
    if due:
        _save(folder, trainer, window, report, data)
    return due


def _stop(
    number: int, saved: bool, folder: Path, trainer: Trainer, window: Window, report: Report, data: Examples
) -> NoReturn:
    """End the run at a signal, with a checkpoint of this step."""
    if not saved:
        _save(folder, trainer, window, report, data)
    raise StoppedError(number, trainer.step)


def _save(folder: Path, trainer: Trainer, window: Window, report: Report, data: Examples) -> None:
    """Write a checkpoint; all processes must call, as each may hold a shard."""
    report.sync()
    training = trainer.config.training
    state = {
        "window": vars(window), "data": data.digest, "threads": torch.get_num_threads(), "device": trainer.device.type,
        "engine": _engine(trainer.config.engine, trainer.processes), "shape": list(data.shape),
        "skipped": {"count": len(data.skipped), "first": list(data.skipped[:_SKIPPED])},
    }  # fmt: skip
    save_checkpoint(folder / "checkpoints", trainer, state)
    if trainer.processes.is_main:
        prune(folder / "checkpoints", training.keep, trainer.step, training.keep_every)
    trainer.processes.barrier()  # a slow disk is waited for without a limit
