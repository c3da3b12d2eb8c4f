"""A user's data from Python: whatever holds them, the same checks and the same form as a source."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from multistage_diffusion.data.examples import Examples
from multistage_diffusion.data.fields import Fields, ScaleKind, measure_scale
from multistage_diffusion.data.images import Images
from multistage_diffusion.data.rows import Rows
from multistage_diffusion.errors import DataError

Data: TypeAlias = Examples | Tensor | np.ndarray | Dataset[Any] | DataLoader[Any] | Rows
_IMAGE, _LABEL = ("image", "images", "x"), ("label", "labels", "class")  # keys of a dataset's items


def as_data(
    x: Data,
    labels: Tensor | np.ndarray | Sequence[int] | Sequence[float] | None = None,
    *,
    classes: Sequence[str] = (),
    scale: ScaleKind = "none",
    name: str = "data",
) -> Examples:
    """Data in the form that is trained on, clustered and measured. Nothing is written into what is given.

    Args:
        x: uint8 pictures or floats of any number of channels, (N, C, H, W) or (N, H, W), as a tensor or an array; or a
            `torch.utils.data.Dataset` whose items are such a picture, (picture, label), or a dictionary with "image"
            and "label". A dataset is read once, into memory. Examples pass as they are.
        labels: Class of each row, integers from 0; (N,) or (N, 1).
        classes: Names of the classes; by default their numbers.
        scale: How floats are scaled: `none`, `range` (least and greatest value become -1 and 1) or `standardise`.
            The statistics are kept in the run.
        name: What messages and records call them.

    Raises:
        DataError: Another kind of data, an ambiguous shape, values that are not finite, or labels that do not fit.
    """
    if isinstance(x, Examples):
        return x
    if isinstance(x, DataLoader):
        raise DataError(f"{name}: a DataLoader makes batches of its own; pass its dataset: as_data(loader.dataset)")
    if isinstance(x, Dataset):
        x, read = _read(x, name)
        labels = read if labels is None else labels
    if isinstance(x, np.ndarray):
        x = torch.from_numpy(np.array(x))  # a copy, so that read-only arrays are taken, too
    if not isinstance(x, (Tensor, Rows)):
        raise DataError(f"{name}: {type(x).__name__} is no tensor, array or torch.utils.data.Dataset")
    rows = _with_channels(x, name) if isinstance(x, Tensor) else x
    given = None if labels is None else _labels(labels, len(rows), name)
    if given is not None and not classes:
        classes = tuple(str(number) for number in range(int(given.max()) + 1))
    if rows.dtype == torch.uint8:
        return Images(name, rows, given, tuple(classes))
    if isinstance(rows, Tensor):
        if not rows.is_floating_point():
            raise DataError(f"{name}: values of type {rows.dtype}; give uint8 pictures or floats")
        rows = rows.float()
    return Fields(name, rows, given, tuple(classes), codec=measure_scale(name, scale, rows))


def _read(dataset: Dataset[Any], name: str) -> tuple[Tensor, Tensor | None]:
    """All items of a dataset: pictures, and labels where each item has one."""
    pictures, labels = [], []
    for index in range(len(dataset)):  # pyright: ignore[reportArgumentType]  # datasets need not say their length
        item = dataset[index]
        if isinstance(item, dict):
            image = next((item[key] for key in _IMAGE if key in item), None)
            label = next((item[key] for key in _LABEL if key in item), None)
        elif isinstance(item, (tuple, list)):
            image, label = item[0], item[1] if len(item) > 1 else None
        else:
            image, label = item, None
        if not isinstance(image, (Tensor, np.ndarray)):
            kind = type(image).__name__
            raise DataError(f"{name}: item {index} holds {kind}, not a tensor or array; add a transform that makes one")
        pictures.append(torch.as_tensor(image))
        labels += [] if label is None else [label]
    if not pictures:
        raise DataError(f"{name}: the dataset is empty")
    if len({picture.shape for picture in pictures}) > 1:
        raise DataError(f"{name}: items of different shapes; crop or resize them in the dataset")
    if labels and len(labels) != len(pictures):
        raise DataError(f"{name}: {len(labels)} of {len(pictures)} items have a label; label all, or none")
    return torch.stack(pictures), torch.as_tensor(np.asarray(labels)) if labels else None


def _with_channels(x: Tensor, name: str) -> Tensor:
    """(N, C, H, W); one channel is added to (N, H, W)."""
    shape = tuple(x.shape)
    if x.ndim == 3 and shape[-1] > 4:
        return x[:, None]
    if x.ndim != 4 or (shape[3] in (1, 3, 4) and shape[1] > 4):
        raise DataError(f"{name}: shape {shape} may be read in several ways; give (N, C, H, W), like x[:, None]")
    return x


def _labels(labels: Tensor | np.ndarray | Sequence[int] | Sequence[float], rows: int, name: str) -> Tensor:
    """(N,) int64, from integers of any type."""
    tensor = torch.as_tensor(np.asarray(labels) if not isinstance(labels, Tensor) else labels)
    if tensor.ndim == 2 and tensor.shape[1] == 1:
        tensor = tensor[:, 0]
    if tensor.ndim != 1 or len(tensor) != rows:
        raise DataError(f"{name}: labels of shape {tuple(tensor.shape)} for {rows} rows; give one integer for each")
    if tensor.is_floating_point() and not torch.equal(tensor, tensor.round()):
        raise DataError(f"{name}: labels must be integers, and there are fractions")
    tensor = tensor.long()
    if int(tensor.min()) < 0:
        raise DataError(f"{name}: labels must be 0 or more, and the least is {int(tensor.min())}")
    return tensor
