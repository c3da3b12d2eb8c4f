"""Processes that leave the signal as it is: variance-exploding, and EDM."""

from __future__ import annotations

import math
from typing import final

import torch

from multistage_diffusion.config import EDMConfig, VEConfig
from multistage_diffusion.noise.base import Levels, Preconditioning, Process, normal_cdf, positive, predict_noise
from multistage_diffusion.noise.preserving import VP


@final
class VE(Process[VEConfig]):
    """Variance-exploding; the network predicts eps from unscaled x. Source: Song et al. 2021, Eq. 9."""

    def __init__(self, config: VEConfig = VEConfig()) -> None:  # noqa: B008
        self.config = config
        self.sigma_min, self.sigma_max = config.sigma_min, config.sigma_max
        self._span = math.log(config.sigma_max / config.sigma_min)

    def sigma(self, t: Levels) -> Levels:
        """sigma_min (sigma_max/sigma_min)^t, t in [0, 1]."""
        return self.sigma_min * torch.exp(t * self._span)

    def t(self, sigma: Levels) -> Levels:
        """Position in log sigma."""
        return torch.log(positive(sigma) / self.sigma_min) / self._span

    def scale(self, sigma: Levels) -> Levels:
        """1."""
        return torch.ones_like(sigma)

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
        return predict_noise(sigma, torch.ones_like(sigma), torch.log(positive(sigma) / 2))


@final
class EDM(Process[EDMConfig]):
    """EDM: log-normal sigma in training, network input and target of unit variance. Source: Karras et al. 2022."""

    def __init__(self, config: EDMConfig = EDMConfig()) -> None:  # noqa: B008
        self.config = config
        self.sigma_min, self.sigma_max = config.sigma_min, config.sigma_max

    def sigma(self, t: Levels) -> Levels:
        """The time is sigma itself."""
        return t

    def t(self, sigma: Levels) -> Levels:
        """The time is sigma itself."""
        return sigma

    def clock(self) -> VP:
        """VP: evenly in sigma, all but a few of the levels would lie where images are noise."""
        return VP()

    def scale(self, sigma: Levels) -> Levels:
        """1."""
        return torch.ones_like(sigma)

    def cdf(self, sigma: Levels) -> Levels:
        """ln sigma ~ N(p_mean, p_std^2)."""
        return normal_cdf((torch.log(positive(sigma)) - self.config.p_mean) / self.config.p_std)

    def icdf(self, u: Levels) -> Levels:
        """ln sigma ~ N(p_mean, p_std^2)."""
        return torch.exp(self.config.p_mean + self.config.p_std * torch.special.ndtri(u))

    def loss_weight(self, sigma: Levels) -> Levels:
        """1/c_out^2, so that every level asks the same of the network at the start (Karras et al. 2022, Table 1)."""
        data = self.config.sigma_data
        return sigma**-2 + data**-2

    def preconditioning(self, sigma: Levels) -> Preconditioning:
        """Karras et al. 2022, Table 1, last column; conditioned on ln(sigma)/4."""
        data = self.config.sigma_data
        norm = torch.hypot(torch.full_like(sigma, data), sigma)
        return Preconditioning((data / norm) ** 2, sigma * (data / norm), 1 / norm, torch.log(positive(sigma)) / 4)
