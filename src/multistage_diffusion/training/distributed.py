"""Several processes that train one model, thin over `torch.distributed`: how they meet, what they share, how they end.

`torchrun` starts the processes and says who they are. One process alone is `ALONE`, and nothing of this file costs it
anything. What the processes tell one another outside of training goes through the store that they met at: waiting
there has no limit and ends when another process fails, while a collective breaks off after the group's timeout.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.nn.parallel import DistributedDataParallel

from multistage_diffusion.errors import ConfigError, NumericsError
from multistage_diffusion.models.unet import Encoder, MultiDecoderUNet
from multistage_diffusion.training.failure import blame, deaf, linger, require_none

_POLL = 0.02  # seconds between looks at the store


@final
@dataclass(frozen=True)
class World:
    """The processes that train together, seen from one of them.

    Attributes:
        rank: Number of this process.
        size: Number of processes.
        store: Where they met; none for a process alone.
    """

    rank: int = 0
    size: int = 1
    store: Store | None = None

    @property
    def leads(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def tell(self, key: str, value: Any = None) -> None:
        """Say something to all other processes.

        Args:
            key: What it is about; each is told once.
            value: Anything that JSON holds.
        """
        if self.store is not None:
            self.store.set(key, json.dumps(value))

    def ask(self, key: str) -> Any:
        """Wait for what another process tells, for as long as it takes.

        Args:
            key: What it is about.

        Returns:
            What was told.

        Raises:
            PeerError: A process failed in the meantime.
        """
        assert self.store is not None, "a process alone has nobody to ask"
        while not self.store.check([key]):
            require_none(self.store)
            time.sleep(_POLL)
        return json.loads(self.store.get(key))

    def lead(self, what: str, action: Callable[[], object]) -> None:
        """Process 0 does something, and the others wait until it has.

        Args:
            what: Its name; each is done once.
            action: What to do.

        Raises:
            PeerError: A process failed in the meantime.
        """
        if self.leads:
            action()
            self.tell(what)
        else:
            self.ask(what)

    def meet(self, what: str) -> None:
        """Wait until all processes are here, for as long as it takes.

        Args:
            what: Its name; each is done once.

        Raises:
            PeerError: A process failed in the meantime.
        """
        self.tell(f"{what} {self.rank}")
        for rank in range(self.size):
            if rank != self.rank:
                self.ask(f"{what} {rank}")

    @contextlib.contextmanager
    def first(self, what: str) -> Iterator[None]:
        """The first process of each machine does something before the others, which then find it done.

        Args:
            what: Its name; each is done once.

        Yields:
            When it is this process's turn.
        """
        key = f"{what} on {os.environ.get('GROUP_RANK', '0')}"
        if self.size == 1:
            yield
        elif int(os.environ.get("LOCAL_RANK", self.rank)) == 0:
            yield
            self.tell(key)
        else:
            self.ask(key)
            yield

    def require_same(self, what: str, value: str) -> None:
        """Refuse to go on where processes differ.

        Args:
            what: Name of the value, in the plural.
            value: This process's value.

        Raises:
            ConfigError: It is not that of process 0.
        """
        if self.leads:
            self.tell(what, value)
        elif self.ask(what) != value:
            raise ConfigError(f"{what} of process {self.rank} are not those of process 0; start all processes alike")

    def sum(self, values: Tensor) -> Tensor:
        """Add up a tensor over the processes, in place.

        Args:
            values: The same shape on each process.

        Returns:
            The same tensor.
        """
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def require_equal(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """Compare what all processes should hold alike, bit by bit.

        Args:
            tensors: float32 tensors by name; those held in shards are left out.
            step: Steps taken, for the message.

        Raises:
            NumericsError: A tensor differs between processes.
        """
        alike = {name: tensor for name, tensor in tensors.items() if local(tensor) is tensor}
        if self.size == 1 or not alike:
            return
        words = [tensor.detach().view(torch.int32).sum(dtype=torch.int64) for tensor in alike.values()]
        sums = torch.stack(words)
        extremes = torch.cat((sums, -sums))
        dist.all_reduce(extremes, dist.ReduceOp.MAX)
        high, low = extremes.chunk(2)
        for name, differs in zip(alike, (high != -low).tolist(), strict=True):
            if differs:
                raise NumericsError(
                    f"weight {name} differs between the processes after step {step}; the same command goes on from the "
                    "last checkpoint, which holds the weights of process 0"
                )

    def share(self, key: str, tensors: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """Hand tensors of process 0 to all.

        Args:
            key: What they are; each is shared once.
            tensors: float32 tensors on the CPU by name, on process 0.

        Returns:
            The same on every process.

        Raises:
            PeerError: A process failed in the meantime.
        """
        if self.leads:
            shared = dict(tensors or {})
            self.tell(key, [(name, list(tensor.shape)) for name, tensor in shared.items()])
        else:
            shared = {name: torch.empty(shape) for name, shape in self.ask(key)}
        if self.size > 1:
            for tensor in shared.values():
                dist.broadcast(tensor, 0)
        return shared


ALONE = World()


def local_device(device: torch.device | str) -> torch.device:
    """The device of this process.

    Args:
        device: `cuda` stands for a GPU for each process of a machine.

    Returns:
        With its number, for a GPU.
    """
    device = torch.device(device)
    if device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % max(torch.cuda.device_count(), 1))


@contextlib.contextmanager
def join(device: torch.device, minutes: float) -> Iterator[World]:
    """Meet the other processes that `torchrun` started, and end together.

    Args:
        device: Where this process trains; its collectives use NCCL on a GPU and gloo elsewhere.
        minutes: How long a collective waits for the others.

    Yields:
        All of them; `ALONE` where there is one.

    Raises:
        PeerError: Another process failed, and has said why.
        UserError: Another process ended without a word.
    """
    ours = not dist.is_initialized()
    if ours and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    if ours:
        _start(device, timedelta(minutes=minutes))
    store = _store()
    world = World(dist.get_rank(), dist.get_world_size(), store)
    try:
        yield world
        # Nobody goes while another one may still ask. A barrier holds no tensor: gloo's thread would need Python's lock
        # to let go of one, while this thread, which holds the lock, may wait for that one to end (torch 2.13).
        dist.barrier()
    except BaseException as error:
        with deaf():
            blamed = blame(store, world.rank, world.size, error)
            if ours and device.type != "cuda":  # NCCL would wait for those that failed
                dist.destroy_process_group()  # now the others notice
            linger(store, world.rank, world.size)
        if blamed is error:
            raise
        raise blamed from error
    if ours:
        dist.destroy_process_group()


def parallelise(
    module: nn.Module, network: MultiDecoderUNet, world: World, device: torch.device, kind: Literal["ddp", "fsdp"], *,
    unused: bool,
) -> nn.Module:  # fmt: skip
    """Make a module's gradients those of all processes together, averaged.

    Args:
        module: What is called in training.
        network: The multi-decoder network in it.
        world: The processes.
        device: Where this process trains.
        kind: `ddp`: each process holds all weights; `fsdp`: each holds a share of weights, optimiser state and average.
        unused: Whether a step may use a part of the weights only, the same part on all processes.

    Returns:
        What to call in place of `module`.
    """
    if world.size == 1:
        return module
    if kind == "fsdp":
        _shard(network, device, world)
        return module
    # The network's buffers are constants; torch 2.13 has another name for the switch that says so.
    known = inspect.signature(DistributedDataParallel).parameters
    switch: dict[str, Any] = {"forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False}
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


def _start(device: torch.device, timeout: timedelta) -> None:
    """Meet at a store keyed by torchrun's restart: the one before may have left its addresses there."""
    from torch.distributed.rendezvous import rendezvous

    store, rank, size = next(iter(rendezvous("env://", timeout=timeout)))
    store = PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)


def _store() -> Store:
    """The store of the default group, with keys of its own for each time that the processes join."""
    store = dist.distributed_c10d._get_default_store()
    times = store.add(f"joined {dist.get_rank()}", 1)
    return PrefixStore(f"join {times}", store)


def _shard(network: MultiDecoderUNet, device: torch.device, world: World) -> None:
    """FSDP2: each level of an encoder and each decoder is gathered when it is used; what remains, with the root."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (world.size,))
    for encoder in network.encoders:
        assert isinstance(encoder, Encoder)
        for level in encoder.levels:
            fully_shard(list(level.children()), mesh=mesh)
    for part in (*network.decoders, network):
        fully_shard(part, mesh=mesh)
