"""Files that are written whole or not at all, and read with one-line errors."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from multistage_diffusion.errors import CheckpointError, ConfigError

MANIFEST = "manifest.json"
MAX_JSON_BYTES = 64 * 1024 * 1024  # a JSON file larger than this is not one of ours


def write_atomic(path: Path, content: bytes) -> None:
    """Write `content` to `path` so that after a crash the file is the old one or the new one, never a part.

    Args:
        path: Destination; its folder is made if missing.
        content: The whole file.

    Raises:
        CheckpointError: The disk is full, or the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_directory(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise CheckpointError(
            f"cannot write {path} ({len(content)} bytes): {error.strerror}; free space or choose another folder"
        ) from error


def write_json(path: Path, document: Any) -> None:
    """Write a JSON document atomically, indented, keys in the order given.

    Args:
        path: Destination.
        document: Anything `json` can write; NaN and infinity are refused.

    Raises:
        CheckpointError: The file cannot be written.
    """
    write_atomic(path, (json.dumps(document, indent=2, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read a JSON document.

    Args:
        path: An existing regular file.

    Returns:
        The document.

    Raises:
        ConfigError: Missing, not a regular file, too large, or not JSON.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such file")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ConfigError(f"{path}: larger than {MAX_JSON_BYTES} bytes, not a file of this program")
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid JSON ({str(error).splitlines()[0][:120]})") from error


def sha256(path: Path) -> str:
    """SHA-256 of a file's content, as hexadecimal digits.

    Args:
        path: An existing file.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def sync_directory(path: Path) -> None:
    """Flush a directory's entries to disk, so that a rename in it survives a power loss.

    Args:
        path: An existing directory.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def whole_directory(path: Path) -> Iterator[Path]:
    """Write a directory so that after a crash the old one is there, or the new one, never a part.

    The caller fills a temporary directory beside `path`. At the end a `manifest.json` with the size and SHA-256 of each
    file is added, everything is flushed to disk, and the directory takes its name.

    Args:
        path: The directory's final name; what is there is replaced.

    Yields:
        The temporary directory.

    Raises:
        CheckpointError: The disk is full, or the folder cannot be written; nothing is left behind.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    displaced = path.with_name(f".{path.name}.{os.getpid()}.old")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        yield temporary
        _seal(temporary)
        if path.exists():
            path.rename(displaced)
        temporary.rename(path)
        sync_directory(path.parent)
        shutil.rmtree(displaced, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write {path}: {error}; free space or choose another folder") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if displaced.exists() and not path.exists():
            displaced.rename(path)


def check_directory(path: Path) -> str | None:
    """Compare each file of a directory with its manifest.

    Args:
        path: A directory written by `whole_directory`.

    Returns:
        None if all is well, else what is wrong, naming the file.
    """
    try:
        files = read_json(path / MANIFEST)["files"]
        for name, expected in files.items():
            file = path / name
            if Path(name).name != name or not file.is_file():
                return f"{file} is missing"
            if file.stat().st_size != expected["bytes"]:
                return f"{file} has {file.stat().st_size} bytes instead of {expected['bytes']}"
            if sha256(file) != expected["sha256"]:
                return f"{file} is damaged (SHA-256 differs from the manifest)"
    except (ConfigError, KeyError, TypeError, AttributeError, OSError) as error:
        return f"{path / MANIFEST} is unreadable: {error}"
    return None


def _seal(directory: Path) -> None:
    """Flush every file of a directory and add the manifest."""
    files = {}
    for file in sorted(directory.iterdir()):
        files[file.name] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    write_json(directory / MANIFEST, {"files": files})
    sync_directory(directory)
