"""Grids of samples and figures on held-out images while a run trains; nothing of it changes what is trained."""

from __future__ import annotations

import contextlib
import gc
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, final

import torch

from multistage_diffusion.config import RunConfig
from multistage_diffusion.data import Images, load_data
from multistage_diffusion.data.latents import Examples, FirstStage, Latents
from multistage_diffusion.data.pictures import grid, png
from multistage_diffusion.data.sources import Split
from multistage_diffusion.errors import ConfigError, NumericsError, suggest
from multistage_diffusion.evaluation import METRICS, evaluate
from multistage_diffusion.files import write_atomic
from multistage_diffusion.metrics.extractor import FeatureExtractor
from multistage_diffusion.metrics.extractors import load_extractor
from multistage_diffusion.models.denoiser import Denoiser
from multistage_diffusion.sampling import is_out_of_memory, sample
from multistage_diffusion.training.loop import Trainer
from multistage_diffusion.training.report import SAMPLES, Report

_CELL = 64  # pixels of an image in a grid, at least
_KEPT = ("stage_loss", "loss_error", "kid_std", "is_std", "fid", "fd_infinity", *METRICS)  # of a report


class _Interrupted(Exception):  # noqa: N818  (no error)
    """A signal came while something was drawn."""


@final
class Observer:
    """Draws grids and measures the averaged weights, from images and noise of its own.

    Args:
        folder: The run directory.
        config: The run.
        data: What it is trained on.
        device: Where the model is.
        stop: Asked before each call of the network; once true, what was begun is dropped, to be made after a resume.

    Raises:
        ConfigError: A metric is unknown, or cannot be measured on this source.
        DataError: The held-out images cannot be read.
    """

    def __init__(
        self, folder: Path, config: RunConfig, data: Examples, device: torch.device, stop: Callable[[], bool]
    ) -> None:
        self._folder, self._config, self._stop, self._left_out = folder, config, stop, 0
        self._first_stage: FirstStage | None = None
        self._extractor: FeatureExtractor | None = None
        self._reference: Images | None = None
        match data:
            case Latents():
                self._first_stage, train = data.stage, None
            case _:
                train = data
        if config.logging.evaluate_every:
            self._prepare(train, device)

    def look(self, trainer: Trainer, report: Report) -> None:
        """Draw and measure what is due after this many steps, unless it is there already; all processes must call.

        Args:
            trainer: The training; left as it was.
            report: Takes grids and figures.
        """
        step, logging, world = trainer.step, self._config.logging, trainer.world
        if not (_due(step, logging.grid_every) or _due(step, logging.evaluate_every)):
            return
        path = self._folder / SAMPLES / f"step-{step:08d}.png"
        draw = _due(step, logging.grid_every) and not path.exists()
        measure = _due(step, logging.evaluate_every) and not report.evaluated(step)
        if world.leads:  # it knows what is there
            world.tell(f"what is due after {step}", [draw, measure])
        else:
            draw, measure = world.ask(f"what is due after {step}")
        if not (draw or measure):
            return
        alone = world.size == 1  # else the others would wait for the share of a process that gives up
        with self._spared(step, alone), self._interruptible(trainer.averaged(), alone) as denoiser:
            if draw and world.leads:
                with self._spared(step, True):
                    self._draw(denoiser, path)
                    report.picture(step, path)
            if measure:
                figures = self._measure(denoiser)
                report.evaluation(step, trainer.images, figures)
        world.lead(f"look after {step}", lambda: None)  # nobody goes on to wait in a collective, which has a time limit

    def _draw(self, denoiser: Denoiser, path: Path) -> None:
        logging, sampling = self._config.logging, self._config.sampling
        classes = self._config.model.classes
        labels = torch.arange(logging.grid_images) % classes if classes else None
        images = sample(
            denoiser, logging.grid_images, solver=sampling.solver, steps=sampling.steps, spacing=sampling.spacing,
            labels=labels, batch_size=logging.sample_batch,
        ).images  # fmt: skip
        if self._first_stage is not None:
            images = self._first_stage.decode(images)
        write_atomic(path, png(grid(images, scale=max(1, _CELL // images.shape[2]))))

    def _measure(self, denoiser: Denoiser) -> dict[str, Any]:
        logging, extractor = self._config.logging, self._extractor
        assert self._reference is not None, "prepared before the first step"
        document = evaluate(
            denoiser, self._reference, metrics=logging.metrics, num=logging.evaluate_images,
            extractor=None if extractor is None else lambda: extractor, sampling=self._config.sampling,
            batch_size=logging.sample_batch, first_stage=self._first_stage,
        )  # fmt: skip
        figures = {key: value for key, value in document.items() if key in _KEPT}
        if extractor is not None and document:
            figures |= {"samples": document["samples"], "features": extractor.name}
        return figures

    def _prepare(self, train: Images | None, device: torch.device) -> None:
        """Read the held-out images and make the features, so that what is wrong with them is known before training."""
        logging, source = self._config.logging, self._config.data
        for name in logging.metrics:
            if name not in METRICS:
                raise ConfigError(f"logging.metrics: no metric {name}{suggest(name, METRICS)}")

        def load(split: Split) -> Images:
            return load_data(
                source.source, split=split, root=source.root, resolution=source.resolution, max_bad=source.tolerated
            )

        self._reference = load("test")
        if set(logging.metrics) - {"loss"}:
            self._extractor = load_extractor(logging.features, train or load("train"), self._reference, device=device)

    @contextlib.contextmanager
    def _spared(self, step: int, spare: bool) -> Iterator[None]:
        """Training is to go on where memory does not suffice, or a model makes no finite image."""
        try:
            yield
        except _Interrupted:
            return
        except (NumericsError, MemoryError, RuntimeError) as error:
            known = isinstance(error, NumericsError)
            if not spare or not (known or is_out_of_memory(error)):
                raise
            reason = str(error) if known else "memory does not suffice"
        else:
            return
        gc.collect()  # only here, as the error held on to what was half made
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self._left_out += 1
        warnings.warn(
            f"samples or figures of step {step} are left out ({self._left_out} so far), training goes on: {reason}",
            stacklevel=3,
        )

    @contextlib.contextmanager
    def _interruptible(self, denoiser: Denoiser, alone: bool) -> Iterator[Denoiser]:
        """A denoiser that is not called once a stop was asked for; several processes agree on that after a step."""

        def check(*_: object) -> None:
            if alone and self._stop():
                raise _Interrupted

        handle = denoiser.register_forward_pre_hook(check)
        try:
            yield denoiser
        finally:
            handle.remove()


def _due(step: int, every: int) -> bool:
    return every > 0 and step > 0 and step % every == 0
