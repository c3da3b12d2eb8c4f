"""What all solvers share: the type of a solver, the report of a step, the Euler step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Protocol, final, runtime_checkable

from multistage_diffusion.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Float
    from torch import Tensor

    Schedule = Sequence[float] | Float[Tensor, " levels"]  # decreasing noise levels; the last one may be 0
    Denoise = Callable[[Tensor, float], Tensor]  # (x, sigma) -> estimate of x0, of the shape of x
    Noise = Callable[[int], Tensor]  # step -> standard normal numbers of the shape of x


@dataclass(frozen=True)
class SolverStep:
    """What a callback sees: one step, after its first evaluation and before x is changed.

    Attributes:
        index: Where the step begins in the schedule.
        sigma: The noise level of x; above the schedule's if noise was added first (churn).
        sigma_next: The noise level to which the step goes.
        x: The noisy images, x0 + sigma eps.
        denoised: The estimate of x0 from x.
    """

    index: int
    sigma: float
    sigma_next: float
    x: Tensor
    denoised: Tensor


Callback = Callable[[SolverStep], None]


@runtime_checkable
class SolverFunction(Protocol):
    """A solver: carries x = x0 + sigma eps from the first noise level of a schedule to the last."""

    def __call__(
        self,
        denoise: Denoise,
        x: Tensor,
        sigmas: Schedule,
        *,
        noise: Noise | None = None,
        callback: Callback | None = None,
    ) -> Tensor:
        """Images at the last noise level.

        Args:
            denoise: Estimates x0 from (x, sigma).
            x: Images at the first noise level.
            sigmas: Decreasing noise levels.
            noise: Gives the noise of a step, by its index; for stochastic solvers.
            callback: Sees every step.
        """
        ...


@final
class Trace:
    """A callback that keeps the estimates of the clean image along the steps of the first batch.

    Args:
        images: How many images to keep, the first ones.

    Attributes:
        sigmas: Noise level of each step.
        denoised: (images, C, H, W) estimates of each step, float32 on the CPU.
    """

    def __init__(self, images: int) -> None:
        self.sigmas: list[float] = []
        self.denoised: list[Tensor] = []
        self._images, self._last_index, self._first_batch = images, -1, True

    def __call__(self, step: SolverStep) -> None:
        """Keep a step of the first batch; a later batch begins where the index falls back."""
        self._first_batch = self._first_batch and step.index > self._last_index
        if self._first_batch:
            self._last_index = step.index
            self.sigmas.append(step.sigma)
            self.denoised.append(step.denoised[: self._images].detach().float().cpu().clone())


def levels_on_host(sigmas: Schedule) -> list[float]:
    """The schedule as Python floats, fetched once, so that no step waits for a device.

    Args:
        sigmas: At least 2 decreasing noise levels, positive save the last, which may be 0.

    Raises:
        ConfigError: They are not decreasing, or one is negative or not finite.
    """
    levels = [float(level) for level in getattr(sigmas, "tolist", lambda: sigmas)()]
    falling = all(high > low for high, low in pairwise(levels))
    if len(levels) < 2 or not falling or levels[-1] < 0 or levels[0] == float("inf"):
        raise ConfigError(f"sigmas must be 2 or more decreasing noise levels that end in 0 or above, got {levels}")
    return levels


def scale_noise(x: Tensor, denoised: Tensor, factor: float) -> Tensor:
    """Scale the noise in x and keep the estimate: denoised + factor (x - denoised).

    With factor sigma'/sigma this is the Euler step of dx/dsigma = (x - D)/sigma from sigma to sigma'.
    """
    return denoised.lerp(x, factor)


def require_noise(noise: Noise | None, step: int) -> Tensor:
    """The noise of a step.

    Raises:
        ConfigError: The solver was given no source of noise.
    """
    if noise is None:
        raise ConfigError("a stochastic solver needs noise=, a function from the step's index to normal numbers")
    return noise(step)
