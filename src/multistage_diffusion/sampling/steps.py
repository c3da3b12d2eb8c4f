"""What all solvers share: the types of their arguments, the levels as Python floats, the report of a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol, final, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from multistage_diffusion.errors import ConfigError

Denoise = Callable[[Tensor, float], Tensor]  # (x, sigma) -> estimate of x0, of the shape of x
Noise = Callable[[int], Tensor]  # step -> standard normal numbers of the shape of x
Levels = Sequence[float] | Float[Tensor, " levels"]


@dataclass(frozen=True)
class SolverStep:
    """What a callback sees: one step, after its first evaluation and before x is changed.

    Attributes:
        index: Where the step begins in the schedule.
        sigma: The noise level of x; above the schedule's if noise was added first (churn).
        sigma_next: The level to which the step goes.
        x: The noisy images, x0 + sigma eps.
        denoised: The estimate of x0 from x.
    """

    index: int
    sigma: float
    sigma_next: float
    x: Tensor
    denoised: Tensor


Callback = Callable[[SolverStep], None]


@final
class Trace:
    """Keeps the estimates of the clean image along the steps of the first batch; `see` is the callback.

    Args:
        images: How many images to keep, the first ones.

    Attributes:
        sigmas: Noise level of each step.
        denoised: (images, C, H, W) estimates of each step, float32 on the CPU.
    """

    def __init__(self, images: int) -> None:
        self.sigmas, self.denoised = list[float](), list[Tensor]()
        self._images, self._index, self._open = images, -1, True

    def see(self, step: SolverStep) -> None:
        """Take a step; those of later batches are let go.

        Args:
            step: The step.
        """
        self._open = self._open and step.index > self._index
        if self._open:
            self._index = step.index
            self.sigmas.append(step.sigma)
            self.denoised.append(step.denoised[: self._images].detach().float().cpu().clone())


@runtime_checkable
class Run(Protocol):
    """A solver whose options are settled."""

    def __call__(
        self, denoise: Denoise, x: Tensor, sigmas: Levels, *, noise: Noise | None = None,
        callback: Callback | None = None,
    ) -> Tensor:  # fmt: skip
        """Carry x from the first level to the last."""
        ...


def host_levels(sigmas: Levels) -> list[float]:
    """The schedule as Python floats, fetched once, so that no step waits for a device.

    Args:
        sigmas: At least 2 decreasing noise levels, positive save the last, which may be 0.

    Returns:
        The same levels.

    Raises:
        ConfigError: They are not decreasing, or one is negative or not finite.
    """
    levels = [float(level) for level in (sigmas.tolist() if isinstance(sigmas, Tensor) else sigmas)]
    falling = all(high > low for high, low in pairwise(levels))
    if len(levels) < 2 or not falling or levels[-1] < 0 or levels[0] == float("inf"):
        raise ConfigError(f"sigmas must be 2 or more decreasing noise levels that end in 0 or above, got {levels}")
    return levels


def walk(levels: Sequence[float]) -> Iterator[tuple[int, float, float]]:
    """The steps of a schedule.

    Args:
        levels: Decreasing noise levels.

    Yields:
        Index, level and next level of each step.
    """
    for index in range(len(levels) - 1):
        yield index, levels[index], levels[index + 1]


def toward(x: Float[Tensor, "*shape"], denoised: Float[Tensor, "*shape"], ratio: float) -> Float[Tensor, "*shape"]:
    """Scale the noise in x and keep the estimate: denoised + ratio (x - denoised), the Euler step in sigma.

    Args:
        x: Noisy images at a level sigma.
        denoised: The estimate of x0 from them.
        ratio: The next level over sigma; 0 gives the estimate itself.

    Returns:
        Images at the next level.
    """
    return torch.lerp(denoised, x, ratio)


def fresh(noise: Noise | None, step: int) -> Tensor:
    """The fresh noise of a step.

    Args:
        noise: The source of noise that the solver was given.
        step: Index of the step.

    Returns:
        What the source gives.

    Raises:
        ConfigError: There is no source.
    """
    if noise is None:
        raise ConfigError("a stochastic solver needs noise=, a function from the step's index to normal numbers")
    return noise(step)
