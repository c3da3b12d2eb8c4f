"""A trainer in its run directory: from the newest checkpoint to the end or to a signal, with all that is written."""

from __future__ import annotations

import contextlib
import copy
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, final

import torch

from multistage_diffusion.classes import TrainedClasses
from multistage_diffusion.config import RunConfig
from multistage_diffusion.data import Images
from multistage_diffusion.errors import CheckpointError, ConfigError
from multistage_diffusion.files import remove_leftovers, write_json
from multistage_diffusion.metrics.cost import training_flops
from multistage_diffusion.metrics.held_out import held_out_loss
from multistage_diffusion.records import to_dict, with_new_keys
from multistage_diffusion.runs import Checkpoint, Run
from multistage_diffusion.runs.averages import FOLDER as SNAPSHOTS
from multistage_diffusion.runs.checkpoints import newest_valid
from multistage_diffusion.runs.whole import RATES, digests, strangeness
from multistage_diffusion.stages import Stages
from multistage_diffusion.training.checkpoint import prune, restore_checkpoint, save_checkpoint
from multistage_diffusion.training.guard import Place, StoppedError, lock, signals
from multistage_diffusion.training.initial import Initial, require_same_initial
from multistage_diffusion.training.observe import Observer
from multistage_diffusion.training.report import Report, Window
from multistage_diffusion.training.snapshots import save_snapshot
from multistage_diffusion.training.target import check_target, other_data
from multistage_diffusion.training.trainer import StepResult, Trainer

_SKIPPED = 100  # lines about the data that a checkpoint repeats
_INITIAL_IMAGES = 512  # behind the losses at the start
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


