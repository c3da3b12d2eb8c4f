"""The U-Net as a backbone: the networks of the paper are presets of it (docs/architecture.md). Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from multistage_diffusion.backbones.protocol import Backbone
from multistage_diffusion.errors import ConfigError
from multistage_diffusion.records import check

if TYPE_CHECKING:
    from torch.nn import Module

    from multistage_diffusion.backbones.resize import Plan
    from multistage_diffusion.multidecoder import MultiDecoder
else:
    Module = MultiDecoder = Plan = Any


@dataclass(frozen=True, kw_only=True)
class UNet(Backbone):
    """The multi-decoder U-Net (the networks of the paper are presets: docs/architecture.md)."""

    backbone: Literal["unet"] = "unet"
    """Family of networks."""
    width: int = 128
    """Base width (channels) of the encoder."""
    decoder_widths: tuple[int, ...] = (128,)
    """Base width of each stage's decoder, low to high noise; unified uses the encoder's width."""
    multipliers: tuple[int, ...] = (1, 2, 2, 2)
    """Width at each resolution, as a multiple of the base width."""
    blocks: int = 4
    """Residual blocks a resolution in the encoder; the decoders have one more."""
    attention: tuple[int, ...] = (16,)
    """Resolutions in pixels at which there is self-attention."""
    decoder_attention: Literal["last", "all", "first-stage", "none"] = "last"
    """Attention after the last block of a decoder's resolution, or after each; first-stage: after each in the decoder
    of stage 0 alone, as in the released latent diffusion; none: in the middle blocks at most."""
    entry_levels: tuple[int, ...] = ()
    """How often each stage's images are halved before they enter the encoder past its higher resolutions: pixels move
    into channels, a layer of the stage's own takes them, and its decoder ends at that resolution. One number a stage,
    low to high noise; none: all 0."""
    head_channels: int | None = None
    """Channels of an attention head; by default one head."""
    middle: Literal["encoder", "decoder"] = "encoder"
    """Who owns the blocks at the lowest resolution between the two."""
    resampling: Literal["block", "conv", "conv-after"] = "block"
    """Resample inside a residual block, or by a strided / upsampled convolution; conv-after: the strided one is padded
    right and below only (DDPM)."""
    filter: Literal["box", "fir"] = "box"
    """Resampling filter inside residual blocks: average and nearest, or FIR 1, 3, 3, 1."""
    input_pyramid: Literal["ncsnpp"] | bool = False
    """Feed the downsampled input to each resolution of the encoder. ncsnpp: filter, then a strided 3x3 convolution, as
    published; true, as in version 0.1: a strided filter, then the convolution."""
    skip_scale: float = math.sqrt(0.5)
    """Scale of a residual block's output."""
    groups: int = 16
    """Largest number of groups in a group norm."""
    group_channels: int = 4
    """Smallest number of channels in a group; a norm of few channels has fewer groups."""
    norm_eps: float = 1e-6
    """Epsilon of a group norm."""
    dropout: float = 0.1
    """Dropout in residual blocks."""
    initialisation: Literal["zero", "edm"] = "zero"
    """Layers that end a residual branch start at zero; edm: at 1e-5 of the others' weights, and attention's queries,
    keys and values at sqrt 0.2 of them (Karras et al. 2022)."""
    frequency_shift: Literal[0, 1] = 1
    """1: sinusoids of the noise level from frequency 1 to 1/10000 (DDPM); 0: the last left out (latent diffusion)."""

    capacity_option: ClassVar[str] = "decoder-widths"
    capacity_noun: ClassVar[str] = "widths"
    decoder_fields: ClassVar[tuple[str, ...]] = ("entry_levels",)

    def __post_init__(self) -> None:
        super().__post_init__()
        widths = (self.width, *self.decoder_widths)
        valid = all(4 <= width <= 8192 and width % 4 == 0 for width in widths)
        check(valid, "model.width and model.decoder-widths", "multiples of 4 up to 8192", widths)
        few = 1 <= len(self.decoder_widths) <= 64
        check(few, "model.decoder-widths", "one width a stage, 64 at most", self.decoder_widths)
        factors = 1 <= len(self.multipliers) <= 12 and all(1 <= factor <= 64 for factor in self.multipliers)
        check(factors, "model.multipliers", "1 to 12 numbers in 1..64", self.multipliers)
        check(1 <= self.blocks <= 64, "model.blocks", "in 1..64", self.blocks)
        check(all(pixels >= 1 for pixels in self.attention), "model.attention", "positive", self.attention)
        heads = self.head_channels is None or self.head_channels >= 1
        check(heads, "model.head-channels", "at least 1", self.head_channels)
        entries, stages = self.entry_levels, len(self.capacities)
        valid = len(entries) in (0, stages) and all(0 <= entry < len(self.multipliers) for entry in entries)
        deepest = len(self.multipliers) - 1
        check(valid, "model.entry-levels", f"{stages} numbers in 0..{deepest}, one a stage", entries)
        check(self.skip_scale > 0, "model.skip-scale", "positive", self.skip_scale)
        check(self.norm_eps > 0, "model.norm-eps", "positive", self.norm_eps)
        check(0 <= self.dropout < 1, "model.dropout", "in [0, 1)", self.dropout)
        check(self.groups >= 1, "model.groups", "at least 1", self.groups)
        check(1 <= self.group_channels <= 4, "model.group-channels", "in 1..4", self.group_channels)

    @property
    def capacity(self) -> int:
        """Base width of the encoder."""
        return self.width

    @property
    def capacities(self) -> tuple[int, ...]:
        """Base width of each decoder as it is built: the encoder's alone, if unified."""
        return (self.width,) if self.architecture == "unified" else self.decoder_widths

    def with_capacities(self, capacities: tuple[int, ...]) -> UNet:
        """The multistage network with decoders of other base widths, and their entries if they are as many."""
        entries = self.entry_levels if len(capacities) == len(self.capacities) else ()
        return replace(self, architecture="multistage", decoder_widths=capacities, entry_levels=entries)

    def with_width(self, factor: float) -> UNet:
        """The network with another base width of the encoder."""
        return replace(self, width=self.nearest_capacity(self.width * factor))

    @property
    def capacity_unit(self) -> int:
        """Base widths are whole groups of 4 channels, and hold attention's heads whole."""
        return math.lcm(4, self.head_channels or 4)

    def nearest_capacity(self, capacity: int | float) -> int:
        """Base widths are whole groups of 4 channels."""
        return max(4, 4 * round(capacity / 4))

    def check_shape(self, shape: tuple[int, int, int]) -> None:
        """Refuse images whose height or width cannot be halved often enough."""
        factor = 2 ** (len(self.multipliers) - 1)
        if shape[1] % factor or shape[2] % factor:
            raise ConfigError(
                f"images of {shape[1]}x{shape[2]} pixels cannot be halved {len(self.multipliers) - 1} times as "
                f"model.multipliers {self.multipliers} ask; set data.resolution to a multiple of {factor}"
            )

    def of_stage(self, stage: int) -> UNet:
        """The record with one decoder, the stage's: its entry, and attention in one decoder only, if so."""
        attention = self.decoder_attention
        if attention == "first-stage":
            attention = "none" if stage else "all"
        return replace(
            self,
            decoder_widths=(self.capacities[stage],),
            entry_levels=self.entry_levels[stage : stage + 1],
            decoder_attention=attention,
        )

    def network(self, shape: tuple[int, int, int]) -> MultiDecoder:
        """The whole network, freshly initialised from torch's generator."""
        network = super().network(shape)
        if self.initialisation == "edm":
            from multistage_diffusion.backbones.unet_parts import initialise_as_edm

            initialise_as_edm(network)
        return network

    def encoder(self, shape: tuple[int, int, int]) -> Module:
        """The downward half, at the base width."""
        from multistage_diffusion.backbones.unet_parts import UNetEncoder

        return UNetEncoder(self, shape)

    def decoder(self, capacity: int, encoder: Any, shape: tuple[int, int, int]) -> Module:
        """The upward half, at a base width of its own."""
        from multistage_diffusion.backbones.unet_parts import UNetDecoder

        return UNetDecoder(capacity, encoder, self, shape, entry=self.entry_levels[0] if self.entry_levels else 0)

    def resize(self, trained: Any, target: Any, encoder: Any) -> Plan:
        """Channels of the trained decoder are picked or repeated."""
        from multistage_diffusion.backbones.resize import resize

        return resize(trained, target, encoder.channels)
