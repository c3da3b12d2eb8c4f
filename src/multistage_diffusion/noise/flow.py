"""Flow matching on the linear path."""

from __future__ import annotations

from typing import final

import torch

from multistage_diffusion.config import FlowConfig
from multistage_diffusion.noise.base import Levels, Preconditioning, Process, normal_cdf, positive


@final
class Flow(Process[FlowConfig]):
    """Flow matching, linear path, sigma = t/(1 - t); the network predicts eps - x0. Source: Lipman et al. 2023."""

    def __init__(self, config: FlowConfig = FlowConfig()) -> None:  # noqa: B008
        self.config = config
        times = torch.tensor([config.t_min, config.t_max], dtype=torch.float64)
        self.sigma_min, self.sigma_max = self.sigma(times).tolist()

    def sigma(self, t: Levels) -> Levels:
        """t/(1 - t)."""
        return t / (1 - t)

    def t(self, sigma: Levels) -> Levels:
        """sigma/(1 + sigma), written so that infinity is 1."""
        return 1 / (1 + 1 / sigma)

    def scale(self, sigma: Levels) -> Levels:
        """1 - t = 1/(1 + sigma)."""
        return 1 / (1 + sigma)

    def cdf(self, sigma: Levels) -> Levels:
        """logit t = ln sigma ~ N(logit_mean, logit_std^2)."""
        return normal_cdf((torch.log(positive(sigma)) - self.config.logit_mean) / self.config.logit_std)

    def icdf(self, u: Levels) -> Levels:
        """logit t = ln sigma ~ N(logit_mean, logit_std^2)."""
        return torch.exp(self.config.logit_mean + self.config.logit_std * torch.special.ndtri(u))

    def loss_weight(self, sigma: Levels) -> Levels:
        """1/t^2: the plain squared error of the predicted velocity."""
        return self.t(sigma) ** -2

    def preconditioning(self, sigma: Levels) -> Preconditioning:
        """x0 = x_t - t v with x_t = (1 - t) x; conditioned on 1000 t."""
        scale, t = self.scale(sigma), self.t(sigma)
        return Preconditioning(scale, -t, scale, 1000 * t)
