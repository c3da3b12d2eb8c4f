"""From a source's name to its images: the one entry for all of them, and how each is split."""

from __future__ import annotations

import contextlib
import errno
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path
from typing import Literal, TypeAlias, get_args, overload

import torch
from jaxtyping import Int
from torch import Tensor

from multistage_diffusion.config import DataConfig, LabelMode, Scaling
from multistage_diffusion.data.arrays import read_npy, read_npz
from multistage_diffusion.data.changes import changes_since, remember
from multistage_diffusion.data.cifar import read_cifar10
from multistage_diffusion.data.collection import Collection, Reading
from multistage_diffusion.data.convert import read_shards, write_images
from multistage_diffusion.data.doubts import warn_of
from multistage_diffusion.data.emoji import read_emoji
from multistage_diffusion.data.examples import Examples
from multistage_diffusion.data.files import read_folder, read_webdataset, read_zip
from multistage_diffusion.data.hub import read_hub
from multistage_diffusion.data.idx import read_mnist_like
from multistage_diffusion.data.images import Images, require_pictures
from multistage_diffusion.data.layout import shown
from multistage_diffusion.data.shards import INDEX, ShardWriter
from multistage_diffusion.errors import CheckpointError, DataError, suggest
from multistage_diffusion.files import remove_abandoned, whole_directory
from multistage_diffusion.records import check, check_count
from multistage_diffusion.rng import permutation

Split: TypeAlias = Literal["train", "test", "all"]

NAMES = (
    *("digits", "mnist", "fashion-mnist", "cifar10", "noto-emoji"),
    *("folder:PATH", "zip:PATH", "npz:PATH", "npy:PATH", "shards:PATH", "webdataset:PATTERN", "hf:NAME"),
)
_READERS: dict[str, Callable[[str, Path, Reading], Collection]] = {
    "folder": read_folder,
    "zip": read_zip,
    "npz": lambda source, path, reading: read_npz(source, path, reading.scale),
    "npy": lambda source, path, reading: read_npy(source, path, reading.scale),
    "shards": lambda source, path, reading: read_shards(source, path, reading.scale),
    "webdataset": read_webdataset,
    "hf": read_hub,
}
_ARRAYS = ("npz", "npy", "shards")
_ENDINGS = {".zip": "zip", ".npz": "npz", ".npy": "npy", ".tar": "webdataset"}
_OWN = {"labels": "its own", "split": "held out: its own test part"}
_DIGITS_TEST = 500  # of 1,797
_SPLIT_SEED = 0  # the split is a property of the data: it does not change with a run's seed


@overload
def load_data(
    source: str,
    *,
    split: Split = "train",
    root: str | None = None,
    resolution: int | None = None,
    max_bad: float = 0.0,
    labels: LabelMode = "auto",
) -> Images: ...


@overload
def load_data(
    source: str,
    *,
    split: Split = "train",
    root: str | None = None,
    resolution: int | None = None,
    max_bad: float = 0.0,
    scale: Scaling,
    labels: LabelMode = "auto",
) -> Examples: ...


def load_data(
    source: str,
    *,
    split: Split = "train",
    root: str | None = None,
    resolution: int | None = None,
    max_bad: float = 0.0,
    scale: Scaling = "pictures",
    labels: LabelMode = "auto",
) -> Examples:
    """Images of a source.

    Args:
        source: `digits`, `mnist`, `fashion-mnist`, `cifar10`, `noto-emoji`, `folder:PATH`, `zip:PATH`, `npz:PATH`,
            `npy:PATH`, `hf:NAME`, `webdataset:PATTERN` or `shards:PATH`.
        split: The part to train on, the part held out, or both (training part first). A source without parts of its own
            holds out about a tenth, chosen by the images' content.
        root: Folder that holds the source's files, looked in first; relative paths in the source start there.
        resolution: Crop to the central square and resize to this many pixels a side; by default no resizing.
        max_bad: Largest share of a collection's pictures that may be unreadable and skipped; 0 refuses the first.
        scale: What arrays hold: `pictures`, or fields, each channel of which is kept as it is (`none`), brought to
            [-1, 1] (`range`) or to mean 0 and standard deviation 1 (`standardise`), as the training part has them.
        labels: `auto` takes the source's labels, which all images must have, or none; `none` reads none.

    Returns:
        `Images`, 8 bits a channel, or `Fields`; those of `shards:PATH` stay on disk.

    Raises:
        DataError: Unknown source, missing, damaged or hostile files, no images, or images of different sizes.
    """
    check(isinstance(source, str), "source", "text like digits or folder:PATH", source)
    check(split in get_args(Split), "split", f"one of {', '.join(get_args(Split))}", split)
    check(root is None or isinstance(root, (str, os.PathLike)), "root", "a folder", root)
    check(labels in get_args(LabelMode), "labels", f"one of {', '.join(get_args(LabelMode))}", labels)
    check(scale in get_args(Scaling), "scale", f"one of {', '.join(get_args(Scaling))}", scale)
    if resolution is not None:
        check_count(resolution, "resolution", least=0)
    check(isinstance(max_bad, Real) and 0 <= max_bad <= 1, "max-bad", "in [0, 1]", max_bad)
    root = None if root is None else os.fspath(root)
    collection = _checked(source, split, root, Reading(resolution, max_bad, scale, labels))
    return _part(collection, split, resolution)


