"""Rows as training takes them: from the device's own memory, or, where they do not fit, read ahead from disk.

Threads read ahead, not processes: the work is reading files and a digest of each row, and neither holds the
interpreter's lock (benchmarks/bench_feed.py compares the two). A thread cannot be killed or stopped alone; a
disk that does not answer is noticed by the time-out.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import TypeAlias, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from multistage_diffusion.config import DataConfig
from multistage_diffusion.data.examples import Examples
from multistage_diffusion.devices import memory_of
from multistage_diffusion.errors import DataError

_AHEAD = 2  # steps whose batches are read ahead
_PATIENCE = 1.0  # seconds for the threads to finish what they read; a disk that hangs is not waited for
_MOST = 512  # batches that are read ahead, over all parts of a step
_Job: TypeAlias = tuple[Future[Tensor], Tensor]  # where the rows go, and which


@final
class Resident:
    """A set in the memory of the device.

    Args:
        data: Images or latents.
        device: Where they go, as they are stored.

    Attributes:
        device: Where indices are expected.
        ahead: How many steps ahead batches should be announced by `prefetch`: none.
    """

    ahead = 0

    def __init__(self, data: Examples, device: torch.device) -> None:
        self._data = data.to(device)
        self.device = device

    def prefetch(self, index: Int[Tensor, " n"]) -> None:
        """Do nothing: all is here.

        Args:
            index: Images that will be asked for.
        """

    def floats(self, index: Int[Tensor, " n"]) -> Float[Tensor, "n channels height width"]:
        """Images as the networks see them.

        Args:
            index: Which, on `device`.

        Returns:
            float32.
        """
        return self._data.floats(index)


@final
class Streamed:
    """A set that stays where it is; batches that are announced are read ahead.

    Args:
        data: Images or latents.
        device: Where batches go.
        workers: Number of threads that read; 0 reads when asked, and then nobody notices a disk that does not answer.
        timeout: Seconds to wait for a batch, above 0.

    Attributes:
        device: Where indices are expected: on the CPU.
        ahead: How many steps ahead batches should be announced by `prefetch`.
    """

    def __init__(self, data: Examples, device: torch.device, *, workers: int, timeout: float) -> None:
        self._data, self._target, self._timeout = data, device, timeout
        self.device, self.ahead = torch.device("cpu"), _AHEAD if workers else 0
        stored, pin = data.images, device.type == "cuda"  # not the feed itself, which its threads would keep alive
        self._read: Callable[[Tensor], Tensor] = lambda index: stored[index].pin_memory() if pin else stored[index]
        self._coming: dict[bytes, Future[Tensor]] = {}
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        threads = [
            threading.Thread(target=_serve, args=(self._jobs, self._read), name=f"reader {number}", daemon=True)
            for number in range(workers)
        ]
        for thread in threads:
            thread.start()
        weakref.finalize(self, _dismiss, self._jobs, threads)  # at the latest when the program ends

    def prefetch(self, index: Int[Tensor, " n"]) -> None:
        """Begin to read.

        Args:
            index: Images that will be asked for, in this order.
        """
        key = index.numpy().tobytes()
        if key not in self._coming:
            self._coming[key] = future = Future()
            self._jobs.put((future, index))
        while len(self._coming) > _MOST:  # announced and never fetched
            self._coming.pop(next(iter(self._coming))).cancel()

    def floats(self, index: Int[Tensor, " n"]) -> Float[Tensor, "n channels height width"]:
        """Images as the networks see them.

        Args:
            index: Which, on the CPU.

        Returns:
            float32, on the device of the training.

        Raises:
            DataError: An image is damaged, or the disk does not answer in time.
        """
        if not self.ahead:
            rows = self._read(index)
        else:
            self.prefetch(index)
            future = self._coming.pop(index.numpy().tobytes())
            try:
                rows = future.result(self._timeout)
            except TimeoutError as error:
                raise DataError(
                    f"{self._data.name}: {len(index)} images were not read within {self._timeout:g} seconds; the disk "
                    "or network that holds them does not answer, or data.timeout is too short"
                ) from error
        return self._data.to_model(rows.to(self._target, non_blocking=True))


Feed: TypeAlias = Resident | Streamed


def make_feed(data: Examples, device: torch.device | str, config: DataConfig | None = None) -> Feed:
    """Hold a set in the device's memory if it is small enough, or there already; else stream it from where it is.

    Args:
        data: Images or latents.
        device: Where batches are made.
        config: Says how small is small enough, and how to stream; by default as its fields' defaults do.

    Returns:
        The feed; which of the two it is does not change a bit of any batch.
    """
    device, config = torch.device(device), config or DataConfig()
    resident = data.device is not None and data.device.type == device.type
    if resident or data.images.nbytes <= config.memory * memory_of(device):
        return Resident(data, device)
    return Streamed(data, device, workers=config.workers, timeout=config.timeout)


def _serve(jobs: SimpleQueue[_Job | None], read: Callable[[Tensor], Tensor]) -> None:
    """What a thread does: read what is asked for, and hand back the rows or the error."""
    while (job := jobs.get()) is not None:
        future, index = job
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(read(index))
            except BaseException as error:  # whoever waits for the rows is told
                future.set_exception(error)


def _dismiss(jobs: SimpleQueue[_Job | None], threads: list[threading.Thread]) -> None:
    """Send the threads home, and wait for them: one inside torch when the interpreter ends aborts the process."""
    with suppress(Empty):
        while True:
            jobs.get_nowait()
    for _ in threads:
        jobs.put(None)
    deadline = time.monotonic() + _PATIENCE
    for thread in threads:
        if thread is not threading.current_thread():  # which may be the one that collects the garbage
            thread.join(max(0.0, deadline - time.monotonic()))
