"""Small files of every kind, and a cache of its own for each test."""

import gzip
import struct

import numpy as np
import pytest


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MSD_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def write_idx():
    """A function that writes an idx.gz file; a false header can be given."""

    def write(path, array, shape=None, magic=None):
        shape = array.shape if shape is None else shape
        header = bytes((0, 0, 8, len(shape))) if magic is None else magic
        path.write_bytes(gzip.compress(header + struct.pack(f">{len(shape)}I", *shape) + array.tobytes(), mtime=0))

    return write


@pytest.fixture
def fashion(tmp_path, write_idx):
    """A folder with the four files of a tiny Fashion-MNIST: 30 training and 10 test images."""
    folder = tmp_path / "fashion"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for prefix, count in (("train", 30), ("t10k", 10)):
        pixels = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        write_idx(folder / f"{prefix}-images-idx3-ubyte.gz", pixels)
        write_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", np.arange(count, dtype=np.uint8) % 10)
    return folder
