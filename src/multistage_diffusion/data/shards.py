"""Rows of one shape in files: written once, then read in any order without being loaded.

A folder holds `shard-00000.bin`, `shard-00001.bin`, ... (the rows as they are, one behind the other, the same number in
each file but the last), `digests.bin` (16 bytes of BLAKE2b for each row) and `index.json`. The writer's caller adds the
manifest with the SHA-256 of every file. Each row is compared with its digest whenever it is read.

Files are read, not mapped: what was read takes no memory afterwards, and a disk that fails is an error, not a signal.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, final

import numpy as np
import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from multistage_diffusion.data.rows import DIGEST_BYTES, Row, Rows, blocks, row_digests
from multistage_diffusion.errors import ConfigError, DataError
from multistage_diffusion.files import MAX_MANIFEST_BYTES, check_directory, read_json

INDEX = "index.json"
_FORMAT = "multistage-diffusion shards 1"
_DIGESTS = "digests.bin"
_SHARD_BYTES = 256 * 2**20
_SHARDS = 2_000  # about as many files of rows at most: those of larger sets are larger
_DTYPES = {"uint8": torch.uint8, "float32": torch.float32}
_MAX_ROW_BYTES = 2**30
_MAX_FILES = 100_000  # in an index that is read


@final
class Shards(Rows):
    """Rows in the files of a folder.

    Args:
        folder: Where the files are.
        shape: Shape of one row.
        dtype: Type of the numbers.
        count: Number of rows in the files.
        per_file: Number of rows in each file but the last.
    """

    def __init__(self, folder: Path, shape: Row, dtype: torch.dtype, count: int, per_file: int) -> None:
        digests = torch.from_numpy(np.fromfile(folder / _DIGESTS, np.uint8)).reshape(count, DIGEST_BYTES)
        super().__init__(str(folder), shape, dtype, digests)
        self.folder, self._per_file = folder, per_file

    def read(self, rows: Int[Tensor, " n"]) -> Shaped[Tensor, "n channels height width"]:
        """Rows by their number in the files, in the order that they lie in on the disk."""
        read = torch.empty(len(rows), *self._row, dtype=self.dtype)
        order = rows.argsort()
        numbers, counts = (rows[order] // self._per_file).unique_consecutive(return_counts=True)
        for number, places in zip(numbers.tolist(), order.split(counts.tolist()), strict=True):
            self._copy(number, rows[places] - number * self._per_file, places, read)
        return read

    def damage(self, row: int) -> str:
        """Which row of which file differs from its digest."""
        path = self.folder / _file(row // self._per_file)
        return (
            f"{path}: row {row % self._per_file} is damaged (it differs from its digest); delete {self.folder} and "
            "make it again"
        )

    def _copy(self, number: int, rows: Tensor, places: Tensor, read: Tensor) -> None:
        """Read increasing rows of one file into places of a tensor; neighbours in both at once."""
        path, size = self.folder / _file(number), math.prod(self._row) * self.dtype.itemsize
        target = read.view(-1).view(torch.uint8).numpy().data
        apart = ((rows.diff() != 1) | (places.diff() != 1)).nonzero()[:, 0] + 1
        starts = torch.cat((apart.new_zeros(1), apart))
        lengths = starts.diff(append=apart.new_tensor([len(rows)]))
        try:
            with path.open("rb", buffering=0) as file:
                for row, place, length in zip(
                    *(t.tolist() for t in (rows[starts], places[starts], lengths)), strict=True
                ):
                    part = target[place * size : (place + length) * size]
                    if os.preadv(file.fileno(), [part], row * size) != len(part):
                        raise DataError(f"{path}: cut off; delete {self.folder} and make it again")
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from error


def open_shards(folder: Path, beside: Sequence[str] = ()) -> tuple[Shards, dict[str, Any]]:
    """Open a folder of rows. All files but those of the rows are compared with the manifest; of those, the sizes.

    Args:
        folder: Written with a `ShardWriter` in a `whole_directory`.
        beside: More files that must be there.

    Returns:
        The rows, and what the writer's caller said about them.

    Raises:
        DataError: No such folder, an index that makes no sense, or files that are missing, damaged or of another size.
    """
    if not (folder / INDEX).is_file():
        raise DataError(f"{folder}: not a folder of shards; msd data SOURCE --convert {folder} writes one")
    if damage := check_directory(folder, (INDEX, _DIGESTS, *beside), sizes_only="shard-*.bin"):
        raise DataError(f"{damage}; delete {folder} and make it again")
    return _open(folder)


def require_size(path: Path, size: int) -> None:
    """Refuse a file that is missing or of another size.

    Args:
        path: The file.
        size: Its size in bytes.

    Raises:
        DataError: It is not there, not a regular file, or has another size.
    """
    found = path.stat().st_size if path.is_file() else None
    if found != size:
        what = "no such file" if found is None else f"{found} bytes instead of {size}"
        raise DataError(f"{path}: {what}; delete {path.parent} and make it again")


@final
class ShardWriter:
    """Writes rows as they come.

    Args:
        folder: An empty folder, best one of `whole_directory`, which makes it durable and adds the manifest.
        expected: Number of rows that will come, about; a disk that is too small for them is refused at once.

    Attributes:
        finished: Whether `finish` was called.
    """

    def __init__(self, folder: Path, *, expected: int = 0) -> None:
        self.expected, self.finished, self._folder = expected, False, folder
        self._digests, self._count, self._per_file = bytearray(), 0, 0
        self._shape: Row = (0, 0, 0)
        self._dtype = torch.uint8
        self._file: BinaryIO | None = None

    def add(self, rows: Shaped[Tensor, "n channels height width"]) -> None:
        """Write rows behind those written before. One channel among three is repeated, whichever comes first.

        Args:
            rows: On the CPU; height, width and type as those before.

        Raises:
            OSError: The disk has no room for what is expected, is full, or cannot be written.
        """
        if self._count == 0:
            self._begin(rows)
        if rows.shape[1] > self._shape[0]:
            self._widen(rows.shape[1])
        rows = rows.expand(-1, self._shape[0], -1, -1).contiguous()
        assert rows.dtype == self._dtype and tuple(rows.shape[1:]) == self._shape
        self._digests += row_digests(rows).numpy().tobytes()
        while len(rows):
            space = self._per_file - self._count % self._per_file
            if space == self._per_file:
                self._open("wb")
            assert self._file is not None
            self._file.write(rows[:space].numpy().data)
            self._count += len(rows[:space])
            rows = rows[space:]

    def finish(self, **about: Any) -> Shards:
        """Write the index, and open what was written.

        Args:
            about: What else the index says.

        Returns:
            The rows.
        """
        self.close()
        self.finished = True
        (self._folder / _DIGESTS).write_bytes(self._digests)
        names = {dtype: name for name, dtype in _DTYPES.items()}
        document = {
            "format": _FORMAT,
            "dtype": names[self._dtype],
            "shape": list(self._shape),
            "rows": self._count,
            "rows_per_shard": self._per_file,
            "about": about,
        }
        (self._folder / INDEX).write_text(json.dumps(document, indent=2) + "\n")
        return _open(self._folder)[0]

    def close(self) -> None:
        """Close the file that is open, if one is."""
        if self._file is not None:
            self._file.close()

    def _begin(self, rows: Tensor) -> None:
        channels, height, width = rows.shape[1:]
        self._shape, self._dtype = (channels, height, width), rows.dtype
        row = rows[0].nbytes
        self._per_file = max(1, _SHARD_BYTES // row, -(-self.expected // _SHARDS))
        needed, free = self.expected * (row + DIGEST_BYTES), shutil.disk_usage(self._folder).free
        if needed > free:  # the folder's owner knows what it will be called
            raise OSError(errno.ENOSPC, f"{needed} bytes are needed and {free} are free")

    def _open(self, mode: str) -> None:
        self.close()
        self._file = (self._folder / _file(self._count // self._per_file)).open(mode)  # pyright: ignore

    def _widen(self, channels: int) -> None:
        """Repeat the one channel of the rows written before."""
        self.close()
        self._digests.clear()
        for number, count in enumerate(_rows_of_files(self._count, self._per_file)):
            path = self._folder / _file(number)
            wider = path.with_suffix(".wide")
            with path.open("rb") as narrow, wider.open("wb") as file:
                for rows in blocks((count, channels, *self._shape[1:])):
                    content = bytearray(narrow.read(len(rows) * math.prod(self._shape)))
                    grey = torch.frombuffer(content, dtype=torch.uint8).reshape(-1, *self._shape)
                    wide = grey.expand(-1, channels, -1, -1).contiguous()
                    self._digests += row_digests(wide).numpy().tobytes()
                    file.write(wide.numpy().data)
            wider.replace(path)
        self._shape = (channels, *self._shape[1:])
        if self._count % self._per_file:
            self._open("ab")


def _open(folder: Path) -> tuple[Shards, dict[str, Any]]:
    """Open a folder by its index."""
    try:
        index: Any = read_json(folder / INDEX, MAX_MANIFEST_BYTES)
        if index["format"] != _FORMAT:
            raise ValueError(f"format {str(index['format'])[:60]!r} instead of {_FORMAT!r}")
        dtype, count, per_file = _DTYPES[index["dtype"]], index["rows"], index["rows_per_shard"]
        (channels, height, width), about = index["shape"], index["about"]
        shape = (channels, height, width)
        if not all(type(number) is int and number > 0 for number in (*shape, count, per_file)):
            raise ValueError("sizes must be whole numbers above 0")
        row = math.prod(shape) * dtype.itemsize
        if row > _MAX_ROW_BYTES or count > _MAX_FILES * per_file:
            raise ValueError("sizes beyond any data set")
        if not isinstance(about, dict):
            raise ValueError("about must hold names")
    except (ConfigError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{folder / INDEX}: not an index of shards ({str(error)[:100]})") from error
    require_size(folder / _DIGESTS, count * DIGEST_BYTES)
    for number, rows in enumerate(_rows_of_files(count, per_file)):
        require_size(folder / _file(number), rows * row)
    return Shards(folder, shape, dtype, count, per_file), about


def _file(number: int) -> str:
    return f"shard-{number:05d}.bin"


def _rows_of_files(count: int, per_file: int) -> list[int]:
    """Number of rows in each file."""
    return [min(per_file, count - start) for start in range(0, count, per_file)]
