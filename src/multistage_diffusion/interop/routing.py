"""Rows of a batch to the copies of their stages, inside the forward pass of a module that knows nothing of stages."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from multistage_diffusion.errors import ConfigError, suggest
from multistage_diffusion.multidecoder import is_batch, leaves, map_leaves, split

_REMEMBERED = 64  # calls with one and the same first tensor


class UnroutableError(Exception):
    """A staged part is used in a way that cannot be split by rows; the batch has to be split before the module."""


@final
class Routing:
    """Which stage runs, seen by every staged part of a module.

    Args:
        by_stage: The copies of each stage, under the names of the parts.
        paths: Names of the parts.

    Attributes:
        route: The stage of the whole batch, or how many rows each stage has, those of stage 0 first; none outside
            forward.
        unroutable: Whether a mixed batch was found to need the module stage by stage.
    """

    route: int | tuple[int, ...] | None

    def __init__(self, by_stage: nn.ModuleList, paths: tuple[str, ...]) -> None:
        self.by_stage, self.paths, self.route, self.unroutable = by_stage, paths, None, False
        # Activation checkpointing calls a part again in the backward pass, with the very tensors of its first call.
        self._calls: Any = WeakIdKeyDictionary()

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles remember no calls."""
        return Routing, (self.by_stage, self.paths)

    def of_call(self, tensors: Sequence[Tensor]) -> int | tuple[int, ...]:
        """The route of a call of a part: the one of forward, or, in a recomputation, of the call with these tensors.

        Raises:
            ConfigError: The part is called by itself.
        """
        if self.route is not None:
            if torch.is_grad_enabled() and tensors:
                calls = self._calls.setdefault(tensors[0], {})
                calls[tuple(map(id, tensors))] = self.route
                if len(calls) > _REMEMBERED:
                    del calls[next(iter(calls))]
            return self.route
        route = self.recalled(tensors)
        if route is None:
            raise ConfigError(
                "a staged part runs only inside the staged module's forward, and is recomputed only by checkpoint("
                "use_reentrant=False); use staged.expert(k) for the parts of one stage"
            )
        return route

    def recalled(self, tensors: Sequence[Tensor]) -> int | tuple[int, ...] | None:
        """The route of the call with these very tensors; none if it is not remembered."""
        calls = self._calls.get(tensors[0]) if tensors else None
        return (calls or {}).get(tuple(map(id, tensors)))


class Tree(nn.Module):
    """The copies of one stage, under the names of the parts."""

    def __init__(self, paths: Sequence[str], modules: Sequence[nn.Module]) -> None:
        super().__init__()
        for path, module in zip(paths, modules, strict=True):
            home: nn.Module = self
            *parents, name = path.split(".")
            for parent in parents:
                if parent not in home._modules:
                    home.add_module(parent, nn.Module())
                home = home.get_submodule(parent)
            home.add_module(name, module)


@final
class Part(nn.Module):
    """Stands where a staged submodule stood: calls the copies of the rows' stages.

    What else is read of it is that of the stage that runs. In a mixed batch plain values are those of stage 0, and
    submodules are parts again.

    Args:
        routing: Shared by all parts.
        path: The submodule's name.
    """

    _routing: Routing

    def __init__(self, routing: Routing, path: str) -> None:
        super().__init__()
        self._routing, self._path = routing, path

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The submodule's own forward, by the copies of the rows' stages."""
        tensors = [leaf for leaf in leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        route = self._routing.of_call(tensors)
        if isinstance(route, int):
            return self._copy(route)(*args, **kwargs)
        if not any(is_batch(tensor, sum(route)) for tensor in tensors):
            raise UnroutableError
        return by_stage((args, kwargs), route, lambda stage, given, named: self._copy(stage)(*given, **named))

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        """Those of the copy that is read."""
        return self._current.named_parameters(*args, **kwargs)

    def named_buffers(self, *args: Any, **kwargs: Any) -> Any:
        """Those of the copy that is read."""
        return self._current.named_buffers(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_routing" not in self.__dict__:
            raise AttributeError(name)
        return self._read(getattr(self._current, name), name)

    def __getitem__(self, index: Any) -> Any:
        current: Any = self._current
        if isinstance(index, slice):
            return [self[position] for position in range(len(current))[index]]
        return self._read(current[index], str(index if isinstance(index, str) else range(len(current))[index]))

    def __len__(self) -> int:
        current: Any = self._current
        return len(current)

    def __bool__(self) -> bool:
        return bool(self._current)

    @property
    def _current(self) -> nn.Module:
        """The copy that is read."""
        route = self._routing.route
        return self._copy(route if isinstance(route, int) else 0)

    def _copy(self, stage: int) -> nn.Module:
        return self._routing.by_stage[stage].get_submodule(self._path)

    def _read(self, value: Any, name: str) -> Any:
        """What is read of a part: where several stages run, nothing that belongs to one of them."""
        route = self._routing.route
        if isinstance(route, int):
            return value
        if isinstance(value, nn.Module):
            return Part(self._routing, f"{self._path}.{name}")
        if route is not None and (isinstance(value, Tensor) or isinstance(getattr(value, "__self__", None), nn.Module)):
            raise UnroutableError
        return value


def by_stage(arguments: Any, counts: Sequence[int], call: Callable[[int, Any, Any], Any]) -> Any:
    """Call a function with the rows of each stage that has some.

    Args:
        arguments: Positional and named arguments; rows of a stage lie side by side, those of stage 0 first.
        counts: How many rows each stage has.
        call: Gets a stage, and the arguments with its rows; they are views.

    Returns:
        The outputs as one, the rows side by side.

    Raises:
        UnroutableError: A tensor of an output has not as many rows.
    """
    outputs: list[Any] = []
    columns: list[list[Any]] = []
    for stage, (given, named) in enumerate(split(arguments, counts, strict=False)):
        if not counts[stage]:
            continue
        outputs.append(call(stage, given, named))
        columns.append(leaves(outputs[-1]))
        if not all(is_batch(leaf, counts[stage]) for leaf in columns[-1] if isinstance(leaf, Tensor)):
            raise UnroutableError
    joined = iter([torch.cat(row) if isinstance(row[0], Tensor) else row[0] for row in zip(*columns, strict=True)])
    return map_leaves(outputs[0], lambda leaf: next(joined))


def submodules(module: nn.Module, own: Sequence[str], option: str) -> list[str]:
    """The submodules that are named and called: members in the place of their list.

    Args:
        module: The module.
        own: Names.
        option: What messages call them.

    Raises:
        ConfigError: A name is no submodule or lies within another.
    """
    names = [name for name, _ in module.named_modules() if name]
    if isinstance(own, str) or not own:
        raise ConfigError(
            f'{option} must be a list of submodules, like ["{names[-1] if names else "conv_out"}"], got {own!r}'
        )
    paths = list[str]()
    for name in own:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = suggest(name, near or [child for child, _ in module.named_children()])
            raise ConfigError(f"{type(module).__name__} has no submodule {name}{hint}")
        part = module.get_submodule(name)
        members = isinstance(part, (nn.ModuleList, nn.ModuleDict))
        paths += [f"{name}.{child}" for child, _ in part.named_children()] if members else [name]
    for path in paths:
        if inside := next((other for other in paths if f"{path}.".startswith(f"{other}.") and other != path), None):
            raise ConfigError(f"{option} names {path} and {inside}, which holds it; name one of them")
    return list(dict.fromkeys(paths))
