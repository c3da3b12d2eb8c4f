"""Named networks: those of the paper, to the parameter, and small ones for laptops. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from multistage_diffusion.config import Architecture, Backbone, UNet
from multistage_diffusion.errors import ConfigError, suggest
from multistage_diffusion.noise import EDM, LDM, VP, Flow, Process


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


def vp_cifar10() -> Preset:
    """The paper's DPM-Solver network, 32x32: DDPM++ blocks, 8 a level (unified: 106.6 M parameters, 18.55 GMACs).

    The published unified network is this one. The published multistage one resamples with FIR filters and feeds the
    input to each level (`--model.filter fir --model.input-pyramid`); here both architectures have the same blocks, so
    that they compare.
    """
    model = UNet(width=128, decoder_widths=(192, 128, 16), multipliers=(1, 2, 2, 2), blocks=8, attention=(16,))
    # Edges t = 0.442 and 0.631 of VP time (Zhang et al. 2024, Table 4), in sigma.
    return Preset(model=model, process=VP(), shape=(3, 32, 32), edges=(2.5102672, 7.4141232))


def edm_cifar10() -> Preset:
    """The paper's EDM network, 32x32: the decoders own the middle blocks (unified: 55.7 M parameters, 21.19 GMACs)."""
    model = UNet(
        width=128, decoder_widths=(192, 128, 16), multipliers=(2, 2, 2), blocks=4, attention=(16,),
        middle="decoder", dropout=0.13, augment_labels=9,
    )  # fmt: skip
    return Preset(model=model, process=EDM(), shape=(3, 32, 32), edges=(2.5103, 7.6577))


def edm_celeba() -> Preset:
    """The paper's EDM network for CelebA at 32x32, the same as for CIFAR-10."""
    return edm_cifar10()


def ldm_celebahq() -> Preset:
    """The paper's network for 3x64x64 latents of 256x256 images (unified: 274.1 M parameters, 101.2 GMACs)."""
    model = UNet(
        width=224, decoder_widths=(256, 192, 128), multipliers=(1, 2, 3, 4), blocks=2, attention=(32, 16, 8),
        decoder_attention="all", head_channels=32, resampling="conv", skip_scale=1.0, groups=32, norm_eps=1e-5,
        dropout=0.0, frequency_shift=0,
    )  # fmt: skip
    # Steps 442 and 631 of 1000 (Zhang et al. 2024), in sigma on this process's own schedule.
    return Preset(model=model, process=LDM(), shape=(3, 64, 64), edges=(2.1531271, 5.3151631))


def digits() -> Preset:
    """A small network for 8x8 digits: trains in a minute or two on two CPU cores."""
    # Edges as `msd cluster digits` finds them; widths near those of `msd cluster digits --allocate 0.004`.
    model = UNet(
        width=32, decoder_widths=(28, 20, 12), multipliers=(1, 2), blocks=1, attention=(4,), dropout=0.0
    )  # fmt: skip
    return Preset(model=model, process=VP(prediction="v"), shape=(1, 8, 8), edges=(0.686, 5.71))


def digits_edm() -> Preset:
    """The digits' network with EDM's process; the decoders own the middle blocks."""
    return _edm(digits(), sigma_data=0.54)


def digits_flow() -> Preset:
    """The digits' network with flow matching."""
    return replace(digits(), process=Flow())


def digits_ldm() -> Preset:
    """A small latent-diffusion network on the pixels of the digits, with the discrete process."""
    return replace(digits(), model=_latent_network((1, 2), attention=(8, 4)), process=LDM(prediction="v"))


def fashion_mnist() -> Preset:
    """A small network for 28x28 images: a few hundred steps a quarter of an hour on two CPU cores."""
    model = UNet(
        width=32, decoder_widths=(32, 24, 8), multipliers=(1, 2, 2), blocks=1, attention=(7,), dropout=0.0
    )  # fmt: skip
    # What `msd cluster fashion-mnist --process vp` finds.
    return Preset(model=model, process=VP(prediction="v"), shape=(1, 28, 28), edges=(2.6, 14.0))


def fashion_mnist_edm() -> Preset:
    """The Fashion-MNIST network with EDM's process and augmentation labels; the decoders own the middle blocks."""
    small = _edm(fashion_mnist(), sigma_data=0.59)
    return replace(small, model=replace(small.model, augment_labels=9))


def fashion_mnist_flow() -> Preset:
    """The Fashion-MNIST network with flow matching."""
    return replace(fashion_mnist(), process=Flow())


def fashion_mnist_ldm() -> Preset:
    """A small latent-diffusion network on the pixels of Fashion-MNIST, with the discrete process."""
    return replace(fashion_mnist(), model=_latent_network((1, 2, 2), attention=(14, 7)), process=LDM(prediction="v"))


def fashion_mnist_latent() -> Preset:
    """A small latent-diffusion network for 4x8x8 latents of Fashion-MNIST at 32x32."""
    model = _latent_network((1, 2), attention=(8, 4))  # edges: msd cluster with --autoencoder
    return Preset(model=model, process=LDM(prediction="v"), shape=(4, 8, 8), edges=(0.58, 12.3))


PRESETS: dict[str, Callable[[], Preset]] = {
    "vp-cifar10": vp_cifar10,
    "edm-cifar10": edm_cifar10,
    "edm-celeba": edm_celeba,
    "ldm-celebahq": ldm_celebahq,
    "digits": digits,
    "digits-edm": digits_edm,
    "digits-flow": digits_flow,
    "digits-ldm": digits_ldm,
    "fashion-mnist": fashion_mnist,
    "fashion-mnist-edm": fashion_mnist_edm,
    "fashion-mnist-flow": fashion_mnist_flow,
    "fashion-mnist-ldm": fashion_mnist_ldm,
    "fashion-mnist-latent": fashion_mnist_latent,
}


def preset(name: str, architecture: Architecture | None = None) -> Preset:
    """A preset by name.

    Args:
        name: One of `PRESETS`.
        architecture: Replaces the preset's architecture.

    Returns:
        The preset. The architecture changes nothing else; the published unified VP and EDM networks have 32 groups in
        their group norms instead of 16 (`--model.groups 32`), which changes neither parameters nor FLOPs.

    Raises:
        ConfigError: No such preset.
    """
    if name not in PRESETS:
        raise ConfigError(f"no preset {name}{suggest(name, PRESETS)}")
    found = PRESETS[name]()
    if architecture is None:
        return found
    return replace(found, model=replace(found.model, architecture=architecture))


def _edm(found: Preset, *, sigma_data: float) -> Preset:
    """A small preset with EDM's process and who owns its middle blocks; sigma_data is the pixels' deviation."""
    return replace(found, model=replace(found.model, middle="decoder"), process=EDM(sigma_data=sigma_data))


def _latent_network(multipliers: tuple[int, ...], attention: tuple[int, ...]) -> UNet:
    """Blocks, attention and norms of `ldm_celebahq` at an eighth of its width."""
    return UNet(
        width=32, decoder_widths=(32, 32, 16), multipliers=multipliers, blocks=1, attention=attention,
        decoder_attention="all", head_channels=16, resampling="conv", skip_scale=1.0, groups=32, norm_eps=1e-5,
        dropout=0.0, frequency_shift=0,
    )  # fmt: skip
