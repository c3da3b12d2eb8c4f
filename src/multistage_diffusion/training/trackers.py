"""TensorBoard, Weights & Biases, MLflow and trackio behind one door: they may be slow or away, and training goes on.

A thread of its own starts each of them and speaks to it, so that a network that hangs costs seconds at the start and no
training time, and a report that fails costs a warning. A resumed run goes on in the same run of theirs, and does not
report again what it has reported before.
"""

from __future__ import annotations

import contextlib
import importlib
import queue
import secrets
import sys
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, final, runtime_checkable

import numpy as np
from PIL import Image

from multistage_diffusion.config import flat
from multistage_diffusion.errors import ConfigError
from multistage_diffusion.files import read_json, write_json

RECORD = "trackers.json"  # by which names the run goes on in each tracker
_LONGEST_QUEUE = 1_000  # reports that wait for a tracker; more are dropped
_START = 20.0  # seconds that a run waits for its trackers before its first step
_PATIENCE = 60.0  # seconds that a finished run waits for its trackers
_HASTE = 5.0  # the same for a run that a signal or an error stops
_MOST_PARAMETERS = 100  # in one request of MLflow


@dataclass(frozen=True)
class About:
    """What a tracker learns of a run.

    Attributes:
        folder: The run directory.
        project: Project, or experiment, that the run belongs to.
        name: What the run is called.
        config: The whole configuration.
        reported: The last step at which each number was reported before the run was interrupted.
    """

    folder: Path
    project: str
    name: str
    config: dict[str, Any]
    reported: Mapping[str, int]


@runtime_checkable
class Tracker(Protocol):
    """What each of them can do. The calls come from one thread, which made it, and may fail."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Show numbers."""

    def image(self, step: int, name: str, path: Path) -> None:
        """Show a picture."""

    def close(self, failed: bool) -> None:
        """Send the rest."""


@final
class _TensorBoard:
    """Event files in `tensorboard/` of the run directory."""

    def __init__(self, about: About, record: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(about.folder / "tensorboard"))
        rows = "\n".join(f"    {name}: {value}" for name, value in flat(about.config).items())  # Markdown for code
        self._writer.add_text("config", rows)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def image(self, step: int, name: str, path: Path) -> None:
        self._writer.add_image(name, _pixels(path), step, dataformats="HWC")
        self._writer.flush()

    def close(self, failed: bool) -> None:
        self._writer.close()


@final
class _WandB:
    """Weights & Biases; `WANDB_MODE=offline` and its other variables hold."""

    def __init__(self, about: About, record: dict[str, Any]) -> None:
        wandb: Any = importlib.import_module("wandb")

        record.setdefault("id", secrets.token_hex(4))
        self._image = wandb.Image
        self._run = wandb.init(
            project=about.project, name=about.name, id=record["id"], resume="allow", config=about.config,
            dir=str(about.folder), settings=wandb.Settings(console="off"),
        )  # fmt: skip
        self._run.define_metric("*", step_metric="step")  # its own steps may not go back to one reported before

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({**values, "step": step})

    def image(self, step: int, name: str, path: Path) -> None:
        self._run.log({name: self._image(str(path)), "step": step})

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


