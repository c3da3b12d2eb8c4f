"""What computes: its mode, the precision of its matrix products, and its memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

_CGROUP = Path("/sys/fs/cgroup/memory.max")


@contextmanager
def untraced() -> Iterator[None]:
    """Compute with numbers on the host, also where the code around is traced into a graph or runs in inference mode."""
    from torch.utils._python_dispatch import _disable_current_modes

    with torch.inference_mode(False), torch.device("cpu"), _disable_current_modes():
        yield


@contextmanager
def evaluating(module: Any) -> Iterator[None]:
    """An `nn.Module` in evaluation mode, without dropout; afterwards each part of it has its own mode again."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


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


def memory_of(device: torch.device) -> int:
    """Memory of a CUDA device in bytes, or this process's share of what the machine has for its processes."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # processes of torchrun on this machine, this one too
    try:
        return min(physical, int(_CGROUP.read_text())) // neighbours
    except (OSError, ValueError):  # no control group, or no limit ("max")
        return physical // neighbours
