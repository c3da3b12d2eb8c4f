"""Images in an npz archive of NumPy arrays; headers are checked before memory is taken, nothing is unpickled."""

from __future__ import annotations

import math
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from multistage_diffusion.data.collection import Collection, hashed_test, number_labels
from multistage_diffusion.data.files import checked_entries, open_zip
from multistage_diffusion.data.images import MAX_SET_BYTES, Images, content_key, to_uint8
from multistage_diffusion.errors import DataError

_PIXELS, _LABELS = ("images", "x", "arr_0"), ("labels", "y", "arr_1")
_TRAIN, _TEST = ("train_images", "x_train"), ("test_images", "x_test")
_TRAIN_LABELS, _TEST_LABELS = ("train_labels", "y_train"), ("test_labels", "y_test")


def read_npz(source: str, path: Path) -> Collection:
    """Images and labels of an npz file.

    Args:
        source: The source, as the user wrote it.
        path: The file. Images are called `images`, `x` or `arr_0`, labels `labels`, `y` or `arr_1`; or both come in two
            parts, `train_images`, `train_labels`, `test_images`, `test_labels` or `x_train`, `y_train`, ...

    Returns:
        The set. Held out is the file's own test part, or a tenth by content.

    Raises:
        DataError: Missing or damaged, no array of images, objects, sizes that are a bomb's, values of unclear range.
    """
    with open_zip(source, path) as archive:
        arrays = {info.filename.removesuffix(".npy"): info for info in checked_entries(source, archive)}

        def find(names: tuple[str, ...]) -> Any:
            for name in names:
                if name in arrays:
                    return read_array(source, archive, arrays[name])
            return None

        pixels, labels, train, test = find(_PIXELS), find(_LABELS), find(_TRAIN), find(_TEST)
        if pixels is None and train is None:
            held = ", ".join(sorted(arrays)[:8]) or "nothing"
            raise DataError(f"{source}: no array called images, x, arr_0 or train_images; the file holds {held}")
        if pixels is not None:
            images = _as_pixels(source, pixels)
            keys = [content_key(picture) for picture in images]
            return Collection(_labelled(source, images, labels), hashed_test(keys))
        parts = [_as_pixels(source, part) for part in (train, test) if part is not None]
        named = [find(_TRAIN_LABELS), *([] if test is None else [find(_TEST_LABELS)])]
        joined = None if any(part is None for part in named) else np.concatenate([part.reshape(-1) for part in named])
        if len({part.shape[1:] for part in parts}) > 1:
            raise DataError(f"{source}: training and test images have different shapes")
        held_out = torch.arange(sum(map(len, parts))) >= len(parts[0])
        images = torch.cat(parts)
        if test is None:
            held_out = hashed_test([content_key(picture) for picture in images])
        return Collection(_labelled(source, images, joined), held_out)


def read_array(source: str, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Any:
    """One array of an npz file, after its header has been compared with the size of its entry.

    Raises:
        DataError: Damaged, or an array of objects.
    """
    where = f"{source}: {info.filename}"
    try:
        with archive.open(info) as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(file)
            if dtype.hasobject or dtype.kind not in "uif" or dtype.itemsize > 8:
                raise DataError(f"{where}: arrays of {dtype} are not read; save uint8 images and whole-number labels")
            size = math.prod(shape) * dtype.itemsize
            if size != info.file_size - file.tell() or size > 8 * MAX_SET_BYTES:
                raise DataError(f"{where}: the header says {shape} of {dtype}, the entry has {info.file_size} bytes")
            array = np.frombuffer(bytearray(file.read()), dtype)
    except (ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error, RuntimeError, NotImplementedError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{where}: not an array that can be read ({' '.join(str(error).split())[:100]})") from error
    return array.reshape(shape, order="F" if fortran else "C")


def _as_pixels(source: str, array: Any) -> UInt8[Tensor, "batch channels height width"]:
    """(N, H, W), (N, H, W, C) or (N, C, H, W) of bytes, or of floats in [-1, 1]."""
    if array.ndim == 3:
        array = array[:, None]
    elif array.ndim == 4:
        last, first = array.shape[3] in (1, 3), array.shape[1] in (1, 3)
        if last == first:
            raise DataError(f"{source}: images must be (N, H, W, C) or (N, C, H, W) with C = 1 or 3, got {array.shape}")
        array = np.moveaxis(array, 3, 1) if last else array
    else:
        raise DataError(f"{source}: images must have 3 or 4 dimensions, got {array.shape}")
    if array.size == 0:
        raise DataError(f"{source}: no images found")
    if array.dtype.kind == "f":
        return _from_floats(source, array)
    if array.dtype != np.uint8:
        raise DataError(f"{source}: images of {array.dtype} have no agreed range: save uint8, or floats in [-1, 1]")
    return torch.from_numpy(np.ascontiguousarray(array))


def _from_floats(source: str, array: Any) -> UInt8[Tensor, "batch channels height width"]:
    """Floats in [-1, 1]; any other range is refused, because a guess would shift every figure."""
    low, high = float(array.min()), float(array.max())
    if not math.isfinite(low + high):
        raise DataError(f"{source}: images hold NaN or infinite values")
    if not (-1.0 <= low < 0.0 and high <= 1.0):
        raise DataError(f"{source}: float images must span [-1, 1], these {low:.4g}..{high:.4g}: save them as uint8")
    native = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("=")))
    return torch.cat([to_uint8(torch.from_numpy(part)) for part in np.array_split(native, -(-len(native) // 1024))])


def _labelled(source: str, pixels: Tensor, labels: Any) -> Images:
    """Images with their labels, if there are any."""
    if labels is None:
        return Images(source, pixels)
    flat = labels.reshape(-1)
    if labels.dtype.kind not in "ui" or len(flat) != len(pixels) or flat.min() < 0:
        raise DataError(
            f"{source}: labels must be {len(pixels)} whole numbers from 0, got {labels.shape} of {labels.dtype}"
        )
    classes, index = number_labels([str(label) for label in flat.tolist()])
    return Images(source, pixels, index, classes)
