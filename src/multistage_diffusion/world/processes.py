"""The processes that `torchrun` started, thin over `torch.distributed`.

One process alone is `SINGLE`, and nothing of this file costs it anything. What the processes tell one another goes
through the store that they met at: waiting there has no limit and ends when another process fails, while a collective
breaks off after the group's timeout, so that it is left to what all processes reach at about the same time.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store

from multistage_diffusion.errors import ConfigError, NumericsError, PeerError
from multistage_diffusion.world.failure import Pulses, blame, deaf, describe, linger, peer_error, pulse, require_none

_POLL = 0.02  # seconds between looks at the store


def _nothing() -> None:
    """What is done while nothing else is to be done."""


@final
@dataclass(frozen=True)
class ProcessGroup:
    """The processes that work together, seen from one of them.

    All of them call the methods alike and in the same order, but for `tell` and `ask`.

    Attributes:
        rank: Number of this process.
        size: Number of processes.
        store: Where they met; none for a process alone.
    """

    rank: int = 0
    size: int = 1
    store: Store | None = None
    _times: Counter[str] = field(default_factory=Counter, init=False, repr=False, compare=False)

    @property
    def is_main(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def part(self, num: int) -> range:
        """This process's part of something: the parts are alike but for one, and follow each other.

        Args:
            num: How much there is.

        Returns:
            The indices of its part; empty where there is less than one for each process.
        """
        return range(self.rank * num // self.size, (self.rank + 1) * num // self.size)

    def tell(self, key: str, value: Any = None) -> None:
        """Say something to all other processes.

        Args:
            key: What it is about; each is told once.
            value: Anything that JSON holds.
        """
        if self.store is not None:
            self.store.set(key, json.dumps(value))

    def told(self, key: str) -> bool:
        """Whether a process has told something; asks the store, and waits for nobody.

        Args:
            key: What it is about.

        Returns:
            Whether it was told.
        """
        return self.store is not None and self.store.check([key])

    def ask(self, key: str, meanwhile: Callable[[], object] = _nothing) -> Any:
        """Wait for what another process tells, for as long as it takes.

        Args:
            key: What it is about.
            meanwhile: Called again and again while this process waits.

        Returns:
            What was told.

        Raises:
            PeerError: A process failed in the meantime.
            UserError: A process was killed, or hangs.
        """
        assert self.store is not None, "a process alone has nobody to ask"
        pulses = Pulses(self.store, self.size)
        while not self.store.check([key]):
            require_none(self.store)
            pulses.require()
            meanwhile()
            time.sleep(_POLL)
        return json.loads(self.store.get(key))

    def gather(self, what: str, value: Any = None, meanwhile: Callable[[], object] = _nothing) -> list[Any]:
        """Wait until all processes are here, for as long as it takes, and learn what each has to say.

        Args:
            what: What it is about.
            value: What this process says: anything that JSON holds.
            meanwhile: Called again and again while this process waits.

        Returns:
            What each process says, in the order of their numbers.

        Raises:
            PeerError: A process failed in the meantime.
        """
        key = self._key(what)
        self.tell(f"{key} {self.rank}", value)
        return [value if r == self.rank else self.ask(f"{key} {r}", meanwhile) for r in range(self.size)]

    @contextlib.contextmanager
    def agreed(self, what: str) -> Iterator[None]:
        """Do something that may fail in any process: all get through it, or none goes on.

        Args:
            what: Its name.

        Yields:
            To what this process does by itself, without waiting for another one.

        Raises:
            PeerError: It failed in another process, which goes on with its own error.
        """
        key = self._key(what)
        try:
            yield
        except Exception as error:
            self.tell(f"{key} {self.rank}", describe(self.rank, error))
            raise
        self.tell(f"{key} {self.rank}")
        for failure in [self.ask(f"{key} {r}") for r in range(self.size) if r != self.rank]:
            if failure is not None:
                raise peer_error(failure)

    def lead(self, what: str, action: Callable[[], object]) -> None:
        """Process 0 does something, and the others wait until it has.

        Args:
            what: Its name.
            action: What to do.

        Raises:
            PeerError: A process failed in the meantime.
        """
        with self.agreed(what):
            if self.is_main:
                action()

    @contextlib.contextmanager
    def first(self, what: str) -> Iterator[None]:
        """The first process of each machine does something before the others, which then find it done.

        Args:
            what: Its name.

        Yields:
            When it is this process's turn.

        Raises:
            PeerError: It failed in another process.
        """
        first = self.size == 1 or int(os.environ.get("LOCAL_RANK", self.rank)) == 0
        with self.agreed(what):
            if first:
                yield
        with self.agreed(what):
            if not first:
                yield

    def require_same(self, what: str, value: str) -> None:
        """Refuse to go on where processes differ.

        Args:
            what: Name of the value, in the plural.
            value: This process's value.

        Raises:
            ConfigError: It is not that of process 0.
        """
        if self.gather(what, value)[0] != value:
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
            tensors: float32 tensors by name, whole.
            step: Steps taken, for the message.

        Raises:
            NumericsError: A tensor differs between processes.
        """
        if self.size == 1 or not tensors:
            return
        words = [tensor.detach().view(torch.int32).sum(dtype=torch.int64) for tensor in tensors.values()]
        sums = torch.stack(words)
        extremes = torch.cat((sums, -sums))
        dist.all_reduce(extremes, dist.ReduceOp.MAX)
        high, low = extremes.chunk(2)
        for name, differs in zip(tensors, (high != -low).tolist(), strict=True):
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
        if self.is_main:
            shared = dict(tensors or {})
            self.tell(key, [(name, list(tensor.shape)) for name, tensor in shared.items()])
        else:
            shared = {name: torch.empty(shape) for name, shape in self.ask(key)}
        if self.size > 1:
            for tensor in shared.values():
                dist.broadcast(tensor, 0)
        return shared

    def _key(self, what: str) -> str:
        """Another name each time that all processes come to the same."""
        self._times[what] += 1
        return f"{what} {self._times[what]}"


