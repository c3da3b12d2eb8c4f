"""From a source's name to its images: the one entry for all of them, and how each is split."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, TypeAlias

import torch
from jaxtyping import Int
from torch import Tensor

from multistage_diffusion.data.arrays import read_npz
from multistage_diffusion.data.cifar import read_cifar10
from multistage_diffusion.data.emoji import read_emoji
from multistage_diffusion.data.files import read_folder, read_webdataset, read_zip
from multistage_diffusion.data.hub import read_hub
from multistage_diffusion.data.idx import read_mnist_like
from multistage_diffusion.data.images import Images
from multistage_diffusion.errors import DataError, suggest
from multistage_diffusion.rng import permutation

Split: TypeAlias = Literal["train", "test", "all"]

_NAMES = (
    "digits", "mnist", "fashion-mnist", "cifar10", "noto-emoji",
    "folder:PATH", "zip:PATH", "npz:PATH", "hf:NAME", "webdataset:PATTERN",
)  # fmt: skip
_DIGITS_TEST = 500  # of 1,797
_SPLIT_SEED = 0  # the split is a property of the data: it does not change with a run's seed


def load_data(
    source: str,
    *,
    split: Split = "train",
    root: str | None = None,
    resolution: int | None = None,
    max_bad: float = 0.0,
) -> Images:
    """Images of a source.

    Args:
        source: `digits`, `mnist`, `fashion-mnist`, `cifar10`, `noto-emoji`, `folder:PATH`, `zip:PATH`, `npz:PATH`,
            `hf:NAME` or `webdataset:PATTERN`.
        split: The part to train on, the part held out, or both (training part first). A source without parts of its own
            holds out about a tenth, chosen by the images' content.
        root: Folder that holds the source's files, looked in first; relative paths in the source start there.
        resolution: Crop to the central square and resize to this many pixels a side; by default no resizing.
        max_bad: Largest share of a collection's pictures that may be unreadable and skipped; 0 refuses the first.

    Returns:
        The images, 8 bits a channel.

    Raises:
        DataError: Unknown source, missing, damaged or hostile files, no images, or images of different sizes.
    """
    if resolution is not None and not 4 <= resolution <= 4096:
        raise DataError(f"resolution must lie in 4..4096, got {resolution}")
    kind, _, rest = source.partition(":")
    path = Path(root or "", rest).expanduser()
    match (kind, bool(rest)):
        case ("digits", False):
            images = _digits(split)
        case ("mnist" | "fashion-mnist" | "cifar10" as name, False):
            images = _own_parts(name, split, root)
        case ("noto-emoji", False):
            images = read_emoji(root, resolution).part(split)
        case ("folder", True):
            images = read_folder(source, path, resolution, max_bad).part(split)
        case ("zip", True):
            images = read_zip(source, path, resolution, max_bad).part(split)
        case ("npz", True):
            images = read_npz(source, path).part(split)
        case ("webdataset", True):
            images = read_webdataset(source, str(path) if "://" not in rest else rest, resolution, max_bad).part(split)
        case ("hf", True):
            images = read_hub(source, str(path) if path.is_dir() else rest, resolution, max_bad).part(split)
        case _:
            raise DataError(f"no data source {source!r}{suggest(kind, _NAMES)}")
    return images if resolution is None else images.fitted(resolution)


def _digits(split: Split) -> Images:
    """Scikit-learn's 1,797 digits of 8 x 8 pixels; 500 of them, evenly over the classes, are held out."""
    from sklearn.datasets import load_digits  # a second to import

    rows, targets = load_digits(return_X_y=True)
    pixels = torch.from_numpy(rows).mul(255 / 16).round().to(torch.uint8).reshape(-1, 1, 8, 8)  # stored as 0..16
    labels = torch.from_numpy(targets).long()
    digits = Images("digits", pixels, labels, tuple("0123456789"))
    test = _stratified(labels, _DIGITS_TEST)
    train = torch.ones(len(labels), dtype=torch.bool).index_fill_(0, test, False).nonzero()[:, 0]
    return digits.take({"train": train, "test": test, "all": torch.cat((train, test))}[split])


def _stratified(labels: Int[Tensor, " batch"], count: int) -> Int[Tensor, " count"]:
    """A fixed random choice that holds each class in proportion: evenly spaced in a shuffled order sorted by class."""
    order = permutation(_SPLIT_SEED, "digits-split", 0, len(labels))
    order = order[labels[order].argsort(stable=True)]
    places = (torch.arange(count, dtype=torch.float64).add(0.5) * len(labels) / count).long()
    return order[places].sort().values


def _own_parts(name: Literal["mnist", "fashion-mnist", "cifar10"], split: Split, root: str | None) -> Images:
    """A set that comes in two parts."""
    parts = [
        read_cifar10(part, root) if name == "cifar10" else read_mnist_like(name, part, root)
        for part in (("train", "test") if split == "all" else (split,))
    ]
    labels = [part.labels for part in parts if part.labels is not None]
    return Images(name, torch.cat([part.pixels() for part in parts]), torch.cat(labels), parts[0].classes)
