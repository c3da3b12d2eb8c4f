"""Fields: numbers of any range and any number of channels, with the statistics that bring them near [-1, 1]."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from multistage_diffusion.config import Scaling
from multistage_diffusion.data.examples import Examples
from multistage_diffusion.data.rows import Rows, blocks
from multistage_diffusion.errors import CheckpointError, ConfigError, DataError
from multistage_diffusion.files import read_json, write_json

RECORD = "scale.json"
ScaleKind: TypeAlias = Literal["none", "range", "standardise"]


@dataclass(frozen=True)
class Scale:
    """Statistics of each channel over the training set, and what is made of them: a model sees (x - shift) / factor.

    Attributes:
        kind: `none`: x as it is; `range`: the least and greatest value become -1 and 1; `standardise`: mean 0 and
            standard deviation 1. A channel that is constant has the factor 1.
        minimum: Least value of each channel.
        maximum: Greatest value.
        mean: Mean.
        std: Standard deviation.
    """

    pictures: ClassVar[bool] = False
    kind: ScaleKind
    minimum: tuple[float, ...]
    maximum: tuple[float, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def shift(self) -> tuple[float, ...]:
        """What is subtracted from each channel."""
        if self.kind == "range":
            return tuple((low + high) / 2 for low, high in zip(self.minimum, self.maximum, strict=True))
        return self.mean if self.kind == "standardise" else (0.0,) * len(self.mean)

    @property
    def factor(self) -> tuple[float, ...]:
        """What each channel is divided by."""
        if self.kind == "range":
            return tuple((high - low) / 2 or 1.0 for low, high in zip(self.minimum, self.maximum, strict=True))
        return tuple(std or 1.0 for std in self.std) if self.kind == "standardise" else (1.0,) * len(self.mean)

    def to_model(self, rows: Float[Tensor, "n channels height width"]) -> Float[Tensor, "n channels height width"]:
        """Stored fields as a model sees them."""
        return rows if self.kind == "none" else (rows - _channels(self.shift, rows)) / _channels(self.factor, rows)

    def decode(self, x: Float[Tensor, "n channels height width"]) -> Float[Tensor, "n channels height width"]:
        """Fields in the unit of the source, on the CPU."""
        x = x.float().cpu()
        return x if self.kind == "none" else x * _channels(self.factor, x) + _channels(self.shift, x)

    def preview(self, x: Float[Tensor, "n channels height width"]) -> Float[Tensor, "n channels height width"]:
        """What a model made as pictures: a channel's least value in the training set is black, its greatest white."""
        return replace(self, kind="range").to_model(self.decode(x))

    def encode(self, images: Examples) -> Examples:
        """Other fields with the same statistics."""
        return replace(images, codec=self)

    def save(self, folder: Path) -> None:
        """Write the record that `load_codec` reads into a run directory."""
        write_json(folder / RECORD, asdict(self))


@dataclass(frozen=True, eq=False)
class Fields(Examples):
    """A set of fields in the unit of the source, float32.

    Attributes:
        codec: Statistics of the training set, and how the fields are scaled.

    Raises:
        DataError: The rows are not float32 or not as many channels as the statistics, or labels do not match.
    """

    codec: Scale = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.images.dtype != torch.float32:
            raise DataError(f"{self.name}: fields must be float32; these are {self.images.dtype}: convert them first")
        if len(self.codec.mean) != self.shape[0]:
            raise DataError(f"{self.name}: {self.shape[0]} channels, but statistics of {len(self.codec.mean)}")

    @property
    def scaling(self) -> Scaling:
        """What `DataConfig.scale` says of such a set."""
        return self.codec.kind

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the content and of the kind of scale; the statistics follow from the two."""
        return hashlib.sha256(f"{self.content_digest()} {self.codec.kind}".encode()).hexdigest()

    def to_model(self, rows: Float[Tensor, "n channels height width"]) -> Float[Tensor, "n channels height width"]:
        """Fields, scaled."""
        return self.codec.to_model(rows)


def measure_scale(name: str, kind: ScaleKind, rows: Float[Tensor, "n channels height width"] | Rows) -> Scale:
    """Statistics of all rows; sums are numpy's, so that the number of threads does not change them.

    Args:
        name: The source, for messages.
        kind: How the rows will be scaled.
        rows: The training set.

    Raises:
        DataError: A value is not finite.
    """
    parts = list[np.ndarray]()
    pivot = np.zeros(0)
    for index in blocks(rows.shape):
        block = rows[index].cpu().double().movedim(1, 0).flatten(1).numpy()
        if not np.isfinite(block).all():
            raise DataError(f"{name}: the fields hold values that are not finite (NaN or infinity)")
        pivot = (
            block[:, :1] if not parts else pivot
        )  # squares of what is left keep their digits where the mean is large
        apart = block - pivot
        parts.append(np.stack((block.min(1), block.max(1), apart.sum(1), np.square(apart).sum(1))))
    low, high, total, square = np.stack(parts, axis=1)
    mean = total.sum(0) / (count := len(rows) * rows.shape[2] * rows.shape[3])
    std = np.sqrt(np.maximum(square.sum(0) / count - np.square(mean), 0.0))
    if (low.min(0) == high.max(0)).all():
        raise DataError(f"{name}: every channel is constant; there is nothing to learn")
    figures = (low.min(0), high.max(0), mean + pivot[:, 0], std)
    return Scale(kind, *(tuple(figure.tolist()) for figure in figures))


def load_scale(path: Path) -> Scale:
    """Read the record of a run on fields.

    Raises:
        CheckpointError: It makes no sense.
    """
    try:
        return scale_of(read_json(path))
    except (ConfigError, DataError) as error:
        raise CheckpointError(f"{path} is not readable: {error}") from error


def scale_of(record: Any) -> Scale:
    """Statistics from a file.

    Raises:
        DataError: Not such statistics.
    """
    try:
        minimum, maximum, mean, std = (
            tuple(map(float, record[name])) for name in ("minimum", "maximum", "mean", "std")
        )
        if record["kind"] not in get_args(ScaleKind) or not np.isfinite((minimum, maximum, mean, std)).all():
            raise ValueError("kind or number out of range")
        return Scale(record["kind"], minimum, maximum, mean, std)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"not the statistics of fields ({str(error)[:100]})") from error


def _channels(values: tuple[float, ...], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=like.device)[:, None, None]
