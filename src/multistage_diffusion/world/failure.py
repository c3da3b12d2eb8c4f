"""How processes that work together end when one of them fails: it says why, and the others go quietly.

A process that fails exits, so the collectives of the others break off with an error of the transport, which says
nothing. They find the reason in the store where all met. Those that wait at the store have no transport that breaks:
they see that the pulse of a process has stopped, which was killed or hangs.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, final

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from multistage_diffusion.errors import PeerError, UserError

_FAILED, _CLAIMS = "failed", "failures"  # keys of the store: who failed first and why; how many claim to have been it
_GRACE = 5.0  # seconds in which processes that lost one another wait for whoever knows why
_POLL = 0.02
_BEAT = 1.0  # seconds between beats of a pulse
_SILENCE = 20.0  # seconds without a beat after which a process is given up


@contextlib.contextmanager
def pulse(store: Store, rank: int) -> Iterator[None]:
    """Show the other processes that this one lives, however long it computes or waits.

    Args:
        store: Where the processes met.
        rank: Number of this process.

    Yields:
        While it beats, on a thread of its own.
    """
    over = threading.Event()

    def beat() -> None:
        with contextlib.suppress(RuntimeError):  # of a store that went before this process
            for number in itertools.count():
                store.set(f"pulse {rank}", str(number))
                if over.wait(_BEAT):
                    return

    thread = threading.Thread(target=beat, name="pulse", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(_BEAT)


@final
class Pulses:
    """The pulses of all processes, for one that waits.

    Args:
        store: Where the processes met.
        size: Number of processes.
    """

    def __init__(self, store: Store, size: int) -> None:
        self._store, self._keys, self._looked = store, [f"pulse {rank}" for rank in range(size)], time.monotonic()
        self._last: list[bytes] = []
        self._silence = [0.0] * size

    def require(self) -> None:
        """Stop waiting when the pulse of a process has stopped.

        Raises:
            UserError: One has; it is named.
        """
        passed = time.monotonic() - self._looked
        if passed < _BEAT:
            return
        self._looked += passed
        # A beat apart: if all were halted for an hour, the first to go on should not bury the others.
        passed = min(passed, 2 * _BEAT)
        beats = [self._store.get(key) if self._store.check([key]) else b"" for key in self._keys]
        same = [beat == last for beat, last in zip(beats, self._last or beats, strict=True)]
        self._silence = [(silence + passed) * still for silence, still in zip(self._silence, same, strict=True)]
        self._last = beats
        if silent := [rank for rank, silence in enumerate(self._silence) if silence > _SILENCE]:
            raise _no_word(silent, len(self._keys))


def require_none(store: Store) -> None:
    """Stop waiting when another process has failed.

    Args:
        store: Where the processes met.

    Raises:
        PeerError: One has.
    """
    if store.check([_FAILED]):
        raise peer_error(json.loads(store.get(_FAILED)))


def describe(rank: int, error: BaseException) -> dict[str, Any]:
    """What other processes learn of an error.

    Args:
        rank: Number of this process.
        error: What happened here.

    Returns:
        What `peer_error` takes.
    """
    text = str(error) or type(error).__name__
    return {"rank": rank, "code": getattr(error, "exit_code", 1), "error": text}


def peer_error(failed: dict[str, Any]) -> PeerError:
    """The error of a process that ends, or gives something up, because of another one's.

    Args:
        failed: What the other process said.

    Returns:
        The error.
    """
    return PeerError(f"process {failed['rank']} failed: {failed['error']}", int(failed["code"]))


def blame(store: Store, rank: int, size: int, error: BaseException) -> BaseException:
    """How this process should end: the first that failed says why, and those that only lost it say nothing.

    Args:
        store: Where the processes met.
        rank: Number of this process.
        size: Number of processes.
        error: What happened here.

    Returns:
        The error to end with: this one, a `PeerError` if another process came first, or a `UserError` that names
        processes which ended without a word.
    """
    try:
        store.set(f"left {rank}", "")
        if isinstance(error, PeerError):
            _told(store)  # whoever failed speaks first
            return error
        if _is_lost(error) and not _told(store) and (silent := _silent(store, size)):
            error = _no_word(silent, size)
        if store.add(_CLAIMS, 1) > 1:
            return peer_error(json.loads(store.get(_FAILED)))
        store.set(_FAILED, json.dumps(describe(rank, error)))
        _report(error)
    except dist.DistError:
        return UserError(f"process 0 of {size}, where all met, ended without a word; the same command goes on")
    return error


def linger(store: Store, rank: int, size: int) -> None:
    """Where process 0 holds the store itself, it stays until the others have read why it ends.

    Args:
        store: Where the processes met.
        rank: Number of this process.
        size: Number of processes.
    """
    if rank > 0 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return
    deadline = time.monotonic() + _GRACE
    while _silent(store, size) and time.monotonic() < deadline:
        time.sleep(_POLL)


@contextlib.contextmanager
def deaf() -> Iterator[None]:
    """Let no SIGTERM of torchrun, which follows the first failure, break into the words about it.

    Yields:
        While SIGTERM is ignored. Under torchrun it stays so: this process is about to exit, and what hangs is killed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            signal.signal(signal.SIGTERM, handler)


def _is_lost(error: BaseException) -> bool:
    """Whether a collective broke off, which is the consequence of something that happened elsewhere."""
    if isinstance(error, UserError):
        return False
    words = ("gloo", "NCCL", "Connection closed", "Timed out")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )


def _told(store: Store) -> bool:
    """Whether another process says in a while why it failed."""
    deadline = time.monotonic() + _GRACE
    while not store.check([_FAILED]):
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL)
    return True


def _silent(store: Store, size: int) -> list[int]:
    """Processes that have not left."""
    return [rank for rank in range(size) if not store.check([f"left {rank}"])]


def _no_word(silent: list[int], size: int) -> UserError:
    return UserError(
        f"no word from process {', '.join(map(str, silent))} of {size}: killed, out of memory, hanging, or its machine "
        "lost; the same command goes on from the last checkpoint"
    )


def _report(error: BaseException) -> None:
    """Name the cause in torchrun's report."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        document = {"message": f"error: {error}", "timestamp": int(time.time())}
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps(document))
