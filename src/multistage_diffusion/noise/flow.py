"""Flow matching on the linear path."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from multistage_diffusion.noise.base import Levels, Preconditioning, Process, normal_cdf, normal_icdf, positive
from multistage_diffusion.records import check


@dataclass(frozen=True, kw_only=True)
class Flow(Process):
    """Flow matching, x_t = (1 - t) x0 + t eps, sigma = t/(1 - t) (Lipman et al. 2023); the network predicts eps - x0.

    Times of training are logit-normal (Esser et al. 2024).
    """

    kind: Literal["flow"] = "flow"
    logit_mean: float = 0.0
    """Mean of logit t = ln sigma in training."""
    logit_std: float = 1.0
    """Standard deviation of logit t in training."""
    t_min: float = 1e-3
    """Smallest time of sampling."""
    t_max: float = 0.999
    """Largest time of sampling; sigma is infinite at t = 1."""

    def validate(self) -> None:
        """A positive width, t_min below t_max in (0, 1)."""
        check(self.logit_std > 0, "process.logit-std", "positive", self.logit_std)
        check(0 < self.t_min < self.t_max < 1, "process.t-min", "0 < t-min < t-max < 1", self.t_min)

    @property
    def sigma_min(self) -> float:
        """The level at t_min."""
        return self.sigma(self.t_min)

    @property
    def sigma_max(self) -> float:
        """The level at t_max."""
        return self.sigma(self.t_max)

    def sigma(self, t: Any) -> Any:
        """t/(1 - t), of a tensor or a number."""
        return t / (1 - t)

    def t(self, sigma: Levels) -> Levels:
        """sigma/(1 + sigma), written so that infinity is 1."""
        return 1 / (1 + 1 / sigma)

    def scale(self, sigma: Levels) -> Levels:
        """1 - t = 1/(1 + sigma)."""
        return 1 / (1 + sigma)

    def cdf(self, sigma: Levels) -> Levels:
        """logit t = ln sigma ~ N(logit_mean, logit_std^2)."""
        return normal_cdf((positive(sigma).log() - self.logit_mean) / self.logit_std)

    def icdf(self, u: Levels) -> Levels:
        """logit t = ln sigma ~ N(logit_mean, logit_std^2)."""
        return (self.logit_mean + self.logit_std * normal_icdf(u)).exp()

    def loss_weight(self, sigma: Levels) -> Levels:
        """1/t^2: the plain squared error of the predicted velocity."""
        return self.t(sigma) ** -2

    def preconditioning(self, sigma: Levels) -> Preconditioning:
        """x0 = x_t - t v with x_t = (1 - t) x; conditioned on 1000 t."""
        scale, t = self.scale(sigma), self.t(sigma)
        return Preconditioning(scale, -t, scale, 1000 * t)
