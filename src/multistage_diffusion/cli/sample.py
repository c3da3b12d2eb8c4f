"""`msd sample`: draw images from a run."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console

from multistage_diffusion.cli import parse as parse_words
from multistage_diffusion.cli.common import Compute, prepare
from multistage_diffusion.cli.editing import EditingOptions
from multistage_diffusion.config import Precision, check
from multistage_diffusion.errors import ConfigError
from multistage_diffusion.sampling.sampler import Sampler, SamplerOptions

if TYPE_CHECKING:
    from torch import Tensor

    from multistage_diffusion.classes import TrainedClasses
    from multistage_diffusion.cli.editing import Given
    from multistage_diffusion.data.fields import Scale
    from multistage_diffusion.data.latents import LatentCodec
    from multistage_diffusion.denoiser import Denoiser
    from multistage_diffusion.process_group import ProcessGroup
    from multistage_diffusion.sampling import Samples, Trace
    from multistage_diffusion.sampling.steps import Callback
else:
    Callback = Denoiser = Given = LatentCodec = ProcessGroup = Samples = Scale = Tensor = Trace = TrainedClasses = Any

RESULT = "samples.json"
TRACED = 8  # images in a denoising trace
_COMPARED = 8  # images drawn once more, to see what reused features change
_MINUTES = 10.0  # that processes wait for one another


# Options that --help shows; --help-all shows the others.
COMMON = ("out", "num", "seed", "label", "guidance", "solver", "steps", "start", "from_sigma", "weights", "device")


@dataclass(frozen=True, kw_only=True)
class Options(EditingOptions, SamplerOptions, Compute):
    """Draw images from a run, or from a folder written by save_pretrained: PNGs, a grid, and a JSON file with the cost.

    Under torchrun the processes share the images: torchrun --nproc_per_node 2 -m -- multistage_diffusion sample ...

    example: msd sample runs/digits --num 64 --solver heun --steps 18 --out samples
    """

    run: tyro.conf.Positional[str]
    """Run directory."""
    out: str
    """Folder for the images; replaced if an earlier msd sample wrote it."""
    num: int | None = None
    """Number of images; by default 16, or as many as --from has."""
    seed: int = 0
    """Seed of the first image; the others follow. A seed is the same image in any batch."""
    label: Annotated[tuple[str, ...], tyro.conf.arg(name="class")] = ()
    """Class of the images by name, for a class-conditional run, or by number where no class is named in digits; of
    several, each is a column of the grid."""
    batch_size: int = 256
    """Images drawn at once; changes no image."""
    precision: Precision = "fp32"
    """What the network computes in: bf16 is faster on GPUs that have it, and changes images a little."""
    weights: Literal["ema", "raw"] = "ema"
    """The averaged weights, or the trained ones."""
    sigma_rel: float | None = None
    """Relative width of another average, like 0.1, for a run trained with --training.sigma-rel."""
    format: Literal["png", "npz"] | None = None
    """Pictures as PNG files, or all in samples.npz; by default npz for a run on fields, in their unit, else png."""
    offload: bool = False
    """Keep only the decoder in use on the device."""
    denoise_trace: bool = False
    """Write trace.png too: estimates of the clean image along the steps, framed by the colour of the stage."""


def parse(arguments: Sequence[str]) -> Options:
    """The options of the command's words.

    Raises:
        ConfigError: A word is wrong, or `--class` names none.
    """
    for word, following in itertools.zip_longest(arguments, arguments[1:], fillvalue="--"):
        check(word != "--class" or not following.startswith("--"), "--class", "the name of a class", "none")
    return parse_words(Options, "sample", arguments, common=COMMON)


def run(options: Options, console: Console) -> dict[str, Any]:
    """Draw the images, write the folder and return the command's document."""
    out = Path(options.out)
    if out.exists() and not (out / RESULT).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out} holds other files; choose an empty or new folder")
    options.require()
    device = prepare(options)

    from multistage_diffusion.data.latents import load_codec
    from multistage_diffusion.process_group import join, local_device
    from multistage_diffusion.records import to_dict
    from multistage_diffusion.runs import load_run
    from multistage_diffusion.sampling import Trace

    device = local_device(device)
    with join(device, _MINUTES) as processes:
        loaded = load_run(options.run, weights=options.weights, sigma_rel=options.sigma_rel, device=device)
        loaded.denoiser.precision = options.precision
        codec = load_codec(options.run, device)
        if options.format == "png" and codec is not None and not codec.pictures:
            raise ConfigError(f"--format png needs a run on pictures; {options.run} was trained on fields: use npz")
        sampler = options.apply(loaded.denoiser.sampler or Sampler())
        classes = _names(options.label, loaded.denoiser.trained_classes)
        given = options.read(loaded.denoiser.shape, codec)
        num = options.num if options.num is not None else 16 if given is None else len(given.x)
        check(num >= len(classes), "num", f"at least {len(classes)}, the number of classes", num)
        labels = list(itertools.islice(itertools.cycle(classes), num)) or None
        trace = Trace(TRACED) if options.denoise_trace and processes.is_main else None
        samples = _draw(options, loaded.denoiser, num, sampler, labels, given, trace, processes)
        document = {
            "run": options.run,
            "weights": options.weights,
            "ema_length": options.sigma_rel,
            "step": loaded.step,
            "images": num,
            "classes": classes,
            **options.document(),
            **to_dict(sampler),
            "precision": options.precision,
            "nfe": samples.nfe,
            "stage_calls": list(samples.stage_calls),
            "seed": options.seed,
            "seconds": round(samples.seconds, 3),
        }
        names = list[str]()
        with processes.all_or_none():  # the others wait for the files
            if processes.is_main:
                document |= _reuse(options, loaded.denoiser, sampler, samples, labels)
                names = _write(options, document, samples, labels, codec, given, trace, loaded.denoiser)
    console.print(
        f"wrote {num} images and grid.png to {out}: {sampler.name}, {samples.nfe} calls of the network each "
        f"({', '.join(f'stage {k}: {calls}' for k, calls in enumerate(samples.stage_calls))}), {samples.seconds:.1f} s"
    )
    if "saved_flops" in document:
        error = document["reuse_error"]
        compared = "" if error is None else f"; images of a trunk at each evaluation differ by {error:.3g} (RMS)"
        console.print(
            f"the trunk ran {samples.encoder_passes} times, {document['saved_flops']:.1%} fewer FLOPs in all{compared}"
        )
    return {**document, "files": [str(out / name) for name in names], "grid": str(out / "grid.png")}