@final
class _MLflow:
    """MLflow; `MLFLOW_TRACKING_URI` says where, by default a database in the working directory."""

    def __init__(self, about: About, record: dict[str, Any]) -> None:
        mlflow: Any = importlib.import_module("mlflow")
        self._client, self._metric = mlflow.MlflowClient(), mlflow.entities.Metric
        if "id" not in record:
            experiment = self._client.get_experiment_by_name(about.project)
            known = experiment.experiment_id if experiment else self._client.create_experiment(about.project)
            record["id"] = self._client.create_run(known, run_name=about.name).info.run_id
            parameters = [mlflow.entities.Param(name, str(value)) for name, value in flat(about.config).items()]
            for start in range(0, len(parameters), _MOST_PARAMETERS):
                self._client.log_batch(record["id"], params=parameters[start : start + _MOST_PARAMETERS])
        else:
            self._client.update_run(record["id"], status="RUNNING")
        self._id: str = record["id"]

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        metrics = [self._metric(name, value, now, step) for name, value in values.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def image(self, step: int, name: str, path: Path) -> None:
        self._client.log_image(self._id, _pixels(path), key=name, step=step)

    def close(self, failed: bool) -> None:
        self._client.set_terminated(self._id, "FAILED" if failed else "FINISHED")


@final
class _Trackio:
    """trackio; `TRACKIO_SPACE_ID`, `TRACKIO_DIR` and its other variables hold."""

    def __init__(self, about: About, record: dict[str, Any]) -> None:
        trackio: Any = importlib.import_module("trackio")

        record.setdefault("name", f"{about.name}-{secrets.token_hex(4)}")  # its runs go by their names
        self._image = trackio.Image
        self._run = trackio.init(
            project=about.project, name=record["name"], resume="allow", config=about.config, embed=False
        )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def image(self, step: int, name: str, path: Path) -> None:
        self._run.log({name: self._image(path)}, step=step)

    def close(self, failed: bool) -> None:
        self._run.finish()


_KNOWN: dict[str, tuple[Callable[[About, dict[str, Any]], Tracker], str]] = {
    "tensorboard": (_TensorBoard, "torch.utils.tensorboard"),
    "wandb": (_WandB, "wandb"),
    "mlflow": (_MLflow, "mlflow"),
    "trackio": (_Trackio, "trackio"),
}


def require_installed(names: tuple[str, ...]) -> None:
    """Refuse a tracker whose package is missing, before anything is trained.

    Args:
        names: Some of tensorboard, wandb, mlflow, trackio.

    Raises:
        ConfigError: A package is missing.
    """
    for name in names:
        try:
            with contextlib.redirect_stdout(sys.stderr):
                importlib.import_module(_KNOWN[name][1])
        except ImportError as error:
            raise ConfigError(
                f"logging.trackers {name} cannot be imported ({error}): pip install 'multistage-diffusion[{name}]'"
            ) from error


@final
class _Line:
    """One tracker, and the thread that alone speaks to it, from its start on."""

    def __init__(self, name: str, start: Callable[[], Tracker]) -> None:
        self.name, self.lost, self.up = name, 0, threading.Event()
        self.failures: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._reports: queue.Queue[Callable[[Tracker], None] | None] = queue.Queue(_LONGEST_QUEUE)
        self._left_out = False
        self._thread = threading.Thread(target=self._work, args=(start,), name=f"tracker {name}", daemon=True)
        self._thread.start()

    def put(self, report: Callable[[Tracker], None]) -> None:
        """Have something reported, in its turn."""
        if self._left_out:
            return
        try:
            self._reports.put_nowait(report)
        except queue.Full:
            self._fail(TimeoutError(f"{_LONGEST_QUEUE} reports wait already"))

    def end(self, failed: bool) -> None:
        """Nothing more is reported, of a run that failed or not."""
        self.put(lambda tracker: tracker.close(failed))
        with contextlib.suppress(queue.Full):
            self._reports.put(None, timeout=1.0)

    def ended(self, deadline: float) -> bool:
        """Wait until everything is said; whether it was."""
        self._thread.join(max(deadline - time.monotonic(), 0.0))
        return not self._thread.is_alive()

    def _work(self, start: Callable[[], Tracker]) -> None:
        try:
            tracker = start()
        except Exception as error:
            self._left_out = True
            self._fail(error)
            return
        finally:
            self.up.set()
        while (report := self._reports.get()) is not None:
            try:
                report(tracker)
            except Exception as error:
                self._fail(error)

    def _fail(self, error: Exception) -> None:
        """Remember a failure; said later, by the main thread."""
        first = (str(error).strip().splitlines() or [""])[0]
        what = "is left out of this run" if self._left_out else "did not take a report"
        self.failures.put(f"{self.name} {what}: {type(error).__name__}: {first}"[:300])


@final
class Trackers:
    """The trackers that a run asked for, as a context; a report to them returns at once and never fails.

    They are started side by side, and waited for 20 s at most. What is reported to one that is not up by then waits
    for it, as long as there are less than a thousand reports.

    Args:
        names: Some of tensorboard, wandb, mlflow, trackio; all installed.
        about: The run.
    """

    def __init__(self, names: tuple[str, ...], about: About) -> None:
        self._lines: list[_Line] = []
        self._reported: dict[str, int] = {}
        self._said: set[str] = set()
        if not names:
            return
        path = about.folder / RECORD
        records: dict[str, dict[str, Any]] = read_json(path) if path.is_file() else {}
        before: dict[str, int] = records.get("reported", {})
        both = sorted({*before, *about.reported})
        self._reported = {name: max(before.get(name, 0), about.reported.get(name, 0)) for name in both}
        records["reported"] = self._reported
        write_json(path, records)
        writing = threading.Lock()

        def start(name: str) -> Tracker:
            record = dict(records.get(name, {}))
            try:
                return _KNOWN[name][0](about, record)
            finally:
                with writing:
                    records[name] = record
                    write_json(path, records)

        deadline = time.monotonic() + _START
        with contextlib.redirect_stdout(sys.stderr):  # some greet on stdout, which may be a JSON document
            self._lines = [_Line(name, partial(start, name)) for name in names]
            for line in self._lines:
                if not line.up.wait(max(deadline - time.monotonic(), 0.0)):
                    warnings.warn(f"{line.name} is not up after {_START:.0f} s; training goes on", stacklevel=2)
        self._warn()

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Wait a while for what was not sent yet."""
        if not self._lines:
            return
        patience = _PATIENCE if kind is None else _HASTE
        deadline = time.monotonic() + patience
        with contextlib.redirect_stdout(sys.stderr):  # and some say goodbye there
            for line in self._lines:
                line.end(failed=kind is not None)
            late = [line.name for line in self._lines if not line.ended(deadline)]
        self._warn()
        for line in self._lines:
            if line.lost > 1:
                warnings.warn(
                    f"{line.name} did not take {line.lost} reports in all; metrics.jsonl has them", stacklevel=2
                )
        if late:
            warnings.warn(f"{', '.join(late)} did not take everything within {patience:.0f} s", stacklevel=2)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Show numbers.

        Args:
            step: Steps taken.
            values: Finite numbers by name.
        """
        new = {name: value for name, value in values.items() if step > self._reported.get(name, 0)}
        if new:
            self._put(lambda tracker: tracker.scalars(step, new))

    def image(self, step: int, name: str, path: Path) -> None:
        """Show a picture.

        Args:
            step: Steps taken.
            name: What it shows.
            path: A PNG that stays where it is.
        """
        if step > self._reported.get(name, 0):
            self._put(lambda tracker: tracker.image(step, name, path))

    def _put(self, report: Callable[[Tracker], None]) -> None:
        for line in self._lines:
            line.put(report)
        self._warn()

    def _warn(self) -> None:
        """One line a tracker, however often it fails."""
        for line in self._lines:
            while not line.failures.empty():
                failure = line.failures.get()
                line.lost += 1
                if line.name not in self._said:
                    self._said.add(line.name)
                    warnings.warn(failure, stacklevel=3)


def flat_numbers(document: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a report by name, as trackers take them.

    Args:
        document: A line of metrics.jsonl, like {"loss": 0.1, "stage_loss": [0.2, None]}.
        prefix: Before each name.

    Returns:
        Like {"loss": 0.1, "stage_loss/0": 0.2}: what is no number is left out.
    """
    numbers: dict[str, float] = {}
    for key, value in document.items():
        if isinstance(value, Mapping):
            numbers |= flat_numbers(value, f"{prefix}{key}/")
        elif isinstance(value, (list, tuple)):
            numbers |= flat_numbers({str(index): item for index, item in enumerate(value)}, f"{prefix}{key}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            numbers[f"{prefix}{key}"] = float(value)
    return numbers


def _pixels(path: Path) -> Any:
    """A picture as an array, height x width x 3."""
    with Image.open(path, formats=["PNG"]) as picture:
        return np.asarray(picture.convert("RGB"))
