"""What a clustering reads of a data set: all of its images or some, from memory or from disk."""

from __future__ import annotations

import hashlib
import math
from typing import TypeAlias

import torch
from jaxtyping import Float, Int, Shaped, UInt8
from torch import Tensor

from multistage_diffusion import rng
from multistage_diffusion.data.feed import memory_of
from multistage_diffusion.data.images import Images
from multistage_diffusion.data.latents import Latents
from multistage_diffusion.data.shards import Shards
from multistage_diffusion.errors import DataError

DataSet: TypeAlias = (
    Float[Tensor, "count channels height width"]
    | UInt8[Tensor, "count channels height width"]
    | Shards
    | Images
    | Latents
)

_WORKING_BYTES = 4  # a number of an image once more, centred, while denoisers are compared


def take(
    images: DataSet, most: int | None, seed: int, device: torch.device | str | None = None
) -> tuple[Shaped[Tensor, "some channels height width"], Int[Tensor, " some"] | None]:
    """All images, or some in the place of all: the first of a random order, so that a smaller choice is in a larger.

    Args:
        images: The data set.
        most: How many to take at most; by default all.
        seed: Seed of the order.
        device: Where their denoisers will be compared; by default where the images are.

    Returns:
        The images, and their indices: None for all in the order they have.

    Raises:
        DataError: They need more memory than there is, or one is damaged on disk.
    """
    count = len(images)
    index = None if most is None or most >= count else rng.permutation(seed, "cluster/subset", 0, count)[:most]
    _require_memory(_stored(images), count if index is None else len(index), device)
    return read(images, index), index


def read(images: DataSet, index: Int[Tensor, " some"] | None = None) -> Shaped[Tensor, "some channels height width"]:
    """Some of the images; of a set on disk no others are read.

    Args:
        images: The data set.
        index: Which; by default all.

    Returns:
        The images in memory, uint8 where they are stored so; latents as a model sees them.

    Raises:
        DataError: They are too many for memory, or one is damaged on disk.
    """
    match images:
        case Images():
            return images.pixels(index)
        case Latents():
            return images.floats(index)
        case _:
            return images[slice(None) if index is None else index]


def described(images: DataSet, source: str, digest: str | None) -> dict[str, str | int | list[int]]:
    """What the file of the stages says about the data.

    Args:
        images: The data set.
        source: Its name; by default that which it has itself.
        digest: Its SHA-256; by default computed.

    Returns:
        Name, digest, number and shape of the images.
    """
    shape = _stored(images).shape
    match images:
        case Images() | Latents():
            source, digest = source or images.name, digest or images.digest
        case Shards():
            digest = digest or _sha256(images.digests)
        case _:
            digest = digest or _sha256(images)
    return {"source": source, "sha256": digest, "images": shape[0], "shape": list(shape[1:])}


def _require_memory(stored: Tensor | Shards, count: int, device: torch.device | str | None) -> None:
    """Refuse what would end the process, before it is read."""
    match stored:
        case Tensor(device=own):
            place = torch.device(device or own)
        case _:
            place = torch.device(device or "cpu")
    each = math.prod(stored.shape[1:]) * (stored.dtype.itemsize + _WORKING_BYTES)
    if count * each > (memory := memory_of(place)):
        raise DataError(
            f"clustering {count:,} images takes {count * each / 2**30:.1f} GiB, more than the {memory / 2**30:.1f} GiB "
            f"here; choose max-images, like {memory // (2 * each):,}"
        )


def _stored(images: DataSet) -> Tensor | Shards:
    match images:
        case Images() | Latents():
            return images.images
        case _:
            return images


def _sha256(numbers: Tensor) -> str:
    return hashlib.sha256(numbers.contiguous().cpu().numpy().data).hexdigest()
