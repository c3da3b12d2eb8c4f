"""How much a study may cost: the network, the data's size, FLOPs, seeds and images behind each figure."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

from multistage_diffusion.backbones import Transformer
from multistage_diffusion.config import (
    DataConfig,
    ModelConfig,
    RunConfig,
    Sampler,
    StagesConfig,
    TrainingConfig,
    check,
)
from multistage_diffusion.errors import ConfigError, suggest
from multistage_diffusion.noise import VP
from multistage_diffusion.recipes import recipe

PUBLISHED = (1.5, 1.0, 0.125)  # the paper's decoder widths, 192, 128 and 16, in encoder widths
_ANY = StagesConfig(edges=(1.0, 10.0))  # replaced by the edges that each study finds


@dataclass(frozen=True, kw_only=True)
class Ladder:
    """What the scaling study tries, and where it compares.

    Attributes:
        unified: Widths of the unified networks, in base widths, the likely ones first.
        staged: Widths of the staged networks, in base widths: the encoder's, then the decoders', low to high noise.
        entries: How often each stage's images of these networks are halved before they enter; none: never.
        rate: First learning rate of a network of the base width, in the budget's own; others by the inverse of width.
        rungs: Shares of the budget's FLOPs, each twice the one before, at which arms are compared and candidates stop.
    """

    unified: tuple[float, ...] = (0.5, 0.25, 0.75, 1.0)
    staged: tuple[tuple[float, ...], ...] = (
        (0.5, 0.75, 0.5, 0.5, 0.25),
        (0.5, 0.75, 0.5, 0.5, 0.25),
        (0.25, 0.5, 0.25, 0.25, 0.25),
    )
    entries: tuple[tuple[int, ...], ...] = ((0, 0, 1, 1), (), (0, 0, 1, 1))
    rate: float = 2.0
    rungs: tuple[float, ...] = (0.125, 0.25, 0.5, 1.0)

    def __post_init__(self) -> None:
        doubled = all(high == 2 * low for low, high in itertools.pairwise(self.rungs))
        check(len(self.rungs) > 0 and self.rungs[0] > 0 and doubled, "rungs", "each twice the one before", self.rungs)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What every model of a study costs and how well it is measured.

    Attributes:
        base: The multistage run; a study changes its architecture, edges and widths.
        tflops: Training FLOPs of each model, forward and backward, in 10^12.
        points: Models kept on the way to them.
        long: How many times `tflops` the well-trained model of the interval study gets.
        seeds: Runs of each model.
        samples: Generated images behind a distance at the end of training.
        samples_on_the_way: Generated images behind every other distance.
        proxy_steps: Steps of the proxy runs behind the allocation of widths.
        evaluations: Numbers of network evaluations at which the sampling study draws.
        ladder: What the scaling study tries.
    """

    base: RunConfig
    tflops: float
    points: int = 6
    long: float = 3.0
    seeds: int = 3
    samples: int = 1_000
    samples_on_the_way: int = 500
    proxy_steps: int = 300
    evaluations: tuple[int, ...] = (5, 10, 20, 40)
    ladder: Ladder = Ladder()

    def __post_init__(self) -> None:
        check(self.tflops > 0, "tflops", "positive", self.tflops)
        check(self.points >= 2, "points", "at least 2", self.points)
        check(self.seeds >= 1, "seeds", "at least 1", self.seeds)
        check(min(self.samples, self.samples_on_the_way) >= 2, "samples", "at least 2", self.samples)


def budget(name: str, source: str, backbone: str = "unet") -> Budget:
    """A budget by its name, for a source of data and a family of networks, `unet` or `dit`.

    `small` is for two CPU cores (some hours for all studies), `gpu` for one GPU (about an hour for one study), `paper`
    has the networks and lengths of the paper's CIFAR-10 runs.

    Raises:
        ConfigError: No such budget.
    """
    if name not in BUDGETS:
        raise ConfigError(f"no budget {name}{suggest(name, BUDGETS)}")
    chosen = BUDGETS[name]()
    base = chosen.base if backbone == "unet" else replace(chosen.base, model=TRANSFORMERS[name])
    return replace(chosen, base=replace(base, data=replace(base.data, source=source)))


def small() -> Budget:
    """16x16 images and a network of 0.3 M parameters (0.7 M with three decoders): a minute or two a model."""
    model = ModelConfig(
        width=16, decoder_widths=(24, 16, 4), multipliers=(1, 2, 2), blocks=1, attention=(4,), dropout=0.0
    )
    training = TrainingConfig(
        batch_size=64, learning_rate=2e-3, warmup_images=6_400, ema_half_life=12_800.0, log_every=25
    )
    return Budget(base=_run(model, training, 16), tflops=4.0, evaluations=(5, 10, 20))


def gpu() -> Budget:
    """32x32 images and a network of 7 M parameters."""
    model = ModelConfig(
        width=64, decoder_widths=(96, 64, 8), multipliers=(1, 2, 2), blocks=2, attention=(8,), dropout=0.1
    )
    training = TrainingConfig(batch_size=256, learning_rate=1e-3, warmup_images=64_000, ema_half_life=250_000.0)
    return Budget(
        base=_run(model, training, 32),
        tflops=2_000.0,
        points=10,
        samples=10_000,
        samples_on_the_way=5_000,
        proxy_steps=300,
    )


def paper() -> Budget:
    """The paper's networks: 450,000 steps of the unified one at batch 128, and 50,000 images behind each distance."""
    base = recipe("vp-cifar10")
    return Budget(
        base=replace(base, stages=_ANY),
        tflops=450_000 * 128 * 3 * 37.1e-3,
        points=9,
        samples=50_000,
        samples_on_the_way=10_000,
        proxy_steps=20_000,
        evaluations=(10, 15, 20, 50),
    )


# The transformer of each budget, on patches of 2x2 pixels.
TRANSFORMERS = {
    "small": Transformer(width=48, depth=6, trunk=4, decoder_widths=(48,) * 3, head_channels=12),
    "gpu": Transformer(width=256, depth=8, trunk=5, decoder_widths=(256,) * 3, head_channels=32),
    "paper": Transformer(width=512, depth=12, trunk=8, decoder_widths=(512,) * 3, head_channels=64),
}
BUDGETS = {"small": small, "gpu": gpu, "paper": paper}


def _run(model: ModelConfig, training: TrainingConfig, resolution: int) -> RunConfig:
    return RunConfig(
        data=DataConfig(resolution=resolution, flip=True),
        process=VP(prediction="v"),
        stages=_ANY,
        model=model,
        training=training,
        sampling=Sampler(solver="dpmpp-2m", steps=20),
    )
