"""What a model is trained on, as one protocol: pictures or latents, in memory or on disk."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from multistage_diffusion.config import Scaling
from multistage_diffusion.data.rows import Rows, row_digests
from multistage_diffusion.errors import DataError
from multistage_diffusion.text import short

Set = TypeVar("Set", bound="Examples")


@runtime_checkable
class Codec(Protocol):
    """What stands between the examples a model is trained on and the images that people see."""

    pictures: ClassVar[bool]  # whether `decode` gives pictures in [-1, 1]

    def to_model(self, rows: Tensor, /) -> Tensor:
        """Stored rows as the networks see them."""
        ...

    def decode(self, x: Tensor, /) -> Tensor:
        """Images of what a model made, on the CPU."""
        ...

    def preview(self, x: Tensor, /) -> Tensor:
        """What a model made as pictures in [-1, 1], to be looked at."""
        ...

    def encode(self, images: Examples, /) -> Examples:
        """Other images of the source, to be trained on or measured in the same unit."""
        ...

    def save(self, folder: Path) -> None:
        """Write the record that `load_codec` reads into a run directory."""
        ...


@dataclass(frozen=True, eq=False)
class Examples(ABC):
    """A set of examples of one shape. Rows are stored compactly and become what a network sees batch by batch.

    Attributes:
        name: The source, as the user wrote it.
        images: The rows as they are stored: a tensor, or rows that stay on disk and are read when they are indexed.
        labels: Class of each row, int64, or None where the source has none.
        classes: Names of the classes; `labels` index them.
        skipped: What the source holds but this set does not, and why; one line each.
        notes: How the source was read: how `labels` were found or why there are none, how the parts were (`split`),
            and what `values` were.
        codec: The way from stored rows to the networks and back, where rows are not pictures.

    Raises:
        DataError: There is no row, rows or labels are of another kind, or they do not match.
    """

    name: str
    images: Shaped[Tensor, "batch channels height width"] | Rows
    labels: Int[Tensor, " labelled"] | None = None
    classes: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    notes: Mapping[str, str] = field(default_factory=dict)
    codec: Codec | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        _require_rows(self.name, self.images)
        if 0 in self.images.shape:
            first = f" ({len(self.skipped)} skipped, the first: {self.skipped[0]})" if self.skipped else ""
            raise DataError(f"{self.name}: no images found{first}")
        names = self.classes
        if isinstance(names, str) or not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
            raise DataError(f"{self.name}: classes must be names like ('cat', 'dog'), no two alike; got {short(names)}")
        if self.labels is not None:
            _require_labels(self.name, self.labels, len(self.images), len(names))

    def __len__(self) -> int:
        return len(self.images)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one row."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    @property
    def scaling(self) -> Scaling:
        """What `DataConfig.scale` says of such a set."""
        return "pictures"

    @property
    def device(self) -> torch.device | None:
        """Where the rows are; None: on disk."""
        return self.images.device

    @cached_property
    def digest(self) -> str:
        """SHA-256 of what the networks see, in hexadecimal digits; not of the name or of where it lies."""
        return self.content_digest()

    def content_digest(self) -> str:
        """SHA-256 of each row's digest, the labels and the names of the classes."""
        labels = b"" if self.labels is None else self.labels.cpu().contiguous().numpy().tobytes()
        content = hashlib.sha256(repr((tuple(self.images.shape), len(labels), self.classes)).encode())
        rows = self.images.digests if isinstance(self.images, Rows) else row_digests(self.images)
        content.update(rows.numpy().data)
        content.update(labels)
        return content.hexdigest()

    @abstractmethod
    def to_model(self, rows: Shaped[Tensor, "n channels height width"]) -> Float[Tensor, "n channels height width"]:
        """Rows as `stored` gives them, as the networks see them."""

    def stored(self, index: Int[Tensor, " n"] | None = None) -> Shaped[Tensor, "n channels height width"]:
        """Rows as they are stored, in memory.

        Args:
            index: Which rows, on the device of `images`; by default all.

        Raises:
            DataError: A row on disk is damaged, or all are too many for memory.
        """
        return self.images[slice(None) if index is None else index]

    def floats(self, index: Int[Tensor, " n"] | None = None) -> Float[Tensor, "n channels height width"]:
        """Rows as the networks see them, float32, in memory of their own; `index` and errors as for `stored`."""
        rows = self.stored(index)
        floats = self.to_model(rows)
        return floats.clone() if index is None and floats is rows else floats

    def values(self, index: Int[Tensor, " n"] | None = None) -> Shaped[Tensor, "n channels height width"]:
        """Rows as an exact denoiser takes them: as the networks do, but pictures as uint8, a quarter of the memory."""
        return self.floats(index)

    def to_images(self, x: Float[Tensor, "n channels height width"]) -> Float[Tensor, "n ..."]:
        """What a model of these examples made, in the unit and form of the source."""
        return x if self.codec is None else self.codec.decode(x)

    def fitted(self: Set, resolution: int) -> Set:
        """The same set with images of `resolution` pixels a side.

        Raises:
            DataError: The images have another size, and are not pictures in memory.
        """
        if self.shape[1:] == (resolution, resolution):
            return self
        mend = (
            "convert their source again with the" if self.device is None else "make them of that size, or leave out the"
        )
        raise DataError(
            f"{self.name}: holds images of {self.shape[1]} x {self.shape[2]}, which are not resized; {mend} resolution "
            f"{resolution}"
        )

    def take(self: Set, index: Int[Tensor, " n"]) -> Set:
        """A subset; rows on disk stay there.

        Args:
            index: Which rows, in the order of the subset.

        Raises:
            DataError: `index` is empty.
        """
        rows = self.images.take(index) if isinstance(self.images, Rows) else self.images[index]
        return replace(self, images=rows, labels=None if self.labels is None else self.labels[index])

    def to(self: Set, device: torch.device) -> Set:
        """The same set with all rows in the memory of a device, as they are stored."""
        return replace(self, images=self.images.to(device))

    def save_record(self, folder: Path) -> None:
        """Write into a run directory what turns a model's output into images again."""
        if self.codec is not None:
            self.codec.save(folder)


def _require_rows(name: str, rows: object) -> None:
    """Refuse what is no dense tensor of rows."""
    if not isinstance(rows, (Tensor, Rows)):
        raise DataError(f"{name}: rows must be a tensor, got {type(rows).__name__}; `as_data` takes other kinds")
    if len(rows.shape) != 4:
        raise DataError(f"{name}: rows must be (N, C, H, W), got {tuple(rows.shape)}; `as_data` takes (N, H, W)")
    if isinstance(rows, Tensor) and (rows.layout != torch.strided or rows.requires_grad):
        raise DataError(f"{name}: rows must be a dense tensor without gradients; detach it, or copy it")


def _require_labels(name: str, labels: object, count: int, classes: int) -> None:
    """Refuse labels that are not one number of a class for each row."""
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        kind = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise DataError(f"{name}: labels must be a tensor of int64, got {kind}; `as_data` takes other kinds")
    if labels.ndim != 1:
        raise DataError(f"{name}: labels must be one number for each row, got the shape {tuple(labels.shape)}")
    if len(labels) != count:
        raise DataError(f"{name}: {count} images but {len(labels)} labels")
    if classes == 0:
        raise DataError(f"{name}: has labels, and no names of classes; `as_data` names them by number")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise DataError(f"{name}: labels must lie in 0..{classes - 1}, got {low}..{high}")
