"""Short proxy runs behind the allocation of decoder widths."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any, Literal

import torch

from multistage_diffusion import rng
from multistage_diffusion.clustering.allocation import (
    Allocation,
    Law,
    Measurement,
    allocate_sampling,
    allocate_training,
    fit_law,
)
from multistage_diffusion.config import ModelConfig, RunConfig, check
from multistage_diffusion.data import Images
from multistage_diffusion.evaluation import held_out_loss
from multistage_diffusion.metrics.cost import StageCost, network_cost, training_shares
from multistage_diffusion.noise import make_process, sigma_schedule
from multistage_diffusion.sampling import find_solver, plan
from multistage_diffusion.stages import Stages
from multistage_diffusion.training.loop import Trainer

Say = Callable[[str], None]
PROXY_SHARES = (0.25, 0.5, 0.75, 1.25)  # decoder widths of the proxy runs, in encoder widths
_WIDEST = 1.5  # widest decoder to choose, in encoder widths: not far beyond what the proxies measure
_HELD_OUT = 0.1  # share of the training images that the proxies keep for measuring
_LEVELS = 4_000  # noise levels of a measurement, at least


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
        say: Told what was measured, in lines.

    Returns:
        One measurement for each width and reading.
    """
    stages, measurements = Stages(config.stages.edges), []
    repeats = max(8, -(-_LEVELS // len(test)))
    for width in widths:
        model = replace(config.model, architecture="multistage", decoder_widths=(width,) * len(stages))
        trainer = Trainer(replace(config, model=model), data, device, stages)
        for point in range(points):
            for _ in trainer.run(max(1, round(steps * 0.5 ** (1 - point / max(points - 1, 1))))):
                pass
            found = held_out_loss(trainer.averaged(), test, stages=stages, repeats=repeats)
            losses = tuple(loss for loss in found.stage_loss if loss is not None)
            assert len(losses) == len(stages), "every stage has held-out noise levels"
            measurements.append(Measurement(width, trainer.images, losses))
            say(f"decoders of width {width}, {trainer.images} images: stage losses "
                + ", ".join(f"{loss:.4f}" for loss in losses))  # fmt: skip
    return measurements


def fit_laws(measurements: Sequence[Measurement]) -> tuple[Law, ...]:
    """The law of each stage.

    Args:
        measurements: Proxy runs.

    Returns:
        One law a stage.
    """
    return tuple(fit_law(measurements, stage) for stage in range(len(measurements[0].stage_loss)))


def split(data: Images, seed: int) -> tuple[Images, Images]:
    """The images that the proxies train on, and a tenth that they measure on; so no test image has a say in widths.

    Args:
        data: Training images.
        seed: Seed of the choice.

    Returns:
        Both parts, which share no image.

    Raises:
        ConfigError: Fewer than two images.
    """
    check(len(data) >= 2, "allocate", "used with at least two images", len(data))
    order, held = rng.permutation(seed, "proxies/held-out", 0, len(data)), max(1, round(len(data) * _HELD_OUT))
    return data.take(order[held:]), data.take(order[:held])


def candidate_widths(model: ModelConfig) -> tuple[int, ...]:
    """Decoder widths to choose from: the encoder's own, and multiples of a step that grows with it.

    Args:
        model: The network, whose attention heads every width must hold whole.

    Returns:
        At most 64 widths, increasing, up to 1.5 times the encoder's.
    """
    unit = _unit(model)
    step = max(unit, model.width // 16 // unit * unit)
    return tuple(sorted({*range(step, int(model.width * _WIDEST) + 1, step), model.width}))


def proxy_widths(model: ModelConfig) -> tuple[int, ...]:
    """Decoder widths of the proxy runs: a quarter, half, three quarters and five quarters of the encoder's.

    Args:
        model: The network, whose attention heads every width must hold whole.

    Returns:
        The widths, increasing.
    """
    unit = _unit(model)
    return tuple(sorted({max(1, round(model.width * share / unit)) * unit for share in PROXY_SHARES}))


def _unit(model: ModelConfig) -> int:
    """What a decoder's width must be a multiple of."""
    return math.lcm(4, model.head_channels or 4)


def allocate(
    config: RunConfig,
    data: Images,
    budget: float,
    purpose: Literal["training", "sampling"],
    *,
    steps: int = 300,
    device: torch.device | str = "cpu",
    say: Say = print,
) -> dict[str, Any]:
    """Decoder widths for a run's stages under a budget, with what they were found from.

    Args:
        config: The run; its stages are kept, its decoder widths are replaced.
        data: Training images; a tenth of them is held out from the proxies and measured on.
        budget: Training PFLOPs in all, or GFLOPs of drawing one image with the run's sampler.
        purpose: Which of the two.
        steps: Steps of each proxy run.
        device: Where to train.
        say: Told what was measured, in lines.

    Returns:
        `decoder_widths`, and `allocation`: budget, expected loss, that of equal widths, laws, measurements.

    Raises:
        ConfigError: The budget is too small for any widths.
    """
    base, candidates = config.model.width, candidate_widths(config.model)
    stages = Stages(config.stages.edges)

    def choose(laws: Sequence[Law], widths: Sequence[int], longest: float) -> Allocation:
        if purpose == "training":
            return widths_for_training(config, data.shape, laws, widths, budget * 1e15)
        return widths_for_sampling(config, data.shape, laws, widths, budget * 1e9, longest)

    choose(
        (Law(0.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0),) * len(stages), candidates, 1.0
    )  # what cannot be is refused at once
    train, held = split(data, config.training.seed)
    measurements = run_proxies(config, train, held, proxy_widths(config.model), steps=steps, device=device, say=say)
    laws = fit_laws(measurements)
    longest = float(max(item.images for item in measurements))
    found = choose(laws, candidates, longest)
    shares = training_shares(make_process(config.process), stages)
    images = choose(laws, (base,), longest).images if purpose == "training" else longest
    equal_loss = sum(share * law.loss(base, images) for share, law in zip(shares, laws, strict=True))
    return {
        "decoder_widths": list(found.widths),
        "allocation": {
            "budget": budget,
            "unit": "training PFLOPs" if purpose == "training" else "sampling GFLOPs",
            "loss": found.loss,
            "equal_loss": equal_loss,
            "images": found.images,
            "laws": [asdict(law) for law in laws],
            "measurements": [asdict(item) for item in measurements],
        },
    }


def widths_for_training(
    config: RunConfig, shape: tuple[int, int, int], laws: Sequence[Law], candidates: Sequence[int], budget: float
) -> Allocation:
    """Decoder widths of least expected loss under a budget of training FLOPs.

    Args:
        config: The run.
        shape: (C, H, W) of an image.
        laws: Law of each stage.
        candidates: Widths to choose from.
        budget: Training FLOPs in all.

    Returns:
        The widths.
    """
    stages = Stages(config.stages.edges)
    flops = _flops(config, shape, candidates, len(stages), lambda cost: cost.training_flops)
    return allocate_training(laws, training_shares(make_process(config.process), stages), candidates, flops, budget)


def widths_for_sampling(
    config: RunConfig,
    shape: tuple[int, int, int],
    laws: Sequence[Law],
    candidates: Sequence[int],
    budget: float,
    images: float,
) -> Allocation:
    """Decoder widths of least expected loss under a budget of FLOPs for drawing one image with the run's sampler.

    Args:
        config: The run.
        shape: (C, H, W) of an image.
        laws: Law of each stage.
        candidates: Widths to choose from.
        budget: FLOPs of one image.
        images: Images of training at which the loss is read.

    Returns:
        The widths.
    """
    stages, process, sampling = Stages(config.stages.edges), make_process(config.process), config.sampling
    solver = find_solver(sampling.solver)
    planned = plan(solver, sigma_schedule(process, sampling.spacing or solver.default_spacing, sampling.steps), stages)
    calls = [planned.count(stage) for stage in range(len(stages))]
    flops = _flops(config, shape, candidates, len(stages), lambda cost: cost.flops)
    return allocate_sampling(laws, training_shares(process, stages), candidates, flops, calls, budget, images)


def _flops(
    config: RunConfig,
    shape: tuple[int, int, int],
    candidates: Sequence[int],
    stages: int,
    read: Callable[[StageCost], float],
) -> list[list[float]]:
    """FLOPs of a stage at each candidate width; all stages have the same encoder, so the rows are equal."""
    model = replace(config.model, architecture="multistage", decoder_widths=tuple(candidates))
    row = [float(read(cost)) for cost in network_cost(model, shape).stages]
    return [row] * stages
