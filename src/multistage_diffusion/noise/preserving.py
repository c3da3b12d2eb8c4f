"""Variance-preserving processes: linear beta, cosine, and the discrete one of latent diffusion."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from multistage_diffusion.noise.base import (
    Levels,
    Preconditioning,
    Prediction,
    Process,
    Tensor,
    ones_like,
    positive,
    predict_noise,
)
from multistage_diffusion.records import check


@dataclass(frozen=True, kw_only=True)
class VariancePreserving(Process):
    """What these processes share: s = 1/sqrt(1 + sigma^2), prediction of eps or v, a uniform time in training."""

    prediction: Prediction = "eps"
    """What the network predicts: the noise (eps), or the velocity (v), which stays accurate at high noise."""

    @property
    @abstractmethod
    def times(self) -> tuple[float, float]:
        """First and last time of training and sampling."""

    @cached_property
    def _levels_at_ends(self) -> list[float]:
        import torch

        return self.sigma(torch.tensor(self.times, dtype=torch.float64, device="cpu")).tolist()

    @property
    def sigma_min(self) -> float:
        """The level at the first time."""
        return self._levels_at_ends[0]

    @property
    def sigma_max(self) -> float:
        """The level at the last time."""
        return self._levels_at_ends[1]

    def scale(self, sigma: Levels) -> Levels:
        """1/sqrt(1 + sigma^2)."""
        return 1 / ones_like(sigma).hypot(sigma)

    def cdf(self, sigma: Levels) -> Levels:
        """Uniform in t between the ends."""
        first, last = self.times
        return ((self.t(sigma) - first) / (last - first)).clamp(0.0, 1.0)

    def icdf(self, u: Levels) -> Levels:
        """Uniform in t between the ends."""
        first, last = self.times
        return self.sigma(first + u * (last - first))

    def loss_weight(self, sigma: Levels) -> Levels:
        """The plain squared error of the predicted noise, 1/sigma^2, or velocity, 1 + 1/sigma^2: 1/c_out^2."""
        return sigma**-2 if self.prediction == "eps" else sigma**-2 + 1

    def preconditioning(self, sigma: Levels) -> Preconditioning:
        """Prediction of eps, or of v = s eps - s sigma x0: D = s^2 x - s sigma F (Salimans and Ho 2022, Appendix D)."""
        scale, c_noise = self.scale(sigma), self.c_noise(sigma)
        if self.prediction == "eps":
            return predict_noise(sigma, scale, c_noise)
        return Preconditioning(scale * scale, -sigma * scale, scale, c_noise)

    def c_noise(self, sigma: Levels) -> Levels:
        """The noise level as the network sees it: 999 t (score_sde's convention)."""
        return 999 * self.t(sigma)

    def level(self, c_noise: Levels) -> Levels:
        """The level at t = c_noise/999, or at the first time, if that is later."""
        return self.sigma((c_noise / 999).clamp(min=self.times[0]))


@dataclass(frozen=True, kw_only=True)
class VP(VariancePreserving):
    """Variance-preserving process, linear beta (Song et al. 2021, Eq. 32-33). Time t in [t_min, 1]."""

    kind: Literal["vp"] = "vp"
    beta_min: float = 0.1
    """Noise rate at t = 0."""
    beta_max: float = 20.0
    """Noise rate at t = 1."""
    t_min: float = 1e-4
    """Smallest time in training and sampling."""

    def validate(self) -> None:
        """beta_max above beta_min, t_min in (0, 1)."""
        check(0 < self.beta_min < self.beta_max, "process.beta-min", "positive and below beta-max", self.beta_min)
        check(0 < self.t_min < 1, "process.t-min", "between 0 and 1", self.t_min)

    def ends(self) -> tuple[float, float]:
        """Without torch."""
        first, last = (math.sqrt(math.expm1(min(self._exponent(t), 700.0))) for t in self.times)
        return first, last

    @property
    def times(self) -> tuple[float, float]:
        """t_min to 1."""
        return self.t_min, 1.0

    def sigma(self, t: Levels) -> Levels:
        """sqrt(1/s^2 - 1) with ln s = -t^2 (beta_max - beta_min)/4 - t beta_min/2."""
        return self._exponent(t).expm1().sqrt()

    def t(self, sigma: Levels) -> Levels:
        """Root of the quadratic ln(1 + sigma^2) = t^2 slope/2 + t beta_min, in the form without cancellation."""
        beta, slope = self.beta_min, self.beta_max - self.beta_min
        inverse = 1 / _log1p_square(sigma)  # divided through by the level, so that sigma = 0 and infinity have a time
        return 2 / (beta * inverse + ((beta * inverse) ** 2 + 2 * slope * inverse).sqrt())

    def _exponent(self, t: Any) -> Any:
        """ln(1/s^2), of a tensor or a number."""
        slope = self.beta_max - self.beta_min
        return t * t * slope / 2 + t * self.beta_min


@dataclass(frozen=True, kw_only=True)
class Cosine(VariancePreserving):
    """Variance-preserving, cosine schedule (Nichol and Dhariwal 2021, Eq. 17). Time in [t_min, t_max]."""

    kind: Literal["vp-cosine"] = "vp-cosine"
    offset: float = 0.008
    """Keeps the noise at t = 0 above zero."""
    t_min: float = 1e-3
    """Smallest time in training and sampling."""
    t_max: float = 0.9946
    """Largest time; the signal vanishes at t = 1."""

    def validate(self) -> None:
        """The offset in (0, 1), t_min below t_max in [0, 1)."""
        check(0 < self.offset < 1, "process.offset", "between 0 and 1", self.offset)
        check(0 <= self.t_min < self.t_max < 1, "process.t-min", "at least 0 and below t-max < 1", self.t_min)

    def ends(self) -> tuple[float, float]:
        """Without torch."""
        start = self._angle(0.0)
        first, last = (
            math.sqrt(math.sin(angle - start) * math.sin(angle + start)) / math.cos(angle)
            for angle in map(self._angle, self.times)
        )
        return first, last

    @property
    def times(self) -> tuple[float, float]:
        """t_min to t_max."""
        return self.t_min, self.t_max

    def sigma(self, t: Levels) -> Levels:
        """sqrt(1/s^2 - 1) with s = cos(angle)/cos(start), angle = pi/2 (t + offset)/(1 + offset)."""
        # 1/s^2 - 1 = sin(angle - start) sin(angle + start)/cos(angle)^2, without cancellation at t = 0.
        angle, start = self._angle(t), self._start
        return ((angle - start).sin() * (angle + start).sin()).clamp(min=0).sqrt() / angle.cos()

    def t(self, sigma: Levels) -> Levels:
        """Angle from tan(angle)^2 = (1 + sigma^2)/cos(start)^2 - 1."""
        tangent = (sigma * sigma + math.sin(self._start) ** 2).sqrt() / math.cos(self._start)
        return tangent.atan() * 2 / math.pi * (1 + self.offset) - self.offset

    def _angle(self, t: Any) -> Any:
        """The angle at a time, of a tensor or a number."""
        return (t + self.offset) / (1 + self.offset) * (math.pi / 2)

    @property
    def _start(self) -> float:
        return self.offset / (1 + self.offset) * math.pi / 2


@dataclass(frozen=True, kw_only=True)
class LDM(VariancePreserving):
    """Discrete process of latent diffusion (Rombach et al. 2022), and with linear betas of DDPM (Ho et al. 2020).

    Time t is the step's index, 0 to num_steps - 1; between steps, ln sigma is interpolated linearly in the index.
    """

    kind: Literal["ldm"] = "ldm"
    num_steps: int = 1000
    """Number of noise levels."""
    beta_first: float = 0.0015
    """First beta."""
    beta_last: float = 0.0195
    """Last beta."""
    betas: Literal["sqrt-linear", "linear"] = "sqrt-linear"
    """What runs evenly from the first to the last: the square root of beta (latent diffusion), or beta (DDPM)."""

    def validate(self) -> None:
        """Two steps or more, betas that rise in (0, 1)."""
        check(2 <= self.num_steps <= 1_000_000, "process.num-steps", "in 2..1000000", self.num_steps)
        check(0 < self.beta_first < self.beta_last < 1, "process.beta-first", "0 < first < last < 1", self.beta_first)

    def ends(self) -> tuple[float, float]:
        """Without torch: the sums of ln(1 - beta)."""
        first, last = self.beta_first**self._power, self.beta_last**self._power
        ramp = (first + (last - first) * step / (self.num_steps - 1) for step in range(self.num_steps))
        logs = [math.log1p(-min(value ** (1 / self._power), 1 - 1e-16)) for value in ramp]
        return math.sqrt(math.expm1(-logs[0])), math.sqrt(math.expm1(min(-sum(logs), 700.0)))

    @property
    def times(self) -> tuple[float, float]:
        """The first index and the last."""
        return 0.0, self.num_steps - 1.0

    @cached_property
    def _levels_at_ends(self) -> list[float]:
        return self._levels[[0, -1]].tolist()

    def sigma(self, t: Levels) -> Levels:
        """ln sigma interpolated between the steps' levels."""
        _, logs = self._table(t)
        index = t.floor().clamp(0, self.num_steps - 2).long()
        return logs[index].lerp(logs[index + 1], t - index).exp()

    def t(self, sigma: Levels) -> Levels:
        """The index at which the interpolated level is sigma; outside the table the outer pieces are extended."""
        import torch

        _, logs = self._table(sigma)
        value = positive(sigma).log()
        index = (torch.bucketize(value, logs) - 1).clamp(0, self.num_steps - 2)
        return index + (value - logs[index]) / (logs[index + 1] - logs[index])

    def cdf(self, sigma: Levels) -> Levels:
        """Share of the steps at or below sigma: a step function."""
        import torch

        levels, _ = self._table(sigma)
        return torch.bucketize(sigma, levels, right=True).to(sigma) / self.num_steps

    def icdf(self, u: Levels) -> Levels:
        """The level of step ceil(u num_steps) - 1: the lowest one whose share reaches u."""
        index = (u * self.num_steps).ceil().long() - 1
        levels, _ = self._table(u)
        return levels[index.clamp(0, self.num_steps - 1)]

    def c_noise(self, sigma: Levels) -> Levels:
        """The step's index."""
        return self.t(sigma)

    def level(self, c_noise: Levels) -> Levels:
        """The level of the step `c_noise`."""
        return self.sigma(c_noise)

    @property
    def _power(self) -> float:
        return 0.5 if self.betas == "sqrt-linear" else 1.0

    @cached_property
    def _levels(self) -> Tensor:
        """The steps' levels."""
        import torch

        from multistage_diffusion.devices import untraced

        power = self._power
        with untraced():
            ramp = torch.linspace(self.beta_first**power, self.beta_last**power, self.num_steps, dtype=torch.float64)
            kept = torch.log1p(-(ramp ** (1 / power))).cumsum(0)  # ln of the signal's share of the variance
            return torch.expm1(-kept).sqrt()

    @cached_property
    def _tables(self) -> dict[Any, tuple[Tensor, Tensor]]:
        return {}

    def _table(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """The steps' levels and their logarithms; moved to a device once, as each move waits for it."""
        from multistage_diffusion.devices import untraced

        key = (like.device, like.dtype)
        if key not in self._tables:
            with untraced():  # training may use what sampling moved, and what is traced must not stay
                levels = self._levels
                self._tables[key] = (levels.to(*key), levels.log().to(*key))
        return self._tables[key]


def _log1p_square(sigma: Tensor) -> Tensor:
    """ln(1 + sigma^2), also where the square would overflow."""
    small = (sigma.clamp(max=1e6) ** 2).log1p()
    return small.where(sigma < 1e6, 2 * positive(sigma).log())
