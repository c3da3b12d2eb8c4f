"""The metrics by name, and how several of them are measured together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from multistage_diffusion.errors import ConfigError, DataError, suggest
from multistage_diffusion.metrics.distance import (
    FrechetDistance,
    FrechetDistanceLimit,
    InceptionScore,
    KernelDistance,
    PrecisionRecall,
)
from multistage_diffusion.metrics.held_out import DenoisingLoss
from multistage_diffusion.metrics.metric import FeatureMetric, Metric, ModelMetric
from multistage_diffusion.metrics.statistics import Moments, Statistics

METRICS: dict[str, FeatureMetric | ModelMetric] = {
    metric.name: metric
    for metric in (
        FrechetDistance(),
        FrechetDistanceLimit(),
        KernelDistance(),
        InceptionScore(),
        PrecisionRecall(),
        DenoisingLoss(),
    )
}
LOGGED = frozenset(key for metric in METRICS.values() for key in (metric.name, *metric.companions))
SHOWN = tuple(key for metric in METRICS.values() for key in metric.shown or (metric.name,))


def resolve(metrics: Sequence[str | Metric]) -> tuple[tuple[FeatureMetric, ...], tuple[ModelMetric, ...]]:
    """Metrics of features and metrics of a model among names of `METRICS` and metrics of the user's own.

    Raises:
        ConfigError: No metric, or an unknown name.
    """
    metrics = (metrics,) if isinstance(metrics, str) else metrics
    if not metrics or not isinstance(metrics, Sequence):
        raise ConfigError(f"name at least one metric of {', '.join(METRICS)}")
    of_features, of_model = list[FeatureMetric](), list[ModelMetric]()
    for metric in metrics:
        if isinstance(metric, str):
            if metric not in METRICS:
                raise ConfigError(f"no metric {metric}{suggest(metric, METRICS)}")
            metric = METRICS[metric]
        match metric:
            case FeatureMetric():
                of_features.append(metric)
            case ModelMetric():
                of_model.append(metric)
            case _:
                raise ConfigError(f"{metric!r} is neither the name of a metric, nor a FeatureMetric or ModelMetric")
    return tuple(of_features), tuple(of_model)


def feature_metrics(metrics: Sequence[str | Metric]) -> tuple[FeatureMetric, ...]:
    """Metrics for images alone; names and the user's own, as `resolve` takes them.

    Raises:
        ConfigError: No metric, an unknown name, or a metric of a model.
    """
    of_features, of_model = resolve(metrics)
    if of_model:
        raise ConfigError(f"the metric {of_model[0].name} needs a run: a folder of images has no denoiser")
    return of_features


def keeps_features(metrics: Sequence[FeatureMetric]) -> tuple[bool, bool]:
    """Whether the real and the generated images must keep their features for some metrics."""
    kept = {metric.keeps for metric in metrics}
    return "both" in kept, bool(kept - {"neither"})


def with_followers(metrics: Sequence[FeatureMetric], generated: int, num_features: int) -> tuple[FeatureMetric, ...]:
    """The metrics, and behind them those that belong to them for so many generated images."""
    more = {one.name: one for metric in metrics for one in metric.followers(generated, num_features)}
    return (*metrics, *(one for name, one in more.items() if name not in {metric.name for metric in metrics}))


def measure(metrics: Sequence[FeatureMetric], real: Moments, generated: Statistics, *, seed: int = 0) -> dict[str, Any]:
    """Figures of generated images against real ones.

    Args:
        metrics: The metrics.
        real: Statistics of the reference, with features where `keeps_features` says so; of no image where no metric
            compares.
        generated: Statistics of generated images, likewise.
        seed: Of random subsets.

    Returns:
        Each metric's figures, in the order of the metrics; `cautions` where there are too few images.

    Raises:
        ConfigError: A metric needs features that know classes, and these do not.
        DataError: Too few images for a metric.
    """
    compares = any(metric.compares for metric in metrics)
    for kind, count, mend in (
        ("real", real.num_images if compares else 2, "take a larger source, or more of it: a tenth may be held out"),
        ("generated", generated.count, "raise num, or take a folder of more images"),
    ):
        if count is not None and count < 2:
            raise DataError(f"a distance needs at least 2 {kind} images, and there is {count}; {mend}")
    result = dict[str, Any]()
    for metric in metrics:
        result |= metric.measure(real, generated, seed=seed)
    sizes = (real.num_images, generated.count, len(generated.total))
    if cautions := dict.fromkeys(line for metric in metrics for line in metric.cautions(*sizes)):
        result["cautions"] = list(cautions)
    return result
