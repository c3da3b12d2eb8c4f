"""Rows of one shape that stay where they are and are read when they are indexed, each compared with its digest."""

from __future__ import annotations

import copy
import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TypeAlias, TypeVar

import torch
from jaxtyping import Int, Shaped, UInt8
from torch import Tensor

from multistage_diffusion.errors import DataError

DIGEST_BYTES = 16
MAX_BYTES = 16 * 2**30  # more is not read into memory at once
_BLOCK = 2**22  # numbers in rows that are gone through block by block

Row: TypeAlias = tuple[int, int, int]
Kind = TypeVar("Kind", bound="Rows")


class Rows(ABC):
    """Rows outside memory; indexed like a tensor, by a slice or a tensor of indices, they are read.

    Args:
        name: What messages call them.
        shape: Shape of one row.
        dtype: Type of the numbers.
        digests: The digest of each row, as `row_digests` gives it.
    """

    device = None  # where a tensor says the device that it is on

    def __init__(self, name: str, shape: Row, dtype: torch.dtype, digests: UInt8[Tensor, "rows 16"]) -> None:
        self.name, self.dtype = name, dtype
        self._row, self._digests = shape, digests
        self._chosen: Tensor | None = None  # the rows meant, in order; all where there are none

    @abstractmethod
    def read(self, rows: Int[Tensor, " n"]) -> Shaped[Tensor, "n channels height width"]:
        """Rows by their number among all, without a check."""

    @abstractmethod
    def damage(self, row: int) -> str:
        """What to say of a row that differs from its digest."""

    def __len__(self) -> int:
        return len(self._digests if self._chosen is None else self._chosen)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Number of rows, then the shape of one."""
        return len(self), *self._row

    @property
    def nbytes(self) -> int:
        """Memory that all rows would take."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def digests(self) -> UInt8[Tensor, "rows 16"]:
        """The digest of each row."""
        return self._digests if self._chosen is None else self._digests[self._chosen]

    def take(self: Kind, index: Int[Tensor, " n"]) -> Kind:
        """Some of the rows in the order of `index`, where they are."""
        some = copy.copy(self)
        some._chosen = index if self._chosen is None else self._chosen[index]
        return some

    def to(self, device: torch.device | str) -> Shaped[Tensor, "rows channels height width"]:
        """Read all rows into the memory of a device; errors as for reading some."""
        read = torch.empty(self.shape, dtype=self.dtype, device=device)
        for rows in blocks(self.shape):
            read[rows[0] : rows[-1] + 1] = self[rows].to(device)
        return read

    def __getitem__(self, index: slice | Int[Tensor, " n"]) -> Shaped[Tensor, "n channels height width"]:
        """Read rows.

        Args:
            index: A slice, or a tensor of indices on the CPU.

        Raises:
            DataError: A row differs from its digest or cannot be read, or they are too many for memory.
        """
        rows = torch.arange(len(self))[index] if isinstance(index, slice) else index
        rows = rows if self._chosen is None else self._chosen[rows]
        if (size := len(rows) * math.prod(self._row) * self.dtype.itemsize) > MAX_BYTES:
            raise DataError(f"{self.name}: {size:,} bytes are too many to be held in memory at once; use fewer images")
        read = self.read(rows)
        wrong = (row_digests(read) != self._digests[rows]).any(1).nonzero()[:, 0]
        if len(wrong):
            raise DataError(self.damage(int(rows[wrong[0]])))
        return read


def blocks(shape: Sequence[int]) -> tuple[Int[Tensor, " _"], ...]:
    """Indices of all rows in blocks of a few megabytes, to go through a set that need not fit into memory.

    Args:
        shape: Number of rows, then the shape of one.

    Returns:
        The indices, in order.
    """
    return torch.arange(shape[0]).split(max(1, _BLOCK // math.prod(shape[1:])))


def row_digests(rows: Shaped[Tensor, "n ..."]) -> UInt8[Tensor, "n 16"]:
    """A digest of each row's bytes.

    Args:
        rows: Any rows.

    Returns:
        16 bytes of BLAKE2b each.
    """
    if len(rows) == 0:
        return torch.empty(0, DIGEST_BYTES, dtype=torch.uint8)
    plain = rows.cpu().contiguous().flatten(1).numpy()
    digests = b"".join(hashlib.blake2b(row.data, digest_size=DIGEST_BYTES).digest() for row in plain)
    return torch.frombuffer(bytearray(digests), dtype=torch.uint8).reshape(len(rows), DIGEST_BYTES)
