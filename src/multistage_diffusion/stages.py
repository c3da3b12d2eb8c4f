"""The partition of the noise levels into stages. The only place where a level meets an edge."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch
from jaxtyping import Float, Int
from torch import Tensor

from multistage_diffusion.errors import ConfigError
from multistage_diffusion.files import read_json, write_json
from multistage_diffusion.noise import Process
from multistage_diffusion.text import short

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito 2008: distinct for every common kind of colour vision; stage k has colour k, modulo 8, in every figure.
STAGE_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")


@dataclass(frozen=True)
class Stages:
    """Increasing edges that cut the sigma axis into `len(edges) + 1` stages, stage 0 at the lowest noise.

    Attributes:
        edges: Noise levels sigma, positive and increasing, in the unit of the data (images are in [-1, 1]).
        provenance: How the edges were found (method, options, process, data), as saved; not part of equality.

    Raises:
        ConfigError: The edges are not finite, positive and increasing.
    """

    edges: tuple[float, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        try:
            edges = tuple(float(edge) for edge in self.edges)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"stage edges must be noise levels, like (0.5, 2.0), got {short(self.edges)}") from error
        object.__setattr__(self, "edges", edges)
        increasing = all(low < high for low, high in zip((0.0, *edges), edges, strict=False))
        if not increasing or not all(map(math.isfinite, edges)):
            raise ConfigError(f"stage edges must be finite, positive and increasing in sigma, got {short(edges)}")

    def __len__(self) -> int:
        return len(self.edges) + 1

    @overload
    def of(self, sigma: float) -> int: ...
    @overload
    def of(self, sigma: Float[Tensor, "*shape"]) -> Int[Tensor, "*shape"]: ...
    def of(self, sigma: float | Tensor) -> int | Tensor:
        """Stage of each noise level: an int of the host for a float, an int64 tensor for a tensor.

        An edge belongs to the stage below it. A tensor is compared with the edges as its own type rounds them, so a
        float32 tensor that was made from an edge lies where the edge itself does.
        """
        return stage_of(sigma, self.edges)

    def bounds(self, stage: int) -> tuple[float, float]:
        """The interval (low, high] of a stage's noise levels.

        Args:
            stage: Index in [0, len(self)).

        Returns:
            The lowest stage begins at 0, the highest ends at infinity.
        """
        return (0.0, *self.edges)[stage], (*self.edges, math.inf)[stage]

    def shares(self, process: Process) -> tuple[float, ...]:
        """Probability of each stage under a process's training distribution; they sum to 1."""
        edges = torch.tensor([0.0, *self.edges, math.inf], dtype=torch.float64)
        return tuple(process.cdf(edges).diff().tolist())

    def plot(self, process: Process) -> Figure:
        """The stages as bands over the noise levels, with the density of a process's training in ln sigma."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6.4, 2.6), layout="constrained")
        axes = figure.add_subplot()
        low, high = min(process.sigma_min, *self.edges[:1]), max(process.sigma_max, *self.edges[-1:])
        sigma = torch.logspace(math.log10(low), math.log10(high), 400, dtype=torch.float64)
        density = process.cdf(sigma).diff() / sigma.log().diff()
        axes.plot(sigma[1:].numpy(), density.numpy(), color="black", lw=1)
        for stage, share in enumerate(self.shares(process)):
            start, end = max(self.bounds(stage)[0], low), min(self.bounds(stage)[1], high)
            axes.axvspan(start, end, color=STAGE_COLOURS[stage % len(STAGE_COLOURS)], alpha=0.13, lw=0)
            label = f"stage {stage}\n{share:.1%}"
            axes.text((start * end) ** 0.5, 1.0, label, ha="center", va="bottom", transform=axes.get_xaxis_transform())
        axes.set(xscale="log", xlim=(low, high), ylim=(0, None), xlabel="noise level sigma", ylabel="training density")
        return figure

    def save(self, path: Path) -> None:
        """Write `stages.json`: the edges in sigma and how they were found.

        Args:
            path: Destination file.

        Raises:
            CheckpointError: The file cannot be written.
        """
        write_json(path, {**self.provenance, "edges": list(self.edges)})

    @classmethod
    def load(cls, path: Path) -> Stages:
        """Read a file written by `save`, or by hand: `{"edges": [0.5, 3.0]}`.

        Args:
            path: A JSON file with at least `edges`.

        Returns:
            The partition.

        Raises:
            ConfigError: The file is missing or malformed.
        """
        return cls.parse(read_json(path), str(path))

    @classmethod
    def parse(cls, document: Any, where: str) -> Stages:
        """Read the document that `save` writes.

        Args:
            document: From JSON; at least `edges`.
            where: What the document is, for messages.

        Returns:
            The partition.

        Raises:
            ConfigError: It is malformed.
        """
        edges = document.get("edges") if isinstance(document, dict) else None
        if not isinstance(edges, list) or any(type(edge) not in (int, float) for edge in edges):
            raise ConfigError(f'{where}: "edges" must be a list of noise levels sigma, like {{"edges": [0.5, 3.0]}}')
        try:
            return cls(tuple(map(float, edges)), {key: value for key, value in document.items() if key != "edges"})
        except (ConfigError, OverflowError) as error:
            raise ConfigError(f"{where}: {error}") from error


def stage_of(sigma: Any, edges: tuple[float, ...]) -> Any:
    """`Stages.of` of the stages that edges cut; numbers and arrays of numpy have types that round, like tensors."""
    if not isinstance(sigma, Tensor):
        if not hasattr(sigma, "dtype"):
            return bisect.bisect_left(edges, sigma)
        sigma = torch.as_tensor(sigma)
        return stage_of(sigma, edges) if sigma.ndim else int(stage_of(sigma, edges))
    # Rounding is monotone: sigma <= edge as Python numbers implies round(sigma) <= round(edge), but round(sigma)
    # may lie just above the edge itself: 5.71 is 5.71000003815 in float32. So both sides have to be rounded alike.
    exact = sigma.dtype if sigma.is_floating_point() else torch.float64
    return torch.bucketize(sigma, torch.tensor(edges, dtype=exact).to(sigma.device))


def stage_at(time: Any, edges: tuple[float, ...], level: Callable[[Any], Any]) -> Any:
    """`stage_of` for what is told of a noise level by a time of a process, of which sigma is a monotone function.

    Args:
        time: A number, or a tensor; its stage is that of sigma at it, and an edge counts as the time to which the
            tensor's type rounds it. So a float32 time that was made from an edge lies where the edge itself does.
        edges: Edges in sigma.
        level: Gives sigma at times, both float64.

    Returns:
        An int of the host for a number, an int64 tensor on the CPU for a tensor.
    """
    if not isinstance(time, Tensor) and not hasattr(time, "dtype"):
        return stage_of(float(level(torch.tensor(time, dtype=torch.float64))), edges)
    given = torch.as_tensor(time).detach().cpu()
    sigma = level(given.double())
    if given.is_floating_point() and given.dtype != torch.float64:
        # The type rounds to a time what lies half a step around it. So the edges below this time are those that sigma
        # has passed half a step to its side of lower noise.
        beside = (given.nextafter(given.new_tensor(end)) for end in (-math.inf, math.inf))
        before, after = (level((given.double() + other.double()) / 2) for other in beside)
        sigma = torch.where(before <= sigma, before, torch.where(after <= sigma, after, sigma))
    return stage_of(sigma, edges)
