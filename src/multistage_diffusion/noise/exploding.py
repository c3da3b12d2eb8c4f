"""Processes that leave the signal as it is: variance-exploding, and EDM."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from multistage_diffusion.noise.base import (
    Levels,
    Preconditioning,
    Process,
    normal_cdf,
    normal_icdf,
    ones_like,
    positive,
    predict_noise,
)
from multistage_diffusion.records import check


@dataclass(frozen=True, kw_only=True)
class VE(Process):
    """Variance-exploding process (Song et al. 2021, Eq. 9), noise prediction from unscaled x.

    Time is the position in log sigma, in [0, 1]; log-uniform sigma in training.
    """

    kind: Literal["ve"] = "ve"
    sigma_min: float = 0.01  # pyright: ignore[reportIncompatibleMethodOverride]
    """Lowest noise level."""
    sigma_max: float = 50.0  # pyright: ignore[reportIncompatibleMethodOverride]
    """Highest noise level."""

    def validate(self) -> None:
        """sigma_max above sigma_min."""
        check(0 < self.sigma_min < self.sigma_max, "process.sigma-min", "positive, below sigma-max", self.sigma_min)

    def sigma(self, t: Levels) -> Levels:
        """sigma_min (sigma_max/sigma_min)^t, t in [0, 1]."""
        return self.sigma_min * (t * self._span).exp()

    def t(self, sigma: Levels) -> Levels:
        """Position in log sigma."""
        return (positive(sigma) / self.sigma_min).log() / self._span

    def scale(self, sigma: Levels) -> Levels:
        """1."""
        return ones_like(sigma)

    def cdf(self, sigma: Levels) -> Levels:
        """Uniform in t."""
        return self.t(sigma).clamp(0.0, 1.0)

    def icdf(self, u: Levels) -> Levels:
        """Uniform in t."""
        return self.sigma(u)

    def loss_weight(self, sigma: Levels) -> Levels:
        """1/sigma^2: the plain squared error of the predicted noise."""
        return sigma**-2

    def preconditioning(self, sigma: Levels) -> Preconditioning:
        """Noise prediction, conditioned on ln(sigma/2)."""
        return predict_noise(sigma, ones_like(sigma), (positive(sigma) / 2).log())

    def level(self, c_noise: Levels) -> Levels:
        """2 exp(c_noise)."""
        return 2 * c_noise.exp()

    @property
    def _span(self) -> float:
        return math.log(self.sigma_max / self.sigma_min)


@dataclass(frozen=True, kw_only=True)
class EDM(Process):
    """EDM (Karras et al. 2022): log-normal sigma in training, network input and target of unit variance.

    The time is sigma.
    """

    kind: Literal["edm"] = "edm"
    p_mean: float = -1.2
    """Mean of ln sigma in training."""
    p_std: float = 1.2
    """Standard deviation of ln sigma in training."""
    sigma_data: float = 0.5
    """Standard deviation of the data."""
    sigma_min: float = 0.002  # pyright: ignore[reportIncompatibleMethodOverride]
    """Lowest noise level of sampling."""
    sigma_max: float = 80.0  # pyright: ignore[reportIncompatibleMethodOverride]
    """Highest noise level of sampling."""

    def validate(self) -> None:
        """Positive widths, sigma_max above sigma_min."""
        check(self.p_std > 0, "process.p-std", "positive", self.p_std)
        check(self.sigma_data > 0, "process.sigma-data", "positive", self.sigma_data)
        check(0 < self.sigma_min < self.sigma_max, "process.sigma-min", "positive, below sigma-max", self.sigma_min)

    def sigma(self, t: Levels) -> Levels:
        """The time is sigma itself."""
        return t

    def t(self, sigma: Levels) -> Levels:
        """The time is sigma itself."""
        return sigma

    def scale(self, sigma: Levels) -> Levels:
        """1."""
        return ones_like(sigma)

    def cdf(self, sigma: Levels) -> Levels:
        """ln sigma ~ N(p_mean, p_std^2)."""
        return normal_cdf((positive(sigma).log() - self.p_mean) / self.p_std)

    def icdf(self, u: Levels) -> Levels:
        """ln sigma ~ N(p_mean, p_std^2)."""
        return (self.p_mean + self.p_std * normal_icdf(u)).exp()

    def loss_weight(self, sigma: Levels) -> Levels:
        """1/c_out^2, so that every level asks the same of the network at the start (Karras et al. 2022, Table 1)."""
        return sigma**-2 + self.sigma_data**-2

    def preconditioning(self, sigma: Levels) -> Preconditioning:
        """Karras et al. 2022, Table 1, last column; conditioned on ln(sigma)/4."""
        data = self.sigma_data
        norm = sigma.new_full(sigma.shape, data).hypot(sigma)
        return Preconditioning((data / norm) ** 2, sigma * (data / norm), 1 / norm, positive(sigma).log() / 4)

    def level(self, c_noise: Levels) -> Levels:
        """exp(4 c_noise)."""
        return (4 * c_noise).exp()
