"""What computes: the precision of its matrix products."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Matrix products in true float32 and no autocast on a device, whatever the code around has chosen."""
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # chosen backend by backend, which the one setting for all cannot express
        with _backends_in_full(), torch.autocast(device.type, enabled=False):
            yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def _backends_in_full() -> Iterator[None]:
    """Each backend's own precision of matrix products at IEEE float32 (torch 2.9 and later)."""
    mkldnn: Any = torch.backends.mkldnn  # a module whose attributes torch makes at run time
    backends = (torch.backends.cuda.matmul, mkldnn.matmul)
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
