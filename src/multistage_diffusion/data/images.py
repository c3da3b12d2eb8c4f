"""The one form that every source becomes: `Images`, 8 bits a channel; and the way from and to [-1, 1]."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor

from multistage_diffusion.data.shards import MAX_BYTES, Shards, row_digests
from multistage_diffusion.errors import DataError, NumericsError

MAX_SET_BYTES = MAX_BYTES  # a set larger than this, at one byte a channel, is not loaded into memory
_FILTER = Image.Resampling.BILINEAR

Pixels: TypeAlias = UInt8[Tensor, "batch channels height width"]


@dataclass(frozen=True, eq=False)
class Images:
    """A set of images of one shape, with what is known about them.

    Attributes:
        name: The source, as the user wrote it.
        images: Pixels, 8 bits a channel; 1 channel is grey, 3 are red, green and blue. In memory, or on disk.
        labels: Class of each image, int64, or None where the source has none.
        classes: Names of the classes; `labels` index them.
        skipped: What the source holds but this set does not, and why; one line each.

    Raises:
        DataError: There is no image, or labels and images do not match.
    """

    name: str
    images: Pixels | Shards
    labels: Int[Tensor, " labelled"] | None = None
    classes: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if 0 in self.images.shape:
            raise DataError(f"{self.name}: no images found{_first(self.skipped)}")
        if self.labels is None:
            return
        if len(self.labels) != len(self.images):
            raise DataError(f"{self.name}: {len(self.images)} images but {len(self.labels)} labels")
        low, high = int(self.labels.min()), int(self.labels.max())
        if low < 0 or high >= len(self.classes):
            raise DataError(f"{self.name}: labels must lie in 0..{len(self.classes) - 1}, got {low}..{high}")

    def __len__(self) -> int:
        return len(self.images)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one image."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the content (each image's digest, labels, class names), in hexadecimal digits; not of the name."""
        labels = b"" if self.labels is None else self.labels.cpu().contiguous().numpy().tobytes()
        content = hashlib.sha256(repr((tuple(self.images.shape), len(labels), self.classes)).encode())
        content.update(_digests(self.images).numpy().data)
        content.update(labels)
        return content.hexdigest()

    def pixels(self, index: Int[Tensor, " n"] | None = None) -> UInt8[Tensor, "n channels height width"]:
        """Images as they are stored, in memory.

        Args:
            index: Which images, on the device of `images`; by default all.

        Returns:
            8 bits a channel.

        Raises:
            DataError: An image on disk is damaged, or all are too many for memory.
        """
        return self.images[slice(None) if index is None else index]

    def floats(self, index: Int[Tensor, " n"] | None = None) -> Float[Tensor, "n channels height width"]:
        """Images as the networks see them.

        Args:
            index: Which images, on the device of `images`; by default all.

        Returns:
            float32 in [-1, 1]: x / 127.5 - 1. `to_uint8` gives the same pixels back.
        """
        return self.seen(self.pixels(index))

    def seen(self, rows: Pixels) -> Float[Tensor, "batch channels height width"]:
        """Stored images as the networks see them.

        Args:
            rows: As `pixels` gives them.

        Returns:
            float32 in [-1, 1].
        """
        return rows.float().div_(127.5).sub_(1.0)

    def take(self, index: Int[Tensor, " n"]) -> Images:
        """A subset.

        Args:
            index: Which images, in the order wanted.

        Returns:
            The set of those images.

        Raises:
            DataError: `index` is empty.
        """
        labels = None if self.labels is None else self.labels[index]
        return replace(self, images=_some(self.images, index), labels=labels)

    def fitted(self, resolution: int) -> Images:
        """The same set, each image cropped to its central square and resized.

        Args:
            resolution: Pixels a side.

        Returns:
            The set; itself if it has that size already.

        Raises:
            DataError: The images are on disk, and of another size.
        """
        if self.shape[1:] == (resolution, resolution):
            return self
        match self.images:
            case Shards():
                raise DataError(
                    f"{self.name}: holds images of {self.shape[1]} x {self.shape[2]}, which are not resized; convert "
                    f"their source again with --resolution {resolution}"
                )
            case _:
                pass
        return replace(self, images=fit(self.images, resolution))


def to_uint8(x: Float[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
    """Pixels of images in [-1, 1], by clipping and rounding; never rescaled by content.

    Args:
        x: Images; -1 is black, 1 is white.

    Returns:
        8 bits a channel: -1, 0, 1 become 0, 128, 255.

    Raises:
        NumericsError: A value is NaN or infinite.
    """
    if not bool(x.isfinite().all()):
        raise NumericsError("images hold NaN or infinite values and cannot be saved as pixels")
    return x.float().clamp(-1.0, 1.0).add(1.0).mul(127.5).round().to(torch.uint8)


def fit(images: Pixels, resolution: int) -> UInt8[Tensor, "batch channels resolution resolution"]:
    """Central square of each image, resized by Pillow's antialiased triangle filter (`Resampling.BILINEAR`).

    Args:
        images: Pixels.
        resolution: Pixels a side wanted.

    Returns:
        Square images. Those that have the size already pass unchanged; an image's result ignores its batch-mates.
    """
    high, wide = images.shape[2:]
    if high == wide == resolution:
        return images
    side = min(high, wide)
    top, left = (high - side) // 2, (wide - side) // 2
    squares = np.moveaxis(images[:, :, top : top + side, left : left + side].numpy(), 1, 3)
    if squares.shape[3] == 1:
        squares = squares[..., 0]
    size = (resolution, resolution)
    resized = np.stack([np.asarray(Image.fromarray(square).resize(size, _FILTER)) for square in squares])
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(resized.reshape(len(images), *size, -1), 3, 1)))


def content_key(picture: UInt8[Tensor, "channels height width"]) -> int:
    """A number in [0, 2^64) that depends on the pixels alone, equal for grey stored in 1 channel and in 3.

    Args:
        picture: One image.

    Returns:
        The first 64 bits of a BLAKE2b hash.
    """
    content = hashlib.blake2b(repr(tuple(picture.shape[1:])).encode(), digest_size=8)
    for plane in picture.expand(3, -1, -1).numpy():
        content.update(np.ascontiguousarray(plane).data)
    return int.from_bytes(content.digest(), "little")


def _digests(rows: Pixels | Shards) -> UInt8[Tensor, "rows 16"]:
    """The digest of each image: read where the images are on disk, else computed."""
    match rows:
        case Shards():
            return rows.digests
        case _:
            return row_digests(rows)


def _some(rows: Pixels | Shards, index: Int[Tensor, " n"]) -> UInt8[Tensor, "n channels height width"] | Shards:
    """Some of the images: in memory, or still on disk."""
    match rows:
        case Shards():
            return rows.take(index)
        case _:
            return rows[index]


def _first(skipped: tuple[str, ...]) -> str:
    """The beginning of a list of skipped things, for a message."""
    return f" ({len(skipped)} skipped, the first: {skipped[0]})" if skipped else ""
