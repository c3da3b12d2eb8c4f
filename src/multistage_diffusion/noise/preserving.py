"""Variance-preserving processes: linear beta, cosine, and the discrete one of latent diffusion."""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor

from multistage_diffusion.config import CosineConfig, LDMConfig, Prediction, VPConfig
from multistage_diffusion.noise.base import Levels, Preconditioning, Process, positive, predict_noise, time_share


@final
class VP(Process[VPConfig]):
    """Variance-preserving, beta linear in t. Source: Song et al. 2021, Eq. 32-33."""

    def __init__(self, config: VPConfig = VPConfig()) -> None:  # noqa: B008  (frozen)
        self.config = config
        self.sigma_min, self.sigma_max = self.sigma(torch.tensor([config.t_min, 1.0], dtype=torch.float64)).tolist()

    def sigma(self, t: Levels) -> Levels:
        """sqrt(1/s^2 - 1) with ln s = -t^2 (beta_max - beta_min)/4 - t beta_min/2."""
        slope = self.config.beta_max - self.config.beta_min
        return torch.expm1(t * t * slope / 2 + t * self.config.beta_min).sqrt()

    def t(self, sigma: Levels) -> Levels:
        """Root of the quadratic ln(1 + sigma^2) = t^2 slope/2 + t beta_min, in the form without cancellation."""
        beta, slope = self.config.beta_min, self.config.beta_max - self.config.beta_min
        inverse = 1 / _log1p_square(sigma)  # divided through by the level, so that sigma = 0 and infinity have a time
        return 2 / (beta * inverse + ((beta * inverse) ** 2 + 2 * slope * inverse).sqrt())

    def scale(self, sigma: Levels) -> Levels:
        """1/sqrt(1 + sigma^2)."""
        return 1 / torch.hypot(torch.ones_like(sigma), sigma)

    def cdf(self, sigma: Levels) -> Levels:
        """Uniform in t on [t_min, 1]."""
        return time_share(self.t(sigma), self.config.t_min, 1.0)

    def icdf(self, u: Levels) -> Levels:
        """Uniform in t on [t_min, 1]."""
        return self.sigma(self.config.t_min + u * (1.0 - self.config.t_min))

    def loss_weight(self, sigma: Levels) -> Levels:
        """The plain squared error of the predicted noise, 1/sigma^2, or velocity, 1 + 1/sigma^2."""
        return _prediction_weight(self.config.prediction, sigma)

    def preconditioning(self, sigma: Levels) -> Preconditioning:
        """Prediction of eps or v, conditioned on 999 t (score_sde's convention)."""
        return _variance_preserving(self.config.prediction, sigma, self.scale(sigma), 999 * self.t(sigma))


@final
class Cosine(Process[CosineConfig]):
    """Variance-preserving, cosine schedule. Source: Nichol and Dhariwal 2021, Eq. 17."""

    def __init__(self, config: CosineConfig = CosineConfig()) -> None:  # noqa: B008
        self.config = config
        times = torch.tensor([config.t_min, config.t_max], dtype=torch.float64)
        self.sigma_min, self.sigma_max = self.sigma(times).tolist()

    def sigma(self, t: Levels) -> Levels:
        """sqrt(1/s^2 - 1) with s = cos(angle)/cos(start), angle = pi/2 (t + offset)/(1 + offset)."""
        # 1/s^2 - 1 = sin(angle - start) sin(angle + start)/cos(angle)^2, without cancellation at t = 0.
        angle, start = self._angle(t), self._start()
        return (torch.sin(angle - start) * torch.sin(angle + start)).clamp(min=0).sqrt() / torch.cos(angle)

    def t(self, sigma: Levels) -> Levels:
        """Angle from tan(angle)^2 = (1 + sigma^2)/cos(start)^2 - 1."""
        tangent = (sigma * sigma + math.sin(self._start()) ** 2).sqrt() / math.cos(self._start())
        return torch.atan(tangent) * 2 / math.pi * (1 + self.config.offset) - self.config.offset

    def scale(self, sigma: Levels) -> Levels:
        """1/sqrt(1 + sigma^2)."""
        return 1 / torch.hypot(torch.ones_like(sigma), sigma)

    def cdf(self, sigma: Levels) -> Levels:
        """Uniform in t on [t_min, t_max]."""
        return time_share(self.t(sigma), self.config.t_min, self.config.t_max)

    def icdf(self, u: Levels) -> Levels:
        """Uniform in t on [t_min, t_max]."""
        return self.sigma(self.config.t_min + u * (self.config.t_max - self.config.t_min))

    def loss_weight(self, sigma: Levels) -> Levels:
        """The plain squared error of the predicted noise, 1/sigma^2, or velocity, 1 + 1/sigma^2."""
        return _prediction_weight(self.config.prediction, sigma)

    def preconditioning(self, sigma: Levels) -> Preconditioning:
        """Prediction of eps or v, conditioned on 999 t."""
        return _variance_preserving(self.config.prediction, sigma, self.scale(sigma), 999 * self.t(sigma))

    def _angle(self, t: Tensor) -> Tensor:
        return (t + self.config.offset) / (1 + self.config.offset) * (math.pi / 2)

    def _start(self) -> float:
        return self.config.offset / (1 + self.config.offset) * math.pi / 2


