"""Images through Hugging Face's datasets library, an extra: from a folder it saved, or from the hub."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from multistage_diffusion.data.collection import Collection, Reading, collect
from multistage_diffusion.data.decode import PictureError, read_regular
from multistage_diffusion.data.layout import LABEL_COLUMNS, Entry, label_text
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
        classes, or of a column of whole numbers or text that is called `label`, `labels`, `class` or `target`.

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
        mend = f"; folder:{source.removeprefix('hf:')} reads pictures in folders" if path.is_dir() else ""
        raise DataError(f"{source}: cannot be loaded ({' '.join(str(error).split())[:200]}){mend}") from error
    parts: dict[str, Any] = dict(loaded) if isinstance(loaded, dict) else {"": loaded}
    test = next((part for part in _TEST if part in parts), None)
    chosen = {"train": parts["train"]} if "train" in parts else {next(iter(parts)): next(iter(parts.values()))}
    if test is not None and test not in chosen:
        chosen["test"] = parts[test]
    names = {part: _label_column(datasets, rows) for part, rows in chosen.items()}
    entries = [entry for part, rows in chosen.items() for entry in _entries(datasets, source, part, rows, names[part])]
    unused = [f"part {part}: not used" for part in parts if part not in chosen and part != test]
    columns = sorted({name for name in names.values() if name is not None})
    labels = f"the column {', '.join(columns)}" if columns else "none: no column of classes, and none called label"
    notes = {"labels": labels} | ({"split": f"held out: the part {test}"} if "test" in chosen else {})
    return collect(source, entries, reading, unused, notes)


def _label_column(datasets: Any, rows: Any) -> str | None:
    """The column of labels: the first of classes, else of numbers or text with a name that says so."""
    features = rows.features
    classes = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    plain = [
        name for name in LABEL_COLUMNS if getattr(features.get(name), "dtype", "").startswith(("int", "uint", "str"))
    ]
    return next(iter(classes + plain), None)


def _entries(datasets: Any, source: str, part: str, rows: Any, label: str | None) -> list[Entry]:
    """The rows of one part, pictures still encoded."""
    image = next((name for name, kind in rows.features.items() if isinstance(kind, datasets.Image)), None)
    if image is None:
        raise DataError(f"{source}: no column of images; it has {', '.join(rows.features)}")
    labels = [None] * len(rows) if label is None else rows[label]
    names = getattr(rows.features.get(label), "names", None)
    rows = rows.cast_column(image, datasets.Image(decode=False))
    prefix, test = (f"{part}/", part == "test") if part else ("", None)
    return [
        Entry(f"{prefix}{i}", _reader(rows, i, image), _name(number, names), test) for i, number in enumerate(labels)
    ]


def _name(label: Any, names: list[str] | None) -> str | None:
    """A label as the name of a class."""
    text = label_text(label)
    return text if text is None or names is None else names[int(text)]


def _reader(rows: Any, index: int, column: str) -> Callable[[], bytes]:
    def read() -> bytes:
        cell = rows[index][column]
        if cell is None:
            raise PictureError("empty")
        return cell["bytes"] if cell.get("bytes") is not None else read_regular(Path(cell["path"]))

    return read
