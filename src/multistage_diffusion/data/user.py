"""A user's data from Python: whatever holds them, the same checks and the same form as a source."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias, get_args

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from multistage_diffusion.data.arrays import as_labels, channels_first
from multistage_diffusion.data.examples import Examples
from multistage_diffusion.data.fields import Fields, ScaleKind, measure_scale
from multistage_diffusion.data.images import Images
from multistage_diffusion.data.layout import MAX_CLASSES, number_labels
from multistage_diffusion.data.rows import Rows
from multistage_diffusion.errors import DataError
from multistage_diffusion.records import check

Data: TypeAlias = Examples | Tensor | np.ndarray | Dataset[Any] | DataLoader[Any] | Rows
_IMAGE, _LABEL = ("image", "images", "x"), ("label", "labels", "class")  # keys of a dataset's items


def as_data(
    x: Data,
    labels: Tensor | np.ndarray | Sequence[int] | Sequence[float] | Sequence[str] | None = None,
    *,
    classes: Sequence[str] = (),
    scale: ScaleKind | None = None,
    name: str = "data",
) -> Examples:
    """Data in the form that is trained on, clustered and measured. Nothing is written into what is given.

    Args:
        x: uint8 pictures or floats of any number of channels, (N, C, H, W) or (N, H, W), as a tensor or an array; or a
            `torch.utils.data.Dataset` whose items are such a picture, (picture, label), or a dictionary with "image"
            and "label". A dataset is read once, into memory. Examples pass as they are.
        labels: Class of each row: whole numbers from 0 or names, (N,) or (N, 1), or one-hot rows.
        classes: Names of the classes; by default their numbers.
        scale: How floats are scaled: `none`, `range` (least and greatest value become -1 and 1) or `standardise`.
            The statistics are kept in the run. By default none, which is refused for what looks like pictures in
            [0, 1] or 0..255: a model takes values around [-1, 1].
        name: What messages and records call them.

    Raises:
        DataError: Another kind of data, an ambiguous shape, values that are not finite or of unclear range, or labels
            that do not fit.
    """
    if isinstance(x, Examples):
        if labels is not None or classes or scale is not None:
            raise DataError(f"{x.name}: is a set with labels and a scale of its own; give labels and scale with arrays")
        return x
    check(isinstance(name, str) and name != "", "name", "text", name)
    check(isinstance(classes, (list, tuple)), "classes", "the names of the classes, like ('cat', 'dog')", classes)
    check(scale is None or scale in get_args(ScaleKind), "scale", f"one of {', '.join(get_args(ScaleKind))}", scale)
    if isinstance(x, Dataset):
        names = _class_names(x)
        x, read = _read(x, name)
        if labels is None:
            labels, classes = read, classes or (names if read is not None else ())
    if classes and labels is None:
        raise DataError(f"{name}: names of classes were given, and no labels")
    x = _numbers(x, name)
    rows = channels_first(name, x, "none") if isinstance(x, Tensor) else x
    names, index = ((), None) if labels is None else _labels(as_labels(name, labels, len(rows)), classes, name)
    if rows.dtype == torch.uint8:
        return Images(name, rows, index, names)
    if isinstance(rows, Tensor):
        if not rows.is_floating_point():
            raise DataError(f"{name}: values of type {rows.dtype}; give uint8 pictures or floats")
        rows = rows.float()
    measured = measure_scale(name, scale or "none", rows)
    low, high = min(measured.minimum), max(measured.maximum)
    if scale is None and rows.shape[1] in (1, 3) and 0 <= low < high <= 255:
        mean = sum(measured.mean) / len(measured.mean)
        raise DataError(
            f"{name}: floats {low:.4g}..{high:.4g} (mean {mean:.4g}) look like pictures, and a model takes [-1, 1]; "
            "give uint8 pixels, or choose a scale: range, standardise, or none for as they are"
        )
    return Fields(name, rows, index, names, codec=measured)


def _numbers(x: object, name: str) -> Tensor | Rows:
    """A tensor that can be read, of a tensor or an array."""
    if isinstance(x, DataLoader):
        raise DataError(f"{name}: a DataLoader makes batches of its own; pass its dataset: as_data(loader.dataset)")
    if isinstance(x, np.ndarray) and x.dtype.kind in "uif":
        return _tensor(x, name)
    if isinstance(x, Tensor):
        return _dense(x, name)
    if not isinstance(x, Rows):
        raise DataError(f"{name}: {_kind(x)} is no tensor, array of numbers or torch.utils.data.Dataset{_mend(x)}")
    return x


def _class_names(dataset: Any) -> Sequence[str]:
    """Names of the classes, where a dataset or the one that it is a part of says them, as torchvision's do."""
    while not hasattr(dataset, "classes") and isinstance(dataset, Subset):
        dataset = dataset.dataset
    names = getattr(dataset, "classes", ())
    is_names = isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)
    return tuple(names) if is_names else ()