@final
class LDM(Process[LDMConfig]):
    """Discrete variance-preserving process of latent diffusion. Source: Rombach et al. 2022.

    Time is the step's index, 0 to num_steps - 1; between steps, ln sigma is interpolated linearly in the index.
    """

    def __init__(self, config: LDMConfig = LDMConfig()) -> None:  # noqa: B008
        self.config = config
        power = 0.5 if config.betas == "sqrt-linear" else 1.0
        ramp = torch.linspace(config.beta_first**power, config.beta_last**power, config.num_steps, dtype=torch.float64)
        kept = torch.log1p(-(ramp ** (1 / power))).cumsum(0)  # ln of the signal's share of the variance
        self._levels = torch.expm1(-kept).sqrt()
        self.sigma_min, self.sigma_max = float(self._levels[0]), float(self._levels[-1])
        self._tables: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def sigma(self, t: Levels) -> Levels:
        """ln sigma interpolated between the steps' levels."""
        _, logs = self._table(t)
        index = t.floor().clamp(0, self.config.num_steps - 2).long()
        return torch.exp(torch.lerp(logs[index], logs[index + 1], t - index))

    def t(self, sigma: Levels) -> Levels:
        """The index at which the interpolated level is sigma; outside the table the outer pieces are extended."""
        _, logs = self._table(sigma)
        value = torch.log(positive(sigma))
        index = (torch.bucketize(value, logs) - 1).clamp(0, self.config.num_steps - 2)
        return index + (value - logs[index]) / (logs[index + 1] - logs[index])

    def scale(self, sigma: Levels) -> Levels:
        """1/sqrt(1 + sigma^2)."""
        return 1 / torch.hypot(torch.ones_like(sigma), sigma)

    def cdf(self, sigma: Levels) -> Levels:
        """Share of the steps at or below sigma: a step function."""
        levels, _ = self._table(sigma)
        return torch.bucketize(sigma, levels, right=True).to(sigma) / self.config.num_steps

    def icdf(self, u: Levels) -> Levels:
        """The level of step ceil(u num_steps) - 1: the lowest one whose share reaches u."""
        index = (u * self.config.num_steps).ceil().long() - 1
        levels, _ = self._table(u)
        return levels[index.clamp(0, self.config.num_steps - 1)]

    def loss_weight(self, sigma: Levels) -> Levels:
        """The plain squared error of the predicted noise, 1/sigma^2, or velocity, 1 + 1/sigma^2."""
        return _prediction_weight(self.config.prediction, sigma)

    def preconditioning(self, sigma: Levels) -> Preconditioning:
        """Prediction of eps or v, conditioned on the step's index."""
        return _variance_preserving(self.config.prediction, sigma, self.scale(sigma), self.t(sigma))

    def _table(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """The steps' levels and their logarithms; moved to a device once, as each move waits for it."""
        key = (like.device, like.dtype)
        if key not in self._tables:
            with torch.inference_mode(False):  # training may use what sampling moved
                self._tables[key] = (self._levels.to(like), self._levels.log().to(like))
        return self._tables[key]


def _variance_preserving(prediction: Prediction, sigma: Tensor, scale: Tensor, c_noise: Tensor) -> Preconditioning:
    """Prediction of eps, or of v = s eps - s sigma x0: D = s^2 x - s sigma F (Salimans and Ho 2022, Appendix D)."""
    if prediction == "eps":
        return predict_noise(sigma, scale, c_noise)
    return Preconditioning(scale * scale, -sigma * scale, scale, c_noise)


def _prediction_weight(prediction: Prediction, sigma: Tensor) -> Tensor:
    """1/c_out^2: the plain squared error of what the network predicts."""
    return sigma**-2 if prediction == "eps" else sigma**-2 + 1


def _log1p_square(sigma: Tensor) -> Tensor:
    """ln(1 + sigma^2), also where the square would overflow."""
    small = torch.log1p(sigma.clamp(max=1e6) ** 2)
    return torch.where(sigma < 1e6, small, 2 * torch.log(positive(sigma)))
