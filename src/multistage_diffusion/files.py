"""Files that are written whole or not at all, and read with one-line errors."""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import glob
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from multistage_diffusion.errors import CheckpointError, ConfigError

MANIFEST = "manifest.json"
MAX_JSON_BYTES = 64 * 2**20  # nothing that this package writes is larger
MAX_MANIFEST_BYTES = 2**19  # 4,000 files; JSON takes up to 25 times its size in memory
_LEFTOVER = re.compile(r"\.(?P<name>.+)\.\d+\.(?P<kind>tmp|old)")


def write_atomic(path: Path, content: bytes) -> None:
    """Write `content` to `path` so that after a crash the file is the old one or the new one, never a part.

    Args:
        path: Destination; its folder is made if missing.
        content: The whole file.

    Raises:
        CheckpointError: The disk is full, or the folder cannot be written.
    """
    path = path.absolute()
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_directory(path.parent)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(
            f"cannot write {path} ({len(content)} bytes): {reason}; free space or choose another folder"
        ) from error
    finally:
        with contextlib.suppress(OSError, ValueError):
            temporary.unlink(missing_ok=True)


def write_json(path: Path, document: Any) -> None:
    """Write a JSON document atomically, indented, keys in the order given.

    Args:
        path: Destination.
        document: Anything `json` can write; NaN and infinity are refused.

    Raises:
        CheckpointError: The file cannot be written.
    """
    write_atomic(path, (json.dumps(document, indent=2, allow_nan=False) + "\n").encode())


def read_regular(path: Path, limit: int) -> bytes:
    """The content of a regular file of at most `limit` bytes; a pipe or a device is never waited for.

    Raises:
        OSError: Missing, not a regular file, or too large; its `strerror` says which.
    """
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with os.fdopen(handle, "rb") as file:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        if status.st_size > limit:
            raise OSError(errno.EFBIG, f"{status.st_size} bytes, more than the {limit} allowed")
        return file.read(limit)


def read_json(path: Path, limit: int | None = None) -> Any:
    """Read a JSON document.

    Args:
        path: An existing regular file.
        limit: Largest size in bytes; by default `MAX_JSON_BYTES`.

    Returns:
        The document.

    Raises:
        ConfigError: Missing, unreadable, not a regular file, too large, or not JSON.
    """
    try:
        if not path.is_file():
            raise ConfigError(f"{path}: no such file")
        limit = limit or MAX_JSON_BYTES
        if path.stat().st_size > limit:
            raise ConfigError(f"{path}: larger than {limit} bytes, which no file of this package is")
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid JSON ({str(error).splitlines()[0][:120]})") from error


