"""Deltas of low rank for each stage beside layers that the stages share (LoRA, Hu et al. 2022, routed by stage)."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from multistage_diffusion.errors import ConfigError
from multistage_diffusion.interop.routing import Routing, UnroutableError, by_stage
from multistage_diffusion.multidecoder import is_batch, leaves


def takes_delta(layer: nn.Module) -> bool:
    """Whether a layer is one that a delta can stand beside: linear, or a two-dimensional convolution in one group."""
    return isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)


@final
class LowRank(nn.Module):
    """up(down(x)) of rank r; `up` begins at zero, so that the layer beside it gives what it gave.

    Args:
        layer: Linear or convolution.
        rank: Channels between the two.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d, rank: int) -> None:
        super().__init__()
        where: dict[str, Any] = {"bias": False, "device": layer.weight.device, "dtype": layer.weight.dtype}
        if isinstance(layer, nn.Linear):
            self.down = nn.Linear(layer.in_features, rank, **where)
            self.up = nn.Linear(rank, layer.out_features, **where)
        else:
            shape: dict[str, Any] = {
                name: getattr(layer, name) for name in ("kernel_size", "stride", "padding", "dilation", "padding_mode")
            }
            self.down = nn.Conv2d(layer.in_channels, rank, **shape, **where)
            self.up = nn.Conv2d(rank, layer.out_channels, 1, **where)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """What is added to the layer's output."""
        return self.up(self.down(x))

    def weight(self) -> Tensor:
        """What is added to the layer's weight, in its shape."""
        return (self.up.weight.flatten(1) @ self.down.weight.flatten(1)).view(-1, *self.down.weight.shape[1:])


@final
class AddDelta:
    """A hook of a shared layer's forward: adds the delta of each row's stage.

    Args:
        routing: Shared by all parts of a staged module.
        path: The layer's name.
    """

    def __init__(self, routing: Routing, path: str) -> None:
        self.routing, self.path = routing, path

    def __deepcopy__(self, memo: dict[int, Any]) -> AddDelta:
        return AddDelta(copy.deepcopy(self.routing, memo), self.path)

    def __call__(self, layer: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], output: Tensor) -> Tensor:
        """Called after the layer's forward."""
        x = args[0] if args else kwargs["input"]
        route = self.routing.of_call([x])
        if isinstance(route, int):
            return output + self.delta(route)(x)
        if not is_batch(x, sum(route)):
            raise UnroutableError
        return output + by_stage(((x,), {}), route, lambda stage, given, named: self.delta(stage)(*given))

    def delta(self, stage: int) -> Any:
        """The delta of a stage."""
        return self.routing.by_stage[stage].get_submodule(self.path)


@final
class Recall:
    """A hook around a module that holds such layers: in a recomputation, the route is that of its first call.

    Activation checkpointing gives the module the very tensors of then; what it computes of them are others.

    Args:
        routing: Shared by all parts of a staged module.
    """

    def __init__(self, routing: Routing) -> None:
        self.routing, self.recalls = routing, False

    def __deepcopy__(self, memo: dict[int, Any]) -> Recall:
        return Recall(copy.deepcopy(self.routing, memo))

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, *output: Any) -> None:
        """Called before the module's forward, and with its output after it."""
        if output:
            if self.recalls:
                self.routing.route, self.recalls = None, False
            return
        tensors = [leaf for leaf in leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if self.routing.route is not None:
            self.routing.of_call(tensors)
        elif (route := self.routing.recalled(tensors)) is not None:
            self.routing.route, self.recalls = route, True


def layers(module: nn.Module, names: Sequence[str]) -> list[str]:
    """The names of the layers that deltas stand beside: those named, and those in the submodules named.

    Raises:
        ConfigError: A name is no submodule, or there is no such layer in it.
    """
    found = dict[str, None]()
    for name in names:
        part = module.get_submodule(name)
        inside = [f"{name}.{path}" if path else name for path, layer in part.named_modules() if takes_delta(layer)]
        if not inside:
            raise ConfigError(f"low_rank names {name}, which has no linear layer and no convolution in one group")
        found |= dict.fromkeys(inside)
    return list(found)


def attach(module: nn.Module, routing: Routing, paths: Sequence[str]) -> None:
    """Hang the deltas, which lie in the routing's parts of each stage under the layers' names, to the layers."""
    holders = dict[str, None]()
    for path in paths:
        module.get_submodule(path).register_forward_hook(AddDelta(routing, path), with_kwargs=True)
        names = path.split(".")
        holders |= dict.fromkeys(".".join(names[:depth]) for depth in range(1, len(names)))
    for holder in holders:
        recall = Recall(routing)
        module.get_submodule(holder).register_forward_pre_hook(recall, with_kwargs=True)
        module.get_submodule(holder).register_forward_hook(recall, with_kwargs=True, always_call=True)


@torch.no_grad()
def merge(module: nn.Module, deltas: nn.Module, paths: Sequence[str]) -> None:
    """Add the deltas of a stage to the weights of a module, whose hooks go."""
    for part in module.modules():
        for hooks in (part._forward_hooks, part._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(hook, (AddDelta, Recall))]:
                del hooks[key]
    for path in paths:
        layer: Any = module.get_submodule(path)
        delta: Any = deltas.get_submodule(path)
        layer.weight.add_(delta.weight())
