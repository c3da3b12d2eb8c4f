"""Pictures in a folder, in a zip archive, in tar archives: read in place, nothing is ever extracted."""

from __future__ import annotations

import glob
import itertools
import json
import os
import re
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from multistage_diffusion.data.collection import Collection, Reading, collect
from multistage_diffusion.data.decode import MAX_FILE_BYTES, PictureError, is_hidden, is_picture_name, read_regular
from multistage_diffusion.data.images import MAX_SET_BYTES
from multistage_diffusion.data.layout import (
    CELEBA,
    CSV,
    JSON,
    LABEL_COLUMNS,
    MEND,
    Entry,
    arrange,
    label_text,
    parts_by_words,
    shown,
    summary,
)
from multistage_diffusion.errors import DataError

_OF_LABELS = (JSON, CSV, CELEBA)
_MAX_LABELS = 256 * 2**20  # bytes in a file of labels
_MAX_EXPANSION = 200  # pictures do not deflate further; deflate itself reaches 1032
_UNCHECKED = 2**20  # bytes below which an entry may expand as it likes
_MAX_SHARDS = 100_000
_MAX_ARCHIVE = 2**40  # bytes in the pictures of an archive, which are read one by one
_TAR_BLOCK = 512
_LABELS = (".cls", ".json")  # beside a picture of a tar archive


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
    names, links = list[str](), list[str]()
    for folder, folders, files in os.walk(path, onerror=lambda error: _unreadable(source, error)):
        below = Path(folder).relative_to(path)
        links += [(below / name).as_posix() for name in folders if os.path.islink(os.path.join(folder, name))]
        names += [(below / file).as_posix() for file in files]

    def reader(name: str) -> Callable[[], bytes]:
        limit = _MAX_LABELS if PurePosixPath(name).name in _OF_LABELS else MAX_FILE_BYTES
        return lambda: read_regular(path / name, limit)

    return _collect(source, sorted(names), reader, reading, sorted(links))


def _unreadable(source: str, error: OSError) -> None:
    """Refuse a set of which a folder cannot be looked into: its pictures would be missing."""
    raise DataError(f"{source}: {shown(str(error.filename))} cannot be looked into ({error.strerror})") from error


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
        return _collect(source, sorted(infos), lambda name: _zip_reader(archive, infos[name]), reading)


def _collect(
    source: str,
    names: Sequence[str],
    reader: Callable[[str], Callable[[], bytes]],
    reading: Reading,
    links: Sequence[str] = (),
) -> Collection:
    """The pictures among files, with the parts and labels that their names and the files of labels say."""
    entries = [Entry(name, reader(name)) for name in names if is_picture_name(name)]
    tables = {name: reader(name) for name in names if PurePosixPath(name).name in _OF_LABELS and not is_hidden(name)}
    others = [name for name in names if not is_picture_name(name) and name not in tables]
    hidden = [name for name in others if is_hidden(name) and is_picture_name(name, hidden=True)]
    skipped = summary((name for name in others if name not in set(hidden)), "not pictures by their name")
    skipped += summary(hidden, "hidden, or in a hidden folder")
    if links:
        skipped.append(f"{len(links)} link{'s' * (len(links) > 1)} to a folder: not followed")
    entries, notes = arrange(source, entries, tables, links, labels=reading.labels)
    return collect(source, entries, reading, skipped, notes)


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
    entries, others, how = list[Entry](), list[str](), "none: no .cls lies beside the pictures"
    parts = parts_by_words(source, [Path(shard).name for shard in shards])
    for shard, test in zip(shards, parts, strict=True):
        archive = Path(shard).name if len(shards) > 1 else ""
        members = _checked_members(source, shard)
        ending = next((end for end in _LABELS if any(member.name.endswith(end) for member in members)), None)
        labels = dict[str, str | None]()
        for member in members:
            if reading.labels == "auto" and ending is not None and member.name.endswith(ending):
                labels[member.name.removesuffix(ending)] = _label(source, shard, member)
                how = f"the {ending} files"
        for member in members:
            if is_picture_name(member.name):
                label = _labelled(member.name, labels)
                entries.append(Entry(member.name, _tar_reader(shard, member), label, test, archive))
            elif ending is None or not member.name.endswith(ending):
                others.append(member.name)
    skipped = summary(others, "neither pictures nor labels by their name")
    if parts[0] is None:
        entries, notes = arrange(source, entries, {}, labels="none")
    else:
        notes = {"split": "held out: the archives called test, val or the like"}
    return collect(source, entries, reading, skipped, {**notes, "labels": how})


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
        with open(shard, "rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        what = "compressed; unpack it with gunzip" if packed else f"not a plain tar archive, or damaged ({words})"
        raise DataError(f"{source}: {shard}: {what}") from error
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


def _label(source: str, shard: str, member: tarfile.TarInfo) -> str | None:
    """The number in a `.cls` file, or the label in a `.json` file, if it has one."""
    try:
        content = _tar_reader(shard, member)()
        if member.name.endswith(".cls"):
            return str(int(content[:32]))
        document = json.loads(content)
        key = next((key for key in (*LABEL_COLUMNS, "cls") if key in document), None)
        return None if key is None else label_text(document[key])
    except (PictureError, ValueError, TypeError, RecursionError) as error:
        raise DataError(
            f"{source}: {shown(member.name)} must hold a whole number, or a document with a label; {MEND}"
        ) from error


def _labelled(name: str, labels: Mapping[str, str | None]) -> str | None:
    """The label of a picture: of the file of its name, else of its name up to an earlier dot, like K.input.png of K."""
    folder, slash, file = name.rpartition("/")
    while "." in file:
        file = file.rpartition(".")[0]
        if (key := folder + slash + file) in labels:
            return labels[key]
    return None


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
