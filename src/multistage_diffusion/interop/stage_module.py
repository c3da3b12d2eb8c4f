"""Any module in stages: a copy of chosen submodules for each stage, behind the module's own class and signature.

    staged = msd.stage_module(unet, own=["up_blocks", "conv_out"], stages=[0.5, 3.0], process=scheduler)

The stage of each row follows from the timestep that the module's forward is given. Nothing of the module is known but
its submodules and that argument; diffusers is not imported.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from multistage_diffusion.errors import CheckpointError, ConfigError
from multistage_diffusion.files import MANIFEST, check_directory, read_json, whole_directory, write_json
from multistage_diffusion.interop import low_rank as deltas
from multistage_diffusion.interop.routing import Part, Routing, Tree, UnroutableError, by_stage, submodules
from multistage_diffusion.interop.timesteps import NoiseLevels, noise_levels, read_levels
from multistage_diffusion.multidecoder import is_batch, map_leaves
from multistage_diffusion.records import check
from multistage_diffusion.stages import Stages, stage_at
from multistage_diffusion.weights import load_weights, save_weights

CONFIG, WEIGHTS = "staged.json", "staged.safetensors"
_TIMESTEPS = ("timestep", "timesteps", "t", "time", "sigma", "sigmas", "noise_labels", "c_noise")
_MIXED = ("shared", "apart")


@dataclass(frozen=True)
class Staging:
    """How a module was staged.

    Attributes:
        own: The submodules of which each stage has a copy, as they were named.
        stages: The partition of the noise levels.
        levels: Gives the noise level of a timestep.
        argument: The argument of forward that is the timestep.
        mixed: What a batch of several stages does; see `stage_module`.
        low_rank: The layers and submodules with a delta for each stage, as they were named.
        rank: Of the deltas.
    """

    own: tuple[str, ...]
    stages: Stages
    levels: NoiseLevels
    argument: str
    mixed: str
    low_rank: tuple[str, ...] = ()
    rank: int = 8


class StagedModule(nn.Module):
    """What `stage_module` adds to a module's class.

    A weight that the stages share keeps its name; that of stage k is called `by_stage.k.` and its name. So the expert
    of stage k is the shared weights and those of that prefix, in parameters as in `state_dict`.

    Attributes:
        original: The module's own class.
        staging: How it was staged.
        by_stage: The copies of each stage, stage 0 (the lowest noise) first.
    """

    original: type[nn.Module]
    staging: Staging
    by_stage: nn.ModuleList
    _routing: Routing

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward, with the copies of each row's stage.

        Raises:
            ConfigError: No timestep was given.
        """
        stage = self.stage_of(self._timestep(args, kwargs))
        if stage.numel() <= 1 or bool((stage == stage[0]).all()):
            return self._run(int(stage.reshape(-1)[0]) if stage.numel() else 0, args, kwargs)
        # Rows of a stage are put side by side, so that splitting is a view; the results are put back.
        order, counts = stage.argsort(stable=True), torch.bincount(stage, minlength=len(self.by_stage)).tolist()
        args, kwargs = _permuted((args, kwargs), order)
        return _permuted(self._run_mixed(tuple(counts), args, kwargs), order.argsort())

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _remade, (self.original,), self.__dict__

    def stage_of(self, timestep: Any) -> Int[Tensor, "*batch"]:
        """The stage of each row.

        Args:
            timestep: What forward gets: a number, or a tensor of one for all rows or one for each; of several for a row
                (frames, tokens) the highest counts.

        Returns:
            int64 on the CPU.
        """
        time = torch.as_tensor(timestep, dtype=None if hasattr(timestep, "dtype") else torch.float64)
        if time.ndim > 1:
            time = time.flatten(1).amax(1)
        stages, levels = self.staging.stages, self.staging.levels
        return stages.of(time.detach().cpu()) if levels.are_given else stage_at(time, stages.edges, levels)

    def expert(self, stage: int) -> Any:
        """A module of the original class for one stage, without the other stages' copies; its weights are copies.

        Raises:
            ConfigError: No such stage.
        """
        if not 0 <= stage < len(self.by_stage):
            raise ConfigError(f"stage must be in 0..{len(self.by_stage) - 1}, got {stage}")
        memo: dict[int, Any] = {id(self.by_stage): nn.ModuleList()}
        plain: Any = copy.deepcopy(self, memo)
        for path in self._routing.paths:
            plain.set_submodule(path, copy.deepcopy(self.by_stage[stage].get_submodule(path), memo))
        deltas.merge(plain, self.by_stage[stage], deltas.layers(plain, self.staging.low_rank))
        del plain.by_stage, plain.staging, plain._routing
        plain.__class__ = self.original
        return plain

    def parameter_groups(
        self, *, shared: float | None = None, stages: float | Sequence[float] | None = None
    ) -> list[dict[str, Any]]:
        """Groups for an optimiser: the shared parameters first, then those of each stage.

        Args:
            shared: Learning rate of the shared parameters; by default the optimiser's.
            stages: Learning rate of all stages, or of each; by default the optimiser's.

        Returns:
            A dictionary each, with `name` ("shared", "stage 0", ...), `params` and, where it was given, `lr`.

        Raises:
            ConfigError: There are not as many rates as stages.
        """
        count = len(self.by_stage)
        rates = list(stages) if isinstance(stages, Sequence) else [stages] * count
        if len(rates) != count:
            raise ConfigError(f"{len(rates)} learning rates do not fit {count} stages")
        of_stages = [list(part.parameters()) for part in self.by_stage]
        staged = {id(parameter) for part in of_stages for parameter in part}
        groups = [[parameter for parameter in self.parameters() if id(parameter) not in staged], *of_stages]
        names = ["shared", *(f"stage {stage}" for stage in range(count))]
        return [
            {"name": name, "params": params} | ({} if rate is None else {"lr": rate})
            for name, params, rate in zip(names, groups, [shared, *rates], strict=True)
        ]

    def boundary_experts(self, num_train_timesteps: int = 1000) -> tuple[Any, Any, float]:
        """Two experts and a boundary, for pipelines of the form `transformer`, `transformer_2`, `boundary_ratio`.

        Args:
            num_train_timesteps: The scheduler's number of timesteps, of which the boundary is a share.

        Returns:
            The expert of high noise, that of low noise, and the boundary: the high one has the timesteps at and above
            `boundary_ratio * num_train_timesteps`.

        Raises:
            ConfigError: There are not two stages, or the edge does not lie within the timesteps.
        """
        if len(self.by_stage) != 2:
            raise ConfigError(f"two experts need two stages; the module has {len(self.by_stage)}")
        low, high = 0.0, float(num_train_timesteps)
        if self.stage_of(low) != 0 or self.stage_of(high) != 1:
            raise ConfigError(f"the edge {self.staging.stages.edges[0]:g} lies outside the timesteps 0..{high:g}")
        while (middle := (low + high) / 2) not in (low, high):
            low, high = (low, middle) if self.stage_of(middle) else (middle, high)
        # Pipelines compare in float32: the lowest such number whose stage is the upper one.
        boundary = torch.tensor(high, dtype=torch.float32)
        if not self.stage_of(boundary):
            boundary = torch.nextafter(boundary, torch.tensor(torch.inf))
        return self.expert(1), self.expert(0), boundary.item() / num_train_timesteps

    def flops(self, *args: Any, **kwargs: Any) -> tuple[int, ...]:
        """FLOPs of a forward pass in each stage, 2 a multiply-accumulate, counted on the meta device.

        Args:
            *args: Arguments of forward; only the shapes of tensors count.
            **kwargs: The same by name.
        """
        tensors = [*self.parameters(), *self.buffers()]
        memo: dict[int, Any] = {id(tensor): tensor.detach().to("meta") for tensor in tensors}
        for parameter in self.parameters():
            memo[id(parameter)] = nn.Parameter(memo[id(parameter)], requires_grad=False)
        skeleton = copy.deepcopy(self, memo)
        args, kwargs = map_leaves((args, kwargs), lambda leaf: leaf.to("meta") if isinstance(leaf, Tensor) else leaf)
        spent = []
        for stage in range(len(self.by_stage)):
            with torch.device("meta"), FlopCounterMode(display=False) as counter:
                skeleton._run(stage, args, kwargs)
            spent.append(counter.get_total_flops())
        return tuple(spent)

    def save_pretrained(self, directory: str | Path, **_: Any) -> None:
        """Write a folder for `load_staged`, with `staged.json` and `staged.safetensors`.

        A pipeline's `save_pretrained` calls it too; to read such a pipeline, pass the loaded module to its
        `from_pretrained`. What diffusers itself reads are experts: `staged.expert(0).save_pretrained(...)`.

        Args:
            directory: The folder; replaced if an earlier call wrote it.
            **_: Options of diffusers, which change nothing.

        Raises:
            CheckpointError: The folder cannot be written.
        """
        document = {
            "class": type(self).__name__,
            "own": list((staging := self.staging).own),
            "stages": {**staging.stages.provenance, "edges": list(staging.stages.edges)},
            "timestep_argument": staging.argument,
            "mixed": staging.mixed,
            **({"low_rank": list(staging.low_rank), "rank": staging.rank} if staging.low_rank else {}),
            **staging.levels.document,
        }
        with whole_directory(Path(directory)) as folder:
            write_json(folder / CONFIG, document)
            save_weights(self.state_dict(), folder / WEIGHTS)

    def _timestep(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The timestep among the arguments of forward."""
        kind, argument = self.original, self.staging.argument
        names = list(inspect.signature(kind.forward).parameters)[1:]
        value = kwargs.get(argument)
        if value is None and argument in names[: len(args)]:
            value = args[names.index(argument)]
        if value is None:
            raise ConfigError(f"{kind.__name__}.forward needs {argument}: it decides the stage")
        return value

    def _run(self, route: int | tuple[int, ...], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The module's own forward in one stage, or with so many rows of each."""
        self._routing.route = route
        try:
            return super().forward(*args, **kwargs)
        finally:
            self._routing.route = None

    def _run_mixed(self, counts: tuple[int, ...], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Shared parts once for all rows; the whole module stage by stage where that is not possible."""
        if self.staging.mixed == "shared" and not self._routing.unroutable:
            try:
                return self._run(counts, args, kwargs)
            except UnroutableError:
                self._routing.unroutable = True
        return by_stage((args, kwargs), counts, self._run)


def stage_module(
    module: nn.Module,
    own: Sequence[str],
    stages: Stages | Sequence[float],
    process: Any = None,
    *,
    timestep_argument: str | None = None,
    mixed: str = "shared",
    low_rank: Sequence[str] = (),
    rank: int = 8,
) -> Any:
    """A copy of a module in which each stage has its own copy of some submodules; at first they are all equal.

    Its class is a subclass of the module's, so that pipelines and training scripts take it in the module's place, and
    of `StagedModule`. A batch in one stage runs that stage's copies. In a batch of several the shared parts run once on
    all rows, and what each staged submodule is given is split: every tensor whose first dimension is the batch's.

    Args:
        module: Any module whose forward takes a timestep; it stays as it is.
        own: Names of submodules, like "conv_out" or "up_blocks.1"; that of a list stages each of its members. May be
            empty with `low_rank`.
        stages: The partition, or its edges in sigma.
        process: What translates timesteps to noise levels: a process of this package, a scheduler of diffusers, or a
            function of a float64 tensor. Not needed where the argument is a noise level itself ("sigma").
        timestep_argument: The argument of forward that is the timestep; by default the one called timestep, timesteps,
            t, time, sigma, sigmas, noise_labels or c_noise.
        mixed: "shared" as above; "apart" runs the whole module for each stage's rows, for modules that give staged
            parts other tensors whose first dimension may be as long as the batch. A module that reads weights of a
            staged part runs apart by itself.
        low_rank: Names of layers, or of submodules, beside whose linear layers and convolutions each stage gets a delta
            of low rank. The layers stay shared, and their names stay. Deltas begin at zero.
        rank: Rank of the deltas, at least 1.

    Returns:
        The staged module, of the module's class and `StagedModule`.

    Raises:
        ConfigError: A name is no submodule or lies within another, the timestep is not found or not translated, or an
            edge lies outside the process's noise levels.
    """
    kind = type(module)
    if isinstance(module, StagedModule):
        raise ConfigError("the module is staged already; stage one of its experts")
    if "forward" in vars(module):
        raise ConfigError(f"forward of this {kind.__name__} was replaced; stage the module before it is prepared")
    if not isinstance(stages, Stages):
        stages = Stages(tuple(stages))
    check(mixed in _MIXED, "mixed", f"one of {', '.join(_MIXED)}", mixed)
    names = list(inspect.signature(kind.forward).parameters)[1:]
    argument = timestep_argument or next((name for name in _TIMESTEPS if name in names), None)
    if argument is None or argument not in names:
        problem = "no argument is known as a timestep" if argument is None else f"no argument {argument}"
        raise ConfigError(f"{problem} in {kind.__name__}.forward({', '.join(names)}); give timestep_argument")
    levels = noise_levels(process, argument)
    levels.require(stages)
    paths = submodules(module, own, "own") if own or not low_rank else []
    beside = deltas.layers(module, submodules(module, low_rank, "low_rank")) if low_rank else []
    if inside := next((path for path in beside if f"{path}.".startswith(tuple(f"{own}." for own in paths))), None):
        raise ConfigError(
            f"low_rank names {inside}, of which each stage has a copy already; leave it out of one of them"
        )
    check(rank >= 1, "rank", "at least 1", rank)
    staged: Any = copy.deepcopy(module)
    staged.__class__ = _staged(kind)
    staged.staging = Staging(tuple(own), stages, levels, argument, mixed, tuple(low_rank), rank)
    parts = [staged.get_submodule(path) for path in paths]
    copies = [parts, *(copy.deepcopy(parts) for _ in range(len(stages) - 1))]
    added = ([deltas.LowRank(staged.get_submodule(path), rank) for path in beside] for _ in copies)
    staged.by_stage = nn.ModuleList(
        Tree([*paths, *beside], [*part, *delta]) for part, delta in zip(copies, added, strict=True)
    )
    staged._routing = Routing(staged.by_stage, tuple(paths))
    for path in paths:
        staged.set_submodule(path, Part(staged._routing, path))
    deltas.attach(staged, staged._routing, beside)
    return staged


def load_staged(directory: str | Path, module: nn.Module, process: Any = None) -> Any:
    """Read what `StagedModule.save_pretrained` wrote. Nothing that the folder names is imported.

    Args:
        directory: The folder.
        module: A module of the architecture that was staged; its weights are replaced, in a copy.
        process: As in `stage_module`; needed if it was a function, which the folder does not hold.

    Returns:
        The staged module.

    Raises:
        CheckpointError: A file is missing or damaged, or belongs to another architecture; or the process was a function
            and none was given.
    """
    folder = Path(directory)
    if (folder / MANIFEST).exists() and (damage := check_directory(folder, (CONFIG, WEIGHTS))):
        raise CheckpointError(f"{damage}; if you changed it on purpose, delete {folder / MANIFEST}")
    where = str(folder / CONFIG)
    try:
        document = read_json(folder / CONFIG)
        if document["class"] != type(module).__name__:
            raise ConfigError(f"it is of a {document['class']}, and the module is a {type(module).__name__}")
        stages = Stages.parse(document["stages"], f"{where}, stages")
        own, argument, mixed = document["own"], document["timestep_argument"], document["mixed"]
        low_rank, rank = document.get("low_rank", []), document.get("rank", 8)
        for option, names in (("own", own), ("low_rank", low_rank)):
            if not isinstance(names, list) or not all(isinstance(word, str) for word in [*names, argument, mixed]):
                raise ConfigError(f"{option} must be a list of names")
        if type(rank) is not int or not 1 <= rank <= 65_536:
            raise ConfigError(f"rank must be in 1..65536, got {rank!r}")
        levels = read_levels(document, where) if process is None else process
        staged = stage_module(
            module, own, stages, levels, timestep_argument=argument, mixed=mixed, low_rank=low_rank, rank=rank
        )
    except (ConfigError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder} holds no staged module for this one: {error}") from error
    load_weights(staged, folder / WEIGHTS)
    return staged


def _remade(kind: type[nn.Module]) -> Any:
    return object.__new__(_staged(kind))


@functools.cache
def _staged(kind: type[nn.Module]) -> type[nn.Module]:
    """A module's class, staged; it has the name of the original, which pipelines write into their folders."""

    @functools.wraps(kind.forward)
    def forward(self: StagedModule, *args: Any, **kwargs: Any) -> Any:
        return StagedModule.forward(self, *args, **kwargs)

    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind.__name__, (StagedModule, kind), {"forward": forward, "original": kind, **names})


def _permuted(record: Any, order: Int[Tensor, " batch"]) -> Any:
    """A record with the rows of the batch in another order."""

    def permute(leaf: Any) -> Any:
        return leaf[order.to(leaf.device)] if is_batch(leaf, len(order)) else leaf

    return map_leaves(record, permute)
