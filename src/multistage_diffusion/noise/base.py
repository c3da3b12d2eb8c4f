"""What every process is: its own time, its training distribution and its preconditioning, as functions of sigma."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from multistage_diffusion.errors import ConfigError
from multistage_diffusion.records import Tagged, check, check_numbers

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    Levels = Float[Tensor, "*levels"]
else:  # importing a process imports no torch: its formulas call the methods of the tensors that they are given
    Levels = Tensor = Any

Prediction = Literal["eps", "v"]


@dataclass(frozen=True)
class Preconditioning:
    """How a raw network F becomes an estimate of the clean image (Karras et al. 2022, Eq. 7).

    D(x) = c_skip x + c_out F(c_in x, c_noise), with x = x0 + sigma eps. All of the shape of sigma.
    """

    c_skip: Tensor
    c_out: Tensor
    c_in: Tensor
    c_noise: Tensor


@dataclass(frozen=True, kw_only=True)
class Process(Tagged, ABC, tag="kind"):
    """A forward process x = s (x0 + sigma eps), seen through sigma: its parameters, with its formulas as methods.

    A process of your own is a subclass with a `kind` of its own; runs and models that use it can be read wherever its
    class was imported before.
    """

    kind: str

    def __post_init__(self) -> None:
        check_numbers(self, "process")
        self.validate()
        low, high = self.ends()
        check(1e-15 < low < high < 1e15, "process", "one whose noise levels lie in 1e-15..1e15", f"{low:g} to {high:g}")

    def validate(self) -> None:
        """Refuse parameters out of range with a ConfigError; called before any formula."""

    def ends(self) -> tuple[float, float]:
        """sigma_min and sigma_max to a few digits; processes of recipes compute them without torch."""
        return self.sigma_min, self.sigma_max

    @property
    @abstractmethod
    def sigma_min(self) -> float:
        """Lowest noise level of training and sampling (of sampling only, where training has no limit)."""

    @property
    @abstractmethod
    def sigma_max(self) -> float:
        """Highest noise level of training and sampling (of sampling only, where training has no limit)."""

    @abstractmethod
    def sigma(self, t: Levels) -> Levels:
        """Noise level at the process's own time."""

    @abstractmethod
    def t(self, sigma: Levels) -> Levels:
        """The process's own time at a noise level; the inverse of `sigma`."""

    @abstractmethod
    def scale(self, sigma: Levels) -> Levels:
        """The scale s of x = s (x0 + sigma eps)."""

    @abstractmethod
    def cdf(self, sigma: Levels) -> Levels:
        """Share of the training distribution at or below a noise level; 0 at sigma = 0 and 1 at infinity."""

    @abstractmethod
    def icdf(self, u: Levels) -> Levels:
        """Noise level below which a share u in (0, 1) of the training distribution lies."""

    @abstractmethod
    def loss_weight(self, sigma: Levels) -> Levels:
        """Weight of the squared error of the denoised image in the training loss."""

    @abstractmethod
    def preconditioning(self, sigma: Levels) -> Preconditioning:
        """Factors that turn the raw network into a denoiser."""

    def level(self, c_noise: Levels) -> Levels:
        """Noise level whose conditioning value is `c_noise`; schedulers of other projects give networks that alone.

        Raises:
            ConfigError: The process does not say.
        """
        raise ConfigError(f"the process {self.kind} has no method level(c_noise), which schedulers of diffusers need")


def process_by_kind(kind: str) -> Process:
    """A process with its default parameters.

    Args:
        kind: One of `Process.kinds()`, like `vp`.

    Raises:
        ConfigError: No such process.
    """
    return Process.by_kind(kind)()


def ones_like(tensor: Tensor) -> Tensor:
    """1, of the shape of a tensor."""
    return tensor.new_ones(tensor.shape)


def predict_noise(sigma: Tensor, scale: Tensor, c_noise: Tensor) -> Preconditioning:
    """The network sees the process's own x and predicts eps: D = x - sigma F."""
    return Preconditioning(ones_like(sigma), -sigma, scale, c_noise)


def positive(tensor: Tensor) -> Tensor:
    """Noise levels with 0 lifted just above it, where a logarithm or a quotient is taken."""
    import torch

    return tensor.clamp(min=torch.finfo(tensor.dtype).tiny)


def normal_cdf(value: Tensor) -> Tensor:
    """Cumulative distribution of the standard normal."""
    import torch

    return torch.special.ndtr(value)


def normal_icdf(share: Tensor) -> Tensor:
    """Inverse of `normal_cdf`."""
    import torch

    return torch.special.ndtri(share)
