"""What a backbone is: a family of networks that can be split into encoders and decoders. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from multistage_diffusion.errors import ConfigError
from multistage_diffusion.records import Tagged, check, check_numbers
from multistage_diffusion.text import short

if TYPE_CHECKING:
    from torch.nn import Module

    from multistage_diffusion.backbones.resize import Plan
    from multistage_diffusion.multidecoder import MultiDecoder
else:
    Module = MultiDecoder = Plan = Any

Architecture = Literal["multistage", "unified", "separate"]


@dataclass(frozen=True, kw_only=True)
class Backbone(Tagged, tag="backbone", untagged="unet"):
    """A family of networks that can be split; a frozen record of its options, and the section `model` of a run.

    A subclass has a field `backbone` with its name as the default, `capacities`, `with_capacities`, `encoder` and
    `decoder`, and is known to files and recipes from the moment it is defined. docs/extending.md has an example.
    """

    architecture: Architecture = "multistage"
    """multistage: one encoder, a decoder per stage; separate: an encoder per stage too; unified: one network."""
    classes: int = 0
    """Number of class labels; 0 trains an unconditional network."""
    augment_labels: int = 0
    """Numbers that tell the network how an image was augmented; 9 for data.augment-probability, else 0."""

    capacity_option: ClassVar[str] = "capacities"
    """The option that holds the decoders' capacities, for messages."""
    capacity_noun: ClassVar[str] = "capacities"
    """What they are, for messages."""
    decoder_fields: ClassVar[tuple[str, ...]] = ()
    """Other fields that say how decoders are built, one entry a stage."""

    def __post_init__(self) -> None:
        check_numbers(self, "model")
        check(0 <= self.classes <= 1_000_000, "model.classes", "in 0..1000000", self.classes)
        check(self.augment_labels in (0, 9), "model.augment-labels", "0 or 9", self.augment_labels)

    @property
    def capacity(self) -> int:
        """What the encoder spends; a decoder of this capacity makes a stage the unified network."""
        raise NotImplementedError

    @property
    def capacities(self) -> tuple[int, ...]:
        """What each decoder may spend, low to high noise, as it is built: one entry a stage."""
        raise NotImplementedError

    def with_capacities(self, capacities: tuple[int, ...]) -> Backbone:
        """The multistage network with other decoders; one entry a stage."""
        raise NotImplementedError

    @property
    def capacity_unit(self) -> int:
        """What every capacity must be a multiple of."""
        return 1

    def nearest_capacity(self, capacity: int | float) -> int:
        """The capacity nearest to a number that a decoder can be built with."""
        return max(1, round(capacity))

    def unified(self) -> Backbone:
        """The network with one stage, whose decoder has the encoder's capacity."""
        return replace(self.with_capacities((self.capacity,)), architecture="unified")

    def with_width(self, factor: float) -> Backbone:
        """The network with an encoder so many times as wide, and the decoders as they are."""
        raise NotImplementedError

    def of_stage(self, stage: int) -> Backbone:
        """The record that makes a stage's decoder, where decoders differ in more than capacity."""
        return self

    def of_kind(self, kind: str, stages: int) -> Backbone:
        """The default network of a family for as many stages, of the same architecture, classes and augmentation.

        Raises:
            ConfigError: No such family, or one that no name builds.
        """
        if self.is_kind({self._tag: kind}):
            return self
        model = Backbone.by_kind(kind)()
        check(model.builds, "model.backbone", "a family that a configuration can build", kind)
        same = {name: getattr(self, name) for name in ("architecture", "classes", "augment_labels")}
        return replace(model.with_capacities((model.capacity,) * stages), **same)

    def check_shape(self, shape: tuple[int, int, int]) -> None:
        """Refuse images (C, H, W) that the network cannot take, with a `ConfigError`."""

    def encoder(self, shape: tuple[int, int, int]) -> Module:
        """An encoder for images (C, H, W): maps (x, c_noise, conditioning) to a record of batch-first tensors."""
        raise NotImplementedError

    def decoder(self, capacity: int, encoder: Any, shape: tuple[int, int, int]) -> Module:
        """A decoder of a capacity behind such an encoder: maps its record to the raw network output F."""
        raise NotImplementedError

    def resize(self, trained: Module, target: Module, encoder: Module) -> Plan:
        """How a decoder's weights follow from those of a trained one of another capacity: `backbones/resize.py`.

        Args:
            trained: The trained decoder.
            target: A decoder behind the same encoder.
            encoder: That encoder.

        Returns:
            An entry for each parameter of `target`.

        Raises:
            ConfigError: The family has no such rule.
        """
        raise ConfigError(
            f"decoders of the backbone {self.backbone} cannot start from decoders of other {self.capacity_noun}"  # pyright: ignore
        )

    def network(self, shape: tuple[int, int, int]) -> MultiDecoder:
        """The whole network, freshly initialised from torch's generator.

        Args:
            shape: (C, H, W) of an image.

        Returns:
            Encoder(s) and decoders as `architecture` and `capacities` say.

        Raises:
            ConfigError: The network cannot take such images.
        """
        from torch import nn

        from multistage_diffusion.backbones.layers import number_dropouts
        from multistage_diffusion.multidecoder import MultiDecoder

        self.check_shape(shape)
        capacities = self.capacities
        # Modules are made in a fixed order, as each takes its initial weights from the generator.
        encoders = nn.ModuleList(
            self.encoder(shape) for _ in range(len(capacities) if self.architecture == "separate" else 1)
        )
        decoders = nn.ModuleList(
            self.of_stage(stage).decoder(capacity, encoders[0], shape) for stage, capacity in enumerate(capacities)
        )
        network = MultiDecoder(encoders, decoders)
        number_dropouts(network)
        return network

    def require_stages(self, count: int, edges: tuple[float, ...]) -> None:
        """Refuse a partition that does not give each decoder a stage.

        Args:
            count: Number of stages.
            edges: Their edges, for the message.

        Raises:
            ConfigError: There are more or fewer decoders.
        """
        if self.architecture != "unified":
            expected = f"{count} {self.capacity_noun}, one for each stage that stages.edges {short(edges)} cut"
            check(len(self.capacities) == count, f"model.{self.capacity_option}", expected, self.capacities)

    @property
    def builds(self) -> bool:
        """Whether the record says all that is needed to build the network."""
        return True


@dataclass(frozen=True, kw_only=True)
class CustomNetwork(Backbone):
    """What files say of a network that was given as an object; it cannot be built from its name."""

    backbone: Literal["custom"] = "custom"
    """Family of networks."""
    network_class: str = ""
    """Class of the network, or of its decoders: who loads a run must pass it; nothing is imported by this name."""
    decoders: int = 1
    """Number of decoders."""

    @property
    def capacities(self) -> tuple[int, ...]:
        """One entry a stage; what a decoder may spend is the user's affair."""
        return (0,) * self.decoders

    @property
    def builds(self) -> bool:
        """Never: the network must be passed."""
        return False

    def encoder(self, shape: tuple[int, int, int]) -> Module:
        """Say that the network must be passed."""
        raise ConfigError(
            f"the network is of the class {self.network_class}, which is not imported from a name in a file; pass it: "
            "network=..."
        )
