"""MNIST's idx files (plain or gzipped), with headers checked before memory is taken."""

from __future__ import annotations

import gzip
import io
import math
import os
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import UInt8
from torch import Tensor

from multistage_diffusion.data.cache import cache_directory
from multistage_diffusion.data.images import MAX_SET_BYTES, Images
from multistage_diffusion.errors import DataError

_MAX_EXPANSION = 200  # images do not deflate further; deflate itself reaches 1032
_UNCHECKED = 2**20  # bytes below which a file may expand as it likes
_DEBIAN, _KERAS = Path("/usr/share/datasets"), "~/.keras/datasets"
_FASHION_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
_DIGIT_CLASSES = tuple("0123456789")


def read_mnist_like(
    name: Literal["mnist", "fashion-mnist"], split: Literal["train", "test"], root: str | None
) -> Images:
    """Images and labels of MNIST or Fashion-MNIST from its four idx files.

    Args:
        name: Which; also the folder's name in the places where it is looked for.
        split: Its own training or test part.
        root: Folder to look in first.

    Returns:
        Grey images, 28 x 28, with labels.

    Raises:
        DataError: The files are missing, damaged, or not idx files of bytes.
    """
    folder = _find(name, root)
    prefix = "train" if split == "train" else "t10k"
    pixels = read_idx(_member(folder, f"{prefix}-images-idx3-ubyte"), 3)
    labels = read_idx(_member(folder, f"{prefix}-labels-idx1-ubyte"), 1)
    classes = _FASHION_CLASSES if name == "fashion-mnist" else _DIGIT_CLASSES
    return Images(name, pixels[:, None], labels.long(), classes)


def read_idx(path: Path, dimensions: int) -> UInt8[Tensor, ...]:
    """One idx file of bytes.

    Args:
        path: The file; gzipped if its name ends in `.gz`.
        dimensions: Number of dimensions wanted.

    Returns:
        The array.

    Raises:
        DataError: Damaged, of another type or number of dimensions, or longer or shorter than its header says.
    """
    try:
        size = path.stat().st_size
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            return _parse(
                path, file, dimensions, max(_UNCHECKED, size * _MAX_EXPANSION) if path.suffix == ".gz" else size
            )
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error or type(error).__name__})") from error


def _parse(path: Path, file: io.BufferedIOBase, dimensions: int, most: int) -> Tensor:
    """Header, checks, then the array; `most` is what a file of this size can hold."""
    magic = file.read(4)
    if magic != bytes((0, 0, 8, dimensions)):
        raise DataError(f"{path}: not an idx file of bytes with {dimensions} dimensions (begins with {magic.hex()})")
    header = file.read(4 * dimensions)
    if len(header) != 4 * dimensions:
        raise DataError(f"{path}: ends within its header")
    shape = struct.unpack(f">{dimensions}I", header)
    count = math.prod(shape)
    if count > min(most, MAX_SET_BYTES):
        raise DataError(f"{path}: header says {' x '.join(map(str, shape))} bytes, more than such a file can hold")
    content = bytearray(file.read(count))
    if len(content) != count or file.read(1):
        what = "ends before" if len(content) != count else "goes on after"
        raise DataError(f"{path}: {what} the {count} bytes its header says")
    if count == 0:
        raise DataError(f"{path}: holds nothing")
    return torch.frombuffer(content, dtype=torch.uint8).reshape(shape)


def _find(name: str, root: str | None) -> Path:
    """The first of the places that holds the training images."""
    places: Sequence[Path] = [
        *([Path(root)] if root is not None else []),
        *([Path(root) / name] if root is not None else []),
        _DEBIAN / name,
        cache_directory() / name,
    ]
    for place in places:
        if any((place / f"train-images-idx3-ubyte{ending}").is_file() for ending in (".gz", "")):
            return place
    keras = next(
        (
            place / f"{name}.npz"
            for place in (*places, Path(os.path.expanduser(_KERAS)))
            if (place / f"{name}.npz").is_file()
        ),
        None,
    )
    if keras is not None:
        raise DataError(f"{name}: these are not its idx files, but there is Keras's {keras}: use npz:{keras}")
    first = f"{places[0]} (--data-root)" if root is not None else "--data-root (not given)"
    package = f"; on Debian and Ubuntu: apt-get install dataset-{name}" if name == "fashion-mnist" else ""
    raise DataError(
        f"{name}: no train-images-idx3-ubyte.gz in {first}, {_DEBIAN / name} or {cache_directory() / name}{package}"
    )


def _member(folder: Path, name: str) -> Path:
    """A file of the set, gzipped or not."""
    for path in (folder / f"{name}.gz", folder / name):
        if path.is_file():
            return path
    raise DataError(f"{folder / name}.gz: no such file")
