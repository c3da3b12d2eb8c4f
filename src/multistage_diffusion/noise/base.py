"""What every process is: its clock, its training distribution and its preconditioning, as functions of sigma."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from multistage_diffusion.config import ProcessConfig

Levels = Float[Tensor, "*levels"]
C = TypeVar("C", bound=ProcessConfig)


@dataclass(frozen=True)
class Preconditioning:
    """How a raw network F becomes an estimate of the clean image (Karras et al. 2022, Eq. 7).

    D(x) = c_skip x + c_out F(c_in x, c_noise), with x = x0 + sigma eps. All of the shape of sigma.
    """

    c_skip: Tensor
    c_out: Tensor
    c_in: Tensor
    c_noise: Tensor


class Process(ABC, Generic[C]):
    """A forward process, seen through sigma.

    Attributes:
        config: Its configuration.
        sigma_min: Lowest noise level of training and sampling (of sampling only, where training has no limit).
        sigma_max: Highest.
    """

    config: C
    sigma_min: float
    sigma_max: float

    @abstractmethod
    def sigma(self, t: Levels) -> Levels:
        """Noise level at the process's own time."""

    @abstractmethod
    def t(self, sigma: Levels) -> Levels:
        """The process's own time at a noise level; the inverse of `sigma`."""

    def clock(self) -> Process[Any]:
        """The process whose time averages over noise levels are taken in: itself, unless its time is sigma."""
        return self

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


def time_share(t: Tensor, t_min: float, t_max: float) -> Tensor:
    """Cumulative distribution of a uniform time.

    Args:
        t: Times.
        t_min: Smallest time.
        t_max: Largest time.

    Returns:
        Shares in [0, 1].
    """
    return ((t - t_min) / (t_max - t_min)).clamp(0.0, 1.0)


def predict_noise(sigma: Tensor, scale: Tensor, c_noise: Tensor) -> Preconditioning:
    """The network sees the process's own x and predicts eps: D = x - sigma F.

    Args:
        sigma: Noise levels.
        scale: The process's scale there.
        c_noise: What the network is told.

    Returns:
        The factors.
    """
    return Preconditioning(torch.ones_like(sigma), -sigma, scale, c_noise)


def positive(tensor: Tensor) -> Tensor:
    """Noise levels with 0 lifted just above it, where a logarithm or a quotient is taken.

    Args:
        tensor: Numbers at or above 0.

    Returns:
        Numbers above 0.
    """
    return tensor.clamp(min=torch.finfo(tensor.dtype).tiny)


def normal_cdf(value: Tensor) -> Tensor:
    """Cumulative distribution of the standard normal.

    Args:
        value: Numbers.

    Returns:
        Shares in [0, 1].
    """
    return torch.special.ndtr(value)
