"""What the figures need to know of a set of images: sums, streamed in; those of the reference are kept in the cache."""

from __future__ import annotations

import contextlib
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import final

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor

from multistage_diffusion.data import Images
from multistage_diffusion.data.cache import cache_directory
from multistage_diffusion.errors import CheckpointError, DataError, NumericsError
from multistage_diffusion.files import check_directory, whole_directory
from multistage_diffusion.metrics.extractor import FeatureExtractor, Features

SPLITS = 10  # parts of a set whose inception scores give the score's deviation (Salimans et al. 2016)
_MOMENTS, _FEATURES = "moments.safetensors", "features.safetensors"


class Moments(ABC):
    """What a Fréchet distance needs to know of a set of images."""

    @abstractmethod
    def mean(self) -> Float[Tensor, " features"]:
        """Mean of the features, float64."""

    @abstractmethod
    def covariance(self) -> Float[Tensor, "features features"]:
        """Unbiased covariance of the features, float64."""

    @property
    def num_images(self) -> int | None:
        """Number of images; none where it is not known."""
        return None

    @property
    def features(self) -> Float[Tensor, "images features"]:
        """The features of every image, float32, in the order of the images; no rows where they were not kept."""
        return torch.zeros(0, len(self.mean()))


@final
class Statistics(Moments):
    """Takes features batch by batch; how they were batched changes nothing but rounding.

    The sums take the same memory for any number of images. The features themselves are kept only where a metric needs
    them, at 4 bytes a number.

    Attributes:
        count: Number of images.
        total: Sum of their features, float64.
        outer: Sum of the outer products of their features, float64.
        kept: Their features, batch by batch.
        split_count: Number of images in each split; image i is in split i modulo `SPLITS`.
        split_probability: Sum of the class probabilities of each split.
        split_information: Sum of p log p over the images and classes of each split.
    """

    def __init__(self, num_features: int, num_classes: int, *, keep: bool = False, first: int = 0) -> None:
        """Start with nothing seen.

        Args:
            num_features: Length of a feature vector.
            num_classes: Length of a row of logits.
            keep: Keep the features.
            first: Index of the first image in the whole set, for a process that sees a part of it.
        """
        self.count, self.keep = 0, keep
        self.total = torch.zeros(num_features, dtype=torch.float64)
        self.outer = torch.zeros(num_features, num_features, dtype=torch.float64)
        self.kept: list[Tensor] = []
        self.split_count = torch.zeros(SPLITS, dtype=torch.float64)
        self.split_probability = torch.zeros(SPLITS, num_classes, dtype=torch.float64)
        self.split_information = torch.zeros(SPLITS, dtype=torch.float64)
        self._next = first

    def update(self, batch: Features) -> None:
        """Take the features of some images.

        Raises:
            DataError: Features of another length.
            NumericsError: A feature is NaN or infinite.
        """
        rows, logits = batch.features.detach().cpu(), batch.logits.detach().cpu().double()
        if rows.shape[1] != len(self.total):
            raise DataError(f"features must have {len(self.total)} numbers, got {rows.shape[1]}")
        if not bool(rows.isfinite().all() and logits.isfinite().all()):
            raise NumericsError("the features of images hold NaN or infinite values")
        double = rows.double()
        self.count += len(rows)
        self.total += double.sum(0)
        self.outer.addmm_(double.T, double)
        if self.keep:
            self.kept.append(rows.float())
        if logits.shape[1]:
            logarithm = logits.log_softmax(1)
            split = torch.arange(self._next, self._next + len(rows)) % SPLITS
            self.split_count.index_add_(0, split, torch.ones(len(rows), dtype=torch.float64))
            self.split_probability.index_add_(0, split, logarithm.exp())
            self.split_information.index_add_(0, split, (logarithm.exp() * logarithm).sum(1))
        self._next += len(rows)

    @property
    def num_images(self) -> int:
        """Number of images."""
        return self.count

    @property
    def features(self) -> Float[Tensor, "images features"]:
        """The features of every image, float32, in the order of the images; no rows where they were not kept."""
        return torch.cat(self.kept) if self.kept else torch.zeros(0, len(self.total))

    def mean(self) -> Float[Tensor, " features"]:
        """Mean of the features, float64."""
        return self.total / self.count

    def covariance(self) -> Float[Tensor, "features features"]:
        """Unbiased covariance of the features, float64: (sum x x^T - n m m^T) / (n - 1)."""
        mean = self.mean()
        return (self.outer - self.count * torch.outer(mean, mean)) / (self.count - 1)

    def combine(self, add: Callable[[Tensor], Tensor], join: Callable[[Tensor], Tensor]) -> None:
        """Make the parts of several processes one set, on each of them.

        Args:
            add: Sum of a tensor over the processes.
            join: Rows of all processes, in their order.
        """
        self.count = int(add(torch.tensor(float(self.count), dtype=torch.float64)))
        self.total, self.outer, self.split_count = add(self.total), add(self.outer), add(self.split_count)
        self.split_probability, self.split_information = add(self.split_probability), add(self.split_information)
        if self.keep:
            self.kept = [join(self.features)]


def reference_statistics(
    extractor: FeatureExtractor,
    images: Images,
    *,
    keep: bool = False,
    batch_size: int = 500,
    cache: Path | None = None,
) -> Statistics:
    """Statistics of real images: from the cache, keyed by the content of images and extractor, or computed now.

    Args:
        extractor: Gives the features.
        images: The images.
        keep: Keep the features.
        batch_size: Images at a time.
        cache: Folder of cached statistics; by default `statistics` in the cache directory.

    Returns:
        The statistics, without those of class scores.
    """
    key = hashlib.sha256(f"statistics 1 {images.digest} {extractor.name} {extractor.digest}".encode()).hexdigest()
    folder = (cache_directory() / "statistics" if cache is None else cache) / key[:32]
    files = (_MOMENTS, _FEATURES) if keep else (_MOMENTS,)
    result = Statistics(extractor.num_features, extractor.num_classes, keep=keep)
    if check_directory(folder, files) is None:
        moments = load_file(folder / _MOMENTS)
        result.count, result.total, result.outer = len(images), moments["total"], moments["outer"]
        result.kept = [load_file(folder / _FEATURES)["features"]] if keep else []
        return result
    for rows in torch.arange(len(images)).split(batch_size):
        result.update(extractor(images.images[rows]))
    with contextlib.suppress(CheckpointError), whole_directory(folder, replace=True) as temporary:
        save_file({"total": result.total, "outer": result.outer}, temporary / _MOMENTS)
        if keep:
            save_file({"features": result.features}, temporary / _FEATURES)
    return result
