"""Pictures in a folder, in a zip archive, in tar archives: read in place, nothing is ever extracted."""

from __future__ import annotations

import glob
import itertools
import os
import re
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from multistage_diffusion.data.collection import (
    Collection,
    Entry,
    Reading,
    collect,
    folder_labels,
    label_entries,
    labels_of_json,
    shown,
    summary,
)
from multistage_diffusion.data.decode import MAX_FILE_BYTES, PictureError, is_picture_name, read_regular
from multistage_diffusion.data.images import MAX_SET_BYTES
from multistage_diffusion.errors import DataError

_JSON = "dataset.json"
_MAX_JSON = 256 * 2**20
_MAX_EXPANSION = 200  # pictures do not deflate further; deflate itself reaches 1032
_UNCHECKED = 2**20  # bytes below which an entry may expand as it likes
_MAX_SHARDS = 100_000
_MAX_ARCHIVE = 2**40  # bytes in the pictures of an archive, which are read one by one
_TAR_BLOCK = 512


def read_folder(source: str, path: Path, reading: Reading) -> Collection:
    """Pictures below a folder; links to folders are not followed.

    Args:
        source: The source, as the user wrote it.
        path: The folder.
        reading: How its pictures are read.

    Returns:
        The set, in the order of the names; labels from `dataset.json` or from the folders' names.

    Raises:
        DataError: Not a folder, or as `collect`.
    """
    if not path.is_dir():
        raise DataError(f"{source}: {path} is not a folder")
    names, others, links = list[str](), list[str](), 0
    for folder, folders, files in os.walk(path):
        links += sum(os.path.islink(os.path.join(folder, name)) for name in folders)
        for file in files:
            name = Path(folder, file).relative_to(path).as_posix()
            (names if is_picture_name(name) else others).append(name)
    entries = [Entry(name, _reader(path / name)) for name in sorted(names)]
    if _JSON in others:
        others.remove(_JSON)
        try:
            entries = label_entries(source, entries, labels_of_json(source, read_regular(path / _JSON, _MAX_JSON)))
        except PictureError as error:
            raise DataError(f"{source}: {_JSON}: {error}") from error
    else:
        entries = folder_labels(entries)
    skipped = summary(others, "not pictures by their name")
    if links:
        skipped.append(f"{links} link{'s' if links > 1 else ''} to a folder: not followed")
    return collect(source, entries, reading, skipped)


def read_zip(source: str, path: Path, reading: Reading) -> Collection:
    """Pictures in a zip archive, laid out as EDM's tools do, or in folders named after their classes.

    Args:
        source: The source, as the user wrote it.
        path: The archive.
        reading: How its pictures are read.

    Returns:
        The set, in the order of the names.

    Raises:
        DataError: Not a zip archive, an entry that no honest archive holds, or as `collect`.
    """
    with open_zip(source, path) as archive:
        infos = {info.filename: info for info in checked_entries(source, archive, _MAX_ARCHIVE)}
        pictures = sorted(name for name in infos if is_picture_name(name))
        others = [name for name in infos if not is_picture_name(name)]
        entries = [Entry(name, _zip_reader(archive, infos[name])) for name in pictures]
        if _JSON in infos:
            others.remove(_JSON)
            try:
                entries = label_entries(source, entries, labels_of_json(source, _read_entry(archive, infos[_JSON])))
            except PictureError as error:
                raise DataError(f"{source}: {_JSON}: {error}") from error
        else:
            entries = folder_labels(entries)
        skipped = summary(others, "not pictures by their name")
        return collect(source, entries, reading, skipped)


def read_webdataset(source: str, path: Path, reading: Reading) -> Collection:
    """Pictures in tar archives as the webdataset library writes them: `KEY.png` and `KEY.cls` (a number) side by side.

    Args:
        source: The source, as the user wrote it.
        path: Files, with `*`, `?` and `{000..012}`.
        reading: How its pictures are read.

    Returns:
        The set, in the order of the shards and their entries.

    Raises:
        DataError: No such file, not a plain tar archive, an entry that no honest archive holds, or as `collect`.
    """
    if "://" in source:
        raise DataError(f"{source}: shards are read from disk only; download them first")
    shards = [shard for part in _braces(str(path)) for shard in sorted(glob.glob(part))]
    if not shards:
        raise DataError(f"{source}: no file matches {path}")
    entries, others = list[Entry](), list[str]()
    for shard in shards:
        members = _checked_members(source, shard)
        labels = {_key(member.name): _label(source, shard, member) for member in members if _is_label(member.name)}
        for member in members:
            if is_picture_name(member.name):
                entries.append(Entry(member.name, _tar_reader(shard, member), labels.get(_key(member.name))))
            elif not _is_label(member.name):
                others.append(member.name)
    skipped = summary(others, "neither pictures nor .cls by their name")
    return collect(source, entries, reading, skipped)


@contextmanager
def open_zip(source: str, path: Path) -> Iterator[zipfile.ZipFile]:
    """Open a zip archive for reading.

    Args:
        source: The source, for messages.
        path: The archive, a regular file.

    Yields:
        The archive.

    Raises:
        DataError: Missing, not a regular file, not a zip archive, or damaged.
    """
    if not path.is_file():
        raise DataError(f"{source}: {path} is not a file")
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error, OverflowError) as error:
        raise DataError(f"{source}: not a zip archive that can be read ({error})") from error
    with archive:
        yield archive


