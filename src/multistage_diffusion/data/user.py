"""A user's data from Python: whatever holds them, the same checks and the same form as a source."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

from multistage_diffusion.data.examples import Examples
from multistage_diffusion.data.fields import Fields, ScaleKind, measure_scale
from multistage_diffusion.data.images import Images
from multistage_diffusion.data.rows import Rows

Data: TypeAlias = Examples | Tensor | Rows


def as_data(x: Data, *, scale: ScaleKind = "none", name: str = "") -> Examples:
    """Data in the form that is trained on, clustered and measured.

    Args:
        x: uint8 pictures or float fields (N, C, H, W); examples pass as they are.
        scale: How fields are scaled.
        name: What messages and records call them.

    Raises:
        DataError: Another kind of data, or values that are not finite.
    """
    if isinstance(x, Examples):
        return x
    if x.dtype == torch.uint8:
        return Images(name, x)
    if isinstance(x, Tensor):
        x = x.float()
    return Fields(name, x, codec=measure_scale(name or "data", scale, x))
