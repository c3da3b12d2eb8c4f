"""Arrays of NumPy, in files or in memory; headers are checked before memory is taken, nothing is unpickled."""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, Shaped, UInt8
from torch import Tensor

from multistage_diffusion.config import Scaling
from multistage_diffusion.data.collection import Collection, hashed_test
from multistage_diffusion.data.examples import Examples
from multistage_diffusion.data.fields import Fields, measure_scale
from multistage_diffusion.data.files import checked_entries, open_zip
from multistage_diffusion.data.images import MAX_SET_BYTES, Images, content_keys, to_uint8
from multistage_diffusion.data.layout import MEND, number_labels, shown
from multistage_diffusion.data.rows import row_digests
from multistage_diffusion.errors import DataError

_PIXELS, _LABELS = ("images", "x", "arr_0"), ("labels", "y", "arr_1")
_TRAIN, _TEST = ("train_images", "x_train"), ("test_images", "x_test")
_TRAIN_LABELS, _TEST_LABELS = ("train_labels", "y_train"), ("test_labels", "y_test")
_LONGEST = 1024  # bytes in the name of a class
_BELOW, _SHARE = -0.05, 0.001  # pictures in [-1, 1] have at least this share of values below this
_EXACT = 2**24  # whole numbers up to here are exact in float32


def read_npz(source: str, path: Path, scaling: Scaling = "pictures") -> Collection:
    """Examples and labels of an npz file.

    Args:
        source: The source, as the user wrote it.
        path: The file. Examples are called `images`, `x` or `arr_0`, labels `labels`, `y` or `arr_1`; or both come in
            two parts, `train_images`, `train_labels`, `test_images`, `test_labels` or `x_train`, `y_train`, ...
        scaling: What the arrays are: pictures, or fields and how they are scaled.

    Returns:
        The set. Held out is the file's own test part, or a tenth by content.

    Raises:
        DataError: Missing or damaged, no array of images, objects, sizes that are a bomb's, values of unclear range.
    """
    with open_zip(source, path) as archive:
        infos = {info.filename.removesuffix(".npy"): info for info in checked_entries(source, archive)}
        unread = set(infos)

        def find(names: tuple[str, ...], kinds: str = "uif") -> Any:
            for name in names:
                if name in infos:
                    unread.discard(name)
                    return read_array(source, archive, infos[name], kinds)
            return None

        parts = [(find(_PIXELS), find(_LABELS, "uifbUS"))]
        if parts[0][0] is None:
            parts = [(find(_TRAIN), find(_TRAIN_LABELS, "uifbUS")), (find(_TEST), find(_TEST_LABELS, "uifbUS"))]
        held = ", ".join(sorted(infos)[:8]) or "nothing"
        if parts[0][0] is None:
            raise DataError(f"{source}: no array called images, x, arr_0 or train_images; the file holds {held}")
        parts = [part for part in parts if part[0] is not None]
    rows = [as_rows(source, array, scaling) for array, _ in parts]
    if len({part.shape[1:] for part in rows}) > 1:
        raise DataError(f"{source}: training and test images have different shapes")
    test = None if len(rows) == 1 else torch.arange(sum(map(len, rows))) >= len(rows[0])
    notes = {"labels": f"none: no array called labels, y or arr_1; the file holds {held}"}
    labels, given = None, [given for _, given in parts if given is not None]
    if given and len(given) < len(parts):
        raise DataError(f"{source}: one of its parts has labels and the other none; the file holds {held}; {MEND}")
    if given:
        labels = np.concatenate([as_labels(source, one, len(part)) for one, part in zip(given, rows, strict=True)])
        notes["labels"] = "the file's"
    if test is not None:
        notes["split"] = "held out: the file's test part"
    if scaling == "pictures" and parts[0][0].dtype.kind == "f":
        notes["values"] = "floats in [-1, 1], brought to 0..255"
    left_out = tuple(f"array {shown(name)}: not read" for name in sorted(unread))
    return _collection(source, torch.cat(rows), labels, test, scaling, notes, left_out)


def read_npy(source: str, path: Path, scaling: Scaling = "pictures") -> Collection:
    """Examples of an npy file, without labels; a tenth is held out by content. Arguments and errors as `read_npz`."""
    if not path.is_file():
        raise DataError(f"{source}: {path} is not a file")
    with path.open("rb") as file:
        array = _parse_array(source, file, path.stat().st_size, "uif")
    notes = {"labels": "none: an npy file has none; save an npz with images and labels"}
    return _collection(source, as_rows(source, array, scaling), None, None, scaling, notes)


