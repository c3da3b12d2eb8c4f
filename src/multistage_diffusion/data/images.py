"""The one form that every source becomes: `Images`, 8 bits a channel; and the way from and to [-1, 1]."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor

from multistage_diffusion.data.examples import Examples
from multistage_diffusion.data.rows import MAX_BYTES
from multistage_diffusion.errors import DataError, NumericsError

MAX_SET_BYTES = MAX_BYTES  # a set larger than this, at one byte a channel, is not loaded into memory
_FILTER = Image.Resampling.BILINEAR

Pixels: TypeAlias = UInt8[Tensor, "batch channels height width"]


@dataclass(frozen=True, eq=False)
class Images(Examples):
    """A set of pictures, 8 bits a channel; 1 channel is grey, 3 are red, green and blue.

    Raises:
        DataError: The pixels are not uint8, there is no picture, or labels and pictures do not match.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.images.dtype != torch.uint8:
            raise DataError(
                f"{self.name}: pictures must be uint8, 0 to 255; these are {self.images.dtype}: `to_uint8` makes pixels"
                " of floats in [-1, 1]"
            )
        if self.images.shape[1] not in (1, 3):
            last = self.images.shape[3] in (1, 3)
            mend = "move the last axis to the second place" if last else "drop the others"
            raise DataError(f"{self.name}: pictures have 1 channel or 3, these {self.images.shape[1]}; {mend}")

    def pixels(self, index: Int[Tensor, " n"] | None = None) -> UInt8[Tensor, "n channels height width"]:
        """Pictures as they are stored, in memory; as `stored`."""
        return self.stored(index)

    def to_model(self, rows: Pixels) -> Float[Tensor, "batch channels height width"]:
        """Pixels as float32 in [-1, 1]: x / 127.5 - 1. `to_uint8` gives the same pixels back."""
        return rows.float().div_(127.5).sub_(1.0)

    def values(self, index: Int[Tensor, " n"] | None = None) -> UInt8[Tensor, "n channels height width"]:
        """Pictures as an exact denoiser takes them: their pixels."""
        return self.stored(index)

    def fitted(self, resolution: int) -> Images:
        """The same set, each picture cropped to its central square and resized; as `Examples.fitted`."""
        if self.device is None or self.shape[1:] == (resolution, resolution):
            return super().fitted(resolution)
        return replace(self, images=fit(self.stored(), resolution))


def require_pictures(data: Examples) -> Images:
    """The same set, where it is one of pictures.

    Raises:
        DataError: It is not.
    """
    if not isinstance(data, Images):
        raise DataError(f"{data.name}: holds fields of {data.shape[0]} channels, and pictures are needed here")
    return data


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


def content_keys(pictures: UInt8[Tensor, "batch channels height width"]) -> list[int]:
    """Numbers in [0, 2^64) that depend on the pixels alone, equal for grey stored in 1 channel and in 3.

    Args:
        pictures: Images of one size, with 1 or 3 channels.

    Returns:
        The first 64 bits of a BLAKE2b hash of each.
    """
    begun = hashlib.blake2b(repr(tuple(pictures.shape[2:])).encode(), digest_size=8)
    repeats, keys = 3 // pictures.shape[1], []
    for picture in np.ascontiguousarray(pictures.numpy()):
        content = begun.copy()
        content.update(picture.tobytes() * repeats)
        keys.append(int.from_bytes(content.digest(), "little"))
    return keys
