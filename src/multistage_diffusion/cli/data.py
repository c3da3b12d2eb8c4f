"""`msd data`: what a source holds; the same as shards."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from multistage_diffusion.cli.common import Common
from multistage_diffusion.config import LabelMode, Scaling, check
from multistage_diffusion.errors import ConfigError
from multistage_diffusion.files import write_atomic

if TYPE_CHECKING:
    from rich.console import Console

    from multistage_diffusion.data.examples import Examples

_CONVERT_MAX_BAD = 0.01
_GRID = 64  # images in the grid, evenly spaced over the set
_GRID_SIDE = 48  # smaller images are enlarged by a whole factor to about this many pixels


@dataclass(frozen=True, kw_only=True)
class Options(Common):
    """Show what a source holds: how many images, their shape and range, classes, what was skipped and why.

    Example: msd data folder:photos --resolution 64 --convert photos-64
    """

    source: tyro.conf.Positional[str]
    """Source of images, like digits, fashion-mnist or folder:PATH."""
    data_root: str | None = None
    """Folder that holds the source's files; looked in first."""
    split: Literal["train", "test", "all"] = "train"
    """The part to train on, the part held out, or both."""
    resolution: int | None = None
    """Crop to the central square and resize to this many pixels a side; by default no resizing."""
    scale: Scaling = "pictures"
    """What arrays hold: pictures, or numbers of any range, kept as they are or scaled, as --data.scale of msd train."""
    labels: LabelMode = "auto"
    """Labels of the source, if it has any, of all its images (auto), or no labels (none)."""
    on_bad_file: Literal["error", "skip"] = "skip"
    """What to do with a picture that cannot be read: stop, or leave it out and list it."""
    max_bad: float | None = None
    """With skip, the largest share of pictures that may be left out; by default all for a look, 0.01 for --convert."""
    convert: str | None = None
    """Write all of the source to this folder: the source shards:FOLDER, which is read without decoding or memory."""
    grid: str | None = None
    """Write a picture of 64 of the images to this PNG file."""


def run(options: Options, console: Console) -> dict[str, Any]:
    """Read the source and describe it.

    Args:
        options: The command's options.
        console: Where the description for people goes.

    Returns:
        The JSON document.

    Raises:
        ConfigError: An option is out of range.
        DataError: The source cannot be found, read or used.
        CheckpointError: A file cannot be written.
    """
    from multistage_diffusion.cli.progress import reading_progress
    from multistage_diffusion.data.collection import Reading
    from multistage_diffusion.data.sources import convert, look

    limit = options.max_bad if options.max_bad is not None else _CONVERT_MAX_BAD if options.convert else 1.0
    check(0 <= limit <= 1, "max-bad", "in [0, 1]", limit)
    if options.grid is not None and Path(options.grid).suffix.lower() != ".png":
        raise ConfigError(f"--grid must name a .png file, got {options.grid}")
    source, root = options.source, options.data_root
    limit = limit if options.on_bad_file == "skip" else 0.0
    reading = Reading(options.resolution, limit, options.scale, options.labels, progress=reading_progress(console))
    if options.convert is not None:
        convert(source, Path(options.convert), root, reading)
        source, root = f"shards:{options.convert}", None
    seen = look(source, options.split, root, reading)
    document = _describe(seen.images, options.split)
    document["changes"] = seen.changes
    if options.grid is not None:
        write_atomic(Path(options.grid), _picture(seen.images))
        document["grid"] = options.grid
    _print(document, console)
    return document


def _describe(images: Examples, split: str) -> dict[str, Any]:
    """The facts, in units of the pixels or fields (range) and of the networks (mean, std)."""
    counts = [] if images.labels is None else images.labels.bincount(minlength=len(images.classes)).tolist()
    return {
        "source": images.name,
        "split": split,
        "images": len(images),
        "shape": list(images.shape),
        **_values(images),
        "classes": list(images.classes),
        "images_per_class": counts,
        "notes": dict(images.notes),
        "skipped": list(images.skipped),
        "digest": images.digest,
    }


def _values(images: Examples) -> dict[str, Any]:
    """Range, mean and standard deviation."""
    from multistage_diffusion.data.doubts import pixel_counts, range_doubt
    from multistage_diffusion.data.fields import Fields, measure_scale
    from multistage_diffusion.data.images import require_pictures

    if isinstance(images, Fields):
        scale = images.codec
        here = measure_scale(images.name, "none", images.images)
        channels = [{"minimum": low, "maximum": high, "mean": mean, "std": std, "shift": shift, "factor": factor}
                    for low, high, mean, std, shift, factor in zip(here.minimum, here.maximum, here.mean, here.std,
                                                                   scale.shift, scale.factor, strict=True)]  # fmt: skip
        return {"dtype": "float32", "scale": scale.kind, "channels": channels, "doubt": None}
    histogram = pixel_counts(require_pictures(images))
    values = histogram.new_tensor(range(256)) / 127.5 - 1.0
    share = histogram / histogram.sum()
    mean = float(values @ share)
    variance = float((values - mean).square() @ share)
    present = histogram.nonzero()
    return {
        "dtype": "uint8",
        "range": [int(present.min()), int(present.max())],
        "mean": round(mean, 6),
        "std": round(variance**0.5, 6),
        "doubt": range_doubt(histogram),
    }


def _print(document: dict[str, Any], console: Console) -> None:
    """The description for people."""
    channels, height, width = document["shape"]
    lines = [
        f"{document['source']} ({document['split']}): {document['images']:,} images, "
        f"{channels} channel{'s' if channels > 1 else ''}, {height} x {width}"
    ]
    if "range" in document:
        low, high = document["range"]
        lines.append(
            f"  pixels {low}..{high} of 0..255; in [-1, 1]: mean {document['mean']:.3f}, std {document['std']:.3f}"
        )
    else:
        lines.append(f"  float32, scale {document['scale']}: the network sees (x - shift) / factor")
        lines += [
            f"  channel {number}: {one['minimum']:.5g}..{one['maximum']:.5g}, mean {one['mean']:.5g}, std "
            f"{one['std']:.5g}; shift {one['shift']:.5g}, factor {one['factor']:.5g}"
            for number, one in enumerate(document["channels"])
        ]
    if document["images_per_class"]:
        pairs = zip(document["classes"], document["images_per_class"], strict=True)
        lines.append(f"  classes: {', '.join(f'{name} {count:,}' for name, count in pairs)}")
    lines += [f"  {key}: {note}" for key, note in document["notes"].items()]
    if document["skipped"]:
        lines.append(f"  skipped {len(document['skipped']):,}:")
        lines += [f"    {line}" for line in document["skipped"][:20]]
        lines += ["    ..."] if len(document["skipped"]) > 20 else []
    lines.append(f"  sha256 {document['digest']}")
    if document["doubt"]:
        lines.append(f"  warning: {document['doubt']}")
    if document["changes"]:
        lines.append(f"  files: {document['changes']}")
    if "grid" in document:
        lines.append(f"  grid: {document['grid']}")
    for line in lines:
        console.print(line, highlight=False)


def _picture(images: Examples) -> bytes:
    """A PNG file of up to 64 images."""
    import torch

    from multistage_diffusion.data.pictures import grid, png

    chosen = torch.linspace(0, len(images) - 1, min(_GRID, len(images))).round().long()
    x = images.floats(chosen)
    shown = x if images.codec is None else images.codec.preview(x)
    return png(grid(shown, scale=max(1, _GRID_SIDE // max(images.shape[1:])), gap=1))
