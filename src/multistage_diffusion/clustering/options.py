"""What a clustering is asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass

from multistage_diffusion.clustering.levels import MEASURES
from multistage_diffusion.clustering.partition import MAX_STAGES
from multistage_diffusion.clustering.similarity import REFERENCES
from multistage_diffusion.config import check
from multistage_diffusion.errors import ConfigError, suggest

METHODS = ("optimal-denoiser", "timestep", "snr", "gradient")
OBJECTIVES = ("crossing", "similarity", "variance")
_DEGENERATE = {"sum-of-means", "mean"}  # each stage's mean similarity, unweighted


@dataclass(frozen=True, kw_only=True)
class Options:
    """How the stages are to be found; see `cluster`.

    Raises:
        ConfigError: A value that no clustering can use.
    """

    method: str
    stages: int
    eta: float
    alpha: float
    samples: int | None
    reference: str
    measure: str
    objective: str | None
    unit_range: bool
    within_class: bool
    max_images: int | None
    resamples: int
    seed: int

    def __post_init__(self) -> None:
        check(2 <= self.stages <= MAX_STAGES, "stages", f"from 2 to {MAX_STAGES}", self.stages)
        check(0 < self.eta < math.inf, "eta", "positive", self.eta)
        check(0 < self.alpha < 1, "alpha", "between 0 and 1", self.alpha)
        check(self.samples is None or self.samples >= 100, "samples", "at least 100", self.samples)
        check(self.resamples >= 0, "resamples", "at least 0", self.resamples)
        check(self.max_images is None or self.max_images >= 8, "max-images", "at least 8", self.max_images)
        for name, known in (("method", METHODS), ("reference", REFERENCES), ("measure", MEASURES)):
            value = getattr(self, name)
            if value not in known:
                raise ConfigError(f"no {name} {value}{suggest(value, known)}")
        if self.objective in _DEGENERATE:
            raise ConfigError(
                "the sum of the stages' mean similarities is degenerate (a stage of one level scores a perfect 1, so "
                "it peels off single levels); use the objective similarity, which weighs a stage by its length"
            )
        if self.objective is not None and self.objective not in OBJECTIVES:
            raise ConfigError(f"no objective {self.objective}{suggest(self.objective, OBJECTIVES)}")
        if self.objective == "crossing" and self.stages != 3:
            raise ConfigError(f"the objective crossing finds 3 stages, got stages {self.stages}; use variance")

    @property
    def draws(self) -> int:
        """Number of draws: as many as asked for, else what keeps the edges to about 0.005 of the measure."""
        return self.samples or (4_000 if self.chosen == "crossing" else 16_000)

    @property
    def chosen(self) -> str:
        """The objective of the optimal-denoiser method: Algorithm 1 for three stages, else the default."""
        return self.objective or ("crossing" if self.stages == 3 else "variance")