@final
class TrainingRun:
    """A trainer in its run directory, from the newest checkpoint to the end or to a signal.

    Args:
        folder: The run directory.
        config: What the run is, for its files.
        trainer: The trainer, at step 0 or where the directory is.
        on_step: Called after each step.
        stages: The partition with its provenance.
        initial: What the weights started from.
        branch: Makes the trainer of the stages from that of the trunk, after `config.branch_step` steps.
    """

    def __init__(
        self,
        folder: Path,
        config: RunConfig,
        trainer: Trainer,
        on_step: Callable[[StepResult, int], None] | None,
        stages: Stages,
        initial: Initial | None = None,
        branch: Callable[[Trainer], Trainer] | None = None,
    ) -> None:
        self.folder, self.config, self.trainer, self.data = folder, config, trainer, trainer.data
        self.processes, self.window, self.on_step = trainer.processes, Window(), on_step
        self.stages, self.initial, self.branch = stages, initial, branch
        self.place: Place | None = None

    def run(self, images: tuple[Images, Images] | None, started: float) -> TrainingSummary:
        """Train to the end.

        Args:
            images: Training and held-out images of the source; none where nothing is to be measured.
            started: When the call began.

        Returns:
            How it ended.
        """
        folder, config, processes = self.folder, self.config, self.processes
        with contextlib.ExitStack() as held:
            if processes.is_main:
                held.enter_context(lock(folder))
                self.place = held.enter_context(contextlib.closing(Place(folder)))
            received = held.enter_context(signals())
            self._open()
            resumed, device = self.trainer.step, self.trainer.device
            with processes.local_main_first():  # what it needs may have to be fetched
                observer = Observer(folder, config, self.data, images, device, received)
            del images  # the observer keeps those that it needs
            with Report(folder, config, resumed, device, processes, self.trainer.callbacks) as report:
                processes.barrier()  # trackers may take their time to answer
                stop = observer.look(self.trainer, report)  # what a signal kept the run from drawing
                if stop is not None:
                    self._stop(stop, True, report)
                if self.initial is not None and self.trainer.step == 0:
                    self._report_initial(self.initial, report)
                if self.branch is not None:
                    self._train(min(config.branch_step, config.training.steps), received, observer, report)
                    if config.branch_step < config.training.steps:
                        self._branch()
                self._train(config.training.steps, received, observer, report)
            model = self.trainer.averaged()
            processes.on_main(lambda: model.save_pretrained(folder / "model"))
        trainer, loss = self.trainer, self.window.loss / self.window.steps if self.window.steps else self.window.last
        flops, seconds = self._flops(), time.perf_counter() - started
        return TrainingSummary(folder, trainer.step, trainer.images, loss, resumed, flops, seconds)

    def _report_initial(self, initial: Initial, report: Report) -> None:
        """Measure the loss right after the start, and that of the trained model, on the same training images."""
        trained, data, losses = initial.denoiser, self.data, {}
        denoiser = self.trainer.averaged()
        if self.processes.is_main and tuple(trained.shape) == tuple(data.shape):
            same = trained.to(self.trainer.device).eval()
            for name, model in (("loss", denoiser), ("trained_loss", same)):
                losses[name] = held_out_loss(model, data, repeats=2, max_images=_INITIAL_IMAGES).loss
            trained.to("cpu")
            report.initial(losses)

    def _train(self, steps: int, received: Sequence[int], observer: Observer, report: Report) -> None:
        """Train to a number of steps, with all that is due on the way."""
        log_every = self.config.training.log_every
        for result in self.trainer.run(steps, received):
            self.window.add(result)
            if result.step % log_every == 0:
                report.training(result, self.window, self._flops())
            elif result.step == self.config.training.steps:  # the checkpoint keeps the sums for a run that goes on
                report.training(result, copy.deepcopy(self.window), self._flops(), partial=True)
            if self.on_step is not None:
                self.on_step(result, self.config.training.steps)
            if self.processes.size == 1:  # several look at the next save, together
                self._require_place(report)
            saved = self._save_what_is_due(report)
            stop = received[0] if self.processes.size == 1 and received else result.stop
            if stop is None:  # after the checkpoint, so that a kill while it draws costs no step
                stop = observer.look(self.trainer, report)
            if stop is not None:
                self._stop(stop, saved, report)

    def _branch(self) -> None:
        """Go on with the trainer of the stages; losses by stage are counted anew."""
        assert self.branch is not None
        self.trainer, self.branch = self.branch(self.trainer), None
        self.window.stage_loss, self.window.stage_steps = [], []

    def _flops(self) -> float:
        """Training FLOPs in all, those of the trunk included."""
        trainer = self.trainer
        return training_flops(trainer.denoiser, trainer.stage_images, trainer.trunk_images, trainer.cost)

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
            if checkpoint is None and self.trainer.step > 0:
                raise ConfigError(
                    f"the trainer has taken {self.trainer.step} steps, of which {self.folder} holds no checkpoint; "
                    "give it a trainer at step 0, or the run directory of those steps"
                )
            require_same_initial(self.folder, self.initial, started=checkpoint is not None)
            write_json(self.folder / "config.json", to_dict(self.config))
            self.stages.save(self.folder / "stages.json")
            self.data.save_record(self.folder)
            if self.trainer.denoiser.trained_classes is not None:
                self.trainer.denoiser.trained_classes.save(self.folder)
        window, step = processes.broadcast(
            (None if checkpoint is None else dict(vars(self.window)), checkpoint and checkpoint.step)
        )
        if window is None:
            return
        if self.branch is not None and step > self.config.branch_step:
            self._branch()
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
        if (strange := strangeness(folder, self.config, checkpoint)) is not None:
            raise CheckpointError(f"{strange}; restore the file, or choose another --out")
        state = checkpoint.state()
        try:
            window, digest, changes = Window(**state["window"]), state["data"], self._changes(state)
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{checkpoint.path}/state.json is of another version: it lacks {error}") from error
        if digest != data.digest:
            raise ConfigError(other_data(folder, data, state.get("shape"), TrainedClasses.load(folder)))
        for change in changes:
            warnings.warn(f"{folder} was trained {change}: equal up to rounding, not to the bit", stacklevel=2)
        before = Run.open(folder).config.training
        for name in RATES:
            if (old := getattr(before, name)) != (new := getattr(self.config.training, name)):
                option = f"training.{name.replace('_', '-')}"
                warnings.warn(f"{option} was {old} and is {new} from step {checkpoint.step} on", stacklevel=2)
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
        # Averages of other lengths are put together from snapshots of one network, so not of the trunk's.
        if self.trainer.powers and step % training.ema_snapshot_every == 0 and self.branch is None:
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

    def _require_place(self, report: Report) -> None:
        """End the run where its directory was renamed or deleted, with a checkpoint where it is now."""
        gone = self.place is not None and not self.place.is_at(self.folder)
        if not self.processes.broadcast(gone):
            return
        before, step = self.folder, self.trainer.step
        there = self.processes.broadcast(self.place.path() if self.place is not None else None)
        if there is None:
            raise CheckpointError(
                f"{before} was deleted while it trained; step {step} is not saved, and the same command begins anew"
            )
        self.folder = Path(there)
        self._save(report)
        raise CheckpointError(
            f"{before} was moved to {there} while it trained; step {step} is saved there, and --out {there} goes on"
        )

    def _save(self, report: Report) -> None:
        """Write a checkpoint; all processes must call, as each may hold a shard."""
        self._require_place(report)
        report.sync()
        trainer, data, checkpoints = self.trainer, self.data, self.folder / "checkpoints"
        state = {
            "window": vars(self.window),
            "data": data.digest,
            "threads": torch.get_num_threads(),
            "device": trainer.device.type,
            "engine": self._engine(),
            "shape": list(data.shape),
            "files": digests(self.folder) if self.processes.is_main else {},
            "skipped": {"count": len(data.skipped), "first": list(data.skipped[:_SKIPPED])},
        }
        save_checkpoint(checkpoints, trainer, state, to_dict(self.config))
        if self.processes.is_main:
            prune(checkpoints, trainer.training.keep, trainer.step, trainer.training.keep_every)
        self.processes.barrier()  # a slow disk is waited for without a limit