def as_rows(name: str, array: Any, scaling: Scaling) -> Shaped[Tensor, "batch channels height width"]:
    """An array as rows that are stored: pictures as uint8, fields as float32.

    Args:
        name: The source, for messages.
        array: Pictures (N, H, W), (N, H, W, C) or (N, C, H, W), uint8 or floats in [-1, 1]; fields (N, H, W) or
            (N, C, H, W), numbers of any kind.
        scaling: Which of the two.

    Returns:
        The rows, channels first; memory of its own or that of `array`, which is not written to.

    Raises:
        DataError: The shape could mean two things, or values have no agreed range, are not finite, or lose digits.
    """
    if array.size == 0:
        raise DataError(f"{name}: no images found")
    if array.dtype.kind not in "uif":
        raise DataError(f"{name}: arrays of {array.dtype} are not read; save numbers")
    array = channels_first(name, array, scaling)
    if scaling == "pictures":
        if array.dtype.kind == "f":
            return _pixels_of_floats(name, array)
        if array.dtype != np.uint8:
            raise DataError(
                f"{name}: images of {array.dtype} have no agreed range: save uint8, or floats in [-1, 1], or choose "
                "data.scale for numbers that are not pictures"
            )
        return torch.from_numpy(np.ascontiguousarray(array))
    if array.dtype.kind in "ui" and max(abs(int(array.min())), abs(int(array.max()))) > _EXACT:
        raise DataError(f"{name}: whole numbers beyond {_EXACT:,} lose digits as float32; save floats in another unit")
    with np.errstate(over="ignore"):
        rows = np.ascontiguousarray(array, dtype=np.float32)
    if not all(np.isfinite(part).all() for part in rows):
        raise DataError(f"{name}: the fields hold values that are not finite as float32 (NaN, infinity, above 3e38)")
    return torch.from_numpy(rows)


def as_examples(
    name: str,
    rows: Tensor,
    labels: Int[Tensor, " n"] | None,
    classes: tuple[str, ...],
    scaling: Scaling,
    train: Tensor | None = None,
    skipped: tuple[str, ...] = (),
    notes: Mapping[str, str] = MappingProxyType({}),
) -> Examples:
    """Pictures, or fields with the statistics of those to train on.

    Args:
        name: The source.
        rows: As `as_rows` gives them.
        labels: Class of each row.
        classes: Names of the classes.
        scaling: Pictures, or how fields are scaled.
        train: True for rows to train on; by default all.
        skipped: What was left out.
        notes: How the rest was read.
    """
    if scaling == "pictures":
        return Images(name, rows, labels, classes, skipped, notes)
    scale = measure_scale(name, scaling, rows if train is None else rows[train])
    return Fields(name, rows, labels, classes, skipped, notes, codec=scale)


def as_labels(name: str, labels: Any, count: int) -> Any:
    """One label for each row, as an array of whole numbers from 0 or of names.

    Args:
        name: The source, for messages.
        labels: Numbers or names, (N,) or (N, 1); or one-hot, (N, classes).
        count: Number of rows, N.

    Raises:
        DataError: Another number of labels, fractions, negative numbers, or something else.
    """
    try:
        array = np.asarray(labels.detach().cpu() if isinstance(labels, Tensor) else labels)
    except (TypeError, ValueError, RuntimeError) as error:  # rows of different lengths, tensors of another device
        words = " ".join(str(error).split())[:100]
        raise DataError(f"{name}: labels must be {count} whole numbers from 0 or names of classes ({words})") from error
    given, numbers = f"{array.shape} of {array.dtype}", array.dtype.kind in "uifb"
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    elif array.ndim == 2 and numbers and ((array == 1).sum(1) == 1).all() and np.count_nonzero(array) == len(array):
        array = array.argmax(1)
    if array.dtype.kind == "S":
        array = np.char.decode(array, "utf-8", "replace")
    if array.shape != (count,) or not (numbers or array.dtype.kind == "U"):
        raise DataError(
            f"{name}: labels must be {count} whole numbers from 0, names of classes or one-hot rows; got {given}"
        )
    if numbers and not (np.isfinite(array) & (array == np.floor(array))).all():
        raise DataError(f"{name}: labels must be whole numbers, and there are fractions, NaN or infinity")
    if not numbers and (array == "").any():
        raise DataError(f"{name}: no label for row {int((array == '').argmax())}; the name of a class is not empty")
    if numbers and array.min() < 0:
        raise DataError(f"{name}: labels must be 0 or more, and the least is {array.min()}; {MEND}")
    if numbers and array.max() >= 2**63:
        raise DataError(f"{name}: labels must be below 2^63, and the greatest is {array.max()}")
    return array.astype(np.int64) if numbers else array