def _tensor(x: np.ndarray, name: str) -> Tensor:
    """A copy of an array, so that arrays that are read-only, turned, or of another byte order are taken, too."""
    if isinstance(x, np.ma.MaskedArray):
        raise DataError(f"{name}: a masked array has rows without values; fill them: x.filled(value)")
    kind = np.dtype(np.float64) if x.dtype.kind == "f" and x.dtype.itemsize > 8 else x.dtype.newbyteorder("=")
    return torch.from_numpy(np.array(x, dtype=kind, order="C"))


def _kind(x: object) -> str:
    """What somebody gave, in a word or two."""
    if isinstance(x, np.ndarray):
        return f"an array of {x.dtype}"
    return f"{type(x).__module__}.{type(x).__qualname__}".removeprefix("builtins.")


def _mend(x: object) -> str:
    """What makes data of things that people have at hand."""
    match x:
        case str() | Path():
            return "; load_data reads sources, like load_data('folder:PATH')"
        case {"train": _}:
            return '; choose a part of it, like x["train"]'
        case dict():
            return '; give the tensor in it, like x["images"]'
        case (Tensor() | np.ndarray() as images, labels) if np.ndim(images) > np.ndim(labels):
            return "; for images with labels call as_data(images, labels)"
        case (Tensor(), *_):
            return "; stack them: torch.stack(x)"
        case (np.ndarray(), *_):
            return "; stack them: numpy.stack(x)"
    if type(x).__module__.partition(".")[0] == "datasets":
        return "; write it with save_to_disk(FOLDER) and read load_data('hf:FOLDER')"
    return ""


def _dense(x: Tensor, name: str) -> Tensor:
    """A tensor whose values can be read, without its history."""
    if x.layout != torch.strided or x.is_meta or x.is_quantized or x.is_complex():
        kind = "meta" if x.is_meta else str(x.dtype if x.layout == torch.strided else x.layout).removeprefix("torch.")
        raise DataError(
            f"{name}: a tensor of kind {kind} has no plain values to read; make a dense one of real numbers"
        )
    return x.detach()


def _labels(labels: Any, classes: Sequence[str], name: str) -> tuple[tuple[str, ...], Tensor]:
    """Names of the classes, and each row's number."""
    if labels.dtype.kind == "U":
        names, index = number_labels(labels.tolist())
        if classes and not set(names) <= set(classes):
            raise DataError(f"{name}: labels like {', '.join(set(names) - set(classes))} are not among the classes")
        if not classes or index is None:
            return names, torch.zeros(0, dtype=torch.int64) if index is None else index
        return tuple(classes), torch.tensor([tuple(classes).index(one) for one in names])[index]
    if int(labels.max()) >= MAX_CLASSES:
        raise DataError(f"{name}: labels are classes counted from 0, below {MAX_CLASSES:,}, and one is {labels.max()}")
    return tuple(classes) or tuple(map(str, range(int(labels.max()) + 1))), torch.from_numpy(labels)


def _read(dataset: Dataset[Any], name: str) -> tuple[Tensor, list[Any] | None]:
    """All items of a dataset: pictures, and labels where each item has one."""
    if not hasattr(dataset, "__len__"):
        raise DataError(f"{name}: the dataset does not say its length; pass one that has __len__ and __getitem__")
    pictures, labels = [], []
    for index in range(len(dataset)):  # pyright: ignore[reportArgumentType]
        item = dataset[index]
        if isinstance(item, dict):
            image = next((item[key] for key in _IMAGE if key in item), None)
            label = next((item[key] for key in _LABEL if key in item), None)
        elif isinstance(item, (tuple, list)):
            image, label = item[0], item[1] if len(item) > 1 else None
        else:
            image, label = item, None
        if isinstance(image, np.ndarray) and image.dtype.kind in "uif":
            image = _tensor(image, name)
        if not isinstance(image, Tensor):
            mend = "a transform that makes one, like torchvision.transforms.v2.PILToTensor()"
            raise DataError(f"{name}: item {index} holds {_kind(image)}, not a tensor or array of numbers; add {mend}")
        pictures.append(_dense(image, name).cpu())
        labels += [] if label is None else [label]
    if not pictures:
        raise DataError(f"{name}: the dataset is empty")
    if len(shapes := {tuple(picture.shape) for picture in pictures}) > 1:
        some = " and ".join(map(str, sorted(shapes)[:2]))
        raise DataError(f"{name}: items of different shapes, like {some}; crop or resize them in the dataset")
    if len(kinds := {str(picture.dtype) for picture in pictures}) > 1:
        raise DataError(f"{name}: items of different types, {', '.join(sorted(kinds))}; make them alike in the dataset")
    if labels and len(labels) != len(pictures):
        raise DataError(f"{name}: {len(labels)} of {len(pictures)} items have a label; label all, or none")
    return torch.stack(pictures), labels or None
