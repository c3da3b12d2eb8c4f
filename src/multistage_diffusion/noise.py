"""Processes and schedules: each translates its own time, scale, training distribution and preconditioning to sigma.

`sigma` is the noise-to-signal ratio of x = s (x0 + sigma eps), the one coordinate in which all processes agree. Past
this door the library knows no timesteps. Tensors keep their device and dtype; schedules are float64.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar, final

import torch
from jaxtyping import Float
from torch import Tensor

from multistage_diffusion.config import (
    CosineConfig,
    EDMConfig,
    FlowConfig,
    LDMConfig,
    Prediction,
    ProcessConfig,
    VEConfig,
    VPConfig,
    check,
)
from multistage_diffusion.errors import ConfigError, suggest

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


def _time_share(t: Tensor, t_min: float, t_max: float) -> Tensor:
    """Cumulative distribution of a uniform time."""
    return ((t - t_min) / (t_max - t_min)).clamp(0.0, 1.0)


def _predict_noise(sigma: Tensor, scale: Tensor, c_noise: Tensor) -> Preconditioning:
    """The network sees the process's own x and predicts eps: D = x - sigma F."""
    return Preconditioning(torch.ones_like(sigma), -sigma, scale, c_noise)


def _variance_preserving(prediction: Prediction, sigma: Tensor, scale: Tensor, c_noise: Tensor) -> Preconditioning:
    """Prediction of eps, or of v = s eps - s sigma x0: D = s^2 x - s sigma F (Salimans and Ho 2022, Appendix D)."""
    if prediction == "eps":
        return _predict_noise(sigma, scale, c_noise)
    return Preconditioning(scale * scale, -sigma * scale, scale, c_noise)


def _prediction_weight(prediction: Prediction, sigma: Tensor) -> Tensor:
    """1/c_out^2: the plain squared error of what the network predicts."""
    return sigma**-2 if prediction == "eps" else sigma**-2 + 1


def _positive(tensor: Tensor) -> Tensor:
    """Noise levels with 0 lifted just above it, where a logarithm or a quotient is taken."""
    return tensor.clamp(min=torch.finfo(tensor.dtype).tiny)


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
        return _time_share(self.t(sigma), self.config.t_min, 1.0)

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
        return _time_share(self.t(sigma), self.config.t_min, self.config.t_max)

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
        return torch.log(_positive(sigma) / self.sigma_min) / self._span

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
        return _predict_noise(sigma, torch.ones_like(sigma), torch.log(_positive(sigma) / 2))


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

    def scale(self, sigma: Levels) -> Levels:
        """1."""
        return torch.ones_like(sigma)

    def cdf(self, sigma: Levels) -> Levels:
        """ln sigma ~ N(p_mean, p_std^2)."""
        return _normal_cdf((torch.log(_positive(sigma)) - self.config.p_mean) / self.config.p_std)

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
        return Preconditioning((data / norm) ** 2, sigma * (data / norm), 1 / norm, torch.log(_positive(sigma)) / 4)


@final
class LDM(Process[LDMConfig]):
    """Discrete variance-preserving process of latent diffusion. Source: Rombach et al. 2022.

    Time is the step's index, 0 to num_steps - 1; between steps, ln sigma is interpolated linearly in the index.
    """

    def __init__(self, config: LDMConfig = LDMConfig()) -> None:  # noqa: B008
        self.config = config
        root = torch.linspace(config.beta_first**0.5, config.beta_last**0.5, config.num_steps, dtype=torch.float64)
        kept = torch.log1p(-(root**2)).cumsum(0)  # ln of the signal's share of the variance
        self._levels = torch.expm1(-kept).sqrt()
        self.sigma_min, self.sigma_max = float(self._levels[0]), float(self._levels[-1])

    def sigma(self, t: Levels) -> Levels:
        """ln sigma interpolated between the steps' levels."""
        logs = self._levels.log().to(t)
        index = t.floor().clamp(0, self.config.num_steps - 2).long()
        return torch.exp(torch.lerp(logs[index], logs[index + 1], t - index))

    def t(self, sigma: Levels) -> Levels:
        """The index at which the interpolated level is sigma; outside the table the outer pieces are extended."""
        logs = self._levels.log().to(sigma)
        value = torch.log(_positive(sigma))
        index = (torch.bucketize(value, logs) - 1).clamp(0, self.config.num_steps - 2)
        return index + (value - logs[index]) / (logs[index + 1] - logs[index])

    def scale(self, sigma: Levels) -> Levels:
        """1/sqrt(1 + sigma^2)."""
        return 1 / torch.hypot(torch.ones_like(sigma), sigma)

    def cdf(self, sigma: Levels) -> Levels:
        """Share of the steps at or below sigma: a step function."""
        return torch.bucketize(sigma, self._levels.to(sigma), right=True).to(sigma) / self.config.num_steps

    def icdf(self, u: Levels) -> Levels:
        """The level of step ceil(u num_steps) - 1: the lowest one whose share reaches u."""
        index = (u * self.config.num_steps).ceil().long() - 1
        return self._levels.to(u)[index.clamp(0, self.config.num_steps - 1)]

    def loss_weight(self, sigma: Levels) -> Levels:
        """The plain squared error of the predicted noise, 1/sigma^2, or velocity, 1 + 1/sigma^2."""
        return _prediction_weight(self.config.prediction, sigma)

    def preconditioning(self, sigma: Levels) -> Preconditioning:
        """Prediction of eps or v, conditioned on the step's index."""
        return _variance_preserving(self.config.prediction, sigma, self.scale(sigma), self.t(sigma))


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
        return _normal_cdf((torch.log(_positive(sigma)) - self.config.logit_mean) / self.config.logit_std)

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


