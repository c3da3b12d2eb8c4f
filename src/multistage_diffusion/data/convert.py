"""Any source as shards: uint8 images on disk that are never decoded again, and never need to fit into memory."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor

from multistage_diffusion.config import Scaling
from multistage_diffusion.data.collection import Collection
from multistage_diffusion.data.fields import Fields, Scale, scale_of
from multistage_diffusion.data.images import Images
from multistage_diffusion.data.rows import blocks
from multistage_diffusion.data.shards import ShardWriter, open_shards, require_size
from multistage_diffusion.errors import ConfigError, DataError
from multistage_diffusion.files import read_json

_ABOUT, _LABELS, _TEST = "images.json", "labels.bin", "test.bin"


def write_images(collection: Collection, folder: Path, writer: ShardWriter) -> None:
    """Complete a folder of shards: write the images, where the reader did not, and what is known of them.

    Args:
        collection: What was read.
        folder: Where the shards go.
        writer: Of that folder, given to the reader, too.
    """
    images = collection.images
    if not writer.finished:
        writer.expected = len(images)
        for rows in blocks(images.images.shape):
            writer.add(images.stored(rows))
        writer.finish()
    if images.labels is not None:
        (folder / _LABELS).write_bytes(images.labels.numpy().data)
    (folder / _TEST).write_bytes(collection.test.to(torch.uint8).numpy().data)
    about = {
        "source": images.name,
        "classes": list(images.classes),
        "labels": images.labels is not None,
        "skipped": list(images.skipped),
        "notes": dict(images.notes),
    }
    if isinstance(images.codec, Scale):
        about["scale"] = asdict(images.codec)
    (folder / _ABOUT).write_text(json.dumps(about, indent=2) + "\n")


def read_shards(source: str, path: Path, scaling: Scaling) -> Collection:
    """Images that `msd data SOURCE --convert PATH` wrote.

    Args:
        source: The source, as the user wrote it.
        path: The folder.
        scaling: Pictures, or how fields are scaled.

    Returns:
        The set, its images on disk; parts, labels and order are those of the source that was converted.

    Raises:
        DataError: No such folder, or one that is damaged.
    """
    shards, _ = open_shards(path, (_ABOUT, _TEST))
    try:
        about: Any = read_json(path / _ABOUT)
        classes, skipped, labelled = about["classes"], about["skipped"], about["labels"]
        notes = dict(about.get("notes", {}))
        if not all(isinstance(entry, str) for entry in (*classes, *skipped, *notes, *notes.values())):
            raise ValueError("classes must be names")
    except (ConfigError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path / _ABOUT}: not a description of images ({str(error)[:100]})") from error
    labels = _read(path / _LABELS, len(shards), torch.int64) if labelled else None
    test = _read(path / _TEST, len(shards), torch.uint8).bool()
    holds_pictures = shards.dtype == torch.uint8
    if holds_pictures != (scaling == "pictures"):
        mend = "leave data.scale out" if holds_pictures else "choose data.scale none, range or standardise"
        raise DataError(f"{source}: holds {'pictures' if holds_pictures else 'numbers of any range'}; {mend}")
    if scaling == "pictures":
        return Collection(Images(source, shards, labels, tuple(classes), tuple(skipped), notes), test)
    try:
        scale = replace(scale_of(about.get("scale")), kind=scaling)
    except DataError as error:
        raise DataError(f"{path / _ABOUT}: {error}") from error
    return Collection(Fields(source, shards, labels, tuple(classes), tuple(skipped), notes, codec=scale), test)


def _read(path: Path, count: int, dtype: torch.dtype) -> Shaped[Tensor, " count"]:
    """One number for each image."""
    require_size(path, count * dtype.itemsize)
    return torch.frombuffer(bytearray(path.read_bytes()), dtype=dtype)
