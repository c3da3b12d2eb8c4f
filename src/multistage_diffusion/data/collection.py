"""Many pictures into one set: same shape, labels from folders or a `dataset.json`, bad files counted or refused."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from multistage_diffusion.config import Scaling
from multistage_diffusion.data.decode import PictureError, decode
from multistage_diffusion.data.examples import Examples
from multistage_diffusion.data.images import MAX_SET_BYTES, Images, content_key, fit
from multistage_diffusion.data.shards import Shards, ShardWriter
from multistage_diffusion.errors import DataError

_TEST_SHARE = 0.1
_TRAIN_NAMES, _TEST_NAMES = ("train", "training"), ("test", "testing", "val", "valid", "validation")
_MAX_CLASSES = 1_000_000


@dataclass(frozen=True)
class Entry:
    """One picture of a collection.

    Attributes:
        name: Its path within the collection, with `/` between the parts.
        read: Gives the content of the file; raises `PictureError`.
        label: Name of its class, where the collection says it.
    """

    name: str
    read: Callable[[], bytes]
    label: str | None = None


@dataclass(frozen=True)
class Reading:
    """How the pictures of a collection are read.

    Attributes:
        resolution: Crop to the central square and resize to this many pixels a side; by default no resizing.
        max_bad: Largest share of the pictures that may be unreadable; 0 refuses the first of them.
        scale: What arrays hold: pictures, or fields and how they are scaled.
        writer: Where the pixels go one by one; by default they are kept in memory.
        progress: Told before each picture how many are read, of how many.
    """

    resolution: int | None = None
    max_bad: float = 0.0
    scale: Scaling = "pictures"
    writer: ShardWriter | None = None
    progress: Callable[[int, int], None] | None = None


@dataclass(frozen=True)
class Collection:
    """A set of images, and which of them are held out.

    Attributes:
        images: All images.
        test: True for those held out.
        files: SHA-256 of each file that was read, by name; none where the source is not made of files.
    """

    images: Examples
    test: Bool[Tensor, " batch"]
    files: Mapping[str, str] = field(default_factory=dict)

    def part(self, split: str) -> Examples:
        """One part of the set.

        Args:
            split: `train`, `test` or `all`.

        Returns:
            Its images; `all` begins with those to train on.

        Raises:
            DataError: The part is empty.
        """
        train, test = (~self.test).nonzero()[:, 0], self.test.nonzero()[:, 0]
        index = {"train": train, "test": test, "all": torch.cat((train, test))}[split]
        if len(index) == 0:
            raise DataError(f"{self.images.name}: too few different images ({len(self.test)}) to hold some out")
        return self.images.take(index)


def collect(source: str, entries: Sequence[Entry], reading: Reading, skipped: Iterable[str] = ()) -> Collection:
    """Decode the pictures of a collection.

    Args:
        source: The source, as the user wrote it.
        entries: Its pictures, in order.
        reading: How.
        skipped: What was passed over already.

    Returns:
        The set. Held out are the parts called `test` or `val`, if there is a `train` too; else a tenth by content.

    Raises:
        DataError: A bad picture, different sizes and no resolution, too many pixels for memory, or none at all.
        CheckpointError: The disk that the pixels are written to is too small.
    """
    good, keys, bad, files = list[Entry](), list[int](), list[str](), dict[str, str]()
    pixels = _Pixels(source, reading.writer, len(entries))
    for number, entry in enumerate(entries):
        if reading.progress is not None:
            reading.progress(number, len(entries))
        try:
            content = entry.read()
            files[entry.name] = hashlib.sha256(content).hexdigest()
            picture = decode(content)
        except PictureError as error:
            bad.append(f"{shown(entry.name)}: {error}")
            if reading.max_bad == 0:
                raise DataError(f"{source}: {bad[0]}; remove it, or leave it out (on-bad-file skip)") from error
            if len(bad) > reading.max_bad * len(entries):
                raise DataError(
                    f"{source}: {len(bad)} of {len(entries)} pictures cannot be read, the first: {bad[0]}; mend or "
                    f"remove them, or raise max-bad (now {reading.max_bad:g})"
                ) from error
            continue
        keys.append(content_key(picture))
        pixels.add(picture if reading.resolution is None else fit(picture[None], reading.resolution)[0], entry.name)
        good.append(entry)
    skipped = (*skipped, *bad)
    if not good:
        hint = f" ({len(skipped)} skipped, the first: {skipped[0]})" if skipped else ""
        raise DataError(f"{source}: no images found{hint}")
    classes, labels = number_labels([entry.label for entry in good])
    own = _parts(good)
    images = Images(source, pixels.finish(), labels, classes, skipped)
    return Collection(images, hashed_test(keys) if own is None else own, files)


def hashed_test(keys: Sequence[int]) -> Bool[Tensor, " batch"]:
    """Which images are held out, by their content alone: a tenth, and at least one if two images differ.

    An image stays on its side when others are added, and copies of an image are on the same side.

    Args:
        keys: `content_key` of each image.

    Returns:
        True for images held out.
    """
    threshold = int(_TEST_SHARE * 2**64)
    test = [key < threshold for key in keys]
    if not any(test):
        test = [key == min(keys) for key in keys]
    if all(test):
        test = [key != max(keys) for key in keys]
    return torch.tensor(test, dtype=torch.bool)


def labels_of_json(source: str, content: bytes) -> Mapping[str, str] | None:
    """Labels of EDM's `dataset.json`: `{"labels": [["00000/img00000.png", 3], ...]}`.

    Args:
        source: The source, for messages.
        content: The file.

    Returns:
        Class of each picture by name, or None where the file says that there are no labels.

    Raises:
        DataError: Not such a file.
    """
    try:
        document: Any = json.loads(content)
        pairs = document["labels"]
        if pairs is None:
            return None
        labels = {name: label for name, label in pairs}
        if any(type(label) is not int or not 0 <= label < _MAX_CLASSES for label in labels.values()):
            raise ValueError("labels must be whole numbers from 0")
        return {str(name): str(label) for name, label in labels.items()}
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        reason = " ".join(str(error).split())[:100]
        raise DataError(f'{source}: dataset.json must be {{"labels": [["NAME", 3], ...]}} ({reason})') from error


def label_entries(source: str, entries: Sequence[Entry], labels: Mapping[str, str] | None) -> list[Entry]:
    """Give the entries the labels of a `dataset.json`.

    Args:
        source: The source, for messages.
        entries: Pictures.
        labels: Class by name, or None for none.

    Returns:
        The entries, labelled; in their order.

    Raises:
        DataError: A picture has no label.
    """
    if labels is None:
        return list(entries)
    for entry in entries:
        if entry.name not in labels:
            raise DataError(f"{source}: dataset.json has no label for {shown(entry.name)}")
    return [Entry(entry.name, entry.read, labels[entry.name]) for entry in entries]


def folder_labels(entries: Sequence[Entry]) -> list[Entry]:
    """Labels from the names of the folders that the pictures lie in.

    Args:
        entries: Pictures.

    Returns:
        The entries, labelled by their outermost folder below a `train` or `test`, if every picture lies in one and
        there are at least two; else as they came.
    """
    skip = 1 if _parts(entries) is not None else 0
    folders = [PurePosixPath(entry.name).parts[skip:-1] for entry in entries]
    if not all(folders) or len({folder[0] for folder in folders}) < 2:
        return list(entries)
    return [Entry(entry.name, entry.read, folder[0]) for entry, folder in zip(entries, folders, strict=True)]


def summary(names: Iterable[str], reason: str) -> list[str]:
    """Lines for files passed over by their name, one for each ending.

    Args:
        names: The files.
        reason: Why.

    Returns:
        Lines like `3 files .txt: not pictures by their name`.
    """
    counts = Counter(PurePosixPath(name).suffix.lower() or "without an ending" for name in names)
    return [
        f"{count} file{'s' if count > 1 else ''} {shown(ending)}: {reason}" for ending, count in sorted(counts.items())
    ]


def shown(name: str) -> str:
    """A file's name fit for a message: on one line, without characters that cannot be printed.

    Args:
        name: The name.

    Returns:
        The same, other characters escaped.
    """
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in name)


def number_labels(labels: Sequence[str | None]) -> tuple[tuple[str, ...], Tensor | None]:
    """Numbers for names of classes.

    Args:
        labels: Name of each image's class.

    Returns:
        The classes, numbers in their order before names in theirs, and each image's index; no label if one has none.
    """
    names = {label for label in labels if label is not None}
    if not names or None in labels:
        return (), None
    numeric = all(name.isdecimal() for name in names)
    classes = tuple(sorted(names, key=int) if numeric else sorted(names))
    index = {name: i for i, name in enumerate(classes)}
    return classes, torch.tensor([index[label] for label in labels if label is not None])


def _parts(entries: Sequence[Entry]) -> Tensor | None:
    """True for pictures below `test` or `val`, if all lie below such a folder or `train`, and both occur."""
    tops = [PurePosixPath(entry.name).parts[0].lower() for entry in entries]
    test = [top in _TEST_NAMES for top in tops]
    named = all(top in (*_TRAIN_NAMES, *_TEST_NAMES) for top in tops)
    return torch.tensor(test) if named and any(test) and not all(test) else None


class _Pixels:
    """Gathers pictures of one size, in memory or in a writer; in colour if one is."""

    def __init__(self, source: str, writer: ShardWriter | None, expected: int) -> None:
        self._source, self._writer, self._first, self._total = source, writer, "", 0
        self._size: tuple[int, ...] = ()
        self._pictures = list[Tensor]()
        if writer is not None:
            writer.expected = expected

    def add(self, picture: Tensor, name: str) -> None:
        size = tuple(picture.shape[1:])
        if not self._size:
            self._size, self._first = size, name
        if size != self._size:
            raise DataError(
                f"{self._source}: images of different sizes, {self._size[0]} x {self._size[1]} ({shown(self._first)}) "
                f"and {size[0]} x {size[1]} ({shown(name)}); choose one with --resolution"
            )
        if self._writer is not None:
            self._writer.add(picture[None])
            return
        self._pictures.append(picture)
        self._total += 3 * picture[0].numel()
        if self._total > MAX_SET_BYTES:
            raise DataError(
                f"{self._source}: more than {MAX_SET_BYTES:,} bytes of pixels; choose a smaller --resolution, or "
                "write them to disk: msd data SOURCE --convert FOLDER"
            )

    def finish(self) -> Tensor | Shards:
        if self._writer is not None:
            return self._writer.finish()
        channels = max(len(picture) for picture in self._pictures)
        return torch.stack([picture.expand(channels, -1, -1) for picture in self._pictures])
