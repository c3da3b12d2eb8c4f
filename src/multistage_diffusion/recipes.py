"""Recipes: functions that return a whole run, with the networks of the paper, to the parameter. Imports no torch.

A preset is a recipe's network with its process, its partition and the shape of an image.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from multistage_diffusion.backbones import Architecture, Backbone, Transformer, UNet
from multistage_diffusion.config import DataConfig, RunConfig, Sampler, StagesConfig, TrainingConfig
from multistage_diffusion.errors import ConfigError, suggest
from multistage_diffusion.noise import EDM, LDM, VP, Flow, Process

EDM_SAMPLING = Sampler(solver="heun", steps=18, spacing="karras")
FLOW_SAMPLING = Sampler(solver="heun", steps=18, spacing="uniform-t")
LDM_SAMPLING = Sampler(solver="dpmpp-2m", steps=20, spacing="uniform-t")

# The usual warm-up of a decay, (1 + n)/(10 + n) after n steps, is a half-life of this share of the images seen.
EMA_WARM_UP = math.log(2) / 9


def half_life(decay: float, batch_size: int) -> float:
    """Half-life in images of an average that keeps a share `decay`, like 0.9999, at a step of `batch_size` images."""
    return batch_size * math.log(0.5) / math.log(decay)


def digits() -> RunConfig:
    """8x8 digits, VP process: a laptop's first run, about two minutes."""
    return RunConfig(
        data=DataConfig(source="digits"),
        process=VP(prediction="v"),
        # Edges as `msd cluster digits` finds them; widths near those of `msd cluster digits --allocate 0.004`.
        stages=StagesConfig(edges=(0.686, 5.71)),
        model=UNet(width=32, decoder_widths=(28, 20, 12), multipliers=(1, 2), blocks=1, attention=(4,), dropout=0.0),
        training=TrainingConfig(
            steps=1_000, batch_size=128, learning_rate=2e-3, warmup_images=6_400, ema_half_life=6_400.0, save_every=250
        ),
        sampling=Sampler(solver="dpmpp-2m", steps=20),
    )


def digits_edm() -> RunConfig:
    """8x8 digits, EDM's process: Heun's method; the decoders own the middle blocks."""
    return _edm(digits(), sigma_data=0.54)


def digits_flow() -> RunConfig:
    """8x8 digits, flow matching."""
    return replace(digits(), process=Flow(), sampling=FLOW_SAMPLING)


def digits_ldm() -> RunConfig:
    """8x8 digits, the network and the discrete process of latent diffusion on the pixels themselves."""
    return _ldm(digits(), multipliers=(1, 2), attention=(8, 4))


def fashion_mnist() -> RunConfig:
    """Fashion-MNIST at 28x28, VP process: small enough for two CPU cores."""
    return RunConfig(
        data=DataConfig(source="fashion-mnist", flip=True),
        process=VP(prediction="v"),
        stages=StagesConfig(edges=(2.6, 14.0)),  # as `msd cluster fashion-mnist --process vp` finds them
        model=UNet(width=32, decoder_widths=(32, 24, 8), multipliers=(1, 2, 2), blocks=1, attention=(7,), dropout=0.0),
        training=TrainingConfig(
            steps=5_000, batch_size=64, learning_rate=1e-3, warmup_images=12_800, ema_half_life=25_000.0, save_every=500
        ),
        sampling=Sampler(solver="dpmpp-2m", steps=20),
    )


def fashion_mnist_edm() -> RunConfig:
    """Fashion-MNIST, EDM's process with its geometric augmentation; the decoders own the middle blocks."""
    base = _edm(fashion_mnist(), sigma_data=0.59)
    data = DataConfig(source="fashion-mnist", augment_probability=0.12)
    return replace(base, data=data, model=replace(base.model, augment_labels=9))


def fashion_mnist_flow() -> RunConfig:
    """Fashion-MNIST, flow matching."""
    return replace(fashion_mnist(), process=Flow(), sampling=FLOW_SAMPLING)


def fashion_mnist_ldm() -> RunConfig:
    """Fashion-MNIST, the network and the discrete process of latent diffusion on the pixels themselves."""
    return _ldm(fashion_mnist(), multipliers=(1, 2, 2), attention=(14, 7))


