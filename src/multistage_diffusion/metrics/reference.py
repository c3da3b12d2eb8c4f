"""Published statistics of real images: mean and covariance of their features, in an npz file with `mu` and `sigma`.

EDM, pytorch-fid and the reference batches of ADM are written so. The images are not needed, and only the Fréchet
distance can be measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from multistage_diffusion.data.arrays import read_array
from multistage_diffusion.data.files import checked_entries, open_zip
from multistage_diffusion.errors import DataError
from multistage_diffusion.files import sha256
from multistage_diffusion.metrics.statistics import Moments

_MEAN, _COVARIANCE = "mu", "sigma"
_MAX_BYTES = 2**36  # ADM keeps the images in the same file; they are not read


@final
@dataclass(frozen=True, eq=False)
class PublishedMoments(Moments):
    """Mean and covariance that somebody else measured, of a number of images that the file does not tell.

    Attributes:
        source: The file.
        mu: The mean, float64.
        sigma: The unbiased covariance, float64.
        digest: SHA-256 of the file.
    """

    source: str
    mu: Float[Tensor, " features"]
    sigma: Float[Tensor, "features features"]
    digest: str

    def mean(self) -> Float[Tensor, " features"]:
        """`mu`."""
        return self.mu

    def covariance(self) -> Float[Tensor, "features features"]:
        """`sigma`."""
        return self.sigma


def read_moments(path: Path) -> PublishedMoments:
    """Read a file of published statistics.

    Raises:
        DataError: Missing or damaged, or it holds no mean and covariance.
    """
    source = str(path)
    with open_zip(source, path) as archive:
        entries = {info.filename.removesuffix(".npy"): info for info in checked_entries(source, archive, _MAX_BYTES)}
        if not {_MEAN, _COVARIANCE} <= entries.keys():
            names = ", ".join(sorted(entries)[:8]) or "nothing"
            raise DataError(f"{source}: statistics are the arrays mu and sigma, and the file holds {names}")
        mean, covariance = (_floats(read_array(source, archive, entries[name])) for name in (_MEAN, _COVARIANCE))
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        shapes = f"{tuple(mean.shape)} and {tuple(covariance.shape)}"
        raise DataError(f"{source}: mu and sigma must have shapes (n,) and (n, n), got {shapes}")
    if not bool(mean.isfinite().all() and covariance.isfinite().all()):
        raise DataError(f"{source}: mu or sigma holds NaN or infinite values")
    return PublishedMoments(source, mean, covariance, sha256(path))


def _floats(array: Any) -> Tensor:
    return torch.from_numpy(array.astype("float64"))
