"""What a model is worth, or a set of images: figures, what they were measured with, and what they cost."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from multistage_diffusion.data import Images
from multistage_diffusion.data.examples import Codec
from multistage_diffusion.data.user import Data, as_data
from multistage_diffusion.denoiser import Denoiser
from multistage_diffusion.errors import ConfigError
from multistage_diffusion.evaluation.images import distances, generated
from multistage_diffusion.metrics.classifier import Classifier
from multistage_diffusion.metrics.cost import CONVENTION, denoiser_cost, training_flops
from multistage_diffusion.metrics.extractor import Description, FeatureExtractor
from multistage_diffusion.metrics.extractors import load_extractor
from multistage_diffusion.metrics.metric import FeatureMetric, Metric
from multistage_diffusion.metrics.reference import PublishedMoments
from multistage_diffusion.metrics.table import feature_metrics, resolve, with_followers
from multistage_diffusion.process_group import SINGLE, ProcessGroup
from multistage_diffusion.records import check, check_count, check_seed
from multistage_diffusion.sampling import Sampler

_MOST = 10**9  # images in a batch
_CAUTION = "the classifier was trained without held-out images, by default on the reference itself: give train"


@dataclass(frozen=True)
class Reference:
    """Real images: `source` as the user wrote it, number, shape and SHA-256; or a file of published statistics."""

    source: str
    images: int | None
    shape: tuple[int, ...] | None
    digest: str


@dataclass(frozen=True)
class SampleCost:
    """What an image costs to draw, and what training cost.

    Attributes:
        solver: The solver.
        steps: Its steps.
        precision: What the network computes in.
        nfe: Network evaluations of an image; a guided one, which is two passes of the network, counts once.
        stage_calls: Those in each stage.
        stage_gmacs: 10^9 multiply-accumulates of one evaluation in each stage.
        gflops_per_sample: 10^9 FLOPs of an image, both passes of guided evaluations included.
        flops: How multiply-accumulates and FLOPs are counted.
        guidance: Scale of classifier-free guidance, if there is any.
        training_images: Images that the model was trained on, if that is known.
        training_pflops: 10^15 FLOPs of its training.
    """

    solver: str
    steps: int
    precision: str
    nfe: int
    stage_calls: tuple[int, ...]
    stage_gmacs: tuple[float, ...]
    gflops_per_sample: float
    flops: str = CONVENTION
    guidance: float | None = None
    training_images: int | None = None
    training_pflops: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """What was measured. Every figure is an attribute by its key, too: `evaluation.fd`, `evaluation.loss_error`.

    Attributes:
        figures: Figures of the metrics by key; all values are such as JSON holds.
        reference: The real images, if there are any.
        statistics: The file of published statistics that the distances were measured to, in place of the real images.
        samples: Number of generated images; 0 where none was drawn.
        seconds: Wall time of all.
        features: What the distances were measured with.
        cost: What an image costs to draw; none for a set of images.
        sampling_seconds: Wall time of drawing.
        cautions: What a reader must know of the figures, like too few images; one line each.
    """

    figures: dict[str, Any]
    reference: Reference | None
    samples: int
    seconds: float
    statistics: Reference | None = None
    features: Description | None = None
    cost: SampleCost | None = None
    sampling_seconds: float | None = None
    cautions: tuple[str, ...] = ()

    def __getattr__(self, name: str) -> Any:
        figures = vars(self).get("figures", {})
        if name not in figures:
            raise AttributeError(f"no figure {name}; measured: {', '.join(figures)}")
        return figures[name]

    def __getitem__(self, key: str) -> Any:
        warnings.warn(f'evaluation["{key}"] becomes evaluation.to_dict()["{key}"]', DeprecationWarning, stacklevel=2)
        return self.to_dict()[key]

    def to_dict(self) -> dict[str, Any]:
        """The JSON document: figures and costs side by side, without what was not measured."""
        optional = {
            "cautions": list(self.cautions) or None,
            "features": None if self.features is None else asdict(self.features),
            "sampling_seconds": self.sampling_seconds,
            "samples": self.samples,
            "reference": _plain(self.reference),
            "statistics": _plain(self.statistics),
            **(_plain(self.cost) or {}),
            "seconds": self.seconds,
        }
        return {**self.figures, **{key: value for key, value in optional.items() if value is not None}}


def _plain(record: Reference | SampleCost | None) -> dict[str, Any] | None:
    """A record as JSON holds it, without what is none."""
    if record is None:
        return None
    values = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(record).items()}
    return {key: value for key, value in values.items() if value is not None}


def evaluate(
    denoiser: Denoiser,
    reference: Data | None,
    metrics: Sequence[str | Metric] | None = None,
    *,
    features: str | FeatureExtractor | None = None,
    train: Images | None = None,
    statistics: PublishedMoments | None = None,
    num: int = 1_000,
    sampler: Sampler | None = None,
    seed: int = 0,
    batch_size: int = 256,
    codec: Codec | None = None,
    stage_images: Sequence[int] | None = None,
    trunk_images: int = 0,
    processes: ProcessGroup = SINGLE,
) -> Evaluation:
    """Measure a model.

    Args:
        denoiser: The model.
        reference: Real images, held out from its training, or what `as_data` takes; none if `statistics` suffice.
        metrics: Names of `METRICS`, and metrics of your own; by default `loss`, and `fd` where `features` are given.
        features: What the distances see the images with: a name like `classifier`, or an extractor.
        train: Images to train the features `classifier` on; without them it is trained on the reference.
        statistics: Published statistics, to which `fd` is measured in place of the reference.
        num: Number of generated images.
        sampler: How images are drawn; by default as `denoiser.sampler` says, or as `Sampler()`.
        seed: Seed of the first image, and of the held-out loss.
        batch_size: Images at a time; changes nothing but rounding.
        codec: Autoencoder of a latent model: its images are decoded, and its loss is that of latents.
        stage_images: Images that each stage was trained on, for the training FLOPs.
        trunk_images: Images that the unified network was trained on from which the model branched.
        processes: The processes that share the work.

    Returns:
        The figures, the same in every process. `fd_infinity` comes with `fd` where fewer images are drawn than is
        customary.

    Raises:
        ConfigError: Unknown metric, or no features where a metric needs them.
        NumericsError: An image is not finite.
        PeerError: Another process failed with its share.
    """
    begin, drawing = time.perf_counter(), _Clock()
    sampler = sampler or denoiser.sampler or Sampler()
    check_count(num, "num")
    check_count(batch_size, "batch-size")
    check_seed(seed, num)
    check(batch_size <= _MOST, "batch-size", f"at most {_MOST}", batch_size)
    reference = None if reference is None else cast(Images, as_data(reference))
    if codec is None and reference is not None and denoiser.shape != reference.shape:
        of_size = denoiser.shape[0] == reference.shape[0] and denoiser.shape[1] == denoiser.shape[2]
        mend = f"read them with the resolution {denoiser.shape[1]}" if of_size else "choose others"
        raise ConfigError(
            f"the run makes images of {denoiser.shape}, but those of {reference.name} are {reference.shape}; {mend}"
        )
    of_features, of_model = resolve(metrics or (("loss",) if features is None else ("fd", "loss")))
    figures, extractor = dict[str, Any](), None
    if of_features:
        if features is None:
            names = ", ".join(metric.name for metric in of_features)
            raise ConfigError(f'metrics {names} need features, and no extractor was given, like features="classifier"')
        extractor = _extractor(features, reference, train, denoiser.device, processes)
        part = processes.shard(num)
        images = generated(denoiser, len(part), sampler, seed=seed + part.start, batch_size=batch_size, codec=codec)
        images = drawing.timed(images) if part else ()
        figures = _distances(extractor, statistics or reference, images, of_features, num, processes)
    if of_model:
        if reference is None:
            raise ConfigError(f"the metric {of_model[0].name} needs real images, and none were given")
        examples = reference
        if codec is not None:
            with processes.local_main_first():
                examples = codec.encode(reference)
        with torch.no_grad():
            for metric in of_model:
                figures |= metric.measure(
                    denoiser, examples, seed=seed, batch_size=int(batch_size), processes=processes
                )
    spent = drawing.seconds if of_features else None
    samples = num if of_features else 0
    measured = _evaluation(figures, begin, spent, samples, reference, statistics, extractor, processes)
    return replace(measured, cost=_cost(denoiser, sampler, stage_images, trunk_images))


def evaluate_images(
    images: Images,
    reference: Images | None,
    metrics: Sequence[str | Metric] = ("fd",),
    *,
    features: str | FeatureExtractor = "classifier",
    train: Images | None = None,
    statistics: PublishedMoments | None = None,
    device: torch.device | str = "cpu",
    processes: ProcessGroup = SINGLE,
) -> Evaluation:
    """Measure a set of images, whoever made them.

    Args:
        images: The images.
        reference: Real images of the same shape; none if `statistics` suffice.
        metrics: Metrics of features: names of `METRICS`, and metrics of your own.
        features: As in `evaluate`.
        train: As in `evaluate`.
        statistics: As in `evaluate`.
        device: Where features given by name are computed.
        processes: The processes that share the work.

    Returns:
        The figures, the same in every process.

    Raises:
        ConfigError: Unknown metric, or one like `loss`, which needs a model.
        PeerError: Another process failed with its share.
    """
    begin, part = time.perf_counter(), processes.shard(len(images))
    chosen = feature_metrics(metrics)
    extractor = _extractor(features, reference, train, device, processes)
    batches = (images.floats(rows) for rows in torch.arange(part.start, part.stop).split(500))
    figures = _distances(extractor, statistics or reference, batches, chosen, len(images), processes)
    return _evaluation(figures, begin, None, len(images), reference, statistics, extractor, processes)


def _extractor(
    features: str | FeatureExtractor,
    reference: Images | None,
    train: Images | None,
    device: torch.device | str,
    processes: ProcessGroup,
) -> FeatureExtractor:
    if isinstance(features, FeatureExtractor):
        return features
    with processes.local_main_first():  # a classifier is trained, or weights are downloaded, once
        if train is None:
            return load_extractor(features, reference, device=device)
        return load_extractor(features, train, reference, device=device)


def _distances(
    extractor: FeatureExtractor,
    reference: Images | PublishedMoments | None,
    images: Iterable[Tensor],
    metrics: Sequence[FeatureMetric],
    num: int,
    processes: ProcessGroup,
) -> dict[str, Any]:
    """Figures of `num` images, of which these are the share of this process; in the first process."""
    metrics = with_followers(metrics, num, extractor.num_features)
    first = processes.shard(num).start
    figures = distances(extractor, reference, images, metrics, first=first, processes=processes)
    if isinstance(extractor, Classifier) and extractor.accuracy is None:
        figures["cautions"] = [*figures.get("cautions", ()), _CAUTION]
    return figures


def _evaluation(
    figures: dict[str, Any],
    begin: float,
    sampling_seconds: float | None,
    samples: int,
    reference: Images | None,
    statistics: PublishedMoments | None,
    extractor: FeatureExtractor | None,
    processes: ProcessGroup,
) -> Evaluation:
    """The figures and times of the first process, in every process."""
    times = [round(time.perf_counter() - begin, 3), None if sampling_seconds is None else round(sampling_seconds, 3)]
    figures, times = processes.broadcast([figures, times])
    return Evaluation(
        {key: value for key, value in figures.items() if key != "cautions"},
        None if reference is None else Reference(reference.name, len(reference), reference.shape, reference.digest),
        samples,
        times[0],
        statistics=None if statistics is None else Reference(statistics.source, None, None, statistics.digest),
        features=None if extractor is None else extractor.describe(),
        sampling_seconds=times[1],
        cautions=tuple(figures.get("cautions", ())),
    )


class _Clock:
    """Adds up the seconds that a loop waits for its images."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def timed(self, images: Iterator[Tensor]) -> Iterator[Tensor]:
        while True:
            begin = time.perf_counter()
            batch = next(images, None)
            self.seconds += time.perf_counter() - begin
            if batch is None:
                return
            yield batch


def _cost(denoiser: Denoiser, sampler: Sampler, stage_images: Sequence[int] | None, trunk_images: int) -> SampleCost:
    cost = denoiser_cost(denoiser)
    stage_calls = sampler.stage_calls(denoiser.process, denoiser.stages)
    passes = sampler.stage_calls(denoiser.process, denoiser.stages, labels=denoiser.classes > 0)
    return SampleCost(
        solver=sampler.name,
        steps=sampler.steps,
        precision=denoiser.precision,
        nfe=sum(stage_calls),
        stage_calls=stage_calls,
        stage_gmacs=tuple(stage.gmacs for stage in cost.stages),
        guidance=None if sampler.guidance == 1 else sampler.guidance,
        gflops_per_sample=cost.flops(passes) / 1e9,
        training_images=None if stage_images is None else sum(stage_images) + trunk_images,
        training_pflops=None if stage_images is None else training_flops(denoiser, stage_images, trunk_images) / 1e15,
    )