def _collection(
    source: str,
    rows: Tensor,
    labels: Any,
    test: Tensor | None,
    scaling: Scaling,
    notes: Mapping[str, str],
    skipped: tuple[str, ...] = (),
) -> Collection:
    """Rows with their labels, if there are any; a tenth is held out where nothing is."""
    classes, index = ((), None) if labels is None else number_labels([str(label) for label in labels.tolist()])
    if test is None:
        pictures = scaling == "pictures"
        test = hashed_test(content_keys(rows) if pictures else digest_keys(row_digests(rows)))
        notes = {**notes, "split": "held out: a tenth, by content"}
    return Collection(as_examples(source, rows, index, classes, scaling, ~test, skipped, notes), test)


def digest_keys(digests: UInt8[Tensor, "rows 16"]) -> list[int]:
    """What decides whether a field is held out, from the digests of rows."""
    return [int.from_bytes(digest[:8], "little") for digest in map(bytes, digests.numpy())]


def read_array(source: str, archive: zipfile.ZipFile, info: zipfile.ZipInfo, kinds: str = "uif") -> Any:
    """One array of an npz file, after its header has been compared with the size of its entry.

    Raises:
        DataError: Damaged, or an array of another kind.
    """
    where = f"{source}: {info.filename}"
    try:
        with archive.open(info) as file:
            return _parse_array(where, file, info.file_size, kinds)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise DataError(f"{where}: not an array that can be read ({' '.join(str(error).split())[:100]})") from error


def _parse_array(where: str, file: Any, size: int, kinds: str) -> Any:
    """One array, after its header has been compared with the size of its file."""
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
        if dtype.hasobject or dtype.kind not in kinds or dtype.itemsize > (_LONGEST if dtype.kind == "U" else 8):
            raise DataError(f"{where}: arrays of {dtype} are not read; save uint8 images and whole-number labels")
        content = math.prod(shape) * dtype.itemsize
        if content != size - file.tell() or content > 8 * MAX_SET_BYTES:
            raise DataError(f"{where}: the header says {shape} of {dtype}, the entry has {size} bytes")
        array = np.frombuffer(bytearray(file.read()), dtype)
    except (ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{where}: not an array that can be read ({' '.join(str(error).split())[:100]})") from error
    return array.reshape(shape, order="F" if fortran else "C")


def channels_first(name: str, array: Any, scaling: Scaling) -> Any:
    """(N, C, H, W) of an array or tensor whose shape can mean one thing only.

    Raises:
        DataError: It can mean two, or nothing.
    """
    shape = tuple(array.shape)
    if len(shape) == 3:
        if shape[0] == shape[1] != shape[2] > 4:
            raise DataError(
                f"{name}: {shape} may be {shape[0]} pictures or, with the number last, {shape[2]}; give (N, 1, H, W): "
                "numpy.moveaxis(x, 2, 0)[:, None] of the latter"
            )
        if (shape[2] <= 4 and shape[1] > shape[2]) or shape[0] == 3:
            raise DataError(
                f"{name}: {shape} may be one picture in colours or {shape[0]} in grey; give four dimensions, "
                f"{(1, *shape)} or {(shape[0], 1, *shape[1:])}"
            )
        return array[:, None]
    if len(shape) != 4:
        raise DataError(f"{name}: images must have 3 or 4 dimensions, got {shape}")
    if scaling == "pictures":
        last, first = shape[3] in (1, 3), shape[1] in (1, 3)
        if last == first:
            four = "; of four channels leave the last one out, x[..., :3]" if 4 in (shape[1], shape[3]) else ""
            raise DataError(
                f"{name}: images must be (N, H, W, C) or (N, C, H, W) with C = 1 or 3, got {shape}{four}; data.scale "
                "reads fields of any number of channels"
            )
        return np.moveaxis(array, 3, 1) if last else array
    if shape[1] == shape[2] > 4 * shape[3] or shape[3] <= 4 < shape[1]:
        raise DataError(
            f"{name}: fields are (N, C, H, W), and {shape} looks like (N, H, W, C); move the last axis to C"
        )
    return array


def _pixels_of_floats(name: str, array: Any) -> UInt8[Tensor, "batch channels height width"]:
    """Floats in [-1, 1]; any other range is refused, because a guess would shift every figure."""
    low, high = float(array.min()), float(array.max())
    if not math.isfinite(low + high):
        raise DataError(f"{name}: images hold NaN or infinite values")
    below = sum(int((part < _BELOW).sum()) for part in array) / array.size
    if not (-1.0 <= low and high <= 1.0 and below >= _SHARE):
        mean = float(array.mean(dtype=np.float64))
        raise DataError(
            f"{name}: float images must span [-1, 1], these {low:.4g}..{high:.4g} (mean {mean:.4g}): save them as "
            "uint8, or choose data.scale for numbers that are not pictures"
        )
    native: Any = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("=")))
    return torch.cat([to_uint8(torch.from_numpy(part)) for part in np.array_split(native, -(-len(native) // 1024))])
