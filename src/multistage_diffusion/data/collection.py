"""Many pictures into one set: same shape, all labelled or none, bad files counted or refused."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from jaxtyping import Bool
from torch import Tensor

from multistage_diffusion.config import LabelMode, Scaling
from multistage_diffusion.data.decode import PictureError, decode
from multistage_diffusion.data.examples import Examples
from multistage_diffusion.data.images import MAX_SET_BYTES, Images, content_keys, fit
from multistage_diffusion.data.layout import Entry, number_labels, require_all, shown, some
from multistage_diffusion.data.shards import Shards, ShardWriter
from multistage_diffusion.errors import DataError

_TEST_SHARE = 0.1


@dataclass(frozen=True)
class Reading:
    """How the pictures of a collection are read.

    Attributes:
        resolution: Crop to the central square and resize to this many pixels a side; by default no resizing.
        max_bad: Largest share of the pictures that may be unreadable; 0 refuses the first of them.
        scale: What arrays hold: pictures, or fields and how they are scaled.
        labels: Whether labels are looked for.
        writer: Where the pixels go one by one; by default they are kept in memory.
        progress: Told before each picture how many are read, of how many.
    """

    resolution: int | None = None
    max_bad: float = 0.0
    scale: Scaling = "pictures"
    labels: LabelMode = "auto"
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


def collect(
    source: str,
    entries: Sequence[Entry],
    reading: Reading,
    skipped: Iterable[str] = (),
    notes: Mapping[str, str] = MappingProxyType({}),
) -> Collection:
    """Decode the pictures of a collection.

    Args:
        source: The source, as the user wrote it.
        entries: Its pictures, in order.
        reading: How.
        skipped: What was passed over already.
        notes: How parts and labels were found.

    Returns:
        The set. Held out is what the entries say, else a tenth by content.

    Raises:
        DataError: A bad picture, labels of some pictures only, different sizes and no resolution, too many pixels for
            memory, or none at all.
        CheckpointError: The disk that the pixels are written to is too small.
    """
    notes = {"split": "held out: a tenth, by content", "labels": "none: there are none beside the pictures", **notes}
    if reading.labels == "auto":
        require_all(source, entries, notes["labels"])
    if all(entry.label is None for entry in entries) and not notes["labels"].startswith("none"):
        notes["labels"] = f"none: no picture has one ({notes['labels']})"
    good, keys, bad, files = list[Entry](), list[int](), list[str](), dict[str, str]()
    notices = list[str]()
    pixels = _Pixels(source, reading.writer, len(entries))
    for number, entry in enumerate(entries):
        if reading.progress is not None:
            reading.progress(number, len(entries))
        try:
            content = entry.read()
            files[entry.place] = hashlib.sha256(content).hexdigest()
            picture = decode(content, reduce=reading.resolution is not None, notices=notices)
        except PictureError as error:
            bad.append(f"{shown(entry.place)}: {error}")
            if reading.max_bad == 0:
                raise DataError(f"{source}: {bad[0]}; remove it, or leave it out (on-bad-file skip)") from error
            if len(bad) > reading.max_bad * len(entries):
                raise DataError(
                    f"{source}: {len(bad)} of {len(entries)} pictures cannot be read, the first: {bad[0]}; mend or "
                    f"remove them, or raise max-bad (now {reading.max_bad:g})"
                ) from error
            continue
        keys += content_keys(picture[None])
        pixels.add(picture if reading.resolution is None else fit(picture[None], reading.resolution)[0], entry.place)
        good.append(entry)
    skipped = (*skipped, *bad)
    if not good:
        hint = f" ({len(skipped)} skipped, the first: {skipped[0]})" if skipped else ""
        raise DataError(f"{source}: no images found{hint}")
    if notices:
        notes["metadata"] = f"{len(notices)} damaged or odd, not needed for pixels, the first: {notices[0]}"
    classes, labels = number_labels([entry.label for entry in good])
    own_parts = all(entry.test is not None for entry in good) and len({entry.test for entry in good}) == 2
    if own_parts and (strange := sorted(set(classes) - {entry.label for entry in good if not entry.test})):
        notes["split"] += f"; classes of it alone: {some(strange)}"
    test = torch.tensor([entry.test for entry in good]) if own_parts else hashed_test(keys)
    return Collection(Images(source, pixels.finish(), labels, classes, skipped, notes), test, files)


def hashed_test(keys: Sequence[int]) -> Bool[Tensor, " batch"]:
    """Which images are held out, by their content alone: a tenth, and at least one if two images differ.

    An image stays on its side when others are added, and copies of an image are on the same side.

    Args:
        keys: `content_keys` of the images.

    Returns:
        True for images held out.
    """
    threshold = int(_TEST_SHARE * 2**64)
    test = [key < threshold for key in keys]
    if not any(test):
        least = min(keys)
        test = [key == least for key in keys]
    if all(test):
        largest = max(keys)
        test = [key != largest for key in keys]
    return torch.tensor(test, dtype=torch.bool)


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
                f"and {size[0]} x {size[1]} ({shown(name)}); choose a resolution (--resolution; msd train: "
                "--data.resolution)"
            )
        if self._writer is not None:
            self._writer.add(picture[None])
            return
        self._pictures.append(picture)
        self._total += 3 * picture[0].numel()
        if self._total > MAX_SET_BYTES:
            raise DataError(
                f"{self._source}: more than {MAX_SET_BYTES:,} bytes of pixels; choose a smaller resolution, or "
                "write them to disk: msd data SOURCE --convert FOLDER"
            )

    def finish(self) -> Tensor | Shards:
        if self._writer is not None:
            return self._writer.finish()
        channels = max(len(picture) for picture in self._pictures)
        return torch.stack([picture.expand(channels, -1, -1) for picture in self._pictures])
