"""Short proxy runs, and the decoder widths that their laws choose for a run."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import torch

from multistage_diffusion import rng
from multistage_diffusion.allocation.laws import (
    Allocation,
    Law,
    Measurement,
    allocate_sampling,
    allocate_training,
    fit_law,
)
from multistage_diffusion.backbones import Backbone
from multistage_diffusion.config import RunConfig, check
from multistage_diffusion.data import Images
from multistage_diffusion.errors import ConfigError
from multistage_diffusion.evaluation import held_out_loss
from multistage_diffusion.metrics.cost import StageCost, network_cost
from multistage_diffusion.stages import Stages
from multistage_diffusion.training.run import build_trainer

Say = Callable[[str], None]
Purpose = Literal["training", "sampling", "seconds"]
PROXY_SHARES = (0.25, 0.5, 0.75, 1.25)  # decoder widths of the proxy runs, in encoder widths
_WIDEST = 1.5  # widest decoder to choose, in encoder widths: not far beyond what the proxies measure
_HELD_OUT = 0.1  # share of the training images that the proxies keep for measuring
_NOISE_LEVELS = 4_000  # noise levels of a measurement, at least
_UNITS: dict[Purpose, tuple[str, float]] = {
    "training": ("training PFLOPs", 1e15),
    "sampling": ("sampling GFLOPs", 1e9),
    "seconds": ("training seconds", 1.0),
}
_ANY_LAW = Law(0.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0)


@dataclass(frozen=True)
class Choice:
    """The capacities chosen, and what they were chosen from.

    Attributes:
        allocation: Capacity of each decoder, with the loss expected of them.
        budget: What they had to keep to, in `unit`.
        unit: Training PFLOPs in all, GFLOPs of drawing one image, or seconds of training in all.
        equal_loss: Expected loss of decoders of the encoder's own width, for the same budget of training, or after the
            same number of images.
        laws: Law of each stage.
        measurements: What the proxy runs measured.
    """

    allocation: Allocation
    budget: float
    unit: str
    equal_loss: float
    laws: tuple[Law, ...]
    measurements: tuple[Measurement, ...]

    def to_dict(self) -> dict[str, Any]:
        """What `stages.json` and the command's document hold; a U-Net's capacity is its width there."""

        def named(record: Law | Measurement) -> dict[str, Any]:
            return {name.replace("capacity", "width"): value for name, value in asdict(record).items()}

        return {
            "decoder_widths": list(self.allocation.capacities),
            "allocation": {
                "budget": self.budget,
                "unit": self.unit,
                "loss": self.allocation.loss,
                "equal_loss": self.equal_loss,
                "images": self.allocation.images,
                "laws": [named(law) for law in self.laws],
                "measurements": [named(item) for item in self.measurements],
            },
        }


def allocate(
    config: RunConfig,
    data: Images,
    budget: float,
    purpose: Purpose,
    *,
    steps: int = 300,
    device: torch.device | str = "cpu",
    say: Say = print,
) -> Choice:
    """Decoder widths for a run's stages under a budget.

    Args:
        config: The run; its stages are kept, its decoder widths are replaced.
        data: Training images; a tenth of them is held out from the proxies and measured on.
        budget: Training PFLOPs in all, GFLOPs of drawing one image with the run's sampler, or seconds of training on
            this machine, as the proxy runs take them.
        purpose: Which of the three.
        steps: Steps of each proxy run.
        device: Where to train.
        say: Called with what was measured, in lines.

    Returns:
        The widths, with what they were chosen from.

    Raises:
        ConfigError: The budget is too small for any widths.
    """
    base, candidates = config.model.capacity, candidate_widths(config.model)
    stages, (unit, scale) = Stages(config.stages.edges), _UNITS[purpose]

    measurements = list[Measurement]()

    def choose(laws: Sequence[Law], widths: Sequence[int], longest: float) -> Allocation:
        if purpose == "seconds":
            row = seconds_an_image(measurements, widths)
            return allocate_training(laws, stages.shares(config.process), widths, [row] * len(stages), budget, unit)
        if purpose == "training":
            return widths_for_training(config, data.shape, laws, widths, budget * scale)
        return widths_for_sampling(config, data.shape, laws, widths, budget * scale, longest)

    # A budget that buys nothing is refused before anything is trained.
    if purpose != "seconds":
        choose([_ANY_LAW] * len(stages), candidates, 1.0)
    train, held_out = split(data, config.training.seed)
    measurements += run_proxies(
        config, train, held_out, proxy_widths(config.model), steps=steps, device=device, say=say
    )
    laws = tuple(fit_law(measurements, stage) for stage in range(len(stages)))
    longest = float(max(item.images for item in measurements))
    allocation = choose(laws, candidates, longest)
    images = longest if purpose == "sampling" else choose(laws, (base,), longest).images
    shares = stages.shares(config.process)
    equal_loss = sum(share * law.loss(base, images) for share, law in zip(shares, laws, strict=True))
    return Choice(allocation, budget, unit, equal_loss, laws, tuple(measurements))


def run_proxies(
    config: RunConfig,
    data: Images,
    test: Images,
    widths: Sequence[int],
    *,
    steps: int = 300,
    points: int = 3,
    device: torch.device | str = "cpu",
    say: Say = print,
) -> list[Measurement]:
    """Train a network with equal decoders for each width, and read each stage's held-out loss on the way.

    Args:
        config: The run; its decoder widths are replaced.
        data: Training images.
        test: Held-out images.
        widths: Decoder widths to try.
        steps: Steps of each proxy run.
        points: Readings of each, from half of the steps to all, in equal ratios: what is earlier belongs to the
            warm-up more than to the law.
        device: Where to train.
        say: Called with what was measured, in lines.

    Returns:
        One measurement for each width and reading.
    """
    stages, measurements = Stages(config.stages.edges), []
    repeats = max(8, -(-_NOISE_LEVELS // len(test)))
    for width in widths:
        model = config.model.with_capacities((width,) * len(stages))
        trainer = build_trainer(replace(config, model=model), data, stages, device=device)
        seconds = 0.0
        for point in range(points):
            start = time.perf_counter()  # each step ends with a value that is read, so the device has done its work
            for _ in trainer.run(max(1, round(steps * 0.5 ** (1 - point / max(points - 1, 1))))):
                pass
            seconds += time.perf_counter() - start
            held_out = held_out_loss(trainer.averaged(), test, stages=stages, repeats=repeats)
            losses = tuple(loss for loss in held_out.stage_loss if loss is not None)
            assert len(losses) == len(stages), "every stage has held-out noise levels"
            measurements.append(Measurement(width, trainer.images, losses, seconds))
            text = ", ".join(f"{loss:.4f}" for loss in losses)
            say(f"decoders of width {width}, {trainer.images} images: stage losses {text}")
    return measurements


def seconds_an_image(measurements: Sequence[Measurement], capacities: Sequence[int]) -> list[float]:
    """Seconds that training takes for an image of a stage whose decoder has a capacity.

    Each proxy run has equal decoders, so an image of any stage takes what its images take on average; between its first
    and its last reading, as a run's first steps are slow. The law a + b w + c w^2 with non-negative parts (overhead and
    encoder; memory; products) is fitted to the runs by least squares of relative errors.

    Args:
        measurements: Proxy runs with seconds, each with at least two readings.
        capacities: Capacities to read the law at.

    Raises:
        ConfigError: No seconds were measured.
    """
    from scipy.optimize import nnls

    def powers(capacity: float) -> list[float]:
        return [1.0, capacity, capacity**2]

    rows = []
    for capacity in sorted({item.capacity for item in measurements}):
        own = sorted((item for item in measurements if item.capacity == capacity), key=lambda item: item.images)
        first, last = own[0], own[-1]
        if not last.seconds > first.seconds:
            raise ConfigError("the proxy runs were not timed; give --proxy-steps at least 4")
        each = (last.seconds - first.seconds) / (last.images - first.images)
        rows.append([power / each for power in powers(capacity)])
    law, _ = nnls(np.array(rows), np.ones(len(rows)))
    return [float(law @ powers(capacity)) for capacity in capacities]


def split(data: Images, seed: int) -> tuple[Images, Images]:
    """The images that the proxies train on, and a tenth that they measure on; so no test image has a say in widths."""
    check(len(data) >= 2, "allocate", "used with at least two images", len(data))
    order, held_out = rng.permutation(seed, "proxies/held-out", 0, len(data)), max(1, round(len(data) * _HELD_OUT))
    return data.take(order[held_out:]), data.take(order[:held_out])


def candidate_widths(model: Backbone) -> tuple[int, ...]:
    """Decoder widths to choose from: the encoder's own, and multiples of a step that grows with it.

    At most 64 widths, increasing, up to 1.5 times the encoder's; each holds the network's attention heads whole.
    """
    unit = model.capacity_unit
    step = max(unit, model.capacity // 16 // unit * unit)
    sizes = map(model.nearest_capacity, range(step, int(model.capacity * _WIDEST) + 1, step))
    return tuple(sorted({*sizes, model.capacity}))


def proxy_widths(model: Backbone) -> tuple[int, ...]:
    """Decoder widths of the proxy runs: a quarter, half, three quarters and five quarters of the encoder's."""
    unit = model.capacity_unit
    sizes = (max(1, round(model.capacity * share / unit)) * unit for share in PROXY_SHARES)
    return tuple(sorted(set(map(model.nearest_capacity, sizes))))


