"""The check behind every configuration value."""

from __future__ import annotations

from multistage_diffusion.errors import ConfigError


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
