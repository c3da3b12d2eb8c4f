"""What a network knows of the images of a batch beside their pixels and noise level."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import final

from jaxtyping import Float, Int
from torch import Tensor


@final
@dataclass(frozen=True, eq=False)
class Conditioning:
    """Conditioning of a batch; each tensor has one row an image.

    Attributes:
        labels: Class of each image, int64; the number of classes stands for none. Absent: no class.
        augment: Numbers that describe how each image was augmented, float32. Absent: not at all.
        dropout_seed: Random 64-bit number of each image, from which its dropout masks are made. Absent: torch's
            generator draws them.
    """

    labels: Int[Tensor, " batch"] | None = None
    augment: Float[Tensor, "batch numbers"] | None = None
    dropout_seed: Int[Tensor, " batch"] | None = None

    def rows(self, index: slice | Int[Tensor, " rows"]) -> Conditioning:
        """The conditioning of some of the images, by a slice or by indices."""
        parts = (getattr(self, field.name) for field in fields(self))
        return Conditioning(*(None if part is None else part[index] for part in parts))


NO_CONDITIONING = Conditioning()