def load_parts(config: DataConfig) -> tuple[Images, Images]:
    """The pictures to train on and those held out, of a source that is read once; with the warnings of `warn_of`.

    Args:
        config: Source, root, resolution, and what is done with unreadable pictures.

    Returns:
        What `load_data` gives for `train` and `test`.

    Raises:
        DataError: As for `load_data`.
    """
    reading = Reading(config.resolution, config.tolerated, config.scale, config.labels)
    collection = _checked(config.source, "all", config.root, reading)
    train, test = (require_pictures(_part(collection, split, config.resolution)) for split in ("train", "test"))
    warn_of(train)
    return train, test


def _checked(source: str, split: Split, root: str | None, reading: Reading) -> Collection:
    """Read a source, and say which files changed since the last look."""
    collection = read_source(source, split, root, reading)
    if told := changes_since(_place(source, root), collection):
        warnings.warn(f"{source}: {told}; msd data {source} takes them as they are", stacklevel=3)
    return collection


def _part(collection: Collection, split: Split, resolution: int | None) -> Examples:
    images = collection.part(split)
    return images if resolution is None else images.fitted(resolution)


@dataclass(frozen=True)
class Look:
    """What `look` found.

    Attributes:
        images: The images of the part asked for.
        changes: Files that are no longer what they were at the last look; none if all are.
    """

    images: Examples
    changes: str | None


def look(source: str, split: Split, root: str | None, reading: Reading) -> Look:
    """Read a source, compare its files with the last look, and record them as they are now.

    Args:
        source: As for `load_data`.
        split: As for `load_data`.
        root: As for `load_data`.
        reading: How pictures are read.

    Returns:
        The images, and what changed.

    Raises:
        DataError: As for `load_data`.
    """
    collection, place = read_source(source, split, root, reading), _place(source, root)
    changes = changes_since(place, collection)
    _remember(place, collection)
    return Look(_part(collection, split, reading.resolution), changes)


def convert(source: str, folder: Path, root: str | None, reading: Reading) -> None:
    """Write all of a source as `shards:FOLDER`; pictures are read one by one, and never all in memory.

    Args:
        source: As for `load_data`.
        folder: Where to; written whole or not at all. What a conversion wrote there before is replaced.
        root: As for `load_data`.
        reading: How pictures are read.

    Raises:
        DataError: As for `load_data`.
        CheckpointError: The disk is full, or the folder holds something else.
    """
    remove_abandoned(folder)
    with whole_directory(folder) as temporary, contextlib.closing(ShardWriter(temporary)) as writer:
        collection = read_source(source, "all", root, replace(reading, writer=writer))
        if reading.resolution is not None:
            collection = replace(collection, images=collection.images.fitted(reading.resolution))
        write_images(collection, temporary, writer)
    _remember(_place(source, root), collection)


def _remember(place: str, collection: Collection) -> None:
    """Record the files; a cache that cannot be written costs the record, and nothing that was read."""
    try:
        remember(place, collection)
    except CheckpointError as error:
        warnings.warn(f"changes of these files cannot be told later: {error}", stacklevel=3)


def read_source(source: str, split: Split, root: str | None, reading: Reading) -> Collection:
    """All of a source, or at least one part of it.

    Args:
        source: As for `load_data`.
        split: The part that is needed.
        root: Folder that holds the source's files.
        reading: How pictures are read. Sources that are not made of pictures come as they are, and in memory.

    Returns:
        The images, and which of them are held out.

    Raises:
        DataError: As for `load_data`.
    """
    collection = _read(source, split, root, reading)
    if reading.labels == "none":
        notes = {**collection.images.notes, "labels": "none: not read, as the option says"}
        images = replace(collection.images, labels=None, classes=(), notes=notes)
        collection = replace(collection, images=images)
    return collection


