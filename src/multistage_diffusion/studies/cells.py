"""Trained models behind the studies: cells of a cache keyed by configuration, each trained once, in any order."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from multistage_diffusion.config import Backbone, RunConfig, Sampler, StagesConfig, to_dict
from multistage_diffusion.data import Images
from multistage_diffusion.denoiser import Denoiser
from multistage_diffusion.errors import CheckpointError
from multistage_diffusion.evaluation import distances, generated, held_out_loss
from multistage_diffusion.files import read_json, write_json
from multistage_diffusion.metrics.cost import Cost, network_cost
from multistage_diffusion.metrics.extractor import FeatureExtractor
from multistage_diffusion.runs import load_run
from multistage_diffusion.stages import Stages
from multistage_diffusion.training.batches import first_counts
from multistage_diffusion.training.guard import BusyError, lock
from multistage_diffusion.training.run import train
from multistage_diffusion.training.trainer import StepResult

Say = Callable[[str], None]
Watch = Callable[[StepResult, int], None]
IMAGE_SEED = 1_000_000  # seed of the first image behind a distance
_VERSION = 1  # of what training does with a configuration: raised when that changes, so that no old model is taken
_POLL = 5.0  # seconds between looks at a cell that another process trains
_NO_MATTER = ("steps", "save_every", "keep", "log_every")  # options of training that change no weight


@dataclass(frozen=True)
class Cell:
    """A model to train.

    Attributes:
        config: The run; its number of steps follows from the budget.
        tflops: Training budget, in 10^12 FLOPs, forward and backward.
        points: Models kept on the way, equally spaced, the last one at the end.
    """

    config: RunConfig
    tflops: float
    points: int

    def cost(self, shape: tuple[int, int, int]) -> Cost:
        """What its network costs."""
        return network_cost(self.config.model, shape)

    def step_flops(self, shape: tuple[int, int, int]) -> float:
        """Training FLOPs of one step, on average over steps."""
        training, shares = self.config.training, self.shares
        cost = self.cost(shape)
        match training.batches:
            case "mixed":
                return cost.training_flops(first_counts(training, shares))
            case "single-uniform":
                return cost.training_flops([training.batch_size / len(shares)] * len(shares))
            case _:
                return cost.training_flops([training.batch_size * share for share in shares])

    def flops(self, steps: int, shape: tuple[int, int, int]) -> float:
        """Training FLOPs of a number of steps; those before a branch are the trunk's."""
        before = min(self.config.branch_step, steps)
        trunk = replace(self, config=self.config.trunk).step_flops(shape) if before else 0.0
        return before * trunk + (steps - before) * self.step_flops(shape)

    def steps_within(self, flops: float, shape: tuple[int, int, int]) -> float:
        """The steps that a number of FLOPs pays for."""
        before = self.config.branch_step
        trunk = self.flops(before, shape)
        return before * flops / trunk if flops < trunk else before + (flops - trunk) / self.step_flops(shape)

    def steps(self, shape: tuple[int, int, int]) -> tuple[int, ...]:
        """Steps taken at each of its points."""
        last = max(self.points, round(self.steps_within(self.tflops * 1e12, shape)))
        return tuple(round(last * (index + 1) / self.points) for index in range(self.points))

    @property
    def key(self) -> dict[str, Any]:
        """What its weights depend on beside its configuration and data."""
        return {"tflops": self.tflops, "points": self.points}

    @cached_property
    def shares(self) -> tuple[float, ...]:
        """Share of each of its stages in the training distribution."""
        return Stages(self.config.edges).shares(self.config.process)


@dataclass(frozen=True)
class Climb(Cell):
    """A model trained on and on at a constant rate, so that each of its points is the end of a budget of its own.

    `tflops` is the budget of the first point; each point doubles that of the second before it. How many points there
    may be changes nothing: a climb goes as far as `Cells.fill` is asked to.
    """

    points: int = 64

    @property
    def key(self) -> dict[str, Any]:
        """What its weights depend on beside its configuration and data."""
        return {"climb": self.tflops}

    def steps(self, shape: tuple[int, int, int]) -> tuple[int, ...]:
        """Steps taken at each of its points."""
        budgets = (self.tflops * 1e12 * 2 ** (point / 2) for point in range(self.points))
        return tuple(max(point + 1, round(self.steps_within(flops, shape))) for point, flops in enumerate(budgets))