def _draw(
    options: Options,
    denoiser: Denoiser,
    num: int,
    sampler: Sampler,
    labels: Sequence[str] | None,
    given: Given | None,
    callback: Callback | None,
    processes: ProcessGroup,
) -> Samples:
    """Images of consecutive seeds, or those between two, which one process draws; in process 0.

    Of several processes, each draws its share: an image does not depend on which.
    """
    from multistage_diffusion.sampling import consecutive_seeds, interpolate

    start = None if given is None else given.start(num)
    seeds, shares = consecutive_seeds(options.seed, num), processes.size > 1 and options.interpolate is None
    part = processes.shard(num) if shares else range(num if processes.is_main else 0)
    rows = slice(part.start, max(part.stop, part.start + 1))  # a process without a share draws one image in vain
    if shares:
        labels = None if labels is None else labels[rows]
        start = None if start is None else replace(start, images=start.images[rows])
    shared: dict[str, Any] = {
        "labels": labels,
        "start": start,
        "batch_size": options.batch_size,
        "offload": options.offload,
        "callback": callback,
    }
    with processes.all_or_none():
        if options.interpolate is None:
            samples = sampler.draw(denoiser, seeds[rows], **shared)
        elif len(options.label) > 1:
            raise ConfigError(f"--interpolate draws one class, got {' '.join(options.label)}")
        else:
            samples = interpolate(denoiser, *options.interpolate, num, sampler=sampler, **shared)
    if processes.size == 1:
        return samples
    images = processes.rows_on_main(samples.images[: len(part)])
    return replace(samples, images=images, seeds=tuple(seeds.tolist()) if shares else samples.seeds)