SINGLE = ProcessGroup()


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
def join(device: torch.device, minutes: float) -> Iterator[ProcessGroup]:
    """Meet the other processes that `torchrun` started, and end together.

    Args:
        device: Where this process trains; its collectives use NCCL on a GPU and gloo elsewhere.
        minutes: How long a collective waits for the others.

    Yields:
        All of them; `SINGLE` where there is one.

    Raises:
        ConfigError: There are fewer GPUs than processes on this machine.
        PeerError: Another process failed, and has said why.
        UserError: Another process ended without a word.
    """
    ours = not dist.is_initialized()
    if ours and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield SINGLE
        return
    if ours:
        _start(device, timedelta(minutes=minutes))
    store = _store()
    processes = ProcessGroup(dist.get_rank(), dist.get_world_size(), store)
    with pulse(store, processes.rank):
        try:
            yield processes
            # Nobody goes while another one may still ask. A barrier holds no tensor: gloo's thread would need Python's
            # lock to let go of one, while this thread, which holds it, may wait for that one to end (torch 2.13).
            dist.barrier()
        except BaseException as error:
            with deaf():
                blamed = blame(store, processes.rank, processes.size, error)
                if ours and device.type != "cuda":  # NCCL would wait for those that failed
                    dist.destroy_process_group()  # now the others notice
                linger(store, processes.rank, processes.size)
            if blamed is error:
                raise
            raise blamed from error
    if ours:
        dist.destroy_process_group()


def _start(device: torch.device, timeout: timedelta) -> None:
    """Meet at a store keyed by torchrun's restart: the one before may have left its addresses there."""
    from torch.distributed.rendezvous import rendezvous

    if device.type == "cuda":
        _require_gpus(torch.cuda.device_count())
        torch.cuda.set_device(device)
    store, rank, size = next(iter(rendezvous("env://", timeout=timeout)))
    store = PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)


def _require_gpus(there: int) -> None:
    """Refuse two processes on one GPU, which NCCL cannot do; the first process of the machine says so."""
    wanted = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if wanted > there:
        text = f"{wanted} processes were started on a machine with {there} GPUs: torchrun --nproc-per-node {there}"
        raise ConfigError(text) if os.environ.get("LOCAL_RANK", "0") == "0" else PeerError(text, ConfigError.exit_code)


def _store() -> Store:
    """The store of the default group, with keys of its own for each time that the processes join."""
    store = dist.distributed_c10d._get_default_store()
    times = store.add(f"joined {dist.get_rank()}", 1)
    return PrefixStore(f"join {times}", store)