def fashion_mnist_latent() -> RunConfig:
    """Latent diffusion on Fashion-MNIST: 4x8x8 latents of an autoencoder made by `msd autoencoder fashion-mnist`."""
    data = DataConfig(source="fashion-mnist", resolution=32, flip=True, autoencoder="runs/fashion-mnist-autoencoder")
    stages = StagesConfig(edges=(0.58, 12.3))  # as `msd cluster` with --autoencoder finds them
    return replace(_ldm(fashion_mnist(), multipliers=(1, 2), attention=(8, 4)), data=data, stages=stages)


def vp_cifar10() -> RunConfig:
    """The paper's multistage DPM-Solver on CIFAR-10 (Zhang et al. 2024): Adam 2e-4, batch 128, 250,000 steps.

    8 blocks a resolution, resampled with FIR filters, and the input fed to each resolution (NCSN++-like: an encoder of
    43.5 M parameters, decoders of 126.0, 64.0 and 3.7 M). The published unified and separate networks are DDPM++: box
    filters, no input pyramid, 32 groups (106.6 M, 18.55 GMACs), and so is this recipe with those architectures.
    """
    return RunConfig(
        data=DataConfig(source="cifar10", flip=True),
        process=VP(),
        # Edges t = 0.442 and 0.631 of VP time (Zhang et al. 2024, Table 4), in sigma.
        stages=StagesConfig(edges=(2.5102672, 7.4141232)),
        model=UNet(
            width=128,
            decoder_widths=(192, 128, 16),
            multipliers=(1, 2, 2, 2),
            blocks=8,
            attention=(16,),
            filter="fir",
            input_pyramid="ncsnpp",
        ),
        training=TrainingConfig(
            steps=250_000,
            batch_size=128,
            learning_rate=2e-4,
            warmup_images=5_000 * 128,
            clip_norm=1.0,
            ema_half_life=half_life(0.9999, 128),
            ema_ramp_up=EMA_WARM_UP,
        ),
        # Singlestep, as the paper's: six steps of order 3 and one of order 2, of equal length in log-SNR.
        sampling=Sampler(solver="dpm-3", steps=20, spacing="singlestep"),
    )


def edm_cifar10() -> RunConfig:
    """The paper's multistage EDM on CIFAR-10: Adam 1e-3, batch 512, 200 M images, EMA half-life 0.5 M images.

    Mirror images are part of the augmentation, which the network is told. The decoders own the middle blocks (unified:
    55.7 M parameters, 21.19 GMACs).
    """
    return RunConfig(
        data=DataConfig(source="cifar10", augment_probability=0.12),
        process=EDM(),
        stages=StagesConfig(edges=(2.5103, 7.6577)),
        model=UNet(
            width=128,
            decoder_widths=(192, 128, 16),
            multipliers=(2, 2, 2),
            blocks=4,
            attention=(16,),
            middle="decoder",
            dropout=0.13,
            augment_labels=9,
            initialisation="edm",
        ),
        training=TrainingConfig(
            steps=200_000_000 // 512,
            batch_size=512,
            learning_rate=1e-3,
            warmup_images=10_000_000,
            clip_norm=None,
            ema_half_life=500_000.0,
            ema_ramp_up=0.05,
        ),
        sampling=EDM_SAMPLING,
    )


def edm_celeba() -> RunConfig:
    """The paper's multistage EDM on CelebA at 32x32, from a folder of images: as on CIFAR-10."""
    data = DataConfig(source="folder:data/celeba", resolution=32, augment_probability=0.12)
    return replace(edm_cifar10(), data=data)