def _write(
    options: Options,
    document: dict[str, Any],
    samples: Samples,
    labels: Sequence[str] | None,
    codec: LatentCodec | Scale | None,
    given: Given | None,
    trace: Trace | None,
    denoiser: Denoiser,
) -> list[str]:
    """Write the folder; the names of the files of images in it."""
    from multistage_diffusion.data import to_uint8
    from multistage_diffusion.data.pictures import grid, picture, png, stack
    from multistage_diffusion.files import whole_directory

    pictures = codec is None or codec.pictures
    kind = "seed" if options.interpolate is None else "frame"
    npz = options.format == "npz" or not pictures
    names = ["samples.npz"] if npz else [f"images/{kind}-{seed:08d}.png" for seed in samples.seeds]
    images = samples.images if codec is None else codec.decode(samples.images)
    images = images if given is None else given.with_kept(images)
    scale, columns = max(1, 64 // images.shape[2]), len(options.label) if len(options.label) > 1 else None
    with whole_directory(Path(options.out)) as folder:
        if npz:
            _write_arrays(folder / names[0], to_uint8(images) if pictures else images, samples.seeds, labels)
        else:
            (folder / "images").mkdir()
            for name, image in zip(names, to_uint8(images), strict=True):
                (folder / name).write_bytes(png(picture(image)))
        shown = images if codec is None or pictures else codec.preview(samples.images)
        (folder / "grid.png").write_bytes(png(grid(shown, scale=scale, columns=columns)))
        if trace is not None:
            frames = [denoiser.stages.of(sigma) for sigma in trace.sigmas]
            estimates = trace.denoised if codec is None else [codec.preview(item) for item in trace.denoised]
            framed = frames * len(estimates[0])
            strip = png(grid(stack(estimates), columns=len(frames), scale=scale, gap=3, frames=framed))
            (folder / "trace.png").write_bytes(strip)
        (folder / RESULT).write_text(json.dumps(document, indent=2) + "\n")
    return names


def _reuse(
    options: Options, denoiser: Denoiser, sampler: Sampler, samples: Samples, labels: Sequence[str] | None
) -> dict[str, Any]:
    """What reused features save, and their error on the first images, which are drawn without once more.

    The error is the root of the mean squared difference, in units of [-1, 1]; none for edited and interpolated images.
    """
    if sampler.trunk_every == 1:
        return {}
    from multistage_diffusion.metrics.cost import denoiser_cost, encoder_flops
    from multistage_diffusion.sampling import consecutive_seeds

    saved = encoder_flops(denoiser.backbone, denoiser.shape) * (samples.nfe - samples.encoder_passes)
    document = {
        "encoder_passes": samples.encoder_passes,
        "saved_flops": saved / denoiser_cost(denoiser).flops(samples.stage_calls),
    }
    if options.start is not None or options.interpolate is not None:
        return document | {"reuse_error": None}
    count = min(_COMPARED, len(samples.images))
    exact = replace(sampler, trunk_every=1).draw(
        denoiser, consecutive_seeds(options.seed, count), labels=labels[:count] if labels else None
    )
    error = (exact.images - samples.images[:count]).square().mean().sqrt()
    return document | {"reuse_error": float(error)}


def _names(words: Sequence[str], record: TrainedClasses | None) -> list[str]:
    """The classes by name, where the model knows it."""
    return [word if record is None else record.names[record.number(word)] for word in words]


def _write_arrays(path: Path, images: Tensor, seeds: Sequence[int], labels: Sequence[str] | None) -> None:
    """All images in one file, (N, C, H, W), which the source `npz:PATH` reads; seeds and classes beside them."""
    import numpy as np

    arrays: dict[str, Any] = {"images": images.numpy(), "seeds": np.array(seeds)}
    if labels is not None:
        arrays["labels"] = np.array(labels)
    np.savez(path, **arrays)