def checked_entries(source: str, archive: zipfile.ZipFile, limit: int = MAX_SET_BYTES) -> list[zipfile.ZipInfo]:
    """The files of an archive, after all of its entries have been looked at.

    Args:
        source: The source, for messages.
        archive: The archive.
        limit: Largest size of all files together.

    Returns:
        Entries that are files, in the archive's order.

    Raises:
        DataError: An entry outside the archive's folder, a link or device, encrypted, twice the same name, or sizes
            that are a bomb's.
    """
    files, seen, total = list[zipfile.ZipInfo](), set[str](), 0
    for info in archive.infolist():
        kind = stat.S_IFMT(info.external_attr >> 16)
        expansion = info.file_size / max(1, info.compress_size)
        reason = _bad_name(info.orig_filename) or (
            "is there twice"
            if info.filename in seen
            else "is a link or a device"
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR)
            else "is encrypted"
            if info.flag_bits & 1
            else f"expands {expansion:.0f} times"
            if info.file_size > _UNCHECKED and expansion > _MAX_EXPANSION
            else None
        )
        if reason is not None:
            raise DataError(f"{source}: archive refused: the entry {shown(info.orig_filename)} {reason}")
        seen.add(info.filename)
        total += info.file_size
        if not info.is_dir():
            files.append(info)
    if total > limit:
        raise DataError(f"{source}: archive refused: its files are {total:,} bytes, more than {limit:,}")
    return files


def _checked_members(source: str, shard: str) -> list[tarfile.TarInfo]:
    """The files of a plain tar archive, after all of its entries have been looked at."""
    if not Path(shard).is_file():
        raise DataError(f"{source}: {shard} is not a file")
    files, seen = list[tarfile.TarInfo](), set[str]()
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                reason = _bad_name(member.name) or (
                    "is a link or a device"
                    if not (member.isreg() or member.isdir())
                    else "is sparse"
                    if member.issparse()
                    else "is there twice"
                    if member.name in seen
                    else None
                )
                if reason is not None:
                    raise DataError(f"{source}: archive refused: the entry {shown(member.name)} {reason}")
                seen.add(member.name)
                files += [member] if member.isreg() else []
            archive.fileobj.seek(archive.offset)  # where tarfile stopped, silently if the archive is cut off
            if archive.fileobj.read(_TAR_BLOCK) != bytes(_TAR_BLOCK):
                raise DataError(f"{source}: {shard}: cut off, the end of the archive is missing")
    except DataError:
        raise
    except (tarfile.TarError, OSError, EOFError, ValueError, OverflowError) as error:
        words = " ".join(str(error).split())[:100]
        raise DataError(f"{source}: {shard}: not a plain tar archive, or damaged ({words})") from error
    return files


def _bad_name(name: str) -> str | None:
    """Why a path could lead out of the archive's folder, or None."""
    parts = PurePosixPath(name.replace("\\", "/")).parts
    if name.startswith(("/", "\\")) or re.match(r"[A-Za-z]:", name):
        return "has an absolute path"
    if ".." in parts:
        return "leads out of the archive"
    if not parts or "\0" in name:
        return "has no proper name"
    return None


def _reader(path: Path) -> Callable[[], bytes]:
    return lambda: read_regular(path)


def _zip_reader(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Callable[[], bytes]:
    return lambda: _read_entry(archive, info)


def _read_entry(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    """The content of an entry, at most as long as its size says."""
    if info.file_size > MAX_FILE_BYTES:
        raise PictureError(f"{info.file_size} bytes, more than the {MAX_FILE_BYTES} allowed")
    try:
        return archive.read(info)
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, NotImplementedError, RuntimeError) as error:
        raise PictureError(f"damaged in the archive ({' '.join(str(error).split())[:100]})") from error


def _tar_reader(shard: str, member: tarfile.TarInfo) -> Callable[[], bytes]:
    """Reads a member where it lies: files in a plain tar archive are in one piece."""

    def read() -> bytes:
        if member.size > MAX_FILE_BYTES:
            raise PictureError(f"{member.size} bytes, more than the {MAX_FILE_BYTES} allowed")
        try:
            with open(shard, "rb") as file:
                file.seek(member.offset_data)
                content = file.read(member.size)
        except OSError as error:
            raise PictureError(error.strerror or "cannot be read") from error
        if len(content) != member.size:
            raise PictureError("cut off by the end of the archive")
        return content

    return read


def _is_label(name: str) -> bool:
    return name.endswith(".cls")


def _label(source: str, shard: str, member: tarfile.TarInfo) -> str:
    """The number in a `.cls` file."""
    try:
        return str(int(_tar_reader(shard, member)()[:32]))
    except (PictureError, ValueError) as error:
        raise DataError(f"{source}: {shown(member.name)} must hold a whole number") from error


def _key(name: str) -> str:
    """What the files of one sample share: the path up to the first dot of the file's name."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]


def _braces(pattern: str) -> list[str]:
    """Expand `{000..012}`, wherever it occurs; refused where that is more than any data set has."""
    pieces = re.split(r"\{(\d+)\.\.(\d+)\}", pattern)
    ranges = list[list[str]]()
    for low, high in zip(pieces[1::3], pieces[2::3], strict=True):
        count = int(high) - int(low) + 1
        if len(high) > 9 or not 0 < count <= _MAX_SHARDS:
            raise DataError(f"webdataset:{pattern}: the range {low}..{high} must rise, by at most {_MAX_SHARDS}")
        ranges.append([str(number).zfill(len(low)) for number in range(int(low), int(high) + 1)])
    fixed = pieces[::3]
    choices = itertools.islice(itertools.product(*ranges), _MAX_SHARDS)
    return ["".join(itertools.chain(*itertools.zip_longest(fixed, choice, fillvalue=""))) for choice in choices]
