"""One network in several processes: gradients summed, weights in shards or whole, whole tensors for files."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from multistage_diffusion.errors import NumericsError
from multistage_diffusion.multidecoder import MultiDecoder
from multistage_diffusion.process_group import ProcessGroup
from multistage_diffusion.weights import persistent_buffers


def parallelise(
    module: nn.Module,
    network: MultiDecoder,
    processes: ProcessGroup,
    device: torch.device,
    kind: Literal["ddp", "fsdp"],
    *,
    unused: bool,
) -> nn.Module:
    """Make a module's gradients those of all processes together, averaged.

    Args:
        module: What is called in training.
        network: The multi-decoder network in it.
        processes: The processes.
        device: Where this process trains.
        kind: `ddp`: each process holds all weights; `fsdp`: each holds a share of weights, optimiser state and average.
        unused: Whether a step may use a part of the weights only, the same part on all processes.

    Returns:
        What to call in place of `module`.
    """
    if processes.size == 1:
        return module
    if kind == "fsdp":
        _shard(network, device, processes)
        return module
    # Buffers that training changes, like the statistics of batch norms, are those of process 0 in all; torch 2.13 has
    # another name for the switch.
    known, change = inspect.signature(DistributedDataParallel).parameters, bool(persistent_buffers(network))
    switch: dict[str, Any] = {
        "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": change
    }
    # Weights of 1x1 convolutions have strides that mean the same and are not: harmless, said by torch in each process.
    warnings.filterwarnings("ignore", message="Grad strides do not match")
    ids = [device] if device.type == "cuda" else None
    return DistributedDataParallel(
        module, device_ids=ids, find_unused_parameters=unused, gradient_as_bucket_view=True, **switch
    )


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor.

    Args:
        tensor: Perhaps a shard of a larger one.

    Returns:
        Its memory; the tensor itself where it is whole.
    """
    if type(tensor) in (Tensor, nn.Parameter):
        return tensor
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_tensor(tensor: Tensor) -> Tensor:
    """A tensor of which each process may hold a shard; then all must call.

    Args:
        tensor: Whole or in shards.

    Returns:
        All of it.
    """
    if local(tensor) is tensor:
        return tensor
    from torch.distributed.tensor import DTensor

    assert isinstance(tensor, DTensor)
    return tensor.full_tensor()


def gather(tensors: Mapping[str, Tensor], *, keep: bool = True) -> dict[str, Tensor]:
    """Whole tensors to be written to a file; all processes must call.

    Args:
        tensors: Tensors by name, whole or in shards.
        keep: Whether this process wants them; one that does not holds one at a time, and gets none.

    Returns:
        Contiguous tensors; on the CPU, one after the other, where they were in shards.
    """
    gathered = {}
    for name, tensor in tensors.items():
        whole = whole_tensor(tensor)
        if keep:
            gathered[name] = (whole if whole is tensor else whole.cpu()).detach().contiguous()
    return gathered


@torch.no_grad()
def put(target: Tensor, values: Tensor) -> None:
    """Write a whole tensor into one of which each process may hold a shard.

    Args:
        target: Where it goes.
        values: All of it, alike on all processes.
    """
    if local(target) is target:
        target.copy_(values)
        return
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(target, DTensor)
    values = values.to(target.device)
    target.copy_(distribute_tensor(values, target.device_mesh, target.placements, src_data_rank=None))


def require_same_weights(processes: ProcessGroup, tensors: Mapping[str, Tensor], step: int) -> None:
    """Compare what all processes hold alike, bit by bit.

    Args:
        processes: The processes.
        tensors: Tensors by name, whole.
        step: Steps taken, for the message.

    Raises:
        NumericsError: A tensor differs between processes.
    """
    if processes.size == 1 or not tensors:
        return
    words = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = [tensor.detach().view(words[tensor.itemsize]) for tensor in tensors.values()]
    sums = torch.stack([part.sum(dtype=torch.int64) for part in bits])
    extremes = torch.cat((sums, -sums))
    dist.all_reduce(extremes, dist.ReduceOp.MAX)
    high, low = extremes.chunk(2)
    for name, differs in zip(tensors, (high != -low).tolist(), strict=True):
        if differs:
            raise NumericsError(
                f"weight {name} differs between the processes after step {step}; the same command goes on from the "
                "last checkpoint, which holds the weights of process 0"
            )


def _shard(network: MultiDecoder, device: torch.device, processes: ProcessGroup) -> None:
    """FSDP2: each block is gathered when it is used, then the rest of each decoder; what remains, with the root."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (processes.size,))
    blocks = [block for blocks in network.blocks() for block in blocks]
    for part in dict.fromkeys((*blocks, *network.decoders, network)):
        if any(True for _ in part.parameters()):
            fully_shard(part, mesh=mesh)
