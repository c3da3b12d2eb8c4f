"""What a metric is. The library's metrics are classes like those that a user writes: examples/own_metric.py."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

from multistage_diffusion.data.examples import Examples
from multistage_diffusion.denoiser import Denoiser
from multistage_diffusion.metrics.statistics import Moments, Statistics
from multistage_diffusion.process_group import ProcessGroup

Figures: TypeAlias = Mapping[str, Any]
"""Numbers by name; a value is anything that JSON holds."""


class Metric:
    """What all metrics have.

    Attributes:
        name: Key of its figure.
        companions: Keys beside `name` that belong on a line of a log, like `kid_std`. It may add more keys, which only
            the whole document holds.
        shown: Keys of its numbers on a model card, best first; by default `name` alone.
    """

    name: str
    companions: tuple[str, ...] = ()
    shown: tuple[str, ...] = ()


class FeatureMetric(Metric, ABC):
    """A metric of two sets of images, seen through their features.

    Attributes:
        keeps: Which sets keep the features of every image, not only their sums: memory of 4 bytes a number.
        compares: False for a metric of the generated images alone.
    """

    keeps: Literal["neither", "generated", "both"] = "neither"
    compares: bool = True

    @abstractmethod
    def measure(self, real: Moments, generated: Statistics, *, seed: int) -> Figures:
        """Figures of generated images against real ones; `seed` is that of random subsets."""

    def cautions(self, real: int | None, generated: int, num_features: int) -> tuple[str, ...]:
        """What a reader must know of figures from so many images, one line each; none if there are enough.

        The number of real images is none where it is not known.
        """
        return ()

    def followers(self, generated: int, num_features: int) -> tuple[FeatureMetric, ...]:
        """Metrics that an evaluation of so many generated images adds to this one."""
        return ()


class ModelMetric(Metric, ABC):
    """A metric of a model and real images, for which no image is drawn."""

    @abstractmethod
    def measure(
        self, denoiser: Denoiser, examples: Examples, *, seed: int, batch_size: int, processes: ProcessGroup
    ) -> Figures:
        """Figures of a model on held-out images, or on their latents for a model of latents.

        Every process calls this alike, without gradients; those of the first one count.
        """
