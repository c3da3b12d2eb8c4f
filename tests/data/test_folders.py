"""Folders and archives: the same pictures give the same set; archives that no honest tool writes are refused."""

import io
import json
import os
import stat
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from multistage_diffusion.data import load_data
from multistage_diffusion.errors import DataError


def png(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def pictures():
    """Forty colour pictures of two classes, by name."""
    generator = np.random.default_rng(0)
    return {
        f"{('cats', 'dogs')[i % 2]}/{i:02}.png": png(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        for i in range(40)
    }


def write_folder(path, files):
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return f"folder:{path}"


def write_zip(path, files, **options):
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return f"zip:{path}"


def write_tar(path, files):
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return f"webdataset:{path}"


def test_the_same_pictures_from_everywhere(tmp_path, pictures):
    names = sorted(pictures)
    folder = write_folder(tmp_path / "folder", pictures)
    archive = write_zip(tmp_path / "a.zip", pictures)
    shards = {f"{i:02}.{kind}": value for i, name in enumerate(names) for kind, value in
              (("png", pictures[name]), ("cls", b"01"[i // 20 : i // 20 + 1]))}  # fmt: skip
    write_tar(tmp_path / "part-000.tar", dict(list(shards.items())[:30]))
    write_tar(tmp_path / "part-001.tar", dict(list(shards.items())[30:]))
    stacked = np.stack([np.asarray(Image.open(io.BytesIO(pictures[name]))) for name in names])
    labels = np.arange(40) // 20
    np.savez(tmp_path / "last.npz", images=stacked, labels=labels)
    np.savez_compressed(tmp_path / "first.npz", arr_0=np.moveaxis(stacked, 3, 1), arr_1=labels[:, None])
    np.savez(tmp_path / "floats.npz", x=np.asfortranarray(stacked / 127.5 - 1), y=labels.astype(np.uint8))
    sources = [folder, archive, f"webdataset:{tmp_path}/part-{{000..001}}.tar", f"webdataset:{tmp_path}/part-*.tar"]
    sources += [f"npz:{tmp_path}/{name}.npz" for name in ("last", "first", "floats")]
    for split in ("train", "test", "all"):
        for resolution in (None, 5):
            sets = [load_data(source, split=split, resolution=resolution) for source in sources]
            assert sets[0].labels.unique().tolist() == [0, 1]
            for other in sets[1:]:
                assert torch.equal(other.images, sets[0].images)
                assert torch.equal(other.labels, sets[0].labels)
    assert load_data(folder).classes == ("cats", "dogs")
    assert load_data("folder:folder", root=str(tmp_path)).digest == load_data(folder).digest


def test_the_split_is_by_content_and_stays(tmp_path, pictures):
    source = write_folder(tmp_path, pictures)
    train, test, both = (load_data(source, split=split) for split in ("train", "test", "all"))
    assert len(train) + len(test) == len(both) == 40
    assert 1 <= len(test) <= 12
    held_out = {bytes(image.numpy().tobytes()) for image in test.images}
    first = next(iter(pictures))
    write_folder(tmp_path, {"cats/more.png": png(np.zeros((8, 8, 3), np.uint8)), "dogs/copy.png": pictures[first]})
    again = {bytes(image.numpy().tobytes()) for image in load_data(source, split="test").images}
    assert held_out <= again and len(again) <= len(held_out) + 1


def test_two_pictures_are_split_and_one_is_not(tmp_path):
    source = write_folder(tmp_path, {"a.png": png(np.zeros((8, 8), np.uint8))})
    assert len(load_data(source)) == 1
    with pytest.raises(DataError, match=r"too few different images \(1\)"):
        load_data(source, split="test")
    write_folder(tmp_path, {"b.png": png(np.full((8, 8), 9, np.uint8))})
    assert len(load_data(source)) == len(load_data(source, split="test")) == 1


def test_folders_named_train_and_test_are_the_split(tmp_path, pictures):
    files = {f"{'test' if i < 7 else 'train'}/{name}": value for i, (name, value) in enumerate(pictures.items())}
    source = write_folder(tmp_path, files)
    test = load_data(source, split="test")
    assert len(test) == 7 and test.classes == ("cats", "dogs")
    assert len(load_data(source)) == 33


@pytest.mark.parametrize("write", [write_folder, write_zip])
def test_labels_of_edm(tmp_path, pictures, write):
    labels = [[name, i % 12] for i, name in enumerate(pictures)]
    files = {**pictures, "dataset.json": json.dumps({"labels": labels}).encode()}
    images = load_data(write(tmp_path / "edm", files), split="all")
    assert images.classes == tuple(map(str, range(12)))
    assert images.labels.bincount().tolist() == [4] * 4 + [3] * 8
    files["dataset.json"] = b'{"labels": null}'
    assert load_data(write(tmp_path / "none", files)).labels is None
    for content, message in [
        (json.dumps({"labels": labels[1:]}).encode(), "no label for cats/00.png"),
        (b'{"labels": [["cats/00.png", [0, 1]]]}', "whole numbers"),
        (b"[" * 100_000, "dataset.json must be"),
        (b"[]", "dataset.json must be"),
    ]:
        files["dataset.json"] = content
        with pytest.raises(DataError, match=message):
            load_data(write(tmp_path / f"bad-{len(content)}", files))


def test_grey_among_colour_becomes_colour_and_sizes_must_agree(tmp_path, pictures):
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    source = write_folder(tmp_path, {**pictures, "dogs/grey.png": png(grey)})
    images = load_data(source, split="all")
    assert images.shape == (3, 8, 8)
    assert any(torch.equal(image, torch.from_numpy(grey).expand(3, -1, -1)) for image in images.images)
    write_folder(tmp_path, {"dogs/large.png": png(np.zeros((9, 8, 3), np.uint8))})
    with pytest.raises(DataError, match=r"8 x 8 \(cats/00.png\) and 9 x 8 \(dogs/large.png\).*--resolution"):
        load_data(source)
    assert load_data(source, resolution=8).shape == (3, 8, 8)


def test_bad_files_are_refused_or_counted(tmp_path, pictures):
    source = write_folder(tmp_path, {**pictures, "cats/bad.png": b"no", "notes.txt": b"", ".hidden": b""})
    with pytest.raises(DataError, match=r"cats/bad\.png: not a picture of a known kind .*; remove it, or leave it out"):
        load_data(source)
    images = load_data(source, split="all", max_bad=0.03)
    assert len(images) == 40
    assert images.skipped[:2] == (
        "1 file .txt: not pictures by their name",
        "1 file without an ending: not pictures by their name",
    )
    assert images.skipped[2].startswith("cats/bad.png: not a picture")
    with pytest.raises(DataError, match="1 of 41 pictures cannot be read"):
        load_data(source, max_bad=0.02)


def test_an_odd_name_stays_on_one_line(tmp_path):
    (tmp_path / "a\nb\x1b[31m.png").write_bytes(b"no")
    with pytest.raises(DataError) as caught:
        load_data(f"folder:{tmp_path}")
    assert "a\\nb\\x1b[31m.png" in str(caught.value)


def test_nothing_to_read(tmp_path):
    (tmp_path / "read.me").write_text("")
    (tmp_path / "empty.zip").write_bytes(b"PK\5\6" + bytes(18))
    (tmp_path / "a.npy").write_bytes(b"")
    for source, message in [
        (f"folder:{tmp_path}", r"no images found \(3 skipped, the first: 1 file \.me"),
        (f"folder:{tmp_path}/read.me", "is not a folder"),
        (f"zip:{tmp_path}/empty.zip", "no images found"),
        (f"zip:{tmp_path}/read.me", "not a zip archive"),
        (f"zip:{tmp_path}", 'did you mean "folder:'),
        (f"folder:{tmp_path}/empty.zip", 'is of another kind; did you mean "zip:'),
        (f"npz:{tmp_path}/a.npy", 'did you mean "npy:'),
        (f"folder:{tmp_path}/gone", "there is no .*gone"),
        (f"webdataset:{tmp_path}/*.tar", "no file matches"),
        (f"webdataset:{tmp_path}/read.m*", "not a plain tar archive|no images"),
        ("webdataset:https://example.org/{000..999}.tar", "download them first"),
        (f"webdataset:{tmp_path}/{{0..99999999999}}.tar", "must rise"),
        (f"webdataset:{tmp_path}/{{5..2}}.tar", "must rise"),
    ]:
        with pytest.raises(DataError, match=message):
            load_data(source)


def test_a_folder_that_cannot_be_looked_into(tmp_path, monkeypatch):
    def walk(path, onerror):
        onerror(PermissionError(13, "Permission denied", f"{path}/cats"))
        yield str(path), [], []

    monkeypatch.setattr(os, "walk", walk)
    with pytest.raises(DataError, match=r"cats cannot be looked into \(Permission denied\)"):
        load_data(f"folder:{tmp_path}")


@pytest.mark.parametrize(
    "name", ["../out.png", "a/../../out.png", "/out.png", "C:/out.png", "..\\out.png", "\\\\h\\o.png"]
)
def test_archives_that_lead_out_are_refused(tmp_path, pictures, name):
    files = {**pictures, name: next(iter(pictures.values()))}
    inside = tmp_path / "inside"
    inside.mkdir()
    for source in (write_zip(inside / "a.zip", files), write_tar(inside / "a.tar", files)):
        with pytest.raises(DataError, match="archive refused: the entry") as caught:
            load_data(source)
        assert "out" in str(caught.value) or "absolute" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["inside"]


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_archives_with_links_devices_copies_and_bombs_are_refused(tmp_path, pictures):
    (name, content), *_ = pictures.items()
    link = zipfile.ZipInfo("link.png")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "link.zip", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    with zipfile.ZipFile(tmp_path / "twice.zip", "w") as archive:
        archive.writestr(name, content)
        archive.writestr(name, content)
    write_zip(tmp_path / "bomb.zip", {"a.png": bytes(200 * 2**20)}, compression=zipfile.ZIP_DEFLATED)
    assert (tmp_path / "bomb.zip").stat().st_size < 300_000
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
        info = tarfile.TarInfo("link.png")
        info.type, info.linkname = kind, "/etc/passwd"
        with tarfile.open(tmp_path / f"kind-{kind.decode()}.tar", "w") as archive:
            archive.addfile(info)
    for file, reason in [
        ("link.zip", "is a link"), ("twice.zip", "is there twice"), ("bomb.zip", r"expands \d+ times"),
        ("kind-1.tar", "is a link"), ("kind-2.tar", "is a link"), ("kind-3.tar", "device"), ("kind-6.tar", "device"),
    ]:  # fmt: skip
        kind = "zip" if file.endswith("zip") else "webdataset"
        with pytest.raises(DataError, match=f"archive refused: the entry .*{reason}"):
            load_data(f"{kind}:{tmp_path / file}")


def test_damaged_archives_are_named(tmp_path, pictures):
    for write, name in ((write_zip, "a.zip"), (write_tar, "a.tar")):
        source = write(tmp_path / name, pictures)
        whole = (tmp_path / name).read_bytes()
        for cut in (10, len(whole) // 2, len(whole) - 30_000 if name == "a.tar" else len(whole) - 10):
            (tmp_path / name).write_bytes(whole[:cut])
            with pytest.raises(DataError):
                load_data(source)
        flipped = bytearray(whole)
        flipped[whole.index(b"IDAT") + 20] ^= 4
        (tmp_path / name).write_bytes(bytes(flipped))
        with pytest.raises(DataError, match=r"cats/00\.png: damaged"):
            load_data(source)


@pytest.mark.slow
def test_ten_thousand_entries(tmp_path):
    content = png(np.zeros((4, 4), np.uint8))
    different = png(np.ones((4, 4), np.uint8))
    files = {f"{i:05}.png": content for i in range(10_000)}
    source = write_zip(tmp_path / "many.zip", {**files, "x.png": different})
    assert len(load_data(source, split="all")) == 10_001
