"""What a run reports while it trains: metrics.jsonl always, trackers and callbacks where they are asked for."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, final

import torch

from multistage_diffusion.config import RunConfig, to_dict
from multistage_diffusion.errors import CheckpointError
from multistage_diffusion.files import remove_leftovers, write_atomic
from multistage_diffusion.process_group import SINGLE, ProcessGroup
from multistage_diffusion.training.callbacks import Callback, LogRecord
from multistage_diffusion.training.trackers import SAMPLES, TrackedRun, Trackers
from multistage_diffusion.training.trainer import StepResult

METRICS, _EVALUATION = "metrics.jsonl", "evaluation"
_PARTIAL = "partial"  # marks a last line that a run leaves before its turn, and drops when it goes on
_MALFORMED = (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError)  # of a foreign line


@dataclass
class Window:
    """Sums since the last line of metrics.jsonl; saved with a checkpoint, so that a resumed log is the same log."""

    steps: int = 0
    loss: float = 0.0
    stage_loss: list[float] = field(default_factory=list)
    stage_steps: list[int] = field(default_factory=list)
    last: float | None = None
    clipped: int = 0
    overflows: int = 0

    def add(self, result: StepResult) -> None:
        """Take a step's losses."""
        if not self.stage_loss:
            self.stage_loss, self.stage_steps = [0.0] * len(result.stage_loss), [0] * len(result.stage_loss)
        self.steps += 1
        self.loss += result.loss
        self.clipped += result.clipped
        self.overflows += result.overflows
        for stage, loss in enumerate(result.stage_loss):
            if loss is not None:
                self.stage_loss[stage] += loss
                self.stage_steps[stage] += 1

    def close(self) -> dict[str, Any]:
        """The means, and how many steps were clipped or overflowed in fp16; the sums begin anew."""
        pairs = zip(self.stage_loss, self.stage_steps, strict=True)
        line = {
            "loss": self.loss / self.steps,
            "stage_loss": [total / count if count else None for total, count in pairs],
            "clipped": self.clipped,
            "overflows": self.overflows,
        }
        vars(self).update(vars(Window(last=line["loss"])))
        return line


