"""One trainer for each run directory, and an orderly end when a signal asks for one."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import signal
import socket
import stat
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from multistage_diffusion.errors import CheckpointError, ConfigError, UserError
from multistage_diffusion.files import is_running

# A closed terminal sends SIGHUP, schedulers send SIGUSR1 before the end, the kernel SIGXCPU at the limit of CPU time.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGXCPU)
_URGENT = (signal.SIGTERM, signal.SIGINT)  # what a second time means: at once
_ECHO = 1.0  # seconds in which a second signal is an echo of the first: it went to the process and to its group
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
_RETRIES = 100  # of a system call that signals interrupt


class StoppedError(UserError):
    """A signal stopped the training after a checkpoint; the exit code is 128 + the signal's number."""

    def __init__(self, number: int, step: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name} after step {step}; the same command resumes there")
        self.exit_code = 128 + number


class BusyError(ConfigError):
    """Another process holds the folder."""


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold the run directory by a lock on its file `.lock`, which the system releases however the process ends.

    On a file system without locks, `.lock` itself is the lock: it names host and process, and is deleted at the end. A
    process of this host that no longer runs is not waited for; one of another host cannot be seen, and is.

    Args:
        folder: The run directory; made if missing.

    Raises:
        BusyError: Another process holds it.
        ConfigError: This system has no `fcntl`, or `.lock` is a link or no file.
        CheckpointError: The folder cannot be written.
    """
    try:
        import fcntl
    except ImportError as error:
        raise ConfigError(
            f"{folder} cannot be locked: this system has no fcntl; train on Linux or macOS, or in WSL"
        ) from error
    path, locked = folder / ".lock", True
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = _open(path)
        try:
            _retried(lambda: fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB))
        except OSError as error:
            owner = _owner(handle)
            os.close(handle)
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise BusyError(_busy(folder, owner)) from error
            if error.errno not in _NO_LOCKS:
                raise
            handle, locked = _take(path, owner), False
            warnings.warn(
                f"{folder} is on a file system without locks ({error.strerror}): {path} names this process instead; "
                "do not start two trainings there at the same moment",
                stacklevel=3,
            )
    except OSError as error:
        raise CheckpointError(f"cannot write in {folder}: {error.strerror}; choose another --out") from error
    try:
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        yield
    finally:
        os.close(handle)
        if not locked:
            path.unlink(missing_ok=True)


def _open(path: Path, flags: int = 0) -> int:
    """A file to write in that is no link, and nobody's file by another name."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | flags, 0o666)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise ConfigError(f"{path} is a link; delete it, or choose another --out") from error
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        os.close(handle)
        raise ConfigError(f"{path} is not a file of its own; delete it, or choose another --out")
    return handle


def _retried(call: Callable[[], object]) -> None:
    """A system call, again where a signal interrupts it, but not for ever."""
    for left in reversed(range(_RETRIES)):
        try:
            call()
            return
        except InterruptedError:
            if not left:
                raise


def _take(path: Path, owner: tuple[int, str] | None) -> int:
    """Make the lock file anew, unless the process that it names may still run."""
    if owner is not None and (owner[1] != socket.gethostname() or is_running(owner[0])):
        raise BusyError(f"{_busy(path.parent, owner)}; if it no longer runs, delete {path}")
    path.unlink(missing_ok=True)
    return _open(path, os.O_EXCL)


def _owner(handle: int) -> tuple[int, str] | None:
    """Process and host that a lock file names; none if it is empty or holds something else."""
    match = re.fullmatch(rb"process (\d{1,10}) on ([\w.-]{1,255})", os.pread(handle, 300, 0))
    return None if match is None else (int(match[1]), match[2].decode())


def _busy(folder: Path, owner: tuple[int, str] | None) -> str:
    name = "another process" if owner is None else f"process {owner[0]} on {owner[1]}"
    return f"{folder} is being trained by {name}; wait for it, or choose another --out"


@contextlib.contextmanager
def signals() -> Iterator[list[int]]:
    """Collect signals instead of ending at once; the loop stops after the step at hand, with a checkpoint.

    A second SIGTERM or SIGINT, one second or more after the first, does what it did before: it ends the process. What
    comes sooner is an echo. Signals that were ignored (`nohup`) stay ignored.

    Yields:
        The numbers of the signals received, in order; stays empty outside the main thread.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    urgent_since = float("inf")

    def receive(number: int, frame: FrameType | None) -> None:
        nonlocal urgent_since
        if number in _URGENT:
            if time.monotonic() - urgent_since >= _ECHO:
                restore()
                signal.raise_signal(number)
            urgent_since = min(urgent_since, time.monotonic())
        received.append(number)

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    caught = [number for number in SIGNALS if number in _URGENT or signal.getsignal(number) != signal.SIG_IGN]
    previous = {number: signal.signal(number, receive) for number in caught}
    try:
        yield received
    finally:
        restore()


class Place:
    """A directory that is followed where it goes.

    Args:
        folder: An existing directory.
    """

    def __init__(self, folder: Path) -> None:
        self._handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def is_at(self, folder: Path) -> bool:
        """Whether a path leads to it."""
        try:
            return os.path.samestat(os.stat(folder), os.fstat(self._handle))
        except OSError:
            return False

    def path(self) -> str | None:
        """Where it is now; none if it was deleted, or the system does not say."""
        try:
            if sys.platform == "darwin":
                import fcntl

                path = fcntl.fcntl(self._handle, fcntl.F_GETPATH, bytes(1024)).rstrip(b"\0").decode()
            else:
                path = os.readlink(f"/proc/self/fd/{self._handle}")
        except (OSError, UnicodeError):
            return None
        return path if self.is_at(Path(path)) else None

    def close(self) -> None:
        """Let it go."""
        os.close(self._handle)