def cell(config: RunConfig, tflops: float, points: int) -> Cell:
    """A cell, without the options that change nothing: two ways to write one model are one cell.

    A unified network has neither edges nor decoder widths.
    """
    return Cell(plain(config), tflops, points)


def plain(config: RunConfig) -> RunConfig:
    """The run without the options that change nothing: a unified network has neither edges nor decoder widths."""
    if config.model.architecture == "unified":
        config = replace(config, stages=StagesConfig(), model=config.model.unified())
    return config


class Cells:
    """The cache: a folder a cell, with its run, the models on the way and what was measured of them.

    Several processes may work on one cache: each trains what no other holds.

    Args:
        folder: The cache.
        data: Training images.
        test: Held-out images.
        stages: The partition in which losses by stage are given, the same for all cells.
        device: Where to compute.
        say: Told what happens, in lines.
    """

    def __init__(
        self,
        folder: Path,
        data: Images,
        test: Images,
        stages: Stages,
        *,
        device: torch.device | str = "cpu",
        say: Say = print,
    ) -> None:
        self.folder, self.data, self.test, self.stages = folder, data, test, stages
        self.device, self.say = device, say
        # Losses are taken on the first images of the set, and early stopping looks at the last: no image is in both.
        half = len(test) // 2
        measured_on = json.dumps([test.digest, list(stages.edges)])
        self._measured_with = hashlib.sha256(measured_on.encode()).hexdigest()[:8]
        self.validation = test.take(torch.arange(half, len(test)))
        self.measured = test.take(torch.arange(half))

    def path(self, cell: Cell) -> Path:
        """The folder of a cell: named by what it is, keyed by everything that its weights depend on."""
        document = {"version": _VERSION, "config": distinct(cell.config), **cell.key}
        text = json.dumps({**document, "data": self.data.digest}, sort_keys=True)
        name = f"{cell.config.model.architecture}-{'-'.join(map(str, cell.config.model.capacities))}"
        return self.folder / f"{name}-seed{cell.config.training.seed}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"

    def done(self, cell: Cell, point: int = -1) -> bool:
        """Whether a cell is trained to a point, by default its end."""
        return self._record(cell, point).is_file()

    def fill(self, cells: Iterable[Cell], watch: Callable[[Cell], Watch] | None = None, *, point: int = -1) -> None:
        """Train all cells that are not trained yet; those that another process holds come last.

        Args:
            cells: The cells, in the order of preference.
            watch: Makes the function that is called after each step of a cell.
            point: The point to train them to; by default their end.

        Raises:
            NumericsError: A loss is not finite.
            CheckpointError: A file cannot be written or is damaged.
            StoppedError: SIGTERM or SIGINT came; the same call goes on from there.
        """
        waiting = list(dict.fromkeys(one for one in cells if not self.done(one, point)))
        while waiting:
            busy = []
            for one in waiting:
                try:
                    with lock(self.path(one)):
                        self._train(one, watch(one) if watch else None, point)
                except BusyError:
                    busy.append(one)
            if len(busy) == len(waiting):
                time.sleep(_POLL)
            waiting = [one for one in busy if not self.done(one, point)]

    def denoiser(self, cell: Cell, point: int = -1) -> Denoiser:
        """The averaged model of a point, in evaluation mode."""
        return Denoiser.from_pretrained(self._record(cell, point).with_suffix(""), device=self.device)

    def spent(self, cell: Cell, point: int = -1) -> dict[str, Any]:
        """What a point took: `tflops`, `steps`, `images`, `stage_images`, `seconds`."""
        return read_json(self._record(cell, point))

    def loss(self, cell: Cell, point: int = -1, *, validation: bool = False) -> dict[str, Any]:
        """Held-out denoising loss of a point: `loss`, `error` over images, `stage_loss` in the common partition."""

        def measure() -> dict[str, Any]:
            images = self.validation if validation else self.measured
            held_out = held_out_loss(
                self.denoiser(cell, point), images, stages=self.stages, max_images=1_000, repeats=4
            )
            return {"loss": held_out.loss, "error": held_out.error, "stage_loss": list(held_out.stage_loss)}

        return self.cached(cell, point, "validation" if validation else "loss", measure)

    def distance(
        self, cell: Cell, extractor: FeatureExtractor, sampling: Sampler, samples: int, point: int = -1
    ) -> dict[str, Any]:
        """Fréchet and kernel distance of a point's images to the held-out ones: `fd`, `kid`."""

        def measure() -> dict[str, Any]:
            images = generated(self.denoiser(cell, point), samples, sampling, seed=IMAGE_SEED)
            return distances(extractor, self.test, images, ["fd", "kid"])

        key = json.dumps([to_dict(sampling), samples, extractor.digest], sort_keys=True)
        name = f"distance-{sampling.solver}-{sampling.steps}-{samples}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"
        return self.cached(cell, point, name, measure)

    def cached(self, cell: Cell, point: int, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What was measured of a point under this name; measured now if it was not."""
        path = self.path(cell) / f"measured-{self._measured_with}" / f"{point % cell.points}-{name}.json"
        if not path.is_file():
            write_json(path, measure())
        return read_json(path)

    def _record(self, cell: Cell, point: int) -> Path:
        return self.path(cell) / "points" / f"{point % cell.points}.json"

    def _train(self, cell: Cell, watch: Watch | None, point: int) -> None:
        """Train to a point, with a model kept at each one before; goes on from what is there."""
        if self.done(cell, point):  # by another process, since we looked
            return
        path, steps = self.path(cell), cell.steps(self.data.shape)[: point % cell.points + 1]
        tflops = cell.flops(steps[-1], self.data.shape) / 1e12
        self.say(f"{path.name}: {steps[-1]} steps, {tflops:.2f} TFLOPs")
        for index, step in enumerate(steps):
            record = self._record(cell, index)
            if record.is_file():
                continue
            training = replace(cell.config.training, steps=step, save_every=steps[-1], keep=1)
            config = replace(cell.config, training=training)
            summary = train(config, path / "run", data=self.data, device=self.device, on_step=watch)
            loaded = load_run(path / "run", device=self.device)
            loaded.denoiser.save_pretrained(record.with_suffix(""))
            if loaded.stage_images is None:
                raise CheckpointError(f"{path / 'run'} has no count of images by stage")
            write_json(
                record,
                {
                    "tflops": summary.training_flops / 1e12,
                    "steps": step,
                    "images": summary.images,
                    "stage_images": list(loaded.stage_images),
                    "seconds": summary.seconds,
                    "threads": torch.get_num_threads(),
                    "device": str(self.device),
                },
            )


def widths(model: Backbone, *factors: float) -> tuple[int, ...]:
    """Decoder widths as multiples of the encoder's, rounded to whole groups of 4 channels, 4 at least."""
    return tuple(model.nearest_capacity(model.capacity * factor) for factor in factors)


def encoder_width(model: Backbone) -> int:
    """Channels of the encoder, for labels; what it spends, where a family has no width."""
    return getattr(model, "width", model.capacity)


def distinct(config: RunConfig) -> dict[str, Any]:
    """What tells a run from others: its options that are not the defaults, without those that change no weight.

    Returns:
        As JSON types; an option that is added to the library later changes nothing here.
    """
    options = to_dict(config)
    for name in _NO_MATTER:
        del options["training"][name]
    return _differing(options, to_dict(RunConfig()))


def _differing(options: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """What differs from the defaults: options that are added later change no key.

    Args:
        options: Options, maybe in sections.
        defaults: Their defaults.

    Returns:
        The options that have another value, or no default.
    """
    differing = {}
    for name, value in options.items():
        other = defaults.get(name)
        if isinstance(value, dict) and isinstance(other, dict):
            if inner := _differing(value, other):
                differing[name] = inner
        elif value != other:
            differing[name] = value
    return differing
