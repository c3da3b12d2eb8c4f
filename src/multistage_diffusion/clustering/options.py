"""What a clustering is asked for: one record for `cluster` and for `msd cluster`. Without torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from multistage_diffusion.errors import ConfigError, suggest
from multistage_diffusion.records import check, check_needs, check_numbers, check_seed

Method = Literal["optimal-denoiser", "timestep", "snr", "gradient"]
Objective = Literal["crossing", "similarity", "variance"]
Measure = Literal["time", "log-sigma", "training"]
Reference = Literal["data-mean", "definition"]
METHODS, OBJECTIVES, MEASURES, REFERENCES = map(get_args, (Method, Objective, Measure, Reference))
_CHOICES = {"method": METHODS, "reference": REFERENCES, "measure": MEASURES, "objective": OBJECTIVES}
MAX_STAGES = 8
# The published reading: the edges stay on the process's own time, as the authors use them.
PAPER: dict[str, Any] = {"unit_range": True, "eta": 2 / 256, "alpha": 0.9, "reference": "data-mean", "measure": "time"}
_DEGENERATE = {"sum-of-means", "mean"}  # each stage's mean similarity, unweighted


_MOST = 10**7  # draws, and resamples


@dataclass(frozen=True, kw_only=True)
class ClusterOptions:
    """How the stages are found. docs/clustering.md says what to choose.

    Raises:
        ConfigError: A value that no clustering can use.
    """

    method: Method = "optimal-denoiser"
    """Compare optimal denoisers, or a baseline: uniform in time, log-SNR, gradients of a network."""
    stages: int = 3
    """Number of stages, 2 to 8."""
    eta: float = 2 / 256
    """Largest difference of optimal noise predictions that counts as similar."""
    alpha: float = 0.9
    """Least mean similarity of an outer stage to its end."""
    samples: int | None = None
    """Number of draws of image, noise and noise level; by default 4000, or 16000 for a matrix."""
    reference: Reference = "data-mean"
    """What the high-noise end is: the constant denoiser (the paper's code) or the denoiser there (its text)."""
    measure: Measure = "time"
    """What averages over noise levels are taken in: the process's time, log sigma, its training distribution."""
    objective: Objective | None = None
    """crossing: Algorithm 1, three stages; similarity, variance: exact partition of a matrix over noise levels. By
    default crossing for three stages, else variance."""
    unit_range: bool = False
    """Read the images in [0, 1], as the paper's code does, and not in [-1, 1]."""
    by_class: bool = False
    """Take posteriors within each image's class, for class-conditional models."""
    max_images: int | None = None
    """Use at most so many images, chosen by --seed; the lower edge of Algorithm 1 is extrapolated to all of them."""
    resamples: int = 200
    """Bootstrap resamples behind the intervals of the edges; 0 for none."""
    seed: int = 0
    """Seed of all draws."""

    def __post_init__(self) -> None:
        check_choices(vars(self))
        check_numbers(self, "")
        check(2 <= self.stages <= MAX_STAGES, "stages", f"from 2 to {MAX_STAGES}", self.stages)
        check(0 < self.eta < math.inf, "eta", "positive", self.eta)
        check(0 < self.alpha < 1, "alpha", "between 0 and 1", self.alpha)
        check(self.samples is None or 100 <= self.samples <= _MOST, "samples", f"in 100..{_MOST}", self.samples)
        check(0 <= self.resamples <= _MOST, "resamples", f"in 0..{_MOST}", self.resamples)
        check(self.max_images is None or self.max_images >= 8, "max-images", "at least 8", self.max_images)
        check_seed(self.seed)
        if self.objective == "crossing" and self.stages != 3:
            raise ConfigError(f"the objective crossing finds 3 stages, got stages {self.stages}; use variance")
        check_needs(
            not self.by_class or self.method == "optimal-denoiser", "by-class", "method optimal-denoiser", self.method
        )

    @property
    def draws(self) -> int:
        """Number of draws: `samples`, else what keeps the edges to about 0.005 of the measure."""
        return self.samples or (4_000 if self.criterion == "crossing" else 16_000)

    @property
    def criterion(self) -> Objective:
        """The objective, or its default: Algorithm 1 for three stages, else the variance."""
        return self.objective or ("crossing" if self.stages == 3 else "variance")


def check_choices(options: Mapping[str, Any]) -> None:
    """Refuse a method, measure, reference or objective that there is not, and name the nearest one.

    Raises:
        ConfigError: One of the options is none of its choices.
    """
    if options.get("objective") in _DEGENERATE:
        raise ConfigError(
            "the sum of the stages' mean similarities is degenerate: a stage of one noise level scores a perfect 1, so "
            "the optimum cuts off single levels; use the objective similarity, which weighs a stage by its length"
        )
    for name, choices in _CHOICES.items():
        value = options.get(name)
        if value is not None and value not in choices:
            raise ConfigError(f"no {name} {value}{suggest(value, choices)}")
