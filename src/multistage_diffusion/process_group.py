"""The processes that `torchrun` started: what `torch.distributed` does not do by itself.

Objects travel through the key-value store where the processes met, so waiting for them has no time limit: a slow disk,
a download or an evaluation may take long. The wait ends when a process reports an error in the store, or when its
heartbeat stops. Tensors travel through collectives, which fail after the group's timeout.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from multistage_diffusion.errors import ConfigError, PeerError, UserError

_BEAT = 1.0  # seconds between the heartbeats of a process
_SILENCE = 20.0  # seconds without a heartbeat after which a process is lost
_GRACE = 5.0  # seconds in which a process whose collective failed waits for the reason
_POLL = 0.02  # seconds between two looks at the store


@final
@dataclass(frozen=True)
class ProcessGroup:
    """The processes that work together; all of them call the methods in the same order.

    Attributes:
        rank: Number of this process.
        size: Number of processes.
        store: Where they met; none for a single process.
        prefix: Of its keys in the store.
    """

    rank: int = 0
    size: int = 1
    store: Store | None = None
    prefix: str = ""
    _calls: Iterator[int] = field(default_factory=itertools.count, init=False, repr=False, compare=False)

    @property
    def is_main(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def shard(self, num: int) -> range:
        """This process's share of `num` indices; shares follow each other and differ by one at most."""
        return range(self.rank * num // self.size, (self.rank + 1) * num // self.size)

    def gather_objects(self, value: Any = None, while_waiting: Callable[[], object] = lambda: None) -> list[Any]:
        """The JSON value of every process, by rank. Waits without limit, and calls `while_waiting` again and again.

        Raises:
            PeerError: Another process failed.
            UserError: Another process was killed, or hangs.
        """
        key = self._key()
        self._send(key, value)
        return [value] if self.store is None else self._collect(key, while_waiting)

    def broadcast(self, value: Any = None) -> Any:
        """The JSON value of process 0."""
        return self.gather_objects(value if self.is_main else None)[0]

    def barrier(self, while_waiting: Callable[[], object] = lambda: None) -> None:
        """Wait until all processes are here."""
        self.gather_objects(None, while_waiting)

    @contextlib.contextmanager
    def all_or_none(self) -> Iterator[None]:
        """A block that may fail in one process: the others then end it with a `PeerError`, so that all go on alike."""
        key = self._key()
        try:
            yield
        except Exception as error:
            self._send(key, _failure(self.rank, error))
            raise
        self._send(key, None)
        for failure in self._collect(key) if self.store is not None else ():
            if failure is not None:
                raise _peer_error(failure)

    def on_main(self, action: Callable[[], object]) -> None:
        """Process 0 does something, and all others wait."""
        with self.all_or_none():
            if self.is_main:
                action()

    @contextlib.contextmanager
    def local_main_first(self) -> Iterator[None]:
        """A block that the first process of each machine runs before the others, which may then read its cache."""
        local_main = self.size == 1 or int(os.environ.get("LOCAL_RANK", self.rank)) == 0
        with self.all_or_none():
            if local_main:
                yield
        with self.all_or_none():
            if not local_main:
                yield

    @contextlib.contextmanager
    def section(self) -> Iterator[ProcessGroup]:
        """A block that one process may leave by an exception: the others' calls in it then fail, and no later ones."""
        section = replace(self, prefix=f"{self._key()} ")
        try:
            yield section
        except Exception as error:
            section.cancel(error)
            raise

    def cancel(self, error: BaseException | None = None) -> None:
        """Let the calls of all processes in this section fail."""
        if self.store is not None:
            self.store.set(f"{self.prefix}error", json.dumps(_failure(self.rank, error or InterruptedError())))

    def is_cancelled(self) -> bool:
        """Whether a process has left or cancelled this section; does not wait."""
        return self.store is not None and self.store.check([f"{self.prefix}error"])

    def require_same(self, name: str, value: str) -> None:
        """Refuse a value that differs from that of process 0; `name` is a plural."""
        if self.broadcast(value) != value:
            raise ConfigError(f"{name} of process {self.rank} are not those of process 0; start all processes alike")

    def all_reduce(self, values: Tensor) -> Tensor:
        """Add up a tensor over the processes, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def rows_on_main(self, rows: Tensor) -> Tensor:
        """Rows of all processes one after the other, in process 0; the others get theirs back. On the CPU."""
        counts = self.gather_objects(len(rows))
        if not self.is_main:
            dist.send(rows, 0)
            return rows
        parts = [rows, *(rows.new_empty(count, *rows.shape[1:]) for count in counts[1:])]
        for rank, part in enumerate(parts[1:], start=1):
            dist.recv(part, rank)
        return torch.cat(parts)

    def broadcast_tensors(self, tensors: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """The CPU tensors of process 0, by name; the others give none."""
        given = [(name, list(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in (tensors or {}).items()]
        empty = {name: torch.empty(shape, dtype=getattr(torch, kind)) for name, shape, kind in self.broadcast(given)}
        copies = empty if tensors is None else dict(tensors)
        for tensor in copies.values() if self.size > 1 else ():
            dist.broadcast(tensor, 0)
        return copies

    def _key(self) -> str:
        return f"{self.prefix}call {next(self._calls)}"

    def _send(self, key: str, value: Any) -> None:
        if self.store is not None:
            self.store.set(f"{key} {self.rank}", json.dumps(value))

    def _collect(self, key: str, while_waiting: Callable[[], object] = lambda: None) -> list[Any]:
        assert self.store is not None
        keys = [f"{key} {rank}" for rank in range(self.size)]
        beats, missed, next_look = [-1] * self.size, [0] * self.size, 0.0
        while not self.store.check(keys):
            for error in {"error", f"{self.prefix}error"}:
                if self.store.check([error]):
                    raise _peer_error(json.loads(self.store.get(error)))
            # Looks are counted, not seconds: if all processes were halted for an hour, none is lost.
            if time.monotonic() >= next_look:
                last, beats = beats, [self.store.add(f"beat {rank}", 0) for rank in range(self.size)]
                missed = [count + 1 if a == b else 0 for count, a, b in zip(missed, last, beats, strict=True)]
                if lost := [rank for rank, count in enumerate(missed) if count * _BEAT > _SILENCE]:
                    raise _lost_error(lost, self.size)
                next_look = time.monotonic() + _BEAT
            while_waiting()
            time.sleep(_POLL)
        return [json.loads(text) for text in self.store.multi_get(keys)]


SINGLE = ProcessGroup()


def local_device(device: torch.device | str) -> torch.device:
    """The device of this process: `auto` is a GPU where there is one, `cuda` becomes the GPU of its LOCAL_RANK.

    Raises:
        ConfigError: There is no such device here, or it is neither the CPU nor one of CUDA.
    """
    name: Any = device
    if isinstance(name, str) and name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.empty(0, device=torch.device(name)).device
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        raise ConfigError(f"device {str(name)[:60]!r} is not available here; use cpu, cuda or auto") from error
    if device.type not in ("cpu", "cuda"):  # noise levels are float64, which mps lacks; meta holds no numbers
        raise ConfigError(f"device {str(name)[:60]!r} is not supported; use cpu, cuda or auto")
    if device.type != "cuda" or str(name) != "cuda":
        return device
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % max(torch.cuda.device_count(), 1))


@contextlib.contextmanager
def join(device: torch.device, minutes: float) -> Iterator[ProcessGroup]:
    """Meet the other processes that `torchrun` started; when one fails, it says why and all end with its exit code.

    Args:
        device: Where this process computes; its collectives use NCCL on a GPU and gloo elsewhere.
        minutes: Time limit of a collective.

    Raises:
        ConfigError: There are fewer GPUs than processes on this machine.
        PeerError: Another process failed, and says why.
        UserError: Another process was killed, or hangs.
    """
    is_owner = not dist.is_initialized()
    if is_owner and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield SINGLE
        return
    if is_owner:
        _init(device, timedelta(minutes=minutes))
    store, rank = dist.distributed_c10d._get_default_store(), dist.get_rank()
    store = PrefixStore(f"join {store.add(f'joined {rank}', 1)}", store)
    processes, over = ProcessGroup(rank, dist.get_world_size(), store), threading.Event()
    heart = threading.Thread(target=_beat, args=(store, rank, over), name="heartbeat", daemon=True)
    heart.start()
    try:
        yield processes
        processes.barrier()  # without limit
        # Then together, as process 0 may hold the store. A barrier holds no tensor: gloo's thread would need Python's
        # lock to free one, while this thread, which holds the lock, may wait for gloo's to end (torch 2.13).
        dist.barrier()
    except BaseException as error:
        if "TORCHELASTIC_RUN_ID" in os.environ and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun sends it after a failure; this process ends anyway
        cause = _cause(store, rank, processes.size, error)
        if is_owner and device.type != "cuda":  # NCCL would wait for the processes that failed
            dist.destroy_process_group()  # breaks the collectives of the others
        if rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            _wait_until(lambda: not _remaining(store, processes.size))  # the store ends with this process
        if cause is error:
            raise
        raise cause from error
    finally:
        over.set()
        heart.join(_BEAT)
    if is_owner:
        dist.destroy_process_group()


def _init(device: torch.device, timeout: timedelta) -> None:
    """Meet at a store with keys of its own for each restart by torchrun: the last one may have left addresses there."""
    if device.type == "cuda":
        _require_gpus(torch.cuda.device_count())
        torch.cuda.set_device(device)
    store, rank, size = next(iter(rendezvous("env://", timeout=timeout)))
    store = PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)


def _require_gpus(count: int) -> None:
    """Refuse two processes on one GPU, which NCCL cannot do; the first process of the machine says so."""
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if local_size > count:
        text = f"{local_size} processes were started on a machine with {count} GPUs: torchrun --nproc-per-node {count}"
        raise ConfigError(text) if os.environ.get("LOCAL_RANK", "0") == "0" else PeerError(text, ConfigError.exit_code)


def _beat(store: Store, rank: int, over: threading.Event) -> None:
    with contextlib.suppress(RuntimeError):  # the store ended before this process
        while store.add(f"beat {rank}", 1) and not over.wait(_BEAT):
            pass


def _cause(store: Store, rank: int, size: int, error: BaseException) -> BaseException:
    """The error to end with: this process's if it failed first, else a `PeerError` that names the first."""
    try:
        store.set(f"left {rank}", "")
        if isinstance(error, PeerError):
            _wait_until(lambda: store.check(["error"]))  # the process that failed speaks first
            return error
        # A broken collective is the consequence of an error elsewhere: that process says why, or was killed.
        broken = type(error) is RuntimeError and re.search("gloo|NCCL|Connection closed|Timed out", str(error))
        if (broken or isinstance(error, dist.DistError)) and not _wait_until(lambda: store.check(["error"])):
            error = _lost_error(lost, size) if (lost := _remaining(store, size)) else error
        failure = json.dumps(_failure(rank, error))
        first = store.compare_set("error", "", failure).decode()
        if first != failure:
            return _peer_error(json.loads(first))
        if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # the root cause in torchrun's report
            with contextlib.suppress(OSError):
                Path(path).write_text(json.dumps({"message": f"error: {error}", "timestamp": int(time.time())}))
    except dist.DistError:
        return UserError(f"process 0 of {size}, where all met, ended without a word; the same command goes on")
    return error


def _wait_until(condition: Callable[[], bool]) -> bool:
    """Whether a condition comes true within the grace period."""
    deadline = time.monotonic() + _GRACE
    while not (is_true := condition()) and time.monotonic() < deadline:
        time.sleep(_POLL)
    return is_true


def _remaining(store: Store, size: int) -> list[int]:
    return [rank for rank in range(size) if not store.check([f"left {rank}"])]


def _failure(rank: int, error: BaseException) -> dict[str, Any]:
    return {"rank": rank, "code": getattr(error, "exit_code", 1), "error": str(error) or type(error).__name__}


def _peer_error(failure: dict[str, Any]) -> PeerError:
    return PeerError(f"process {failure['rank']} failed: {failure['error']}", int(failure["code"]))


def _lost_error(ranks: list[int], size: int) -> UserError:
    return UserError(
        f"no word from process {', '.join(map(str, ranks))} of {size}: killed, out of memory, hanging, or its machine "
        "lost; the same command goes on from the last checkpoint"
    )
