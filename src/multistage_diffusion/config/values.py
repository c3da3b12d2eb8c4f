"""The check behind every configuration value."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, Literal

from multistage_diffusion.errors import ConfigError

Solver = Literal[
    "heun", "euler", "ddim", "ancestral", "dpm-1", "dpm-2", "dpm-3", "dpmpp-2m", "dpmpp-3m", "sde-dpmpp-2m"
]  # fmt: skip
Spacing = Literal["karras", "log-snr", "uniform-t", "quadratic-t"]

_LARGEST = 1e30  # fits float32, and no sensible value comes near it


def check(condition: bool, option: str, wanted: str, value: object) -> None:
    """Refuse a configuration value.

    Args:
        condition: Whether the value is right.
        option: Its name, as on the command line without dashes.
        wanted: What would be right.
        value: What came.

    Raises:
        ConfigError: `condition` is false.
    """
    if not condition:
        raise ConfigError(f"{option} must be {wanted}, got {value}")


def check_numbers(config: Any, section: str) -> None:
    """Refuse NaN, infinity and numbers out of all proportion in any field.

    Args:
        config: A dataclass.
        section: Its name on the command line, for the message.

    Raises:
        ConfigError: A field holds such a number.
    """
    for item in fields(config):
        value = getattr(config, item.name)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, (int, float)):
                check(abs(number) <= _LARGEST, f"{section}.{item.name.replace('_', '-')}", "a finite number", value)
