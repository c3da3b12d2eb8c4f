"""What people should know of a set before they train on it: what was left out, and pixels of a small range."""

from __future__ import annotations

import math
import warnings

import torch
from jaxtyping import Float
from torch import Tensor

from multistage_diffusion.data.examples import Examples
from multistage_diffusion.data.images import Images
from multistage_diffusion.data.rows import blocks
from multistage_diffusion.errors import DataError

_LITTLE = 64  # grey levels of 256
_APART = 0.001  # share of the pixels, at either end, that may lie far from the others: dead and hot ones
_LOOKED_AT = 2**26  # values of a large set, of images evenly spaced over it
_FEWEST = 64
_SHOWN = 3  # lines of what was left out
_MEND = "masks, and 12 bits in 16-bit files, must be stretched to the whole range first"


def warn_of(images: Examples) -> None:
    """Warn of what was left out, and of pixels whose range may not be what was meant.

    Raises:
        DataError: All pixels of several images are the same.
    """
    if images.skipped:
        more = f"; and {len(images.skipped) - _SHOWN} more" if len(images.skipped) > _SHOWN else ""
        _say(images, f"left out: {'; '.join(images.skipped[:_SHOWN])}{more}")
    if not isinstance(images, Images) or len(images) == 1:
        return
    counts = pixel_counts(images, max(_FEWEST, _LOOKED_AT // math.prod(images.shape)))
    doubt = range_doubt(counts)
    if doubt is not None and int((counts > 0).sum()) == 1:
        raise DataError(f"{images.name}: {doubt}")
    if doubt is not None:
        _say(images, doubt)


def _say(images: Examples, line: str) -> None:
    warnings.warn(f"{images.name}: {line}", stacklevel=4)


def pixel_counts(images: Images, most: int | None = None) -> Float[Tensor, " 256"]:
    """How often each of the 256 values of a pixel occurs.

    Args:
        images: The set, in memory or on disk.
        most: Largest number of images that are looked at, evenly spaced; by default all.
    """
    num = len(images) if most is None else min(len(images), most)
    chosen = torch.linspace(0, len(images) - 1, num, dtype=torch.float64).round().long()
    counts = torch.zeros(256, dtype=torch.float64)
    for rows in blocks((num, *images.shape)):
        pixels = images.stored(chosen[rows].to(images.device or "cpu"))
        counts += pixels.flatten().bincount(minlength=256).cpu()
    return counts


def range_doubt(counts: Float[Tensor, " 256"]) -> str | None:
    """Why the values of a set's pixels may not be what was meant; none if they may.

    Args:
        counts: As `pixel_counts` gives them.
    """
    low, high = _ends(counts > 0)
    if low == high:
        return f"every pixel is {low} of 0..255; {_MEND}"
    if high - low < _LITTLE:
        return f"pixels use {low}..{high} of 0..255; {_MEND}"
    below = counts.cumsum(0) / counts.sum()
    first, last = _ends((below > _APART) & (below - counts / counts.sum() < 1 - _APART))
    if last - first < _LITTLE:
        return f"all but {2 * _APART:.1%} of the pixels use {first}..{last} of 0..255, the rest {low}..{high}; {_MEND}"
    return None


def _ends(chosen: Tensor) -> tuple[int, int]:
    """First and last place that is true."""
    places = chosen.nonzero()
    return int(places.min()), int(places.max())
