"""Flow matching on the linear path."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from multistage_diffusion.noise.base import Levels, Preconditioning, Process, normal_cdf, normal_icdf, positive
from multistage_diffusion.records import check


@dataclass(frozen=True, kw_only=True)
class Flow(Process):
    """Flow matching, x_t = (1 - t) x0 + t eps, sigma = t/(1 - t) (Lipman et al. 2023); the network predicts eps - x0.

    Times of training are logit-normal (Esser et al. 2024) or uniform (Ma et al. 2024, SiT). A shift moves times of
    training and sampling to higher noise, as larger images need: the process's own time t is that before the shift, and
    sigma = shift t/(1 - t).
    """

    kind: Literal["flow"] = "flow"
    logit_mean: float = 0.0
    """Mean of logit t in training."""
    logit_std: float = 1.0
    """Standard deviation of logit t in training."""
    times: Literal["logit-normal", "uniform"] = "logit-normal"
    """Distribution of t in training; uniform: between t-min and t-max."""
    shift: float = 1.0
    """Factor of sigma at each t: the square root of how many times as many pixels (Esser et al. 2024, Eq. 23)."""
    time_scale: float = 1000.0
    """The network sees this times the share of noise, sigma/(1 + sigma): 1000 in diffusers, 1 in SiT."""
    t_min: float = 1e-3
    """Smallest time of sampling."""
    t_max: float = 0.999
    """Largest time of sampling; sigma is infinite at t = 1."""

    def validate(self) -> None:
        """A positive width, shift and scale, t_min below t_max in (0, 1)."""
        for name in ("logit_std", "shift", "time_scale"):
            check(getattr(self, name) > 0, f"process.{name.replace('_', '-')}", "positive", getattr(self, name))
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
        """shift t/(1 - t), of a tensor or a number."""
        return self.shift * t / (1 - t)

    def t(self, sigma: Levels) -> Levels:
        """sigma/(shift + sigma), written so that infinity is 1."""
        return 1 / (1 + self.shift / sigma)

    def scale(self, sigma: Levels) -> Levels:
        """1/(1 + sigma)."""
        return 1 / (1 + sigma)

    def cdf(self, sigma: Levels) -> Levels:
        """logit t = ln(sigma/shift) ~ N(logit_mean, logit_std^2), or uniform in t."""
        if self.times == "uniform":
            return ((self.t(sigma) - self.t_min) / (self.t_max - self.t_min)).clamp(0.0, 1.0)
        return normal_cdf((positive(sigma).log() - self._mean) / self.logit_std)

    def icdf(self, u: Levels) -> Levels:
        """logit t = ln(sigma/shift) ~ N(logit_mean, logit_std^2), or uniform in t."""
        if self.times == "uniform":
            return self.sigma(self.t_min + u * (self.t_max - self.t_min))
        return (self._mean + self.logit_std * normal_icdf(u)).exp()

    def loss_weight(self, sigma: Levels) -> Levels:
        """The plain squared error of the predicted velocity: 1 over the squared share of noise."""
        return _share(sigma) ** -2

    def preconditioning(self, sigma: Levels) -> Preconditioning:
        """x0 = x_s - s v with s the share of noise, x_s = (1 - s) x; conditioned on time_scale s."""
        scale, share = self.scale(sigma), _share(sigma)
        return Preconditioning(scale, -share, scale, self.time_scale * share)

    def level(self, c_noise: Levels) -> Levels:
        """The level at the share of noise c_noise/time_scale."""
        share = c_noise / self.time_scale
        return share / (1 - share)

    @property
    def _mean(self) -> float:
        """Mean of ln sigma in training."""
        return self.logit_mean + math.log(self.shift)


def _share(sigma: Levels) -> Levels:
    """sigma/(1 + sigma), written so that infinity is 1."""
    return 1 / (1 + 1 / sigma)
