"""`msd evaluate`: measure a run, or a folder of images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro
from rich.console import Console

from multistage_diffusion.cli.common import Compute, prepare
from multistage_diffusion.cli.sample import RESULT as SAMPLES
from multistage_diffusion.config import LabelMode, Precision, check
from multistage_diffusion.errors import ConfigError
from multistage_diffusion.records import check_seed
from multistage_diffusion.sampling.sampler import Sampler, SamplerOptions

if TYPE_CHECKING:
    import torch

    from multistage_diffusion.data import Images
    from multistage_diffusion.process_group import ProcessGroup
    from multistage_diffusion.runs import LoadedRun

_RUN = "config.json"  # a folder with this file is a run directory
_TRAINED = ("classifier", "source")  # features that are trained on images of the source
_MINUTES = 10.0  # that processes wait for one another where they add up their sums


# Options that --help shows; --help-all shows the others.
COMMON = ("data", "metrics", "features", "num", "reference", "seed", "solver", "steps", "weights", "device", "out")


@dataclass(frozen=True, kw_only=True)
class Options(SamplerOptions, Compute):
    """Measure a run, or a folder of images, against real images that were held out from training.

    Metrics: fd (Fréchet distance), fd_infinity (the same, extrapolated to infinitely many images; comes with fd where
    few are drawn), kid (kernel distance), is (inception score's formula), prdc (precision, recall, density, coverage),
    loss (held-out denoising loss, by stage and by noise level). Only with the features inception is fd called fid.

    Under torchrun the processes share the images: torchrun --nproc_per_node 2 -m -- multistage_diffusion evaluate ...

    example: msd evaluate runs/digits --metrics fd,prdc,loss --num 1000
    """

    target: tyro.conf.Positional[str]
    """Run directory, folder of images, or what --data takes, like npz:FILE or zip:FILE; also FILE.npz and FILE.zip, as
    guided-diffusion and EDM write images."""
    data: str | None = None
    """Source of the real images; by default that of the run."""
    metrics: str | None = None
    """Metrics, separated by commas; by default fd,loss for a run and fd for a folder of images."""
    features: str = "classifier"
    """What the distances see the images with: classifier (a small one, trained on the labels of the source),
    efficientnet-lite0, inception or dinov2; behind a colon a local file of its weights (dinov2: folder, or name on the
    hub)."""
    num: int = 1_000
    """Generated images behind the distances, for a run."""
    reference: str = "test"
    """Which real images: test, the held-out ones; train, as published FIDs do; or FILE.npz with the mean (mu) and the
    covariance (sigma) of their features, for fd."""
    seed: int = 0
    """Seed of the first image and of the held-out loss."""
    batch_size: int = 256
    """Images drawn at once; changes no image."""
    precision: Precision = "fp32"
    """What the network computes in: bf16 is faster on GPUs that have it, and changes images a little."""
    weights: Literal["ema", "raw"] = "ema"
    """The averaged weights, or the trained ones."""
    sigma_rel: float | None = None
    """Relative width of another average, like 0.1, for a run trained with --training.sigma-rel."""
    data_root: str | None = None
    """Folder that holds the source's files."""
    resolution: int | None = None
    """Crop to the central square and resize real images, and those of a folder, to this many pixels a side; by default
    as the run's were."""
    labels: LabelMode | None = None
    """Labels of the real images, if they have any, of all (auto), or no labels (none); by default as the run's."""
    out: str | None = None
    """Write the JSON document to this file too."""


def run(options: Options, console: Console) -> dict[str, Any]:
    """Measure.

    Args:
        options: The command's options.
        console: Where people read.

    Returns:
        The command's document.
    """
    device = prepare(options)
    target = Path(options.target)
    if not _is_model(target):
        _images_source(options.target)
    text = options.metrics
    if text is None:
        text = "fd,loss" if _is_model(target) else "fd"
    names = [name.strip() for name in text.split(",") if name.strip()]
    check(len(names) > 0, "metrics", "one or more names separated by commas", repr(text))
    if "fid" in names and options.features.partition(":")[0] != "inception":
        raise ConfigError("fid is fd with the features inception; add --features inception, or ask for fd")
    names = ["fd" if name == "fid" else name for name in names]
    is_file = options.reference.endswith(".npz")
    check_seed(options.seed, options.num)
    known = is_file or options.reference in ("test", "train")
    check(known, "reference", "test, train or FILE.npz (--data names a source of images)", options.reference)

    from multistage_diffusion.files import write_json
    from multistage_diffusion.process_group import join, local_device

    device = local_device(device)
    with join(device, _MINUTES) as processes:
        document = _measure(options, names, target, device, processes)
        if processes.is_main and options.out is not None:
            write_json(Path(options.out), document)
    for key, value in document.items():
        if key == "sigma_loss":
            value = f"{len(value)} noise levels, in the document of --json and --out"
        console.print(f"{key}: {_shown(value)}")
    return document


def _is_model(target: Path) -> bool:
    """Whether the target is a run, a saved model, a folder for diffusers (refused) or an export, and not images."""
    names = (_RUN, "model_index.json")
    return any((target / name).is_file() for name in names) or (target.is_file() and target.suffix == ".safetensors")


def _images_source(target: str) -> str:
    """The source of generated images, as `load_data` takes it.

    Raises:
        ConfigError: The target is no folder, no file of images and no source.
    """
    from multistage_diffusion.data.sources import NAMES

    path = Path(target)
    if path.is_dir():
        return f"folder:{path / 'images' if (path / SAMPLES).is_file() else path}"
    if path.is_file() and path.suffix in (".npz", ".npy", ".zip"):
        return f"{path.suffix[1:]}:{target}"
    if path.is_file() or not (":" in target or target in NAMES):
        raise ConfigError(
            f"{target} is neither a run directory nor a folder or file of images, nor a source like npz:FILE, nor a "
            "file of msd export"
        )
    return target


def _shown(value: Any) -> str:
    """For people: four digits, and no quotes."""
    match value:
        case float():
            return f"{value:.4g}"
        case list() | tuple():
            return ", ".join(map(_shown, value))
        case dict():
            return ", ".join(f"{key} {_shown(part)}" for key, part in value.items())
        case _:
            return str(value)


def _measure(
    options: Options, metrics: Sequence[str], target: Path, device: torch.device, processes: ProcessGroup
) -> dict[str, Any]:
    """The document, the same in every process."""
    from multistage_diffusion.data import load_data
    from multistage_diffusion.data.latents import load_codec
    from multistage_diffusion.evaluation import evaluate, evaluate_images
    from multistage_diffusion.metrics.extractors import load_extractor
    from multistage_diffusion.metrics.reference import read_moments
    from multistage_diffusion.metrics.table import resolve
    from multistage_diffusion.runs import load_run

    loaded = None
    if _is_model(target):
        loaded = load_run(target, weights=options.weights, sigma_rel=options.sigma_rel, device=device)
    of_features, of_model = resolve(metrics)
    statistics = None if options.reference in ("test", "train") else read_moments(Path(options.reference))
    train = test = None
    if statistics is None or of_model or options.features in _TRAINED:
        train, test = _real_images(options, target, loaded)
    real = train if options.reference == "train" else test
    extractor = None
    if of_features:
        with processes.local_main_first():  # a classifier is trained, or weights are downloaded, once
            extractor = load_extractor(options.features, train, test, device=device)
    if loaded is None:
        evaluation = evaluate_images(
            load_data(
                _images_source(options.target),
                split="all",
                root=options.data_root,
                resolution=options.resolution,
                labels="none",
            ),
            real,
            metrics,
            features=extractor or options.features,
            statistics=statistics,
            processes=processes,
        )
    else:
        loaded.denoiser.precision = options.precision
        codec = load_codec(target, device)
        evaluation = evaluate(
            loaded.denoiser,
            real,
            metrics,
            features=extractor,
            statistics=statistics,
            num=options.num,
            sampler=options.apply(loaded.denoiser.sampler or Sampler()),
            seed=options.seed,
            batch_size=options.batch_size,
            codec=codec,
            stage_images=loaded.stage_images,
            trunk_images=loaded.trunk_images,
            processes=processes,
        )
    return {"target": str(target), "step": loaded.step if loaded else None, **evaluation.to_dict()}


def _real_images(options: Options, target: Path, loaded: LoadedRun | None) -> tuple[Images, Images]:
    """Training and held-out images of the source: the option's, or the run's own."""
    from multistage_diffusion.data import load_data

    config = loaded.config.data if loaded and loaded.config else None
    source = options.data or (config.source if config else None)
    if source is None:
        raise ConfigError(f"--data is needed: {target} does not say which images it should resemble")
    train, test = (
        load_data(
            source,
            split=split,
            root=options.data_root or (config.root if config and options.data is None else None),
            resolution=options.resolution or (config.resolution if config else None),
            max_bad=config.tolerated if config else 0.0,
            labels=options.labels or (config.labels if config else "auto"),
        )
        for split in ("train", "test")
    )
    return train, test
