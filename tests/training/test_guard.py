"""One process a run directory; a signal ends a run after its step, a second one at once."""

import signal
import sys
import time

import pytest

from multistage_diffusion.errors import ConfigError
from multistage_diffusion.training.guard import lock, signals


@pytest.fixture
def restore_sigint():
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


def test_the_first_signal_is_collected_and_its_echo_too():
    with signals() as received:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
            signal.raise_signal(number)
        assert received == [signal.SIGINT, signal.SIGTERM, signal.SIGINT]


def test_whoever_asks_again_is_heard_at_once(monkeypatch, restore_sigint):
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


def test_a_system_without_locks_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with pytest.raises(ConfigError, match="this system has no fcntl") as caught, lock(tmp_path / "run"):
        pass
    assert "\n" not in str(caught.value)
