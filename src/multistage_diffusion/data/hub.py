"""Images through Hugging Face's datasets library, an extra: from a folder it saved, or from the hub."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from multistage_diffusion.data.collection import Collection, Entry, Reading, collect
from multistage_diffusion.data.decode import PictureError, read_regular
from multistage_diffusion.errors import DataError

_TEST = ("test", "validation", "valid", "val")


def read_hub(source: str, path: Path, reading: Reading) -> Collection:
    """Images of a dataset; no code of the dataset's is run.

    Args:
        source: The source, as the user wrote it.
        path: A folder written by `save_to_disk` or with Parquet files, as the hub has them; if there is none, what
            follows `hf:` is a name on the hub, with `:CONFIGURATION` behind it if it has some.
        reading: How its pictures are read.

    Returns:
        The set. Held out is its own test or validation part, or a tenth by content. Labels are of the first column of
        classes.

    Raises:
        DataError: The library is missing, the dataset cannot be read, or has no column of images.
    """
    try:
        import datasets  # pyright: ignore[reportMissingImports]  (an extra)
    except ImportError as error:
        raise DataError(f"{source}: needs the datasets library: pip install 'multistage-diffusion[data]'") from error
    try:
        if path.is_dir():
            parquet = next(path.rglob("*.parquet"), None) is not None
            loaded: Any = datasets.load_dataset(str(path)) if parquet else datasets.load_from_disk(str(path))
        else:
            name, _, configuration = source.removeprefix("hf:").partition(":")
            loaded = datasets.load_dataset(name, configuration or None)
    except Exception as error:  # the library, the network and the file formats each have their own
        raise DataError(f"{source}: cannot be loaded ({' '.join(str(error).split())[:200]})") from error
    parts: dict[str, Any] = dict(loaded) if isinstance(loaded, dict) else {"": loaded}
    test = next((part for part in _TEST if part in parts), None)
    chosen = {"train": parts["train"]} if "train" in parts else {next(iter(parts)): next(iter(parts.values()))}
    if test is not None and test not in chosen:
        chosen["test"] = parts[test]
    entries = [entry for part, rows in chosen.items() for entry in _entries(datasets, source, part, rows)]
    unused = [f"part {part}: not used" for part in parts if part not in chosen and part != test]
    return collect(source, entries, reading, unused)


def _entries(datasets: Any, source: str, part: str, rows: Any) -> list[Entry]:
    """The rows of one part, pictures still encoded."""
    columns = {
        kind: [key for key, value in rows.features.items() if isinstance(value, kind)]
        for kind in (datasets.Image, datasets.ClassLabel)
    }
    if not columns[datasets.Image]:
        raise DataError(f"{source}: no column of images; it has {', '.join(rows.features)}")
    image = columns[datasets.Image][0]
    rows = rows.cast_column(image, datasets.Image(decode=False))
    labels = [None] * len(rows)
    if columns[datasets.ClassLabel]:
        label = columns[datasets.ClassLabel][0]
        names = rows.features[label].names
        labels = [None if number is None or number < 0 else names[number] for number in rows[label]]
    prefix = f"{part}/" if part else ""
    return [Entry(f"{prefix}{i}", _reader(rows, i, image), label) for i, label in enumerate(labels)]


def _reader(rows: Any, index: int, column: str) -> Callable[[], bytes]:
    def read() -> bytes:
        cell = rows[index][column]
        if cell is None:
            raise PictureError("empty")
        return cell["bytes"] if cell.get("bytes") is not None else read_regular(Path(cell["path"]))

    return read
