"""The errors a user can cause, each with the exit code of its kind.

Messages are one line: what was wrong, where (file, option, value), how to mend it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from multistage_diffusion.text import bounded


class UserError(Exception):
    """Base of all errors that are shown to the user as one line, without a traceback."""

    exit_code = 1

    def __init__(self, message: str, document: Any = None) -> None:
        super().__init__(bounded(message))
        self.document = document  # results from before the failure, for --json


class ConfigError(UserError, ValueError):
    """A wrong option, configuration value or argument (exit code 2)."""

    exit_code = 2


class DataError(UserError, ValueError):
    """A source that cannot be found, read or used (exit code 3)."""

    exit_code = 3


class NumericsError(UserError, ArithmeticError):
    """A non-finite loss or result (exit code 4)."""

    exit_code = 4


class CheckpointError(UserError, RuntimeError):
    """A checkpoint or run directory that cannot be written, read or trusted (exit code 5)."""

    exit_code = 5


class PeerError(UserError):
    """Another process of the run failed and prints the reason; this one exits with the same code, without a line."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(bounded(message))
        self.exit_code = exit_code


# Of torch's allocators, oneDNN, cuDNN and cuBLAS, most of whose errors have no class of their own.
_NO_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "could not create a primitive",
    "could not create a memory",
    "ALLOC_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device or the host has no memory left: torch's and its libraries', or Python's."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)


def suggest(name: object, names: Iterable[str]) -> str:
    """What to append to a message about an unknown name: `; did you mean "vp"?`, or `; known: edm, vp`."""
    names = sorted(names)
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.6)
    return f'; did you mean "{near[0]}"?' if near else f"; known: {', '.join(names)}"