@final
class Report:
    """metrics.jsonl, the trackers and the callbacks of a run, as a context; process 0 alone reports.

    Args:
        folder: The run directory.
        config: The run.
        step: Steps taken. Lines of later steps, which a killed run left, are dropped: they will be written again.
        device: Whose memory is reported.
        processes: The processes that train together.
        callbacks: Called with each record after it was written.

    Raises:
        CheckpointError: metrics.jsonl cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        config: RunConfig,
        step: int,
        device: torch.device,
        processes: ProcessGroup = SINGLE,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self.folder, self._batch_size, self._device = folder, config.training.batch_size, device
        self._began, self._last_line = time.perf_counter(), (time.perf_counter(), step)
        self._evaluated: set[int] = set()
        self._file: int | None = None
        self._trackers: Trackers | None = None
        self._callbacks: Sequence[Callback] = ()
        if processes.is_main:
            reported = self._continue(step)
            name = config.logging.name or folder.absolute().name
            run = TrackedRun(folder, config.logging.project, name, to_dict(config), reported)
            self._trackers = Trackers(config.logging.trackers, run)
            self._callbacks = (self._trackers, *callbacks)

    def _continue(self, step: int) -> dict[str, int]:
        """Open metrics.jsonl without the lines after a step; the last step of each number, those lines included."""
        folder, kept, reported = self.folder, [], dict[str, int]()
        for line in (folder / METRICS).read_bytes().splitlines() if (folder / METRICS).is_file() else ():
            with contextlib.suppress(*_MALFORMED):
                document = json.loads(line)
                if type(document["step"]) is not int or not 0 <= document["step"] < 2**62:
                    continue
                reported |= dict.fromkeys(flat_numbers(document), int(document["step"]))
                if document["step"] <= step and not document.get(_PARTIAL):
                    kept.append(line + b"\n")
                    self._evaluated |= {document["step"]} if _EVALUATION in document else set()
        for picture in sorted((folder / SAMPLES).glob("step-*.png")):
            reported[SAMPLES] = _step(picture)
            if _step(picture) > step:
                picture.unlink()
        remove_leftovers(folder / SAMPLES)
        write_atomic(folder / METRICS, b"".join(kept))
        self._file = os.open(folder / METRICS, os.O_WRONLY | os.O_APPEND)
        return reported

    def __enter__(self) -> Report:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._trackers is not None:
            self._trackers.__exit__(kind, error, trace)
        if self._file is not None:
            os.close(self._file)

    def training(self, result: StepResult, window: Window, flops: float, *, partial: bool = False) -> None:
        """Report what was trained since the last line.

        Args:
            result: The last step.
            window: The losses since the last line; begins anew.
            flops: FLOPs spent in all.
            partial: Whether the run ends before a line is due; a run that goes on drops the line.
        """
        now, (then, step) = time.perf_counter(), self._last_line
        self._last_line = (now, result.step)
        images = (result.step - step) * self._batch_size
        line = {
            "step": result.step,
            "images": result.images,
            **window.close(),
            "learning_rate": result.learning_rate,
            "gradient_norm": result.gradient_norm,
            "training_flops": flops,
            "images_per_second": round(images / max(now - then, 1e-9), 3),
        }
        if partial:
            line[_PARTIAL] = True
        if self._device.type == "cuda":
            line["gpu_memory_gib"] = round(torch.cuda.max_memory_reserved(self._device) / 2**30, 3)
        self._write(line)

    def initial(self, losses: dict[str, float]) -> None:
        """Report the loss at the start beside that of the model started from."""
        self._write({"step": 0, "images": 0, "initial": losses})

    def evaluation(self, step: int, images: int, figures: dict[str, Any]) -> None:
        """Report the figures of an evaluation."""
        self._write({"step": step, "images": images, _EVALUATION: figures})
        self._evaluated.add(step)

    def evaluated(self, step: int) -> bool:
        """Whether an evaluation of a step was reported, now or before the run was interrupted."""
        return step in self._evaluated

    def picture(self, step: int, images: int, path: Path) -> None:
        """Report a grid of samples."""
        self._log(LogRecord(step, images, picture=path))

    def sync(self) -> None:
        """Bring the lines to the disk."""
        if self._file is not None:
            with self._named_errors():
                os.fsync(self._file)

    def _write(self, line: dict[str, Any]) -> None:
        if self._file is None:
            return
        line["seconds"] = round(time.perf_counter() - self._began, 3)
        with self._named_errors():
            content = (json.dumps(line) + "\n").encode()
            while content:
                content = content[os.write(self._file, content) :]
        scalars = flat_numbers(line)
        self._log(LogRecord(line["step"], line["images"], {name: scalars[name] for name in scalars if name != "step"}))

    def _log(self, record: LogRecord) -> None:
        for callback in self._callbacks:
            callback.on_log(record)

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CheckpointError(
                f"cannot write {self.folder / METRICS}: {error.strerror}; free space, then run the same command"
            ) from error


def flat_numbers(document: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a line by name: {"loss": 1, "stage_loss": [0.2, None]} has "loss" and "stage_loss/0"."""
    numbers: dict[str, float] = {}
    for key, value in document.items():
        if isinstance(value, Mapping):
            numbers |= flat_numbers(value, f"{prefix}{key}/")
        elif isinstance(value, (list, tuple)):
            numbers |= flat_numbers({str(index): item for index, item in enumerate(value)}, f"{prefix}{key}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            numbers[f"{prefix}{key}"] = float(value)
    return numbers


def _step(picture: Path) -> int:
    """The step of a file like step-00001000.png."""
    digits = picture.stem.removeprefix("step-")
    return int(digits) if digits.isdecimal() else 0
