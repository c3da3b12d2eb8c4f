"""A denoiser that starts from a trained one: a staged network from its unified trunk, or from other stages.

The encoder is taken as it is, and the decoder of each stage starts as that trained decoder which is responsible for the
largest share of the stage's noise levels. With equal capacities a staged network is its trunk to the bit.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor, nn

from multistage_diffusion.backbones import Backbone
from multistage_diffusion.backbones.resize import Entry, Plan
from multistage_diffusion.denoiser import Denoiser
from multistage_diffusion.errors import ConfigError
from multistage_diffusion.noise import Process
from multistage_diffusion.stages import Stages

_NAMED = 3  # differences that an error names
_FREE = {"architecture", "classes", "augment_labels", "dropout"}  # options that no weight's meaning depends on


@dataclass(frozen=True)
class Inheritance:
    """Where each weight of a network comes from in a trained one.

    Attributes:
        stages: The trained stage behind each stage.
        kinds: Whether its decoder was copied, narrowed or widened.
    """

    stages: tuple[int, ...]
    kinds: tuple[Literal["copied", "narrowed", "widened"], ...]
    _entries: Mapping[str, tuple[str, Entry]]

    def weights(self, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The network's weights, from the trained network's by name."""
        return {name: entry.weight(trained.get(source)) for name, (source, entry) in self._entries.items()}

    def moments(self, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """An optimiser's moments of the network's weights, from those of the trained network's, where it has some."""
        return {
            name: entry.moment(trained[source])
            for name, (source, entry) in self._entries.items()
            if source in trained and entry.fixed is None
        }

    def __str__(self) -> str:
        words = (f"{kind} from {old}" for old, kind in zip(self.stages, self.kinds, strict=True))
        return ", ".join(f"decoder {stage} {word}" for stage, word in enumerate(words))


def inheritance(target: Denoiser, trained: Denoiser, where: str = "the trained network") -> Inheritance:
    """How a denoiser starts from a trained one.

    Args:
        target: The denoiser that is to start.
        trained: The trained one.
        where: What messages call it.

    Returns:
        Where each weight comes from.

    Raises:
        ConfigError: They differ in process, in an option of the network or in the shape of a weight, which are named;
            or the backbone has no rule for decoders of other capacities.
    """
    _require_same_options(target, trained, where)
    network, old = target.network, trained.network
    entries: dict[str, tuple[str, Entry]] = {}
    stages = tuple(_responsible(target, trained.stages, stage) for stage in range(network.stages))
    for index, encoder in enumerate(network.encoders):
        source = stages[index] if len(old.encoders) > 1 else 0
        if len(network.encoders) == 1 and len(old.encoders) > 1:
            raise ConfigError(f"{where} has an encoder a stage, and a shared one cannot start from several")
        plan = _same(encoder, old.encoders[source])
        if plan is None:
            raise ConfigError(
                f"the encoder differs from that of {where}: {_differences(encoder, old.encoders[source])}"
            )
        entries |= {f"encoders.{index}.{name}": (f"encoders.{source}.{name}", entry) for name, entry in plan.items()}
    kinds = []
    for index, decoder in enumerate(network.decoders):
        source = old.decoders[stages[index]]
        plan = _same(decoder, source)
        if plan is not None:
            kinds.append("copied")
        else:
            kinds.append("narrowed" if _size(decoder) < _size(source) else "widened")
            if not _resizable(target.backbone, trained.backbone):
                raise ConfigError(f"decoder {index} differs from that of {where}: {_differences(decoder, source)}")
            plan = target.backbone.resize(source, decoder, network.encoder(index))
        prefix = f"decoders.{stages[index]}"
        entries |= {f"decoders.{index}.{name}": (f"{prefix}.{name}", entry) for name, entry in plan.items()}
    return Inheritance(stages, tuple(kinds), entries)


@torch.no_grad()
def inherit(target: Denoiser, trained: Denoiser, where: str = "the trained network") -> Inheritance:
    """Start a denoiser from a trained one: its weights are replaced.

    Args:
        target: The denoiser that is to start.
        trained: The trained one; stays as it is.
        where: What messages call it.

    Returns:
        What became of each decoder.

    Raises:
        ConfigError: As in `inheritance`; then nothing was changed.
    """
    plan = inheritance(target, trained, where)
    target.network.load_state_dict(plan.weights(trained.network.state_dict()))
    target.trained_classes, target.label_optional = trained.trained_classes, trained.label_optional
    return plan


def branch(trained: Denoiser, stages: Stages, capacities: tuple[int, ...] | None = None) -> Denoiser:
    """A staged denoiser that starts as a trained one.

    Args:
        trained: A denoiser of a backbone of this package, unified or staged.
        stages: The partition of the noise levels.
        capacities: Capacity of each stage's decoder, like a width; by default that of the trained network's encoder.

    Returns:
        A new denoiser, on the CPU, in evaluation mode. With the default capacities it gives the same estimates as a
        unified one, to the bit.

    Raises:
        ConfigError: The network was given as an object, or the number of capacities is not the number of stages.
    """
    backbone = trained.backbone
    if not backbone.builds:
        raise ConfigError(
            "a network that was given as an object has no rule for its stages; give MultiDecoder a decoder for each, "
            "or use stage_module"
        )
    backbone = backbone.with_capacities(capacities or (backbone.capacity,) * len(stages))
    with torch.random.fork_rng(devices=[]):
        denoiser = Denoiser.from_backbone(backbone, trained.process, trained.shape, stages)
    denoiser.sampler = trained.sampler
    inherit(denoiser, trained)
    return denoiser.eval()


def _require_same_options(target: Denoiser, trained: Denoiser, where: str) -> None:
    """Refuse networks whose weights mean something else, though their shapes may agree."""
    if not _same_inputs(target.process, trained.process):
        raise ConfigError(
            f"{where} was trained for another process: {_options(trained.process, target.process)}; choose the same "
            "--process options"
        )
    here, there = target.backbone, trained.backbone
    if type(here) is type(there) and (differing := _options(there, here)):
        raise ConfigError(f"{where} has another network: {differing}; choose the same --model options")
    if target.classes != trained.classes:
        raise ConfigError(
            f"{where} has {trained.classes} classes, and the network is to have {target.classes}; set --model.classes "
            f"{trained.classes}"
        )


def _same_inputs(process: Process, trained: Process) -> bool:
    """Whether a network sees the same inputs and is asked for the same output; the noise levels trained may differ."""
    sigma = torch.logspace(-2, 2, 41, dtype=torch.float64)
    here, there = vars(process.preconditioning(sigma)), vars(trained.preconditioning(sigma))
    return all(torch.allclose(here[name], there[name], rtol=1e-6, atol=1e-9) for name in here)


def _options(there: Any, here: Any) -> str:
    """The options in which two records differ, for a message."""
    if type(there) is not type(here):
        return f"{type(there).__name__} there and {type(here).__name__} here"
    free = set[str]()
    if isinstance(here, Backbone):
        free = _FREE | {here.capacity_option.replace("-", "_"), *here.decoder_fields}
    pairs = [
        f"{field.name.replace('_', '-')} {getattr(there, field.name)} there and {getattr(here, field.name)} here"
        for field in fields(here)
        if field.name not in free and getattr(there, field.name) != getattr(here, field.name)
    ]
    return _few(pairs)


def _responsible(target: Denoiser, trained: Stages, stage: int) -> int:
    """The trained stage that has the largest share of a stage's part of the training distribution."""
    if len(trained) == 1:
        return 0
    process: Process = target.process
    edges = torch.tensor([0.0, *target.stages.edges, float("inf")], dtype=torch.float64)
    low, high = process.cdf(edges)[stage : stage + 2].tolist()
    borders = process.cdf(torch.tensor([0.0, *trained.edges, float("inf")], dtype=torch.float64)).tolist()
    overlaps = [min(high, right) - max(low, left) for left, right in itertools.pairwise(borders)]
    return max(range(len(trained)), key=lambda index: overlaps[index])


def _same(module: nn.Module, trained: nn.Module) -> Plan | None:
    """The plan of a copy; none where a name or a shape differs."""
    if _shapes(module) != _shapes(trained):
        return None
    return {name: Entry() for name in module.state_dict()}


def _resizable(backbone: Backbone, trained: Backbone) -> bool:
    return backbone.builds and type(backbone) is type(trained)


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _differences(module: nn.Module, trained: nn.Module) -> str:
    """The first weights that differ, for a message."""
    here, there = _shapes(module), _shapes(trained)
    names = [name for name in here | there if here.get(name) != there.get(name)]
    return _few(
        [f"{name} is {there.get(name, 'missing')} there and {here.get(name, 'missing')} here" for name in names]
    )


def _few(differences: list[str]) -> str:
    more = f" and {len(differences) - _NAMED} more" if len(differences) > _NAMED else ""
    return ", ".join(differences[:_NAMED]) + more