def ldm_celebahq() -> RunConfig:
    """The paper's multistage latent diffusion on CelebA-HQ at 256x256: AdamW, no warm-up, 170,000 steps, EMA 0.9999.

    The network is for 3x64x64 latents (unified: 274.1 M parameters, 101.2 GMACs). The learning rate is 2e-6 x GPUs x 16
    images a GPU. With three GPUs, one for each stage of the published code, it is 9.6e-5 and the batch 48 images; both
    are stated here and scale with nothing.
    """
    batch_size = 3 * 16
    return RunConfig(
        data=DataConfig(
            source="folder:data/celebahq", resolution=256, flip=True, autoencoder="CompVis/ldm-celebahq-256/vqvae"
        ),
        process=LDM(),
        # Steps 442 and 631 of 1000 (Zhang et al. 2024) begin a stage; so the edges lie 0.003 of a step below them, in
        # sigma on this process's own schedule.
        stages=StagesConfig(edges=(2.1531, 5.3151)),
        model=replace(
            _latent_network(multipliers=(1, 2, 3, 4), attention=(32, 16, 8)),
            width=224,
            decoder_widths=(256, 192, 128),
            blocks=2,
            head_channels=32,
        ),
        training=TrainingConfig(
            steps=170_000,
            batch_size=batch_size,
            learning_rate=2e-6 * batch_size,
            weight_decay=0.01,
            clip_norm=None,
            ema_half_life=half_life(0.9999, batch_size),
            ema_ramp_up=EMA_WARM_UP,
        ),
        sampling=LDM_SAMPLING,
    )


def digits_dit() -> RunConfig:
    """8x8 digits, a staged transformer of 0.5 M parameters on 16 patches."""
    model = Transformer(
        width=64, depth=6, trunk=4, decoder_widths=(64, 64, 32), decoder_blocks=(3, 2, 1), head_channels=16
    )
    return replace(digits(), model=model)


def fashion_mnist_dit() -> RunConfig:
    """Fashion-MNIST, a staged transformer of 2 M parameters on 49 patches."""
    model = Transformer(
        width=128,
        depth=6,
        trunk=4,
        patch=4,
        decoder_widths=(128, 128, 64),
        decoder_blocks=(3, 2, 1),
        head_channels=32,
    )
    return replace(fashion_mnist(), model=model)


# Width, depth and channels of an attention head of DiT's sizes (Peebles and Xie 2023, Table 1); blocks of the trunk;
# width and blocks of the heads, so that the mean over the stages costs what the undivided network costs.
_DIT = {
    "s": (384, 12, 64, 8, (384, 384, 256), (7, 4, 1)),
    "b": (768, 12, 64, 8, (768, 768, 448), (7, 4, 1)),
    "l": (1024, 24, 64, 16, (1024, 1024, 512), (14, 8, 3)),
    "xl": (1152, 28, 72, 18, (1152, 1152, 504), (18, 10, 2)),
}


def dit(size: str, patch: int) -> RunConfig:
    """DiT in stages on ImageNet at 256x256 (Peebles and Xie 2023): AdamW 1e-4, batch 256, EMA 0.9999, 400,000 steps.

    The network is for 4x32x32 latents and 1000 classes. The process is ADM's: 1000 steps, betas from 1e-4 to 0.02.
    """
    width, depth, head_channels, trunk, widths, blocks = _DIT[size]
    return RunConfig(
        data=DataConfig(
            source="folder:data/imagenet", resolution=256, flip=True, autoencoder="stabilityai/sd-vae-ft-ema"
        ),
        process=LDM(beta_first=1e-4, beta_last=0.02, betas="linear"),
        # Steps 442 and 631 of 1000 (Zhang et al. 2024), in sigma on this process's own schedule.
        stages=StagesConfig(edges=(2.5218166, 7.4943283)),
        model=Transformer(
            width=width,
            depth=depth,
            trunk=trunk,
            patch=patch,
            decoder_widths=widths,
            decoder_blocks=blocks,
            head_channels=head_channels,
            classes=1000,
        ),
        training=TrainingConfig(
            steps=400_000,
            batch_size=256,
            learning_rate=1e-4,
            clip_norm=None,
            ema_half_life=half_life(0.9999, 256),
            ema_ramp_up=None,
        ),
        sampling=LDM_SAMPLING,
    )


