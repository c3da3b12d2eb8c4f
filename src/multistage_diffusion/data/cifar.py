"""CIFAR-10 from its binary version. The pickled version is never read: a pickle can run code."""

from __future__ import annotations

from pathlib import Path

import torch

from multistage_diffusion.data.cache import cache_directory
from multistage_diffusion.data.decode import PictureError, read_regular
from multistage_diffusion.data.images import Images
from multistage_diffusion.errors import DataError

_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_RECORD = 1 + 3 * 32 * 32  # a label, then the red, green and blue planes
_TRAIN, _TEST = tuple(f"data_batch_{i}.bin" for i in range(1, 6)), ("test_batch.bin",)
_MAX_BYTES = 100_000 * _RECORD
_MEND = "get cifar-10-binary.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html and unpack it there"


def read_cifar10(split: str, root: str | None) -> Images:
    """CIFAR-10.

    Args:
        split: `train` or `test`.
        root: Folder to look in first.

    Returns:
        RGB images, 32 x 32, with labels.

    Raises:
        DataError: Missing, damaged, or the pickled version.
    """
    folder = _find(root)
    records = torch.cat([_read_batch(folder / name) for name in (_TRAIN if split == "train" else _TEST)])
    return Images("cifar10", records[:, 1:].reshape(-1, 3, 32, 32).contiguous(), records[:, 0].long(), _CLASSES)


def _read_batch(path: Path) -> torch.Tensor:
    """Records of one file."""
    try:
        content = read_regular(path, _MAX_BYTES)
    except PictureError as error:
        raise DataError(f"{path}: {error}") from error
    if len(content) == 0 or len(content) % _RECORD:
        raise DataError(f"{path}: {len(content)} bytes, not a whole number of records of {_RECORD} bytes")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8).reshape(-1, _RECORD)


def _find(root: str | None) -> Path:
    """The folder that holds the binary version."""
    cache = cache_directory() / "cifar10"
    places = [*([Path(root)] if root is not None else []), cache]
    inner = ("", "cifar-10-batches-bin", "cifar10", "cifar-10-batches-py")
    candidates = [place / name for place in places for name in inner]
    for folder in candidates:
        if (folder / _TRAIN[0]).is_file():
            return folder
    for folder in candidates:
        if (folder / "data_batch_1").is_file():
            raise DataError(f"cifar10: {folder} holds the pickled version, which is never read; {_MEND}")
    first = f"{root} (--data-root)" if root is not None else "--data-root (not given)"
    raise DataError(f"cifar10: no {_TRAIN[0]} in {first} or {cache}; {_MEND}")
