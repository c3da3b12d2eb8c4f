"""The staged transformer as a backbone: a trunk that the stages share, and a head a stage. Imports no torch."""

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
else:
    Module = Plan = Any


@dataclass(frozen=True, kw_only=True)
class Transformer(Backbone):
    """A diffusion transformer with a shared trunk and a head a stage; undivided it is DiT (Peebles and Xie 2023).

    Trunk and heads are adaLN-Zero blocks on patches. The capacity of a head is its depth times its width. Where its
    size is that of the undivided network, a stage is exactly that network; where width or patch differ from the
    trunk's, a linear layer joins the two.
    """

    backbone: Literal["dit"] = "dit"
    """Family of networks."""
    width: int = 384
    """Channels of the trunk."""
    depth: int = 12
    """Blocks of the undivided network: trunk and head together."""
    trunk: int = 8
    """How many of them are the trunk."""
    patch: int = 2
    """Pixels a side of a patch."""
    decoder_widths: tuple[int, ...] = (384,)
    """Channels of each stage's head, low to high noise; unified uses the trunk's."""
    decoder_blocks: tuple[int, ...] = ()
    """Blocks of each stage's head; by default what the trunk leaves of model.depth, for all."""
    decoder_patches: tuple[int, ...] = ()
    """Pixels a side of each head's patches, multiples of the trunk's: fewer and larger ones take less time; by default
    the trunk's."""
    head_channels: int = 64
    """Channels of an attention head."""
    mlp: Literal["gelu", "swiglu"] = "gelu"
    """Layers after attention: GELU with 4 times the width, or SwiGLU of as many weights (Shazeer 2020)."""
    norm: Literal["layer", "rms"] = "layer"
    """Norm before attention and MLP, whose scale and shift the noise level gives: layer norm or RMSNorm."""
    qk_norm: bool = False
    """RMSNorm of queries and keys, which keeps attention's logits bounded in long or half-precision training."""
    norm_eps: float = 1e-6
    """Epsilon of the norm before an MLP (1e-5 in DiT models of diffusers); the others have 1e-6."""
    frequency_shift: Literal[0, 1] = 1
    """1: sinusoids of the noise level from frequency 1 to 1/10000 (as in diffusers); 0: without the last (DiT, SiT)."""

    capacity_option: ClassVar[str] = "decoder-widths"
    capacity_noun: ClassVar[str] = "widths"
    decoder_fields: ClassVar[tuple[str, ...]] = ("decoder_blocks", "decoder_patches")

    def __post_init__(self) -> None:
        super().__post_init__()
        unit, widths, stages = self.head_channels, (self.width, *self.decoder_widths), len(self.decoder_widths)
        blocks, patches = self.decoder_blocks, self.decoder_patches
        check(2 <= unit <= 1024 and unit % 2 == 0, "model.head-channels", "even and in 2..1024", unit)
        valid = all(1 <= width <= 16_384 and width % unit == 0 for width in widths) and self.width % 4 == 0
        expected = f"multiples of model.head-channels {unit} (the trunk's of 4, too) up to 16384"
        check(valid, "model.width and model.decoder-widths", expected, widths)
        check(1 <= stages <= 64, "model.decoder-widths", "one width a stage, 64 at most", self.decoder_widths)
        check(1 <= self.depth <= 256, "model.depth", "in 1..256", self.depth)
        check(0 <= self.trunk < self.depth, "model.trunk", f"at least 0 and below model.depth {self.depth}", self.trunk)
        check(1 <= self.patch <= 1024, "model.patch", "in 1..1024", self.patch)
        valid = len(blocks) in (0, stages) and all(1 <= count <= 256 for count in blocks)
        check(valid, "model.decoder-blocks", f"{stages} numbers in 1..256, one a stage", blocks)
        valid = len(patches) in (0, stages) and all(0 < size <= 1024 and size % self.patch == 0 for size in patches)
        check(valid, "model.decoder-patches", f"{stages} multiples of model.patch {self.patch}, one a stage", patches)
        check(self.norm_eps > 0, "model.norm-eps", "positive", self.norm_eps)

    @property
    def heads(self) -> tuple[tuple[int, int, int], ...]:
        """Width, blocks and patch of each head as it is built: the trunk's width and patch, if unified."""
        blocks, stages = self.depth - self.trunk, len(self.decoder_widths)
        if self.architecture == "unified":
            return ((self.width, blocks, self.patch),)
        depths, patches = self.decoder_blocks or (blocks,) * stages, self.decoder_patches or (self.patch,) * stages
        return tuple(zip(self.decoder_widths, depths, patches, strict=True))

    @property
    def capacity(self) -> int:
        """Depth times width of the undivided network's head."""
        return (self.depth - self.trunk) * self.width

    @property
    def capacities(self) -> tuple[int, ...]:
        """Depth times width of each head as it is built."""
        return tuple(width * blocks for width, blocks, _ in self.heads)

    def with_capacities(self, capacities: tuple[int, ...]) -> Transformer:
        """The multistage network with other heads, whose depth and width shrink or grow together."""
        if self.architecture != "unified" and capacities == self.capacities:
            return replace(self, architecture="multistage")
        widths, blocks = zip(*map(self._size, capacities), strict=True)
        patches = () if self.architecture == "unified" else self.decoder_patches
        return replace(
            self,
            architecture="multistage",
            decoder_widths=widths,
            decoder_blocks=blocks,
            decoder_patches=patches if len(patches) == len(widths) else (),
        )

    def with_width(self, factor: float) -> Transformer:
        """The network with a trunk of another width."""
        unit = math.lcm(4, self.head_channels)
        return replace(self, width=max(1, round(self.width * factor / unit)) * unit)

    @property
    def capacity_unit(self) -> int:
        """Widths hold attention's heads whole."""
        return self.head_channels

    def nearest_capacity(self, capacity: int | float) -> int:
        """The capacity nearest to a number that is exactly a depth times a width."""
        unit = self.head_channels
        near = range(unit, unit * (2 + 2 * math.ceil(max(capacity, unit) / unit)), unit)
        return min(
            (size for size in near if math.prod(self._size(size)) == size), key=lambda size: abs(size - capacity)
        )

    def _size(self, capacity: int | float) -> tuple[int, int]:
        """Width and blocks of a head: as many blocks as the root of the capacity says, and the width that is left."""
        blocks = max(1, round((self.depth - self.trunk) * math.sqrt(capacity / self.capacity)))
        return max(1, round(capacity / blocks / self.head_channels)) * self.head_channels, blocks

    def check_shape(self, shape: tuple[int, int, int]) -> None:
        """Refuse images that cannot be cut into whole patches."""
        for *_, patch in self.heads:
            if shape[1] % patch or shape[2] % patch:
                raise ConfigError(
                    f"images of {shape[1]}x{shape[2]} pixels cannot be cut into patches of {patch}x{patch}; set "
                    f"data.resolution to a multiple of {patch}, or model.patch and model.decoder-patches to divisors"
                )

    def encoder(self, shape: tuple[int, int, int]) -> Module:
        """The trunk, with the embeddings of patches, noise level and class."""
        from multistage_diffusion.backbones.transformer_parts import Trunk

        return Trunk(self, shape)

    def resize(self, trained: Module, target: Module, encoder: Module) -> Plan:
        """A shallower head keeps the first blocks; a deeper one gets blocks that pass on what they are given."""
        from multistage_diffusion.backbones.transformer_parts import deeper

        return deeper(trained, target)

    def of_stage(self, stage: int) -> Transformer:
        """The record with one head, the stage's."""
        width, blocks, patch = self.heads[stage]
        return replace(self, decoder_widths=(width,), decoder_blocks=(blocks,), decoder_patches=(patch,))

    def decoder(self, capacity: int, encoder: Any, shape: tuple[int, int, int]) -> Module:
        """A head, of the first stage's size; `of_stage` gives others."""
        from multistage_diffusion.backbones.transformer_parts import Head

        return Head(self, shape, *self.heads[0])
