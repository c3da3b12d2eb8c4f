"""Grids of samples and figures on held-out images while a run trains; nothing of it changes what is trained."""

from __future__ import annotations

import contextlib
import gc
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, final

import torch

from multistage_diffusion.config import RunConfig
from multistage_diffusion.data import Images
from multistage_diffusion.data.examples import Examples
from multistage_diffusion.data.pictures import grid, png
from multistage_diffusion.denoiser import Denoiser
from multistage_diffusion.errors import ConfigError, NumericsError, PeerError
from multistage_diffusion.evaluation import evaluate
from multistage_diffusion.files import write_atomic
from multistage_diffusion.metrics.extractor import FeatureExtractor
from multistage_diffusion.metrics.extractors import load_extractor
from multistage_diffusion.metrics.table import LOGGED, resolve
from multistage_diffusion.process_group import ProcessGroup
from multistage_diffusion.sampling import is_out_of_memory, sample
from multistage_diffusion.training.report import SAMPLES, Report
from multistage_diffusion.training.trainer import Trainer

_CELL = 64  # pixels of an image in a grid, at least
_ASK_AFTER = 1.0  # seconds between questions whether another process gave up


class _Interrupted(Exception):  # noqa: N818  (no error)
    """A signal came while something was drawn, or another process gave up."""


def require_metrics(names: Sequence[str]) -> None:
    """Refuse metrics that do not exist, before anything is read."""
    try:
        resolve(names)
    except ConfigError as error:
        raise ConfigError(f"logging.metrics: {error}") from error


