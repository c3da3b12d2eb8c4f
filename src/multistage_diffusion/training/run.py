"""The run directory: configuration, stages, metrics, checkpoints and the averaged model; the same command resumes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from multistage_diffusion.classes import TrainedClasses
from multistage_diffusion.config import DataConfig, LoggingConfig, RunConfig, StagesConfig
from multistage_diffusion.data import Images, load_parts
from multistage_diffusion.data.doubts import warn_of
from multistage_diffusion.data.examples import Examples
from multistage_diffusion.data.feed import make_feed
from multistage_diffusion.data.latents import load_examples
from multistage_diffusion.data.user import Data, as_data
from multistage_diffusion.errors import ConfigError
from multistage_diffusion.inherit import inherit
from multistage_diffusion.process_group import SINGLE, ProcessGroup, join, local_device
from multistage_diffusion.records import check, check_path
from multistage_diffusion.runs import build_denoiser
from multistage_diffusion.sampling import Sampler
from multistage_diffusion.stages import Stages
from multistage_diffusion.training.branch import branch_trainer
from multistage_diffusion.training.callbacks import Callback
from multistage_diffusion.training.directory import TrainingRun, TrainingSummary
from multistage_diffusion.training.initial import Initial, initial_classes
from multistage_diffusion.training.observe import require_metrics
from multistage_diffusion.training.target import check_target
from multistage_diffusion.training.trackers import require_installed
from multistage_diffusion.training.trainer import StepResult, Trainer


def train(
    config: RunConfig,
    out: str | Path,
    *,
    data: Data | None = None,
    stages: Stages | None = None,
    network: nn.Module | None = None,
    initial: Initial | Callable[[tuple[int, int, int]], Initial] | None = None,
    device: torch.device | str = "auto",
    callbacks: Sequence[Callback] = (),
    on_step: Callable[[StepResult, int], None] | None = None,
    on_encode: Callable[[int, int], None] | None = None,
) -> TrainingSummary:
    """Train a model in a run directory; called again with the same arguments, resume it.

    Under `torchrun`, every process calls it alike; process 0 alone writes.

    Args:
        config: The whole configuration.
        out: The run directory.
        data: Training images or latents, or what `as_data` takes; by default loaded and encoded as `config.data` says.
        stages: The partition with its provenance, kept in `stages.json`; its edges are those of the configuration.
        network: A network of the user's, in place of the one that `config.model` describes.
        initial: A trained denoiser to start from, or a function that gives it for a shape; by default weights are
            random.
        device: Where to train: by default a GPU where there is one; `cuda` is the GPU of this process.
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
    check(isinstance(config, RunConfig), "config", "a RunConfig, like recipe(NAME)", config)
    started, folder, device = time.perf_counter(), check_path(out, "out"), local_device(device)
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
        if stages is None or stages.edges != config.stages.edges:
            stages = Stages(config.stages.edges)
        if initial is not None and not isinstance(initial, Initial):
            initial = initial(data.shape)
        branch, first = None, config
        if config.branch_step:
            build = partial(build_denoiser, config, data.shape, stages, network=network)
            branch, first = (lambda trunk: branch_trainer(trunk, build(), config.training)), config.trunk
        trainer = build_trainer(
            first,
            data,
            None if branch else stages,
            network=network,
            initial=initial,
            classes=initial_classes(folder),
            device=device,
            processes=processes,
            callbacks=callbacks,
        )
        return TrainingRun(folder, config, trainer, on_step, stages, initial, branch).run(images, started)


def build_trainer(
    config: RunConfig,
    data: Examples,
    stages: Stages | None = None,
    *,
    network: nn.Module | None = None,
    initial: Initial | None = None,
    classes: TrainedClasses | None = None,
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
        initial: A trained denoiser to start from.
        classes: The classes that the network knows already, without `initial`.
        device: Where to train.
        processes: The processes that train together.
        callbacks: As in `train`.

    Returns:
        The trainer, at step 0.

    Raises:
        ConfigError: The configuration does not fit the data.
    """
    guided = config.sampling.guidance != 1 and config.model.classes > 0
    hidden = config.training.label_dropout
    check(not guided or hidden > 0, "training.label-dropout", "above 0 with sampling.guidance", hidden)
    denoiser = build_denoiser(config, data.shape, stages, network=network)
    denoiser.trained_classes = classes
    if initial is not None:
        inherit(denoiser, initial.denoiser, initial.name)
    return Trainer(
        denoiser,
        data,
        config.training,
        config.engine,
        flip=config.data.flip and config.data.autoencoder is None,  # latents of mirrored images are among the latents
        augment_probability=config.data.augment_probability,
        augment_signs=config.data.augment_signs,
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
    started, folder, denoiser = time.perf_counter(), check_path(out, "out"), trainer.denoiser
    denoiser.sampler = sampler or denoiser.sampler or Sampler()
    augmented = trainer.augment_probability > 0
    config = RunConfig(
        data=DataConfig(
            source=trainer.data.name,
            scale=trainer.data.scaling,
            flip=trainer.flip,
            augment_probability=trainer.augment_probability,
            augment_signs=trainer.augment_signs,
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
    return TrainingRun(folder, config, trainer, on_step, denoiser.stages).run(images, started)


def _read(
    config: RunConfig, data: Data | None, device: torch.device, on_encode: Callable[[int, int], None] | None
) -> tuple[Examples, tuple[Images, Images] | None]:
    """What is trained on, and where something is to be measured the training and held-out images; read once."""
    images = load_parts(config.data) if config.logging.evaluate_every else None
    if data is None:
        data = load_examples(config.data, device, on_encode, None if images is None else images[0])
    else:
        data = as_data(data)
        warn_of(data)
    return data, (data, images[1]) if images is not None and isinstance(data, Images) else images
