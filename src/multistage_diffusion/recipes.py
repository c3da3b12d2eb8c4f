"""Recipes: functions that return a whole run. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Callable

from multistage_diffusion.config import DataConfig, RunConfig, SamplingConfig, StagesConfig, TrainingConfig
from multistage_diffusion.errors import ConfigError, suggest
from multistage_diffusion.models import presets


def half_life(decay: float, batch_size: int) -> float:
    """Half-life in images of an average that keeps a share `decay` each step.

    Args:
        decay: Share kept, like 0.9999.
        batch_size: Images a step.

    Returns:
        The half-life.
    """
    return batch_size * math.log(0.5) / math.log(decay)


def digits() -> RunConfig:
    """8x8 digits, VP process: a laptop's first run, about two minutes."""
    preset = presets.digits()
    return RunConfig(
        data=DataConfig(source="digits"),
        process=preset.process,
        stages=StagesConfig(edges=preset.edges),
        model=preset.model,
        training=TrainingConfig(
            steps=1_000, batch_size=128, learning_rate=2e-3, warmup_images=6_400, ema_half_life=6_400.0, save_every=250
        ),
        sampling=SamplingConfig(solver="dpmpp-2m", steps=20),
    )


def fashion_mnist() -> RunConfig:
    """Fashion-MNIST at 28x28, VP process: small enough for two CPU cores."""
    preset = presets.fashion_mnist()
    return RunConfig(
        data=DataConfig(source="fashion-mnist", flip=True),
        process=preset.process,
        stages=StagesConfig(edges=preset.edges),
        model=preset.model,
        training=TrainingConfig(
            steps=5_000, batch_size=64, learning_rate=1e-3, warmup_images=12_800, ema_half_life=25_000.0, save_every=500
        ),
        sampling=SamplingConfig(solver="dpmpp-2m", steps=20),
    )


def vp_cifar10() -> RunConfig:
    """The paper's multistage DPM-Solver on CIFAR-10 (Zhang et al. 2024): Adam 2e-4, batch 128, 250,000 steps."""
    preset = presets.vp_cifar10()
    return RunConfig(
        data=DataConfig(source="cifar10", flip=True),
        process=preset.process,
        stages=StagesConfig(edges=preset.edges),
        model=preset.model,
        training=TrainingConfig(
            steps=250_000, batch_size=128, learning_rate=2e-4, warmup_images=5_000 * 128, clip_norm=1.0,
            ema_half_life=half_life(0.9999, 128),
        ),
        sampling=SamplingConfig(solver="dpm-3", steps=20, spacing="log-snr"),
    )  # fmt: skip


def edm_cifar10() -> RunConfig:
    """The paper's multistage EDM on CIFAR-10: Adam 1e-3, batch 512, 200 M images, EMA half-life 0.5 M images."""
    preset = presets.edm_cifar10()
    return RunConfig(
        data=DataConfig(source="cifar10", flip=True),
        process=preset.process,
        stages=StagesConfig(edges=preset.edges),
        model=preset.model,
        training=TrainingConfig(
            steps=200_000_000 // 512, batch_size=512, learning_rate=1e-3, warmup_images=10_000_000, clip_norm=None,
            ema_half_life=500_000.0, ema_ramp_up=0.05,
        ),
        sampling=SamplingConfig(solver="heun", steps=18, spacing="karras"),
    )  # fmt: skip


RECIPES: dict[str, Callable[[], RunConfig]] = {
    "digits": digits,
    "fashion-mnist": fashion_mnist,
    "vp-cifar10": vp_cifar10,
    "edm-cifar10": edm_cifar10,
}


def recipe(name: str) -> RunConfig:
    """A recipe by name.

    Args:
        name: One of `RECIPES`.

    Returns:
        The whole configuration.

    Raises:
        ConfigError: No such recipe.
    """
    if name not in RECIPES:
        raise ConfigError(f"no recipe {name}{suggest(name, RECIPES)}")
    return RECIPES[name]()
