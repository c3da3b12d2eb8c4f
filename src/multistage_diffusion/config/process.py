"""Configurations of the processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from multistage_diffusion.config.values import check, check_numbers
from multistage_diffusion.errors import ConfigError, suggest

Prediction = Literal["eps", "v"]
ProcessKind = Literal["vp", "vp-cosine", "ve", "edm", "ldm", "flow"]


@dataclass(frozen=True, kw_only=True)
class VPConfig:
    """Variance-preserving process, linear beta (Song et al. 2021). Time t in [t_min, 1]."""

    kind: Literal["vp"] = "vp"
    prediction: Prediction = "eps"
    """What the network predicts: the noise (eps), or the velocity (v), which stays accurate at high noise."""
    beta_min: float = 0.1
    """Noise rate at t = 0."""
    beta_max: float = 20.0
    """Noise rate at t = 1."""
    t_min: float = 1e-4
    """Smallest time in training and sampling."""

    def __post_init__(self) -> None:
        check_numbers(self, "process")
        check(0 < self.beta_min < self.beta_max, "process.beta-min", "positive and below beta-max", self.beta_min)
        check(0 < self.t_min < 1, "process.t-min", "between 0 and 1", self.t_min)


@dataclass(frozen=True, kw_only=True)
class CosineConfig:
    """Variance-preserving, cosine schedule (Nichol and Dhariwal 2021). Time in [t_min, t_max]."""

    kind: Literal["vp-cosine"] = "vp-cosine"
    prediction: Prediction = "eps"
    """What the network predicts: the noise (eps), or the velocity (v), which stays accurate at high noise."""
    offset: float = 0.008
    """Keeps the noise at t = 0 above zero."""
    t_min: float = 1e-3
    """Smallest time in training and sampling."""
    t_max: float = 0.9946
    """Largest time; the signal vanishes at t = 1."""

    def __post_init__(self) -> None:
        check_numbers(self, "process")
        check(0 < self.offset < 1, "process.offset", "between 0 and 1", self.offset)
        check(0 <= self.t_min < self.t_max < 1, "process.t-min", "at least 0 and below t-max < 1", self.t_min)


@dataclass(frozen=True, kw_only=True)
class VEConfig:
    """Variance-exploding process (Song et al. 2021), noise prediction. Log-uniform sigma; t = position in log sigma."""

    kind: Literal["ve"] = "ve"
    sigma_min: float = 0.01
    """Lowest noise level."""
    sigma_max: float = 50.0
    """Highest noise level."""

    def __post_init__(self) -> None:
        check_numbers(self, "process")
        check(0 < self.sigma_min < self.sigma_max, "process.sigma-min", "positive, below sigma-max", self.sigma_min)


@dataclass(frozen=True, kw_only=True)
class EDMConfig:
    """EDM (Karras et al. 2022): log-normal training distribution, sigma_data preconditioning. The time is sigma."""

    kind: Literal["edm"] = "edm"
    p_mean: float = -1.2
    """Mean of ln sigma in training."""
    p_std: float = 1.2
    """Standard deviation of ln sigma in training."""
    sigma_data: float = 0.5
    """Standard deviation of the data."""
    sigma_min: float = 0.002
    """Lowest noise level of sampling."""
    sigma_max: float = 80.0
    """Highest noise level of sampling."""

    def __post_init__(self) -> None:
        check_numbers(self, "process")
        check(self.p_std > 0, "process.p-std", "positive", self.p_std)
        check(self.sigma_data > 0, "process.sigma-data", "positive", self.sigma_data)
        check(0 < self.sigma_min < self.sigma_max, "process.sigma-min", "positive, below sigma-max", self.sigma_min)


@dataclass(frozen=True, kw_only=True)
class LDMConfig:
    """Discrete process of latent diffusion (Rombach et al. 2022), and with linear betas of DDPM (Ho et al. 2020).

    Time t is the step's index, 0 to num_steps - 1.
    """

    kind: Literal["ldm"] = "ldm"
    prediction: Prediction = "eps"
    """What the network predicts: the noise (eps), or the velocity (v), which stays accurate at high noise."""
    num_steps: int = 1000
    """Number of noise levels."""
    beta_first: float = 0.0015
    """First beta."""
    beta_last: float = 0.0195
    """Last beta."""
    betas: Literal["sqrt-linear", "linear"] = "sqrt-linear"
    """What runs evenly from the first to the last: the square root of beta (latent diffusion), or beta (DDPM)."""

    def __post_init__(self) -> None:
        check_numbers(self, "process")
        check(2 <= self.num_steps <= 1_000_000, "process.num-steps", "in 2..1000000", self.num_steps)
        check(0 < self.beta_first < self.beta_last < 1, "process.beta-first", "0 < first < last < 1", self.beta_first)


@dataclass(frozen=True, kw_only=True)
class FlowConfig:
    """Flow matching, x_t = (1 - t) x0 + t eps, velocity prediction, logit-normal times (Esser et al. 2024)."""

    kind: Literal["flow"] = "flow"
    logit_mean: float = 0.0
    """Mean of logit t = ln sigma in training."""
    logit_std: float = 1.0
    """Standard deviation of logit t in training."""
    t_min: float = 1e-3
    """Smallest time of sampling."""
    t_max: float = 0.999
    """Largest time of sampling; sigma is infinite at t = 1."""

    def __post_init__(self) -> None:
        check_numbers(self, "process")
        check(self.logit_std > 0, "process.logit-std", "positive", self.logit_std)
        check(0 < self.t_min < self.t_max < 1, "process.t-min", "0 < t-min < t-max < 1", self.t_min)


ProcessConfig = VPConfig | CosineConfig | VEConfig | EDMConfig | LDMConfig | FlowConfig
PROCESSES: dict[str, type[ProcessConfig]] = {
    "vp": VPConfig,
    "vp-cosine": CosineConfig,
    "ve": VEConfig,
    "edm": EDMConfig,
    "ldm": LDMConfig,
    "flow": FlowConfig,
}


def process_config(kind: str) -> ProcessConfig:
    """The default configuration of a process, by name.

    Args:
        kind: One of `PROCESSES`.

    Returns:
        Its configuration.

    Raises:
        ConfigError: No such process.
    """
    if kind not in PROCESSES:
        raise ConfigError(f"no process {kind}{suggest(kind, PROCESSES)}")
    return PROCESSES[kind]()
