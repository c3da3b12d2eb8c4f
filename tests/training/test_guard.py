"""One trainer for each run directory; a signal ends a run after its step, a second one at once."""

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from multistage_diffusion.errors import CheckpointError, ConfigError
from multistage_diffusion.training.guard import SIGNALS, BusyError, lock, signals


@pytest.fixture
def restore_sigint():
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.fixture
def gone():
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_every_signal_is_collected_and_its_echo_too():
    with signals() as received:
        for number in (*SIGNALS, signal.SIGINT):
            signal.raise_signal(number)
        assert received == [*SIGNALS, signal.SIGINT]
    assert {"SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGXCPU"} == {number.name for number in SIGNALS}


def test_a_second_signal_to_end_acts_at_once(monkeypatch, restore_sigint):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background processes may start with it ignored
    before = signal.getsignal(signal.SIGINT)
    now = time.monotonic()
    with signals() as received:
        signal.raise_signal(signal.SIGINT)
        monkeypatch.setattr(time, "monotonic", lambda: now + 60)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is before
    assert received == [signal.SIGINT]
    assert signal.getsignal(signal.SIGINT) is before


def test_a_notice_and_what_follows_it_leave_the_time_to_save(monkeypatch):
    """A scheduler sends SIGUSR1 and minutes later SIGTERM; the kernel sends SIGXCPU every second."""
    now = [time.monotonic()]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with signals() as received:
        for number in (signal.SIGUSR1, signal.SIGXCPU, signal.SIGXCPU, signal.SIGHUP, signal.SIGTERM, signal.SIGXCPU):
            signal.raise_signal(number)
            now[0] += 60
        assert len(received) == 6


def test_what_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals() as received:
            signal.raise_signal(signal.SIGHUP)
            assert received == []
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_system_without_locks_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with pytest.raises(ConfigError, match="this system has no fcntl") as caught, lock(tmp_path / "run"):
        pass
    assert "\n" not in str(caught.value)


def test_who_holds_a_folder_is_named_and_nobody_after_the_end(tmp_path):
    for _ in range(2):
        with lock(tmp_path):
            with pytest.raises(BusyError, match=f"by process {os.getpid()} on {socket.gethostname()}; wait"):
                lock(tmp_path).__enter__()


@pytest.mark.parametrize("kind", ["soft", "dangling", "hard", "pipe"])
def test_the_lock_never_writes_through_a_link(kind, tmp_path):
    thesis, run = tmp_path / "thesis.txt", tmp_path / "run"
    run.mkdir()
    if kind != "dangling":
        thesis.write_text("mine")
    {
        "soft": lambda: (run / ".lock").symlink_to(thesis),
        "dangling": lambda: (run / ".lock").symlink_to(thesis),
        "hard": lambda: os.link(thesis, run / ".lock"),
        "pipe": lambda: os.mkfifo(run / ".lock"),
    }[kind]()
    with pytest.raises(ConfigError, match=r"\.lock is (a link|not a file of its own); delete it"), lock(run):
        pass
    assert thesis.exists() == (kind != "dangling") and (kind == "dangling" or thesis.read_text() == "mine")


@pytest.fixture
def failing(monkeypatch):
    """Let the next calls of flock fail."""

    def fail(*numbers):
        flock, left = fcntl.flock, list(numbers)

        def call(handle, operation):
            if left:
                number = left.pop(0)
                raise OSError(number, os.strerror(number))
            flock(handle, operation)

        monkeypatch.setattr(fcntl, "flock", call)

    return fail


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_without_locks_the_file_itself_is_the_lock(number, failing, gone, tmp_path):
    path = tmp_path / ".lock"
    for left in ("", f"process {gone} on {socket.gethostname()}", "\0 no process"):
        path.write_text(left)
        failing(number, number)
        with pytest.warns(UserWarning, match="file system without locks"), lock(tmp_path):
            assert path.read_text() == f"process {os.getpid()} on {socket.gethostname()}"
            with pytest.raises(BusyError, match=f"by process {os.getpid()} .* if it no longer runs, delete"):
                lock(tmp_path).__enter__()
        assert not path.exists()


def test_without_locks_a_process_of_another_host_is_waited_for(failing, gone, tmp_path):
    (tmp_path / ".lock").write_text(f"process {gone} on elsewhere.example.org")
    failing(errno.ENOLCK)
    with pytest.raises(BusyError, match=f"process {gone} on elsewhere.example.org"), lock(tmp_path):
        pass
    assert "elsewhere" in (tmp_path / ".lock").read_text()


def test_an_interrupted_lock_is_tried_again_but_not_for_ever(failing, tmp_path):
    failing(*[errno.EINTR] * 3)
    with lock(tmp_path):
        pass
    failing(*[errno.EINTR] * 10_000)
    with pytest.raises(CheckpointError, match=r"cannot write in .*: Interrupted system call"), lock(tmp_path):
        pass


def test_another_fault_of_the_disk_is_not_another_trainer(failing, tmp_path):
    failing(errno.EIO)
    with pytest.raises(CheckpointError, match=r"cannot write in .*: Input/output error"), lock(tmp_path):
        pass