def _read(source: str, split: Split, root: str | None, reading: Reading) -> Collection:
    """By the source's kind."""
    if reading.resolution is not None and not 4 <= reading.resolution <= 4096:
        raise DataError(f"resolution must lie in 4..4096, got {reading.resolution}")
    kind, _, rest = source.partition(":")
    path = Path(root or "", rest).expanduser()
    _require_usable(path)
    if reading.scale != "pictures" and kind not in _ARRAYS:
        raise DataError(f"{source}: holds pictures; data.scale {reading.scale} is for {', '.join(_ARRAYS)} of numbers")
    if kind in _READERS and rest:
        _require_kind(source, kind, path)
        return _READERS[kind](source, path, reading)
    match source:
        case "digits":
            return _digits()
        case "mnist" | "fashion-mnist" | "cifar10":
            return _own_parts(source, split, root)
        case "noto-emoji":
            return read_emoji(root, reading)
        case _:
            raise DataError(f"no data source {source!r}{_meant(source, root) or suggest(kind, NAMES)}")


def _require_usable(path: Path) -> None:
    """Refuse a path that cannot be opened, where even the question whether it is there fails."""
    try:
        path.stat()
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise DataError(f"{str(path)[:60]}...: the name is too long") from error
        if error.errno not in (errno.ENOENT, errno.ENOTDIR):  # which readers name; patterns name no file
            raise DataError(f"{shown(str(path))}: cannot be opened ({error.strerror})") from error
    except ValueError as error:
        raise DataError(f"{shown(str(path))[:60]}: no file has such a name") from error


def _meant(source: str, root: str | None) -> str | None:
    """A hint for whoever named a file or folder without saying what it is."""
    path = Path(root or "", source).expanduser()
    kind = _kind_of(path) if source else None
    return None if kind is None else f'; did you mean "{kind}:{source}"?'


def _kind_of(path: Path) -> str | None:
    """What kind of source a path is, by its name; none where there is nothing, or another thing."""
    if os.path.isdir(path):  # false where the question fails, as for a name that is too long
        return "shards" if os.path.isfile(path / INDEX) else "folder"
    return _ENDINGS.get(path.suffix.lower()) if os.path.isfile(path) else None


def _require_kind(source: str, kind: str, path: Path) -> None:
    """Refuse a file or folder of another kind than the source says."""
    other = _kind_of(path)
    alike = {kind, other} in ({"folder", "hf"}, {"folder", "shards"}, {"zip", "npz"}) or kind == "hf"
    if other is not None and other != kind and not alike:
        raise DataError(f'{source}: is of another kind; did you mean "{other}:{source.partition(":")[2]}"?')
    if kind not in ("hf", "webdataset", "shards") and not path.exists():
        raise DataError(f"{source}: there is no {path}")


def _place(source: str, root: str | None) -> str:
    """Where a source is, however the user wrote it."""
    kind, _, rest = source.partition(":")
    return f"{kind}:{os.path.abspath(os.path.join(root or '', os.path.expanduser(rest)))}"


def _digits() -> Collection:
    """Scikit-learn's 1,797 digits of 8 x 8 pixels; 500 of them, evenly over the classes, are held out."""
    from sklearn.datasets import load_digits  # a second to import

    rows, targets = load_digits(return_X_y=True)
    pixels = torch.from_numpy(rows).mul(255 / 16).round().to(torch.uint8).reshape(-1, 1, 8, 8)  # stored as 0..16
    labels = torch.from_numpy(targets).long()
    test = torch.zeros(len(labels), dtype=torch.bool).index_fill_(0, _stratified(labels, _DIGITS_TEST), True)
    notes = {"labels": "its own", "split": f"held out: {_DIGITS_TEST}, evenly over the classes"}
    return Collection(Images("digits", pixels, labels, tuple("0123456789"), notes=notes), test)


def _stratified(labels: Int[Tensor, " batch"], count: int) -> Int[Tensor, " count"]:
    """A fixed random choice that holds each class in proportion: evenly spaced in a shuffled order sorted by class."""
    order = permutation(_SPLIT_SEED, "digits-split", 0, len(labels))
    order = order[labels[order].argsort(stable=True)]
    places = (torch.arange(count, dtype=torch.float64).add(0.5) * len(labels) / count).long()
    return order[places].sort().values


def _own_parts(name: Literal["mnist", "fashion-mnist", "cifar10"], split: Split, root: str | None) -> Collection:
    """A set that comes in two parts; only those needed are read."""
    wanted: tuple[Literal["train", "test"], ...] = ("train", "test") if split == "all" else (split,)
    parts = [read_cifar10(part, root) if name == "cifar10" else read_mnist_like(name, part, root) for part in wanted]
    labels = [part.labels for part in parts if part.labels is not None]
    images = Images(name, torch.cat([part.pixels() for part in parts]), torch.cat(labels), parts[0].classes, notes=_OWN)
    return Collection(
        images, torch.cat([torch.full((len(p),), w == "test") for p, w in zip(parts, wanted, strict=True)])
    )
