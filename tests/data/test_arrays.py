"""Files of numbers: npz, idx, CIFAR's records; bombs, false headers, pickles."""

import io
import os
import pickle
import struct
import sys
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from multistage_diffusion.data import load_data
from multistage_diffusion.errors import DataError

GENERATOR = np.random.default_rng(0)
PIXELS = GENERATOR.integers(0, 256, (20, 6, 5, 3), dtype=np.uint8)


class Payload:
    """Touches a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def npz(path, **arrays):
    np.savez_compressed(path, **arrays)
    return f"npz:{path}"


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"weights": PIXELS}, r"no array called images.*the file holds weights"),
        ({"images": PIXELS.astype(np.int64)}, "images of int64 have no agreed range"),
        ({"images": PIXELS / 255.0}, r"must span \[-1, 1\], these 0\.\.1"),
        ({"images": PIXELS.astype(np.float32)}, r"must span \[-1, 1\], these 0\.\.255"),
        ({"images": np.full((2, 4, 4), np.nan)}, "NaN"),
        ({"images": np.array([[[-1.0, np.inf]]])}, "NaN or infinite"),
        ({"images": PIXELS[:, :, :, :2]}, r"\(N, H, W, C\) or \(N, C, H, W\)"),
        ({"images": PIXELS[:, :3, :, :]}, r"\(N, H, W, C\) or \(N, C, H, W\)"),
        ({"images": PIXELS[0, 0]}, "3 or 4 dimensions"),
        ({"images": PIXELS[:0]}, "no images found"),
        ({"images": PIXELS, "labels": np.arange(19)}, "labels must be 20 whole numbers"),
        ({"images": PIXELS, "labels": np.arange(20) / 2}, "fractions"),
        ({"images": PIXELS, "labels": np.arange(20) - 1}, "the least is -1"),
        ({"images": PIXELS.astype("V1")}, "are not read"),
        ({"images": np.zeros((100, 1000, 1000), np.uint8)}, "images.npy expands"),
    ],
)
def test_npz_is_refused(tmp_path, arrays, message):
    with pytest.raises(DataError, match=message):
        load_data(npz(tmp_path / "a.npz", **arrays))


def test_npz_with_parts_of_its_own(tmp_path):
    source = npz(
        tmp_path / "a.npz", x_train=PIXELS[:15], y_train=np.arange(15) % 3, x_test=PIXELS[15:], y_test=np.arange(5) % 3
    )
    test = load_data(source, split="test")
    assert test.labels.tolist() == [0, 1, 2, 0, 1]
    assert torch.equal(test.images, torch.from_numpy(PIXELS[15:]).permute(0, 3, 1, 2))
    assert len(load_data(source)) == 15
    assert len(load_data(npz(tmp_path / "b.npz", train_images=PIXELS), split="all")) == 20


def test_npz_headers_that_lie(tmp_path):
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, PIXELS)
    honest = buffer.getvalue()
    for shape in ("(20, 6, 5, 9)", "(2000000000, 60, 5, 3)", "(20, 6, 5, -3)"):
        lie = honest.replace(b"(20, 6, 5, 3)", shape.encode())
        with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
            archive.writestr("images.npy", lie)
        with pytest.raises(DataError, match=r"images\.npy"):
            load_data(f"npz:{tmp_path / 'a.npz'}")
    for content in (b"", b"\x93NUMPY", honest[:90], b"\x80\x04." * 9):
        with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
            archive.writestr("images.npy", content)
        with pytest.raises(DataError, match=r"images\.npy"):
            load_data(f"npz:{tmp_path / 'a.npz'}")


def test_no_pickle_is_opened(tmp_path):
    marker = tmp_path / "marker"
    payload = pickle.dumps(Payload(marker))
    objects = np.empty(2, dtype=object)
    objects[0] = Payload(marker)
    with zipfile.ZipFile(tmp_path / "object.npz", "w") as archive, archive.open("images.npy", "w") as file:
        np.lib.format.write_array(file, objects, allow_pickle=True)
    with (tmp_path / "object.npy").open("wb") as file:
        np.lib.format.write_array(file, objects, allow_pickle=True)
    torch.save({"images": Payload(marker)}, tmp_path / "model.pt")
    pictures, cifar = tmp_path / "pictures", tmp_path / "cifar-10-batches-py"
    pictures.mkdir()
    cifar.mkdir()
    for path in (tmp_path / "plain.npz", tmp_path / "plain.zip", tmp_path / "plain.tar", pictures / "a.png",
                 cifar / "data_batch_1", cifar / "data_batch_1.bin", tmp_path / "train-images-idx3-ubyte"):  # fmt: skip
        path.write_bytes(payload)
    sources = [f"npz:{tmp_path / name}" for name in ("object.npz", "object.npy", "model.pt", "plain.npz")]
    sources += [f"zip:{tmp_path / name}" for name in ("model.pt", "plain.zip", "object.npz")]
    sources += [f"webdataset:{tmp_path / name}" for name in ("model.pt", "plain.tar")]
    sources += [f"folder:{pictures}", "cifar10", "mnist"]
    for source in sources:
        with pytest.raises(DataError) as caught:
            load_data(source, root=str(tmp_path))
        assert "\n" not in str(caught.value)
    (cifar / "data_batch_1.bin").unlink()
    with pytest.raises(DataError, match=r"pickled version, which is never read; get cifar-10-binary\.tar\.gz"):
        load_data("cifar10", root=str(tmp_path))
    assert not marker.exists()


def test_cifar10(tmp_path):
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    records = GENERATOR.integers(0, 256, (60, 3073), dtype=np.uint8)
    records[:, 0] = np.arange(60) % 10
    for i, name in enumerate([*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]):
        (folder / f"{name}.bin").write_bytes(records[10 * i : 10 * i + 10].tobytes())
    train = load_data("cifar10", root=str(tmp_path))
    assert (len(train), train.shape, train.classes[8]) == (50, (3, 32, 32), "ship")
    assert train.labels.tolist() == [i % 10 for i in range(50)]
    assert train.images[3, 1, 0, 5] == records[3, 1 + 1024 + 5]
    assert len(load_data("cifar10", split="all", root=str(folder))) == 60
    (folder / "test_batch.bin").write_bytes(bytes(3072))
    with pytest.raises(DataError, match="not a whole number of records"):
        load_data("cifar10", split="test", root=str(tmp_path))


def test_cifar10_in_parquet_without_the_library_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "train-00000-of-00001.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(DataError, match=r"needs pyarrow: pip install 'multistage-diffusion\[data\]'"):
        load_data("cifar10", root=str(tmp_path))


def test_cifar10_in_parquet_is_the_binary_version(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    binary, folder = tmp_path / "cifar-10-batches-bin", tmp_path / "hub" / "plain_text"
    binary.mkdir()
    folder.mkdir(parents=True)
    records = GENERATOR.integers(0, 256, (60, 3073), dtype=np.uint8)
    records[:, 0] = np.arange(60) % 10
    for i, name in enumerate([*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]):
        (binary / f"{name}.bin").write_bytes(records[10 * i : 10 * i + 10].tobytes())
    pictures = [Image.fromarray(record[1:].reshape(3, 32, 32).transpose(1, 2, 0)) for record in records]

    def write(name, rows, column="img", **changes):
        cells = [{"bytes": encoded(pictures[row]), "path": None} for row in rows]
        table = {column: cells, "label": [row % 10 for row in rows], **changes}
        parquet.write_table(pyarrow.table(table), folder / name, row_group_size=7)

    write("train-00000-of-00002.parquet", range(30))
    write("train-00001-of-00002.parquet", range(30, 50), "image")
    write("test-00000-of-00001.parquet", range(50, 60))
    for split in ("train", "test", "all"):
        first, second = (load_data("cifar10", split=split, root=str(root)) for root in (tmp_path, tmp_path / "hub"))
        assert first.digest == second.digest
    path = folder / "test-00000-of-00001.parquet"
    whole = path.read_bytes()
    for content in (b"", whole[:-3], whole[: len(whole) // 2], b"\x80\x04." * 9, whole.replace(b"\x89PNG", b"xxxx")):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"test-00000-of-00001\.parquet: not CIFAR-10 in Parquet") as caught:
            load_data("cifar10", split="test", root=str(tmp_path / "hub"))
        assert "\n" not in str(caught.value)
    for changes, message in [({"label": [None] * 10}, "each with a label"), ({"label": [10] * 10}, r"0\.\.9, got 10")]:
        write(path.name, range(50, 60), **changes)
        with pytest.raises(DataError, match=message):
            load_data("cifar10", split="test", root=str(tmp_path / "hub"))
    path.unlink()
    with pytest.raises(DataError, match=r"no test-\*\.parquet"):
        load_data("cifar10", split="test", root=str(tmp_path / "hub"))


def encoded(picture):
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("shape", "magic", "message"),
    [
        ((31, 28, 28), None, "ends before"),
        ((29, 28, 28), None, "goes on after"),
        ((2**32 - 1, 2**32 - 1, 2**32 - 1), None, "more than such a file can hold"),
        ((60_000, 28, 28), None, "more than such a file can hold"),
        ((0, 28, 28), None, "goes on after"),
        ((30, 28, 28), bytes((0, 0, 13, 3)), "not an idx file of bytes"),
        ((30, 28, 28), bytes((0, 0, 8, 1)), "not an idx file of bytes with 3 dimensions"),
    ],
)
def test_idx_headers_that_lie(fashion, write_idx, shape, magic, message):
    write_idx(fashion / "train-images-idx3-ubyte.gz", np.zeros((30, 28, 28), np.uint8), shape, magic)
    with pytest.raises(DataError, match=message):
        load_data("fashion-mnist", root=str(fashion))


def test_idx_files_that_are_damaged(fashion, write_idx):
    path = fashion / "train-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for content in (b"", whole[:9], whole[:-5], bytes(flipped), b"\x80\x04.", struct.pack(">I", 2051)):
        path.write_bytes(content)
        with pytest.raises(DataError, match="train-images-idx3-ubyte"):
            load_data("fashion-mnist", root=str(fashion))
    path.write_bytes(whole)
    write_idx(fashion / "train-labels-idx1-ubyte.gz", np.arange(29, dtype=np.uint8) % 10)
    with pytest.raises(DataError, match="30 images but 29 labels"):
        load_data("fashion-mnist", root=str(fashion))
    (fashion / "train-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataError, match=r"train-labels-idx1-ubyte\.gz: no such file"):
        load_data("fashion-mnist", root=str(fashion))
