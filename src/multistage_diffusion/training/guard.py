"""What a running training owes its surroundings: one process a run directory, and an end when a signal asks for one."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from multistage_diffusion.errors import CheckpointError, ConfigError, UserError

_PATIENCE = 1.0  # seconds in which a second signal is taken for an echo of the first


class StoppedError(UserError):
    """Training was stopped by a signal, after a checkpoint; the exit code is 128 + the signal's number."""

    def __init__(self, number: int, step: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name} after step {step}; the same command resumes there")
        self.exit_code = 128 + number


class BusyError(ConfigError):
    """Another process holds the folder."""


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold the run directory; the operating system releases the lock when the process ends, however it ends.

    Args:
        folder: The run directory; made if missing.

    Yields:
        While it is held.

    Raises:
        BusyError: Another process holds it.
        ConfigError: This system has no locks.
        CheckpointError: The folder cannot be written.
    """
    try:
        import fcntl
    except ImportError as error:
        raise ConfigError(
            f"{folder} cannot be locked: this system has no fcntl; train on Linux or macOS, or in WSL"
        ) from error
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = (folder / ".lock").open("a+")
    except OSError as error:
        raise CheckpointError(f"cannot write in {folder}: {error.strerror}; choose another --out") from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            handle.seek(0)
            owner = handle.read(64).strip() or "another process"
            raise BusyError(f"{folder} is being trained by {owner}; wait for it, or choose another --out") from error
        handle.truncate(0)
        handle.write(f"process {os.getpid()}")
        handle.flush()
        yield


@contextlib.contextmanager
def signals() -> Iterator[list[int]]:
    """Collect SIGTERM and SIGINT instead of dying of them; the loop stops after the step at hand.

    Whoever asks again a second later or more means at once, and gets what the process did with the signal before. What
    comes sooner is an echo: job managers signal a process and its group, and a key may be held down.

    Yields:
        The numbers of the signals received, in order; stays empty outside the main thread.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    asked = 0.0

    def receive(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if not received:
            asked = time.monotonic()
        elif time.monotonic() - asked >= _PATIENCE:
            restore()
            signal.raise_signal(number)
        received.append(number)

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    previous = {number: signal.signal(number, receive) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        restore()