def make_process(config: ProcessConfig) -> Process:
    """Build a process from its configuration.

    Args:
        config: One of the process configurations.

    Returns:
        The process.

    Raises:
        ConfigError: Its noise levels are beyond what float32 can square.
    """
    process = _build(config)
    low, high = process.sigma_min, process.sigma_max
    check(1e-15 < low < high < 1e15, "process", "one whose noise levels lie in 1e-15..1e15", f"{low:g} to {high:g}")
    return process


def _build(config: ProcessConfig) -> Process:
    match config:
        case VPConfig():
            return VP(config)
        case CosineConfig():
            return Cosine(config)
        case VEConfig():
            return VE(config)
        case EDMConfig():
            return EDM(config)
        case LDMConfig():
            return LDM(config)
        case FlowConfig():
            return Flow(config)


Spacing = Literal["karras", "log-snr", "uniform-t", "quadratic-t"]
SPACINGS: tuple[Spacing, ...] = ("karras", "log-snr", "uniform-t", "quadratic-t")


def sigma_schedule(process: Process, spacing: str, steps: int, *, rho: float = 7.0) -> Float[Tensor, " levels"]:
    """The noise levels that sampling visits, from sigma_max down to sigma_min, then 0.

    Args:
        process: Gives the range, and the time for the spacings in t.
        spacing: `karras` (uniform in sigma^(1/rho), Karras et al. 2022, Eq. 5), `log-snr` (geometric), `uniform-t`,
            `quadratic-t` (uniform in sqrt t).
        steps: Number of steps, at least 1.
        rho: Exponent of `karras`.

    Returns:
        `steps + 1` decreasing levels, float64, the last one 0.

    Raises:
        ConfigError: Unknown spacing, or fewer than 1 step.
    """
    check(steps >= 1, "steps", "at least 1", steps)
    ends = torch.tensor([process.sigma_max, process.sigma_min], dtype=torch.float64)
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    match spacing:
        case "karras":
            roots = ends ** (1 / rho)
            levels = torch.lerp(roots[0], roots[1], ramp) ** rho
        case "log-snr":
            levels = torch.lerp(ends[0].log(), ends[1].log(), ramp).exp()
        case "uniform-t":
            times = process.t(ends)
            levels = process.sigma(torch.lerp(times[0], times[1], ramp))
        case "quadratic-t":
            times = process.t(ends).sqrt()
            levels = process.sigma(torch.lerp(times[0], times[1], ramp) ** 2)
        case _:
            raise ConfigError(f"no spacing {spacing}{suggest(spacing, SPACINGS)}")
    return torch.cat((levels, levels.new_zeros(1)))


def _normal_cdf(value: Tensor) -> Tensor:
    return torch.special.ndtr(value)


def _log1p_square(sigma: Tensor) -> Tensor:
    """ln(1 + sigma^2), also where the square would overflow."""
    small = torch.log1p(sigma.clamp(max=1e6) ** 2)
    return torch.where(sigma < 1e6, small, 2 * torch.log(_positive(sigma)))
