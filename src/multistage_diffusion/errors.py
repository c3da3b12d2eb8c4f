"""The errors a user can cause, each with the exit code of its kind.

Messages are one line: what was wrong, where (file, option, value), how to mend it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class UserError(Exception):
    """Base of all errors that are shown to the user as one line, without a traceback."""

    exit_code = 1

    def __init__(self, message: str, document: Any = None) -> None:
        super().__init__(message)
        self.document = document  # what a command found before it failed, for --json


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
    """Another process of the run failed, and says why; this one ends quietly with the same exit code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def needs(condition: bool, option: str, other: str, value: object) -> None:
    """Refuse an option that another one contradicts.

    Args:
        condition: Whether the two fit.
        option: The option given, without dashes.
        other: The other option with the value that `option` needs, like `method gradient`.
        value: What the other option is.

    Raises:
        ConfigError: `condition` is false.
    """
    if not condition:
        raise ConfigError(f"--{option} needs --{other}; it is {value}")


def suggest(name: str, known: Iterable[str]) -> str:
    """A hint to append to a message about an unknown name.

    Args:
        name: What the user wrote.
        known: What would have been right.

    Returns:
        `; did you mean "vp"?` if one is near, else `; known: edm, vp`.
    """
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f'; did you mean "{near[0]}"?' if near else f"; known: {', '.join(known)}"
