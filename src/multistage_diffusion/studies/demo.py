"""The main job: cluster, train multistage and unified models at equal training FLOPs, sample both, evaluate both."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from multistage_diffusion.clustering import Clustering, cluster
from multistage_diffusion.config import RunConfig, StagesConfig, check, to_dict
from multistage_diffusion.data import Images, load_parts
from multistage_diffusion.denoiser import Denoiser
from multistage_diffusion.errors import ConfigError
from multistage_diffusion.evaluation import distances, generated, held_out_loss
from multistage_diffusion.files import read_json, write_json
from multistage_diffusion.metrics.classifier import classifier_features
from multistage_diffusion.metrics.cost import Cost, network_cost
from multistage_diffusion.metrics.extractor import FeatureExtractor
from multistage_diffusion.records import check_seed
from multistage_diffusion.runs import load_run
from multistage_diffusion.sampling import Trace, consecutive_seeds
from multistage_diffusion.stages import Stages
from multistage_diffusion.training.batches import first_counts
from multistage_diffusion.training.run import TrainingSummary, train
from multistage_diffusion.training.trainer import StepResult

ARCHITECTURES = ("multistage", "unified")
CLAIM, RESULTS = "demo.json", "results.json"
FINAL_SETS = 3  # sets of generated images behind the final distance and its standard error
Say = Callable[[str], None]
Step = Callable[[StepResult, int], None]


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """What the demo trains and measures.

    Attributes:
        tflops: Training budget of each model, in TFLOPs (forward and backward).
        points: How many times each model is measured on its way, the end included.
        samples: Generated images behind each distance.
        shown: Images in a sample grid.
        seed: Seed of everything.
    """

    tflops: float = 6.0
    points: int = 5
    samples: int = 500
    shown: int = 40
    seed: int = 0

    def __post_init__(self) -> None:
        check(0 < self.tflops < math.inf, "tflops", "positive", self.tflops)
        check(self.points >= 1, "points", "at least 1", self.points)
        check(self.samples >= 2, "samples", "at least 2", self.samples)
        check(self.shown >= 1, "shown", "at least 1", self.shown)
        check_seed(self.seed, 1_000 + FINAL_SETS * self.samples + self.shown)


@dataclass(frozen=True)
class Point:
    """One measurement on the way.

    Attributes:
        tflops: Training FLOPs spent, in 10^12.
        fd: Fréchet distance to the held-out images, mean over the sets of generated images.
        fd_error: Its standard error over the sets; none for a single set.
        loss: Held-out denoising loss.
        loss_error: Its standard error over images.
        stage_loss: Held-out loss within each of the clustering's stages.
        seconds: Training time since the point before.
    """

    tflops: float
    fd: float
    fd_error: float | None
    loss: float
    loss_error: float
    stage_loss: tuple[float | None, ...]
    seconds: float


@dataclass(frozen=True)
class ModelResult:
    """One trained model.

    Attributes:
        run: Its run directory.
        config: Its configuration.
        cost: Cost of its network.
        shares: Share of each of its stages in training.
        steps: Steps taken.
        stage_images: Images each stage was trained on.
        points: Measurements, the last one at the end.
        image_loss: Held-out loss of each image at the end.
        grid: Images generated from the same seeds for every model.
        trace: Estimates of the clean image along the sampling steps: (sigma, images).
        nfe: Network evaluations of an image.
        sampling_gflops: FLOPs of one image's sampling, in 10^9.
        seconds: Training time.
    """

    run: Path
    config: RunConfig
    cost: Cost
    shares: tuple[float, ...]
    steps: int
    stage_images: tuple[int, ...]
    points: tuple[Point, ...]
    image_loss: Tensor
    grid: Tensor
    trace: tuple[tuple[float, Tensor], ...]
    nfe: int
    sampling_gflops: float
    seconds: float


@dataclass(frozen=True)
class DemoResult:
    """Everything that the report shows.

    Attributes:
        source: Name of the data.
        clustering: The stages and the curves behind them.
        models: A result for each architecture.
        real: Real images beside the generated ones.
        features: What the distance was measured with.
        floor: Distance of the training images themselves to the held-out ones.
        reference: Number of held-out images.
        options: Budget and measurements.
        seconds: Wall time of this call; less than the whole for a demo that went on from an interrupted one.
    """

    source: str
    clustering: Clustering
    models: dict[str, ModelResult]
    real: Tensor
    features: dict[str, Any]
    floor: float
    reference: int
    options: DemoOptions
    seconds: float


def run_demo(
    config: RunConfig,
    out: Path,
    options: DemoOptions = DemoOptions(),
    *,
    device: torch.device | str = "cpu",
    say: Say = print,
    on_step: Callable[[str], Step] | None = None,
) -> DemoResult:
    """Do the main job.

    Args:
        config: The multistage recipe; its edges are replaced by those found here.
        out: Folder of the two run directories; a finished or interrupted demo goes on from what is there.
        options: Budget and measurements.
        device: Where to compute.
        say: Told what happens, in lines.
        on_step: Makes the function that is called after each training step of an architecture.

    Raises:
        ConfigError: The folder holds another demo.
        DataError: The source cannot be read, or has no labels to learn features from.
    """
    begin = time.perf_counter()
    if config.data.autoencoder is not None:
        raise ConfigError("the demo compares models of images; recipes of latents are trained with msd train")
    data, test = load_parts(config.data)
    say(f"{config.data.source}: {len(data)} training and {len(test)} held-out images of {data.shape}")
    clustering = cluster(data, config.process, stages=len(config.model.capacities), seed=options.seed)
    edges = clustering.stages.edges
    say(f"stages at sigma {', '.join(f'{edge:.3g}' for edge in edges)} in {clustering.seconds:.1f} s")
    extractor = classifier_features(data, test)
    say(f"features: {extractor.name}, {extractor.accuracy:.1%} of the held-out images named right")
    config = replace(config, stages=StagesConfig(edges=edges), training=replace(config.training, seed=options.seed))
    _claim(out, config, options)
    models = {}
    for architecture in ARCHITECTURES:
        model_config = replace(config, model=replace(config.model, architecture=architecture))
        step = on_step(architecture) if on_step is not None else None
        models[architecture] = _train_and_measure(
            model_config, out / architecture, data, test, clustering.stages, extractor, options, device, say, step
        )
    batches = (data.floats(rows) for rows in torch.arange(len(data)).split(500))
    floor = distances(extractor, test, batches, ["fd"])["fd"]
    return DemoResult(
        data.name,
        clustering,
        models,
        data.floats(torch.arange(options.shown)),
        asdict(extractor.describe()),
        floor,
        len(test),
        options,
        time.perf_counter() - begin,
    )


def step_flops(config: RunConfig, cost: Cost) -> float:
    """Training FLOPs of one step."""
    shares = Stages(config.edges).shares(config.process)
    return cost.training_flops(first_counts(config.training, shares))


def _train_and_measure(
    config: RunConfig,
    run: Path,
    data: Images,
    test: Images,
    stages: Stages,
    extractor: FeatureExtractor,
    options: DemoOptions,
    device: torch.device | str,
    say: Say,
    on_step: Step | None,
) -> ModelResult:
    """Train to the budget, measuring on the way; a run directory that is there is continued."""
    cost = network_cost(config.model, data.shape)
    last = max(options.points, round(options.tflops * 1e12 / step_flops(config, cost)))
    points = _read_points(run)
    for index in range(len(points), options.points):
        steps = round(last * (index + 1) / options.points)
        part = replace(config, training=replace(config.training, steps=steps, save_every=last))
        summary = train(part, run, data=data, stages=stages, device=device, on_step=on_step)
        sets = FINAL_SETS if index + 1 == options.points else 1
        denoiser = load_run(run, device=device).denoiser
        point = _measure(denoiser, config, test, stages, extractor, options, sets, summary)
        points.append(point)
        write_json(run / RESULTS, {"points": [asdict(point) for point in points]})
        say(f"{run.name}: {point.tflops:.2f} TFLOPs, FD {point.fd:.2f}, held-out loss {point.loss:.4f}")
    loaded = load_run(run, device=device)
    seeds, trace, classes = consecutive_seeds(options.seed, options.shown), Trace(options.shown), config.model.classes
    labels = torch.arange(options.shown) % classes if classes else None
    samples = config.sampling.draw(loaded.denoiser, seeds, labels=labels, callback=trace)
    return ModelResult(
        run=run,
        config=config,
        cost=cost,
        shares=loaded.denoiser.stages.shares(config.process),
        steps=last,
        stage_images=loaded.stage_images or (),
        points=tuple(points),
        image_loss=held_out_loss(loaded.denoiser, test, stages=stages, seed=options.seed).by_image,
        grid=samples.images,
        trace=tuple(zip(trace.sigmas, trace.denoised, strict=True)),
        nfe=samples.nfe,
        sampling_gflops=cost.flops(samples.stage_calls) / 1e9,
        seconds=sum(point.seconds for point in points),
    )


def _measure(
    denoiser: Denoiser,
    config: RunConfig,
    test: Images,
    stages: Stages,
    extractor: FeatureExtractor,
    options: DemoOptions,
    sets: int,
    summary: TrainingSummary,
) -> Point:
    """Distance over sets of generated images, seeds after those of the grid, and the held-out loss."""
    fds = []
    for index in range(sets):
        seed = options.seed + 1_000 + index * options.samples
        images = generated(denoiser, options.samples, config.sampling, seed=seed)
        fds.append(distances(extractor, test, images, ["fd"])["fd"])
    loss = held_out_loss(denoiser, test, stages=stages, seed=options.seed)
    return Point(
        summary.training_flops / 1e12, *_mean_and_error(fds), loss.loss, loss.error, loss.stage_loss, summary.seconds
    )


def _claim(out: Path, config: RunConfig, options: DemoOptions) -> None:
    """Mark the folder as this demo's, or go on with it if it is; refuse a folder of anything else."""
    document = {"config": to_dict(config), "options": to_dict(options)}
    if (out / CLAIM).is_file():
        if read_json(out / CLAIM) != document:
            raise ConfigError(
                f"--out {out} holds a demo with other options; choose another folder, or repeat its options"
            )
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out} holds other files; choose an empty or new folder")
    else:
        write_json(out / CLAIM, document)


def _read_points(run: Path) -> list[Point]:
    """The measurements that an interrupted demo has made."""
    if not (run / RESULTS).is_file():
        return []
    return [
        Point(**{**point, "stage_loss": tuple(point["stage_loss"])}) for point in read_json(run / RESULTS)["points"]
    ]


def _mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and standard error where there is more than one value."""
    numbers = torch.tensor(values, dtype=torch.float64)
    return float(numbers.mean()), float(numbers.std() / len(values) ** 0.5) if len(values) > 1 else None