def widths_for_training(
    config: RunConfig, shape: tuple[int, int, int], laws: Sequence[Law], candidates: Sequence[int], budget: float
) -> Allocation:
    """Decoder widths of least expected loss under a budget of training FLOPs."""
    stages = Stages(config.stages.edges)
    flops = _flops(config, shape, candidates, len(stages), lambda cost: cost.training_flops)
    return allocate_training(laws, stages.shares(config.process), candidates, flops, budget)


def widths_for_sampling(
    config: RunConfig,
    shape: tuple[int, int, int],
    laws: Sequence[Law],
    candidates: Sequence[int],
    budget: float,
    images: float,
) -> Allocation:
    """Decoder widths of least expected loss, after some images, under a budget of FLOPs for one image to be drawn."""
    stages, process = Stages(config.stages.edges), config.process
    calls = config.sampling.stage_calls(process, stages, labels=config.model.classes > 0)
    flops = _flops(config, shape, candidates, len(stages), lambda cost: cost.flops)
    return allocate_sampling(laws, stages.shares(process), candidates, flops, calls, budget, images)


def _flops(
    config: RunConfig,
    shape: tuple[int, int, int],
    candidates: Sequence[int],
    stages: int,
    read: Callable[[StageCost], float],
) -> list[list[float]]:
    """FLOPs of a stage at each candidate width; all stages have the same encoder, so the rows are equal."""
    model = config.model.with_capacities(tuple(candidates))
    row = [float(read(cost)) for cost in network_cost(model, shape).stages]
    return [row] * stages
