"""The processes that `torchrun` started share the images among them, by seed; the first of them does the rest."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from multistage_diffusion.metrics.statistics import Statistics


def place() -> tuple[int, int]:
    """This process's rank, and the number of processes.

    Returns:
        (0, 1) without a process group.
    """
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def share(num: int) -> range:
    """The images that this process makes.

    Args:
        num: Images of all processes.

    Returns:
        Their indices: the parts of the processes follow each other.
    """
    rank, world = place()
    return range(rank * num // world, (rank + 1) * num // world)


def gather(seen: Statistics) -> None:
    """Make the statistics of all processes those of one set, in the first process.

    Args:
        seen: This process's; in the others they are spoilt.
    """
    if place()[1] == 1:
        return
    group: Any = dist.new_group(backend="gloo")  # the sums are on the CPU, whatever the models' device
    try:
        seen.combine(lambda part: _add(part, group), lambda rows: _join(rows, group))
    finally:
        dist.destroy_process_group(group)


def _add(part: Tensor, group: Any) -> Tensor:
    total = part.clone()
    dist.all_reduce(total, group=group)
    return total


def _join(rows: Tensor, group: Any) -> Tensor:
    """Rows of all processes one after the other, in the first process; padded on the way to be of one size."""
    rank, world = place()
    counts = [torch.zeros(1, dtype=torch.int64) for _ in range(world)]
    dist.all_gather(counts, torch.tensor([len(rows)]), group=group)
    most = max(int(count) for count in counts)
    padded = torch.cat((rows, rows.new_zeros(most - len(rows), *rows.shape[1:])))
    parts = [torch.empty_like(padded) for _ in range(world)] if rank == 0 else None
    dist.gather(padded, parts, dst=0, group=group)
    return rows if parts is None else torch.cat([part[: int(n)] for part, n in zip(parts, counts, strict=True)])
