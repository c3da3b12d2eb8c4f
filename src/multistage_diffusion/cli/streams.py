"""Standard output and error that may be closed, full, or without a reader."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, cast, final

from multistage_diffusion.errors import UserError


@final
class _Stream:
    """A standard stream whose first fault is an error of one line, or a warning while it is lenient; then it is mute.

    Where the reader of a pipe went away, `BrokenPipeError` says so. Nobody can read of a fault of standard error.
    """

    def __init__(self, stream: Any, *, is_error: bool) -> None:
        if stream is None:  # closed before Python began
            stream = io.StringIO()
            stream.close()
        self._stream = self._original = stream
        self._is_error, self.is_lenient = is_error, False

    def write(self, text: str) -> int:
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(lambda: self._stream.flush())

    def end(self) -> None:
        """Close what took the place of a stream that failed."""
        if self._stream is not self._original:
            self._stream.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _try(self, action: Callable[[], object]) -> None:
        try:
            action()
        except (OSError, ValueError) as error:
            broken, self._stream = self._stream, open(os.devnull, "w")
            with contextlib.suppress(OSError, ValueError):  # what it still holds must not fail again at the end
                os.dup2(self._stream.fileno(), broken.fileno())
            if isinstance(error, BrokenPipeError) and not self.is_lenient:
                raise
            text = f"cannot print: {getattr(error, 'strerror', None) or error}"
            if self._is_error:
                return
            if not self.is_lenient:
                raise UserError(text) from error
            print(f"warning: {text}; training goes on", file=sys.stderr)


@contextlib.contextmanager
def standard_streams() -> Iterator[None]:
    """Take the standard streams as they are: closed, full, or without a reader."""
    for handle in (0, 1, 2):  # else the next file that is opened would stand for a closed stream
        try:
            os.fstat(handle)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    out, err = _Stream(sys.stdout, is_error=False), _Stream(sys.stderr, is_error=True)
    try:
        with contextlib.redirect_stdout(cast("Any", out)), contextlib.redirect_stderr(cast("Any", err)):
            yield
    finally:
        out.end()
        err.end()


@contextlib.contextmanager
def printing_may_fail() -> Iterator[None]:
    """Something long that goes on where nothing can be printed any more."""
    streams = [stream for stream in (sys.stdout, sys.stderr) if isinstance(stream, _Stream)]
    for stream in streams:
        stream.is_lenient = True
    try:
        yield
    finally:
        for stream in streams:
            stream.is_lenient = False
