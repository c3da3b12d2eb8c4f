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
from multistage_diffusion.errors import ConfigError, NumericsError, PeerError, is_out_of_memory
from multistage_diffusion.evaluation import drawable_classes, evaluate
from multistage_diffusion.files import write_atomic
from multistage_diffusion.metrics.extractor import FeatureExtractor
from multistage_diffusion.metrics.extractors import load_extractor
from multistage_diffusion.metrics.table import LOGGED, resolve
from multistage_diffusion.process_group import SINGLE, ProcessGroup
from multistage_diffusion.training.report import Report
from multistage_diffusion.training.trackers import SAMPLES
from multistage_diffusion.training.trainer import Trainer

_CELL = 64  # pixels of an image in a grid, at least
_CHECK_EVERY = 1.0  # seconds between two looks whether another process has failed


class _Interrupted(Exception):  # noqa: N818  (no error)
    """A signal came while something was drawn, or another process failed."""


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
        received: Signals that this process has received; grows meanwhile. The drawing or measuring at hand then stops
            at the next call of the network, and is repeated after a resume.

    Raises:
        ConfigError: The features do not exist, or cannot be learned from this source.
    """

    def __init__(
        self,
        folder: Path,
        config: RunConfig,
        data: Examples,
        images: tuple[Images, Images] | None,
        device: torch.device,
        received: Sequence[int] = (),
    ) -> None:
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
            Number of the signal that asks to stop, received by any process; none: go on.
        """
        step, logging, processes = trainer.step, self._config.logging, trainer.processes
        if not (_is_due(step, logging.grid_every) or _is_due(step, logging.evaluate_every)):
            return None
        path = self._folder / SAMPLES / f"step-{step:08d}.png"
        draw = _is_due(step, logging.grid_every) and not path.exists()
        measure = _is_due(step, logging.evaluate_every) and not report.evaluated(step)
        draw, measure = processes.broadcast([draw, measure])  # process 0 knows what is there
        if not (draw or measure):
            return None
        attempt = _Attempt(self._received)
        with attempt.tolerant(), processes.section() as attempt.section:
            with attempt.interruptible(trainer.averaged()) as denoiser:
                if draw and processes.is_main:
                    with attempt.tolerant():
                        self._draw(denoiser, path)
                        report.picture(step, trainer.images, path)
                if measure:
                    report.evaluation(step, trainer.images, self._measure(denoiser, attempt.section))
        signal, reason = attempt.outcome(processes)
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
        logging, labels = self._config.logging, None
        if classes := drawable_classes(denoiser):
            labels = torch.tensor(classes)[torch.arange(logging.grid_images) % len(classes)]
        images = self._config.sampling.draw(
            denoiser, range(logging.grid_images), labels=labels, batch_size=logging.sample_batch
        ).images
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
            sampler=self._config.sampling,
            batch_size=logging.sample_batch,
            codec=self._codec,
            processes=processes,
        )
        figures = {key: value for key, value in evaluation.figures.items() if key in LOGGED}
        if extractor is not None:
            figures |= {"samples": evaluation.samples, "features": extractor.name}
        return figures


@final
class _Attempt:
    """Drawing and measuring that may fail in any process: all processes leave it out, and training goes on.

    Args:
        received: Signals that this process has received.

    Attributes:
        section: The processes, as long as none of them has failed.
    """

    def __init__(self, received: Sequence[int]) -> None:
        self.section, self._received = SINGLE, received
        self._reason: str | None = None
        self._last_check = time.monotonic()

    @contextlib.contextmanager
    def tolerant(self) -> Iterator[None]:
        """A block whose memory may not suffice, or whose images may not be finite; other errors end the run."""
        try:
            yield
            return
        except (_Interrupted, PeerError):  # another process has the reason, or fails altogether
            pass
        except (NumericsError, MemoryError, RuntimeError) as error:
            if not (isinstance(error, NumericsError) or is_out_of_memory(error)):
                raise
            self._reason = str(error) if isinstance(error, NumericsError) else "memory does not suffice"
        gc.collect()  # only here, as the error held on to what was half made
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @contextlib.contextmanager
    def interruptible(self, denoiser: Denoiser) -> Iterator[Denoiser]:
        """A denoiser whose next call ends the block once a process has failed or received a signal."""
        handle = denoiser.register_forward_pre_hook(lambda *_: self._check())
        try:
            yield denoiser
        finally:
            handle.remove()

    def outcome(self, processes: ProcessGroup) -> tuple[int | None, str | None]:
        """Wait for all processes; the signal that any of them received, and why any of them failed."""
        processes.barrier(self._pass_on)
        # All at once, so that all processes stop at a signal or none does.
        outcomes = processes.gather_objects([self._received[0] if self._received else None, self._reason])
        who = "" if processes.size == 1 else "process {}: "
        reasons = [who.format(rank) + reason for rank, (_, reason) in enumerate(outcomes) if reason is not None]
        signals = [number for number, _ in outcomes if number is not None]
        return (signals or [None])[0], (reasons or [None])[0]

    def _check(self) -> None:
        now = time.monotonic()
        if self._received:
            raise _Interrupted
        if now - self._last_check > _CHECK_EVERY:
            self._last_check = now
            if self.section.is_cancelled():
                raise _Interrupted

    def _pass_on(self) -> None:
        """A signal that comes while this process waits for the others stops their drawing, too."""
        if self._received and not self.section.is_cancelled():
            self.section.cancel()


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step > 0 and step % every == 0
