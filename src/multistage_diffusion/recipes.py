"""Recipes: functions that return a whole run. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from multistage_diffusion import presets
from multistage_diffusion.config import DataConfig, RunConfig, SamplingConfig, StagesConfig, TrainingConfig
from multistage_diffusion.errors import ConfigError, suggest
from multistage_diffusion.presets import Preset

FLOW_SAMPLING = SamplingConfig(solver="heun", steps=18, spacing="uniform-t")
LDM_SAMPLING = SamplingConfig(solver="dpmpp-2m", steps=20, spacing="uniform-t")

# The usual warm-up of a decay, (1 + n)/(10 + n) after n steps, is a half-life of this share of the images seen.
EMA_WARM_UP = math.log(2) / 9


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


def digits_edm() -> RunConfig:
    """8x8 digits, EDM's process: Heun's method."""
    return _with(digits(), presets.digits_edm(), SamplingConfig(solver="heun", steps=18, spacing="karras"))


def digits_flow() -> RunConfig:
    """8x8 digits, flow matching."""
    return _with(digits(), presets.digits_flow(), FLOW_SAMPLING)


def digits_ldm() -> RunConfig:
    """8x8 digits, the network and the discrete process of latent diffusion on the pixels themselves."""
    return _with(digits(), presets.digits_ldm(), LDM_SAMPLING)


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


def fashion_mnist_edm() -> RunConfig:
    """Fashion-MNIST, EDM's process with its geometric augmentation."""
    sampling = SamplingConfig(solver="heun", steps=18, spacing="karras")
    data = DataConfig(source="fashion-mnist", augment_probability=0.12)
    return _with(fashion_mnist(), presets.fashion_mnist_edm(), sampling, data)


def fashion_mnist_flow() -> RunConfig:
    """Fashion-MNIST, flow matching."""
    return _with(fashion_mnist(), presets.fashion_mnist_flow(), FLOW_SAMPLING)


def fashion_mnist_ldm() -> RunConfig:
    """Fashion-MNIST, the network and the discrete process of latent diffusion on the pixels themselves."""
    return _with(fashion_mnist(), presets.fashion_mnist_ldm(), LDM_SAMPLING)


def fashion_mnist_latent() -> RunConfig:
    """Latent diffusion on Fashion-MNIST: 4x8x8 latents of an autoencoder made by `msd autoencoder fashion-mnist`."""
    base = _with(fashion_mnist(), presets.fashion_mnist_latent(), LDM_SAMPLING)
    data = DataConfig(source="fashion-mnist", resolution=32, flip=True, autoencoder="runs/fashion-mnist-autoencoder")
    return replace(base, data=data)


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
            ema_half_life=half_life(0.9999, 128), ema_ramp_up=EMA_WARM_UP,
        ),
        sampling=SamplingConfig(solver="dpm-3", steps=20, spacing="log-snr"),
    )  # fmt: skip


def edm_cifar10() -> RunConfig:
    """The paper's multistage EDM on CIFAR-10: Adam 1e-3, batch 512, 200 M images, EMA half-life 0.5 M images.

    Mirror images are part of the augmentation, so that the network is told of them.
    """
    preset = presets.edm_cifar10()
    return RunConfig(
        data=DataConfig(source="cifar10", augment_probability=0.12),
        process=preset.process,
        stages=StagesConfig(edges=preset.edges),
        model=preset.model,
        training=TrainingConfig(
            steps=200_000_000 // 512, batch_size=512, learning_rate=1e-3, warmup_images=10_000_000, clip_norm=None,
            ema_half_life=500_000.0, ema_ramp_up=0.05,
        ),
        sampling=SamplingConfig(solver="heun", steps=18, spacing="karras"),
    )  # fmt: skip


def edm_celeba() -> RunConfig:
    """The paper's multistage EDM on CelebA at 32x32, from a folder of images: as on CIFAR-10."""
    data = DataConfig(source="folder:data/celeba", resolution=32, augment_probability=0.12)
    return replace(edm_cifar10(), data=data)


def ldm_celebahq() -> RunConfig:
    """The paper's multistage latent diffusion on CelebA-HQ at 256x256: AdamW, no warm-up, 170,000 steps, EMA 0.9999.

    The learning rate is 2e-6 x GPUs x 16 images a GPU. With three GPUs, one for each stage of the published code, it
    is 9.6e-5 and the batch 48 images; both are stated here and scale with nothing.
    """
    preset, batch_size = presets.ldm_celebahq(), 3 * 16
    return RunConfig(
        data=DataConfig(
            source="folder:data/celebahq", resolution=256, flip=True, autoencoder="CompVis/ldm-celebahq-256/vqvae"
        ),
        process=preset.process,
        stages=StagesConfig(edges=preset.edges),
        model=preset.model,
        training=TrainingConfig(
            steps=170_000, batch_size=batch_size, learning_rate=2e-6 * batch_size, weight_decay=0.01, clip_norm=None,
            ema_half_life=half_life(0.9999, batch_size), ema_ramp_up=EMA_WARM_UP,
        ),
        sampling=SamplingConfig(solver="dpmpp-2m", steps=20, spacing="uniform-t"),
    )  # fmt: skip


RECIPES: dict[str, Callable[[], RunConfig]] = {
    "digits": digits,
    "digits-edm": digits_edm,
    "digits-flow": digits_flow,
    "digits-ldm": digits_ldm,
    "fashion-mnist": fashion_mnist,
    "fashion-mnist-edm": fashion_mnist_edm,
    "fashion-mnist-flow": fashion_mnist_flow,
    "fashion-mnist-ldm": fashion_mnist_ldm,
    "fashion-mnist-latent": fashion_mnist_latent,
    "vp-cifar10": vp_cifar10,
    "edm-cifar10": edm_cifar10,
    "edm-celeba": edm_celeba,
    "ldm-celebahq": ldm_celebahq,
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


def _with(base: RunConfig, preset: Preset, sampling: SamplingConfig, data: DataConfig | None = None) -> RunConfig:
    """A recipe with another network, process and sampler, and perhaps other data."""
    return replace(
        base, data=data or base.data, process=preset.process, stages=StagesConfig(edges=preset.edges),
        model=preset.model, sampling=sampling,
    )  # fmt: skip
