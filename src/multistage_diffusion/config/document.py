"""Configurations to JSON and back, every key and value checked."""

from __future__ import annotations

import json
import typing
from dataclasses import asdict, fields, is_dataclass
from typing import Any, TypeVar

from multistage_diffusion.config.process import PROCESSES, ProcessConfig
from multistage_diffusion.errors import ConfigError, suggest

T = TypeVar("T")


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain JSON types.

    Args:
        config: A dataclass of this file.

    Returns:
        Nested dictionaries; tuples become lists.
    """
    return json.loads(json.dumps(asdict(config)))


def flat(document: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options by their names.

    Args:
        document: Nested dictionaries, as `to_dict` gives them.
        prefix: What stands before each name.

    Returns:
        One level, with keys like `training.steps`.
    """
    named: dict[str, Any] = {}
    for key, value in document.items():
        named |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return named


def from_dict(kind: type[T], document: Any, where: str = "configuration") -> T:
    """Read and check a configuration: every key known, every value of its type.

    Args:
        kind: The dataclass wanted.
        document: Nested dictionaries, as from JSON. Missing keys take their defaults.
        where: What the document is, for messages.

    Returns:
        The configuration.

    Raises:
        ConfigError: An unknown key (the nearest known one is named), or a value of the wrong type or range.
    """
    import pydantic

    _check_keys(kind, document, where, "")
    try:
        return pydantic.TypeAdapter(kind).validate_json(json.dumps(document), strict=True)
    except pydantic.ValidationError as error:
        first = next((item for item in error.errors() if item["loc"][-1:] != ("kind",)), error.errors()[0])
        key = ".".join(str(part) for part in first["loc"] if not str(part).endswith("Config"))
        cause = first.get("ctx", {}).get("error")
        message = str(cause) if cause else f"{key}: {first['msg'].lower()}, got {first['input']!r}"
        raise ConfigError(f"{where}: {message}") from error


def _check_keys(kind: Any, document: Any, where: str, path: str) -> None:
    """Name the first unknown key of a nested document, with the nearest known one."""
    if not isinstance(document, dict):
        raise ConfigError(f"{where}: {path.rstrip('.') or 'the document'} must hold named values, got {document!r}")
    hints = typing.get_type_hints(kind)
    known = {item.name for item in fields(kind)}
    for key, value in document.items():
        if key not in known:
            raise ConfigError(f"{where}: unknown key {path}{key}{suggest(str(key), known)}")
        inner = hints[key]
        if inner == ProcessConfig:
            tag = str(value.get("kind", "")) if isinstance(value, dict) else ""
            if tag not in PROCESSES:
                raise ConfigError(f"{where}: no process {tag}{suggest(tag, PROCESSES)}")
            inner = PROCESSES[tag]
        if is_dataclass(inner):
            _check_keys(inner, value, where, f"{path}{key}.")