@final
class Observer:
    """Draws grids and measures the averaged weights, from images and noise of its own.

    Args:
        folder: The run directory.
        config: The run.
        data: What it is trained on.
        images: Training and held-out images of the source; none where nothing is to be measured.
        device: Where the model is.
        received: Signals that this process has received; grows meanwhile. What was begun is dropped at the next call of
            the network, to be made after a resume.

    Raises:
        ConfigError: The features do not exist, or cannot be learned from this source.
    """

    def __init__(
        self, folder: Path, config: RunConfig, data: Examples, images: tuple[Images, Images] | None,
        device: torch.device, received: Sequence[int] = (),
    ) -> None:  # fmt: skip
        self._folder, self._config, self._received, self._left_out = folder, config, received, 0
        self._codec = data.codec
        self._extractor: FeatureExtractor | None = None
        self._reference: Images | None = None
        if images is not None:
            self._reference = images[1]
            if resolve(config.logging.metrics)[0]:
                self._extractor = load_extractor(config.logging.features, *images, device=device)

    def look(self, trainer: Trainer, report: Report) -> int | None:
        """Draw and measure what is due after this many steps, unless it is there already; all processes must call.

        Args:
            trainer: The training; left as it was.
            report: Takes grids and figures.

        Returns:
            Number of the signal that asks to stop, heard by any process; none: go on.
        """
        step, logging, processes = trainer.step, self._config.logging, trainer.processes
        if not (_due(step, logging.grid_every) or _due(step, logging.evaluate_every)):
            return None
        path = self._folder / SAMPLES / f"step-{step:08d}.png"
        draw = _due(step, logging.grid_every) and not path.exists()
        measure = _due(step, logging.evaluate_every) and not report.evaluated(step)
        draw, measure = processes.broadcast([draw, measure])  # process 0 knows what is there
        if not (draw or measure):
            return None
        given_up = _GivenUp(processes, f"given up after {step}", self._received)
        with given_up.spared(last=True), given_up.checked(trainer.averaged()) as denoiser:
            if draw and processes.is_main:
                with given_up.spared():
                    self._draw(denoiser, path)
                    report.picture(step, path)
            if measure:
                figures = self._measure(denoiser, processes)
                report.evaluation(step, trainer.images, figures)
        signal, reason = given_up.agree()
        if reason is not None:
            self._left_out += 1
            if processes.is_main:
                warnings.warn(
                    f"samples or figures of step {step} are left out ({self._left_out} so far), training goes on: "
                    f"{reason}",
                    stacklevel=2,
                )
        return signal

    def _draw(self, denoiser: Denoiser, path: Path) -> None:
        logging, sampling = self._config.logging, self._config.sampling
        classes = self._config.model.classes
        labels = torch.arange(logging.grid_images) % classes if classes else None
        images = sample(
            denoiser, logging.grid_images, solver=sampling.solver, steps=sampling.steps, spacing=sampling.spacing,
            labels=labels, batch_size=logging.sample_batch,
        ).images  # fmt: skip
        if self._codec is not None:
            images = self._codec.decode(images)
        write_atomic(path, png(grid(images, scale=max(1, _CELL // images.shape[2]))))

    def _measure(self, denoiser: Denoiser, processes: ProcessGroup) -> dict[str, Any]:
        logging, extractor = self._config.logging, self._extractor
        assert self._reference is not None, "read before the first step"
        evaluation = evaluate(
            denoiser,
            self._reference,
            logging.metrics,
            features=extractor,
            num=logging.evaluate_images,
            sampling=self._config.sampling,
            batch_size=logging.sample_batch,
            codec=self._codec,
            processes=processes,
        )
        figures = {key: value for key, value in evaluation.figures.items() if key in LOGGED}
        if extractor is not None:
            figures |= {"samples": evaluation.samples, "features": extractor.name}
        return figures


@final
class _GivenUp:
    """What is given up, by whichever process and for whatever reason: training is to go on, in all of them alike.

    Args:
        processes: The processes.
        key: Told by a process that gives up, so that the others need not finish their shares.
        received: Signals that this process has received.
    """

    def __init__(self, processes: ProcessGroup, key: str, received: Sequence[int]) -> None:
        self._processes, self._key, self._received = processes, key, received
        self._reason: str | None = None
        self._asked = time.monotonic()

    @contextlib.contextmanager
    def spared(self, *, last: bool = False) -> Iterator[None]:
        """Where memory may not suffice, or a model makes no finite image; `last`: nothing is done after it."""
        try:
            yield
            return
        except (_Interrupted, PeerError):  # another process says why, or fails altogether
            pass
        except (NumericsError, MemoryError, RuntimeError) as error:
            known = isinstance(error, NumericsError)
            if not (known or is_out_of_memory(error)):
                raise
            self._reason = str(error) if known else "memory does not suffice"
        gc.collect()  # only here, as the error held on to what was half made
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if last:
            self._processes.set_flag(self._key)

    @contextlib.contextmanager
    def checked(self, denoiser: Denoiser) -> Iterator[Denoiser]:
        """A denoiser that is not called once a process gave up or was asked to stop."""
        handle = denoiser.register_forward_pre_hook(lambda *_: self._check())
        try:
            yield denoiser
        finally:
            handle.remove()

    def agree(self) -> tuple[int | None, str | None]:
        """Wait for all processes; the signal that any of them received, and why any of them gave up."""
        self._processes.barrier(self._pass_on)
        own = [self._received[0] if self._received else None, self._reason]
        told = self._processes.gather_objects(own)  # all at once, so a signal is heard by all or by none
        who = "" if self._processes.size == 1 else "process {}: "
        reasons = [who.format(rank) + reason for rank, (_, reason) in enumerate(told) if reason is not None]
        signals = [number for number, _ in told if number is not None]
        return (signals or [None])[0], (reasons or [None])[0]

    def _check(self) -> None:
        if self._received:
            raise _Interrupted
        now = time.monotonic()
        if now - self._asked > _ASK_AFTER:
            self._asked = now
            if self._processes.flag_is_set(self._key):
                raise _Interrupted

    def _pass_on(self) -> None:
        """A signal that comes while others are still at it."""
        if self._received and not self._processes.flag_is_set(self._key):
            self._processes.set_flag(self._key)


def _due(step: int, every: int) -> bool:
    return every > 0 and step > 0 and step % every == 0
