"""TensorBoard, Weights & Biases, MLflow and trackio, as one callback that neither stops nor delays training.

Each tracker has a queue and a thread of its own, so one that hangs delays neither the run nor another tracker. A
resumed run continues the same run of each tracker (`trackers.json` has their names for it) and reports nothing twice.
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
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, final

import numpy as np
from PIL import Image

from multistage_diffusion.config import flat
from multistage_diffusion.errors import ConfigError
from multistage_diffusion.files import read_json, write_json
from multistage_diffusion.training.callbacks import LogRecord

RECORD, SAMPLES = "trackers.json", "samples"
_MAX_WAITING = 1_000  # records that wait for a tracker; more are dropped
_START, _END, _END_FAILED = 20.0, 60.0, 5.0  # seconds that a run waits for its trackers


@dataclass(frozen=True)
class TrackedRun:
    """What trackers show of a run: where and what it is, and the last step at which each number was reported before."""

    folder: Path
    project: str
    name: str
    config: dict[str, Any]
    reported: Mapping[str, int]


Tracker = tuple[Callable[[LogRecord], object], Callable[[bool], object]]  # log(record), close(failed)


def _tensorboard(run: TrackedRun, ids: dict[str, str]) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(run.folder / "tensorboard"))
    writer.add_text("config", "\n".join(f"    {name}: {value}" for name, value in flat(run.config).items()))

    def log(record: LogRecord) -> None:
        for name, value in record.scalars.items():
            writer.add_scalar(name, value, record.step)
        if record.picture is not None:
            writer.add_image(SAMPLES, _pixels(record.picture), record.step, dataformats="HWC")
        writer.flush()

    return log, lambda failed: writer.close()


def _wandb(run: TrackedRun, ids: dict[str, str]) -> Tracker:
    wandb: Any = importlib.import_module("wandb")
    options = {"project": run.project, "name": run.name, "config": run.config, "dir": str(run.folder)}
    id_ = ids.setdefault("id", secrets.token_hex(4))
    remote = wandb.init(**options, id=id_, resume="allow", settings=wandb.Settings(console="off"))
    remote.define_metric("*", step_metric="step")  # its own steps may not go back to an earlier one

    def log(record: LogRecord) -> None:
        picture = {} if record.picture is None else {SAMPLES: wandb.Image(str(record.picture))}
        remote.log({**record.scalars, **picture, "step": record.step})

    return log, lambda failed: remote.finish(exit_code=int(failed))


def _mlflow(run: TrackedRun, ids: dict[str, str]) -> Tracker:
    mlflow: Any = importlib.import_module("mlflow")
    mlflow.set_experiment(run.project)
    is_new = "id" not in ids
    ids["id"] = mlflow.start_run(ids.get("id"), run_name=run.name).info.run_id  # the active run of this thread
    if is_new:
        mlflow.log_params(flat(run.config))

    def log(record: LogRecord) -> None:
        mlflow.log_metrics(dict(record.scalars), step=record.step)
        if record.picture is not None:
            mlflow.log_image(_pixels(record.picture), key=SAMPLES, step=record.step)

    return log, lambda failed: mlflow.end_run("FAILED" if failed else "FINISHED")


def _trackio(run: TrackedRun, ids: dict[str, str]) -> Tracker:
    trackio: Any = importlib.import_module("trackio")
    name = ids.setdefault("name", f"{run.name}-{secrets.token_hex(4)}")  # its runs are known by their names
    remote = trackio.init(project=run.project, name=name, resume="allow", config=run.config, embed=False)

    def log(record: LogRecord) -> None:
        picture = {} if record.picture is None else {SAMPLES: trackio.Image(record.picture)}
        remote.log({**record.scalars, **picture}, step=record.step)

    return log, lambda failed: remote.finish()


_TRACKERS = {"tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow, "trackio": _trackio}


def require_installed(names: tuple[str, ...]) -> None:
    """Refuse a tracker whose package is missing, before anything is trained."""
    for name in names:
        try:
            with contextlib.redirect_stdout(sys.stderr):
                importlib.import_module({"tensorboard": "torch.utils.tensorboard"}.get(name, name))
        except ImportError as error:
            raise ConfigError(
                f"logging.trackers {name} cannot be imported ({error}): pip install 'multistage-diffusion[{name}]'"
            ) from error


@final
class _Worker:
    """A tracker and the thread that alone calls it, from its start to its end."""

    def __init__(self, name: str, start: Callable[[], Tracker]) -> None:
        self.name, self.failures, self.started = name, 0, threading.Event()
        self._waiting: queue.Queue[LogRecord | bool] = queue.Queue(_MAX_WAITING)
        self.thread = threading.Thread(target=self._work, args=(start,), name=f"tracker {name}", daemon=True)
        self.thread.start()

    def put(self, item: LogRecord | bool, seconds: float = 0.0) -> None:
        """Have a record logged in its turn; the last item says whether the run failed."""
        try:
            self._waiting.put(item, block=seconds > 0, timeout=seconds or None)
        except queue.Full:
            self._fail("did not take a report", TimeoutError(f"{_MAX_WAITING} reports wait already"))

    def _work(self, start: Callable[[], Tracker]) -> None:
        log = close = lambda _: None
        try:
            log, close = start()
        except Exception as error:
            self._fail("is left out of this run", error)
        self.started.set()
        item: LogRecord | bool | None = None
        while not isinstance(item, bool):
            item = self._waiting.get()
            try:
                close(item) if isinstance(item, bool) else log(item)
            except Exception as error:
                self._fail("did not take a report", error)

    def _fail(self, what: str, error: Exception) -> None:
        """One line, however often a tracker fails."""
        self.failures += 1
        if self.failures == 1:
            first = (str(error).strip().splitlines() or [""])[0]
            warnings.warn(f"{self.name} {what}: {type(error).__name__}: {first}"[:300], stacklevel=2)


@final
class Trackers:
    """The trackers of a run, as a callback and a context. They start side by side, and are waited for 20 s at most."""

    def __init__(self, names: tuple[str, ...], run: TrackedRun) -> None:
        self._workers: list[_Worker] = []
        if not names:
            return
        path, writing = run.folder / RECORD, threading.Lock()
        record: dict[str, dict[str, Any]] = read_json(path) if path.is_file() else {}
        before, now = record.get("reported", {}), run.reported
        self._reported = {name: max(before.get(name, 0), now.get(name, 0)) for name in sorted({*before, *now})}
        write_json(path, record | {"reported": self._reported})

        def start(name: str) -> Tracker:
            ids = dict(record.get(name, {}))
            try:
                return _TRACKERS[name](run, ids)
            finally:
                with writing:
                    record.update({name: ids, "reported": self._reported})
                    write_json(path, record)

        deadline = time.monotonic() + _START
        with contextlib.redirect_stdout(sys.stderr):  # they print, and stdout may be a JSON document
            self._workers = [_Worker(name, partial(start, name)) for name in names]
            for worker in self._workers:
                if not worker.started.wait(max(deadline - time.monotonic(), 0.0)):
                    warnings.warn(f"{worker.name} is not up after {_START:.0f} s; training goes on", stacklevel=2)

    def on_log(self, record: LogRecord) -> None:
        """Pass on what was not reported before; returns at once and never fails."""
        if not self._workers:
            return
        scalars = {name: value for name, value in record.scalars.items() if record.step > self._reported.get(name, 0)}
        picture = record.picture if record.step > self._reported.get(SAMPLES, 0) else None
        if scalars or picture is not None:
            for worker in self._workers:
                worker.put(replace(record, scalars=scalars, picture=picture))

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Wait a while for what was not sent yet."""
        patience = _END if kind is None else _END_FAILED
        deadline = time.monotonic() + patience
        with contextlib.redirect_stdout(sys.stderr):
            for worker in self._workers:
                worker.put(kind is not None, 1.0)
            for worker in self._workers:
                worker.thread.join(max(deadline - time.monotonic(), 0.0))
        for worker in self._workers:
            if worker.failures > 1:
                text = f"{worker.name} did not take {worker.failures} reports in all; metrics.jsonl has them"
                warnings.warn(text, stacklevel=2)
        if late := [worker.name for worker in self._workers if worker.thread.is_alive()]:
            warnings.warn(f"{', '.join(late)} did not take everything within {patience:.0f} s", stacklevel=2)


def _pixels(path: Path) -> Any:
    """A picture as an array, height x width x 3."""
    with Image.open(path, formats=["PNG"]) as picture:
        return np.asarray(picture.convert("RGB"))