# Every recipe, with the shape (C, H, W) of what its network denoises.
_SHAPES: dict[str, tuple[Callable[[], RunConfig], tuple[int, int, int]]] = {
    "digits": (digits, (1, 8, 8)),
    "digits-edm": (digits_edm, (1, 8, 8)),
    "digits-flow": (digits_flow, (1, 8, 8)),
    "digits-ldm": (digits_ldm, (1, 8, 8)),
    "fashion-mnist": (fashion_mnist, (1, 28, 28)),
    "fashion-mnist-edm": (fashion_mnist_edm, (1, 28, 28)),
    "fashion-mnist-flow": (fashion_mnist_flow, (1, 28, 28)),
    "fashion-mnist-ldm": (fashion_mnist_ldm, (1, 28, 28)),
    "fashion-mnist-latent": (fashion_mnist_latent, (4, 8, 8)),
    "vp-cifar10": (vp_cifar10, (3, 32, 32)),
    "edm-cifar10": (edm_cifar10, (3, 32, 32)),
    "edm-celeba": (edm_celeba, (3, 32, 32)),
    "ldm-celebahq": (ldm_celebahq, (3, 64, 64)),
    "digits-dit": (digits_dit, (1, 8, 8)),
    "fashion-mnist-dit": (fashion_mnist_dit, (1, 28, 28)),
    **{f"dit-{size}-{patch}": (partial(dit, size, patch), (4, 32, 32)) for size in _DIT for patch in (2, 4)},
}
RECIPES: dict[str, Callable[[], RunConfig]] = {name: make for name, (make, _) in _SHAPES.items()}

# What the published unified network has, and with it each separate one, where the multistage one has something else.
_DDPMPP: dict[str, Any] = {"filter": "box", "input_pyramid": False, "groups": 32}
_UNIFIED: dict[str, dict[str, Any]] = {
    "vp-cifar10": _DDPMPP,
    "edm-cifar10": {"groups": 32},
    "edm-celeba": {"groups": 32},
}


def recipe(name: str, architecture: Architecture | None = None) -> RunConfig:
    """The whole configuration of a recipe.

    Args:
        name: One of `RECIPES`.
        architecture: In place of the recipe's, with the network that was published for it.

    Returns:
        The configuration.

    Raises:
        ConfigError: No such recipe.
    """
    if name not in RECIPES:
        raise ConfigError(f"no recipe {name}{suggest(name, RECIPES)}")
    config = RECIPES[name]()
    if architecture is None:
        return config
    changes = {} if architecture == "multistage" else _UNIFIED.get(name, {})
    return replace(config, model=replace(config.model, architecture=architecture, **changes))


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A network with the process and the partition it is made for.

    Attributes:
        model: The network.
        process: The process.
        shape: (C, H, W) of an image.
        edges: Edges of the stages in sigma.
    """

    model: Backbone
    process: Process
    shape: tuple[int, int, int]
    edges: tuple[float, ...]


def preset(name: str, architecture: Architecture | None = None) -> Preset:
    """The network of a recipe.

    Args:
        name: One of `RECIPES`.
        architecture: In place of the recipe's.

    Returns:
        The preset: of each architecture, the network that was published for it.

    Raises:
        ConfigError: No such preset.
    """
    if name not in RECIPES:
        raise ConfigError(f"no preset {name}{suggest(name, RECIPES)}")
    config, shape = recipe(name, architecture), _SHAPES[name][1]
    return Preset(model=config.model, process=config.process, shape=shape, edges=config.stages.edges)


def _edm(base: RunConfig, *, sigma_data: float) -> RunConfig:
    """A small recipe with EDM's process and who owns its middle blocks; sigma_data is the pixels' deviation."""
    model = replace(base.model, middle="decoder")
    return replace(base, process=EDM(sigma_data=sigma_data), model=model, sampling=EDM_SAMPLING)


def _ldm(base: RunConfig, *, multipliers: tuple[int, ...], attention: tuple[int, ...]) -> RunConfig:
    """A small recipe with the network and the discrete process of latent diffusion."""
    model = _latent_network(multipliers=multipliers, attention=attention)
    return replace(base, process=LDM(prediction="v"), model=model, sampling=LDM_SAMPLING)


def _latent_network(*, multipliers: tuple[int, ...], attention: tuple[int, ...]) -> UNet:
    """Blocks, attention and norms of latent diffusion, at an eighth or so of its width."""
    return UNet(
        width=32,
        decoder_widths=(32, 32, 16),
        multipliers=multipliers,
        blocks=1,
        attention=attention,
        decoder_attention="all",
        head_channels=16,
        resampling="conv",
        skip_scale=1.0,
        groups=32,
        norm_eps=1e-5,
        dropout=0.0,
        frequency_shift=0,
    )
