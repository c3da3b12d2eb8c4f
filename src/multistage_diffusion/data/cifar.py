"""CIFAR-10 from its binary version, or from Parquet files. The pickled version is never read: a pickle can run code."""

from __future__ import annotations

from pathlib import Path

import torch

from multistage_diffusion.data.cache import cache_directory
from multistage_diffusion.data.decode import PictureError, decode, read_regular
from multistage_diffusion.data.images import Images
from multistage_diffusion.errors import DataError

_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_RECORD = 1 + 3 * 32 * 32  # a label, then the red, green and blue planes
_TRAIN, _TEST = tuple(f"data_batch_{i}.bin" for i in range(1, 6)), ("test_batch.bin",)
_MAX_BYTES = 100_000 * _RECORD
_MEND = "get cifar-10-binary.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html and unpack it there"
_MAX_PARQUET = 2**30  # bytes of encoded pictures in one file


def read_cifar10(split: str, root: str | None) -> Images:
    """CIFAR-10.

    Args:
        split: `train` or `test`.
        root: Folder to look in first.

    Returns:
        RGB images, 32 x 32, with labels.

    Raises:
        DataError: Missing, damaged, the pickled version, or Parquet files without the library that reads them.
    """
    folder = _find(root)
    if not (folder / _TRAIN[0]).is_file():
        return _read_parquet(sorted(folder.glob(f"{split}-*.parquet")), folder, split)
    records = torch.cat([_read_batch(folder / name) for name in (_TRAIN if split == "train" else _TEST)])
    return Images("cifar10", records[:, 1:].reshape(-1, 3, 32, 32).contiguous(), records[:, 0].long(), _CLASSES)


def _read_parquet(files: list[Path], folder: Path, split: str) -> Images:
    """Rows of a picture (`img` or `image`: an encoded file) and a `label`, as the Hugging Face hub has them."""
    try:
        import pyarrow.parquet as parquet  # pyright: ignore[reportMissingImports]  (an extra)
    except ImportError as error:
        raise DataError(f"cifar10: {folder} needs pyarrow: pip install 'multistage-diffusion[data]'") from error
    if not files:
        raise DataError(f"{folder}: no {split}-*.parquet")
    pictures, labels = list[torch.Tensor](), list[int]()
    for path in files:
        if not path.is_file():
            raise DataError(f"{path}: not a regular file")
        try:
            with parquet.ParquetFile(path) as table:
                groups = [table.metadata.row_group(number) for number in range(table.metadata.num_row_groups)]
                if sum(group.total_byte_size for group in groups) > _MAX_PARQUET:
                    raise DataError(f"{path}: more than {_MAX_PARQUET:,} bytes of pictures, not CIFAR-10")
                image = next(name for name in ("img", "image") if name in table.schema_arrow.names)
                for batch in table.iter_batches(1024, columns=[image, "label"]):
                    pictures += [decode(cell["bytes"]) for cell in batch[image].to_pylist()]
                    labels += batch["label"].to_pylist()
        except DataError:
            raise
        except Exception as error:  # the library, the pictures and the columns each have their own
            words = " ".join(str(error).split())[:100]
            raise DataError(f"{path}: not CIFAR-10 in Parquet, or damaged ({words or type(error).__name__})") from error
    if any(picture.shape != (3, 32, 32) for picture in pictures) or not all(type(label) is int for label in labels):
        raise DataError(f"{folder}: the {split} pictures must be in colour, 32 x 32, each with a label")
    if not pictures:
        raise DataError(f"{folder}: no {split} pictures")
    return Images("cifar10", torch.stack(pictures), torch.tensor(labels), _CLASSES)


def _read_batch(path: Path) -> torch.Tensor:
    """Records of one file."""
    try:
        content = read_regular(path, _MAX_BYTES)
    except PictureError as error:
        raise DataError(f"{path}: {error}") from error
    if len(content) == 0 or len(content) % _RECORD:
        raise DataError(f"{path}: {len(content)} bytes, not a whole number of records of {_RECORD} bytes")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8).reshape(-1, _RECORD)


def _find(root: str | None) -> Path:
    """The folder that holds the binary version, or Parquet files."""
    cache = cache_directory() / "cifar10"
    places = [*([Path(root)] if root is not None else []), cache]
    inner = ("", "cifar-10-batches-bin", "cifar10", "cifar-10-batches-py", "plain_text", "cifar10/plain_text")
    candidates = [place / name for place in places for name in inner]
    for folder in candidates:
        if (folder / _TRAIN[0]).is_file() or any(folder.glob("train-*.parquet")):
            return folder
    for folder in candidates:
        if (folder / "data_batch_1").is_file():
            raise DataError(f"cifar10: {folder} holds the pickled version, which is never read; {_MEND}")
    first = f"{root} (--data-root)" if root is not None else "--data-root (not given)"
    raise DataError(f"cifar10: no {_TRAIN[0]} in {first} or {cache}; {_MEND}")