def sha256(path: Path) -> str:
    """SHA-256 of a file's content, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def sync_directory(path: Path) -> None:
    """Flush a directory's entries to disk, so that a rename in it survives a power loss."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def whole_directory(path: Path, *, size: int = 0, replace: bool = False) -> Iterator[Path]:
    """Write a directory so that after a crash the old one is there, or the new one, never a part.

    The caller fills a temporary directory beside `path`. At the end a `manifest.json` with the size and SHA-256 of each
    file is added, everything is flushed to disk, and the directory takes its name.

    Args:
        path: The directory's final name. An empty directory is replaced, and one that holds nothing but what this
            function wrote.
        size: Bytes that will be written, about; for the message of a full disk.
        replace: Replace a directory that holds anything else, too.

    Yields:
        The temporary directory.

    Raises:
        CheckpointError: The disk is full, the folder cannot be written, or something else is there; nothing is left
            behind, and what is there stays.
    """
    path = path.absolute()
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    displaced = path.parent / f".{path.name}.{os.getpid()}.old"
    if not replace and (foreign := _foreign(path)):
        raise CheckpointError(f"cannot write {path}: {foreign}; choose another folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _recover(path)
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
        reason = getattr(error, "strerror", None) or error
        needed = f" ({size} bytes)" if size else ""
        raise CheckpointError(f"cannot write {path}{needed}: {reason}; free space or choose another folder") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if displaced.exists() and not path.exists():
            displaced.rename(path)


def remove_leftovers(directory: Path) -> None:
    """Delete what interrupted writes left in a directory; no other process may be writing there.

    A directory that was killed between its two renames gets its name back.
    """
    for path in directory.iterdir() if directory.is_dir() else ():
        if match := _LEFTOVER.fullmatch(path.name):
            name = directory / match["name"]
            if match["kind"] == "old" and not name.exists():
                path.rename(name)
            elif path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def remove_abandoned(path: Path) -> None:
    """Delete what interrupted writes of a file or directory left, if their process no longer runs on this machine."""
    for leftover in path.absolute().parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        if is_leftover(leftover.name) and not is_running(int(leftover.name.split(".")[-2])):
            shutil.rmtree(leftover, ignore_errors=True)


def is_leftover(name: str) -> bool:
    """Whether a file or directory of this name was left by an interrupted write."""
    return _LEFTOVER.fullmatch(name) is not None


def check_directory(path: Path, required: Sequence[str] = (), *, sizes_only: str = "") -> str | None:
    """Compare each file of a directory with its manifest.

    Args:
        path: A directory written by `whole_directory`.
        required: Files that the manifest must name.
        sizes_only: Pattern of names, like `shard-*.bin`, of files that are too large to be read for this.

    Returns:
        None if all is well, else what is wrong, naming the file.
    """
    try:
        files = read_json(path / MANIFEST, MAX_MANIFEST_BYTES)["files"]
        for name in required:
            if name not in files:
                return f"{path / MANIFEST} does not name {name}"
        for name, expected in files.items():
            file = path / name
            if Path(name).is_absolute() or ".." in Path(name).parts or not file.is_file():
                return f"{file} is missing"
            if file.stat().st_size != expected["bytes"]:
                return f"{file} has {file.stat().st_size} bytes instead of {expected['bytes']}"
            if not fnmatch.fnmatch(name, sizes_only) and sha256(file) != expected["sha256"]:
                return f"{file} is damaged (SHA-256 differs from the manifest)"
    except (ConfigError, KeyError, TypeError, AttributeError, OSError, ValueError) as error:
        return f"{path / MANIFEST} is unreadable: {error}"
    return None


def is_running(process: int) -> bool:
    """Whether a process of this number runs on this machine."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # another user's, or no number of a process
        return True
    return True


def _recover(path: Path) -> None:
    """Give a directory that was killed between its two renames its name back."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.old"):
        if is_leftover(leftover.name) and not path.exists():
            leftover.rename(path)


def _foreign(path: Path) -> str | None:
    """What is at `path` that `whole_directory` did not write."""
    if not path.exists():
        return None
    if not path.is_dir():
        return "it is a file"
    try:
        written = {MANIFEST, *read_json(path / MANIFEST, MAX_MANIFEST_BYTES)["files"]}
    except (ConfigError, KeyError, TypeError):
        written = set()
    entries = (entry for entry in path.rglob("*") if not entry.is_dir() or entry.is_symlink())
    foreign = sorted(name for name in (entry.relative_to(path).as_posix() for entry in entries) if name not in written)
    return f"it holds {foreign[0]}, which would be lost" if foreign else None


def _seal(directory: Path) -> None:
    """Flush every file of a directory and add the manifest; the files get the permissions of any other new file."""
    contents = sorted(path for path in directory.rglob("*") if path.is_file())
    facts = {
        file.relative_to(directory).as_posix(): {"bytes": file.stat().st_size, "sha256": sha256(file)}
        for file in contents
    }
    write_json(directory / MANIFEST, {"files": facts})
    mode = (directory / MANIFEST).stat().st_mode & 0o777
    for file in contents:
        file.chmod(mode)  # safetensors makes its files readable by the owner alone
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    for folder in {file.parent for file in contents} | {directory}:
        sync_directory(folder)
