"""Situations of docs/data.md: labels, parts and ranges are read right, or a line says which file and what mends it."""

import io
import json
import re
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from test_folders import png, write_folder, write_tar, write_zip

import tiny
from multistage_diffusion.config import DataConfig
from multistage_diffusion.data import load_data
from multistage_diffusion.data.collection import Reading
from multistage_diffusion.data.latents import load_images
from multistage_diffusion.data.sources import convert
from multistage_diffusion.errors import ConfigError, DataError
from multistage_diffusion.training.run import train

GENERATOR = np.random.default_rng(0)
PICTURES = [png(GENERATOR.integers(0, 256, (8, 8), dtype=np.uint8)) for _ in range(12)]


def files(*names):
    """Pictures under these names, each different; names that end in / hold three."""
    wanted = [
        f"{name}{i}.png" if name.endswith("/") else name for name in names for i in range(3 if name[-1] == "/" else 1)
    ]
    return dict(zip(wanted, PICTURES, strict=False))


def pixels(picture):
    return np.asarray(Image.open(io.BytesIO(picture))).tobytes()


def named_labels(images):
    """The name of the class of each picture, by its pixels."""
    return {row.numpy().tobytes(): images.classes[images.labels[i]] for i, row in enumerate(images.images)}


LAYOUTS = {
    "one folder around all": (("set/cats/", "set/dogs/"), ("cats", "dogs"), None),
    "train alone": (("train/cats/", "train/dogs/"), ("cats", "dogs"), None),
    "train and val": (("train/cats/", "train/dogs/", "val/cats/"), ("cats", "dogs"), 3),
    "train and dev": (("train/a/", "train/b/", "dev/a/"), ("a", "b"), 3),
    "years": (("train2017/", "val2017/"), (), 3),
    "sets": (("training_set/a/", "training_set/b/", "test_set/a/"), ("a", "b"), 3),
    "a folder around parts": (("data/Train/a/", "data/Train/b/", "data/Test/b/"), ("a", "b"), 3),
    "parts inside classes": (("bottle/train/", "bottle/test/", "cable/train/"), ("bottle", "cable"), 3),
    "classes of the names of parts": (("train/", "car/", "boat/"), ("boat", "car", "train"), None),
    "short names of parts": (("tr/a/", "tr/b/", "te/a/"), ("a", "b"), 3),
    "languages": (("tr/", "te/", "en/"), ("en", "te", "tr"), None),
    "classes called after trains": (
        ("bullet_train/", "crash_test/", "car/", "boat/"),
        ("boat", "bullet_train", "car", "crash_test"),
        None,
    ),
    "numbers": (("10/", "2/", "1/"), ("1", "2", "10"), None),
    "no folders": (("a.png", "b.png", "c.png"), (), None),
    "one class": (("cats/",), (), None),
    "hidden": (("cats/", "dogs/", ".ipynb_checkpoints/"), ("cats", "dogs"), None),
}


@pytest.mark.parametrize("write", [write_folder, write_zip])
@pytest.mark.parametrize("name", LAYOUTS)
def test_parts_and_classes_of_folders(tmp_path, name, write):
    names, classes, held_out = LAYOUTS[name]
    source = write(tmp_path / "x", files(*names))
    images = load_data(source, split="all")
    assert images.classes == classes and (images.labels is None) == (not classes)
    assert images.notes["labels"] == "the names of folders" or images.notes["labels"].startswith("none: ")
    assert ("a tenth" in images.notes["split"]) == (held_out is None)
    if held_out is not None:
        assert len(load_data(source, split="test")) == held_out and len(load_data(source)) == len(images) - held_out


@pytest.mark.parametrize("write", [write_folder, write_zip])
@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ("cats/", "dogs/", "preview.png"),
            r"no label for preview\.png \(1 of 7 pictures; .* folders\); .*--labels none",
        ),
        (("train/a/", "train/b/", "test/x.png"), r"no label for test/x\.png"),
        (("train/", "test/", "extra/"), "test and train are parts of the set, and beside them lies extra"),
        (("train/", "test/", "preview.png"), "beside them lies preview.png"),
        (("train/a/", "train/b/", "query/"), "train looks like a part of the set, and beside it lies query"),
        (("seg_train/a/", "seg_test/a/", "seg_pred/"), "seg_test, seg_train|seg_test and seg_train"),
        (("trainA/", "trainB/", "testA/"), "testA, trainA, trainB are called after parts of the set"),
        (("images/", "masks/"), "images and masks look like pictures and what is marked in them"),
    ],
)
def test_what_belongs_nowhere_is_named(tmp_path, names, message, write):
    with pytest.raises(DataError, match=message):
        load_data(write(tmp_path / "x", files(*names)))


def test_a_class_that_is_only_held_out_is_said(tmp_path):
    images = load_data(write_folder(tmp_path / "x", files("train/a/", "train/b/", "val/c/")))
    assert images.notes["split"] == "held out: the folder val; classes of it alone: c"


def test_without_labels_when_asked(tmp_path):
    source = write_folder(tmp_path / "x", files("cats/", "dogs/", "preview.png"))
    images = load_data(source, split="all", labels="none")
    assert images.labels is None and images.classes == () and len(images) == 7
    assert load_data("digits", labels="none").labels is None


def test_a_class_behind_a_link_is_missed(tmp_path):
    source = write_folder(tmp_path / "x", files("cats/", "dogs/"))
    (tmp_path / "owls").mkdir()
    (tmp_path / "x" / "owls").symlink_to(tmp_path / "owls")
    with pytest.raises(DataError, match="owls is a link to a folder, which is not followed"):
        load_data(source)
    assert load_data(source, labels="none").skipped == ("1 link to a folder: not followed",)


def csv(*rows):
    return "\n".join(("file_name,label", *rows))


def edm(*pairs):
    return json.dumps({"labels": pairs})


TABLES = {
    "backslashes": ("dataset.json", edm(["cats\\0.png", 5], ["./cats/1.png", 1], ["cats/2.png", 1]), ["5", "1", "1"]),
    "inside the folder": ("cats/dataset.json", edm(["0.png", 0], ["1.png", 1], ["2.png", 0]), ["0", "1", "0"]),
    "metadata.csv": (
        "metadata.csv",
        csv("cats/0.png,big", "cats/1.png,small", "cats/2.png,big"),
        ["big", "small", "big"],
    ),
    "metadata.csv of a folder": ("cats/metadata.csv", csv("0.png,1", "1.png,0", "2.png,1"), ["1", "0", "1"]),
    "null": ("dataset.json", '{"labels": null}', "none: dataset.json has none"),
    "no column": ("metadata.csv", "file_name,text\ncats/0.png,a cat", "none: metadata.csv has none"),
    "attributes": ("list_attr_celeba.txt", "3\nBald", "none: .* list_attr_celeba.txt holds attributes, not one class"),
}


@pytest.mark.parametrize("write", [write_folder, write_zip])
@pytest.mark.parametrize("name", TABLES)
def test_tables_of_labels(tmp_path, name, write):
    table, text, expected = TABLES[name]
    images = load_data(write(tmp_path / "x", {**files("cats/"), table: text.encode()}), split="all")
    if isinstance(expected, list):
        labels = named_labels(images)
        assert [labels[pixels(picture)] for picture in PICTURES[:3]] == expected
    else:
        assert re.match(expected, images.notes["labels"]) and images.labels is None


@pytest.mark.parametrize(
    ("table", "text", "message"),
    [
        ("dataset.json", edm(["cats/0.png", 0]), r"no label for cats/1\.png, cats/2\.png \(2 of 3"),
        ("dataset.json", edm(["a.png", 0]), "names none of the pictures: it has a.png, and there is cats/0"),
        ("metadata.csv", csv("cats/0.png,1", "cats/1.png,", "cats/2.png,1"), r"no label for cats/1\.png"),
        ("metadata.csv", "name,label\n", "no column file_name"),
    ],
)
def test_tables_that_leave_pictures_out(tmp_path, table, text, message):
    source = write_folder(tmp_path / "x", {**files("cats/"), table: text.encode()})
    with pytest.raises(DataError, match=message):
        load_data(source)


TARS = {
    "keys with dots": ({"v1.2_a.png": 0, "v1.2_a.cls": b"3", "v1.2_b.png": 1, "v1.2_b.cls": b"4"}, ["3", "4"]),
    "several pictures of a key": ({"k.input.png": 0, "k.target.png": 1, "k.cls": b"7"}, ["7", "7"]),
    "json": ({"a.png": 0, "a.json": b'{"label": 1}', "b.png": 1, "b.json": b'{"label": "x"}'}, ["1", "x"]),
    "one missing": ({"a.png": 0, "a.cls": b"3", "b.png": 1}, r"no label for b\.png"),
    "json without": ({"a.png": 0, "a.json": b'{"caption": "a cat"}'}, "none: no picture has one (the .json files)"),
    "none": ({"cats/a.png": 0, "dogs/b.png": 1}, "none: no .cls lies beside the pictures"),
    "no number": ({"a.png": 0, "a.cls": b"cat"}, r"a\.cls must hold a whole number"),
}


@pytest.mark.parametrize("name", TARS)
def test_labels_of_tar_archives(tmp_path, name):
    entries, expected = TARS[name]
    content = {path: PICTURES[value] if isinstance(value, int) else value for path, value in entries.items()}
    source = write_tar(tmp_path / "x.tar", content)
    if isinstance(expected, list):
        labels = named_labels(load_data(source, split="all"))
        assert [labels[pixels(PICTURES[i])] for i in range(2)] == expected
    elif expected.startswith("none"):
        assert load_data(source, split="all").notes["labels"] == expected
    else:
        with pytest.raises(DataError, match=expected):
            load_data(source)


def test_parts_among_tar_archives(tmp_path):
    for number, name in enumerate(("a-train-0", "a-train-1", "a-val-0")):
        write_tar(tmp_path / f"{name}.tar", {"k.png": PICTURES[number], "k.cls": b"3"})
    source = f"webdataset:{tmp_path}/*.tar"
    assert len(load_data(source)) == 2 and len(load_data(source, split="test")) == 1
    write_tar(tmp_path / "b.tar", {"k.png": PICTURES[3]})
    with pytest.raises(DataError, match=r"some are called train and some test or val, and b\.tar neither"):
        load_data(source)
    (tmp_path / "a-val-0.tar").unlink()
    with pytest.raises(DataError, match=r"no label for b\.tar/k\.png \(1 of 3"):
        load_data(source)


def test_a_compressed_tar_archive_is_named(tmp_path):
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz"):
        pass
    with pytest.raises(DataError, match=r"x\.tar\.gz: compressed; unpack it with gunzip"):
        load_data(f"webdataset:{tmp_path}/x.tar.gz")


STACK = GENERATOR.integers(0, 256, (6, 8, 8), dtype=np.uint8)
ARRAYS = {
    "numbers": ({"labels": [2, 0, 2, 0, 5, 5]}, ["2", "0", "2", "0", "5", "5"]),
    "a column": ({"labels": [[2], [0], [2], [0], [5], [5]]}, ["2", "0", "2", "0", "5", "5"]),
    "one-hot": ({"y": np.eye(3)[[0, 1, 2, 2, 1, 0]]}, ["0", "1", "2", "2", "1", "0"]),
    "whole floats": ({"labels": np.array([1.0, 0, 1, 0, 1, 0])}, ["1", "0", "1", "0", "1", "0"]),
    "names": ({"labels": np.array(["a", "b", "a", "b", "c", "c"])}, ["a", "b", "a", "b", "c", "c"]),
    "bytes": ({"labels": np.array([b"a", b"b", b"a", b"b", b"c", b"c"])}, ["a", "b", "a", "b", "c", "c"]),
    "fractions": ({"labels": np.array([1.5, 0, 1, 0, 1, 0])}, "fractions"),
    "negative": ({"labels": [-1, 0, 1, 0, 1, 0]}, "the least is -1"),
    "too few": ({"labels": [1, 0]}, r"6 whole numbers .* got \(2,\)"),
    "two columns": ({"labels": [[1, 1]] * 6}, r"got \(6, 2\)"),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_labels_of_arrays(tmp_path, name):
    arrays, expected = ARRAYS[name]
    np.savez(tmp_path / "x.npz", images=STACK, **arrays) if "y" not in arrays else np.savez(
        tmp_path / "x.npz", x=STACK, **arrays
    )
    if isinstance(expected, str):
        with pytest.raises(DataError, match=expected):
            load_data(f"npz:{tmp_path}/x.npz")
    else:
        labels = named_labels(load_data(f"npz:{tmp_path}/x.npz", split="all"))
        assert [labels[row.tobytes()] for row in STACK] == expected


RANGES = {
    "one value below 0": (np.where(np.arange(384).reshape(6, 8, 8) == 5, -1e-6, STACK / 255), r"span \[-1, 1\].*mean"),
    "floats in [0, 1]": (STACK / 255, r"span \[-1, 1\], these 0\.\d+\.\.0\.99\d+ \(mean 0\.\d+\): .*data\.scale"),
    "floats 0..255": (STACK.astype(np.float32), "save them as uint8"),
    "16 bits": (STACK.astype(np.uint16), "no agreed range"),
    "four channels": (np.zeros((6, 8, 8, 4), np.uint8), r"leave the last one out, x\[\.\.\., :3\]"),
    "one picture in colours": (np.zeros((32, 32, 3), np.uint8), "may be one picture in colours or 32 in grey"),
    "the number last": (np.zeros((8, 8, 50), np.uint8), "may be 8 pictures or, with the number last, 50"),
    "one picture, channels first": (np.zeros((3, 32, 32), np.uint8), "may be one picture in colours or 3 in grey"),
}


@pytest.mark.parametrize("name", RANGES)
def test_ranges_and_shapes_that_could_mean_two_things(tmp_path, name):
    array, message = RANGES[name]
    np.savez(tmp_path / "x.npz", images=array)
    with pytest.raises(DataError, match=message):
        load_data(f"npz:{tmp_path}/x.npz")


def test_labels_of_one_part_alone(tmp_path):
    np.savez(tmp_path / "x.npz", x_train=STACK, y_train=np.arange(6), x_test=STACK)
    with pytest.raises(DataError, match="one of its parts has labels and the other none"):
        load_data(f"npz:{tmp_path}/x.npz")


def test_arrays_that_are_not_read_are_said(tmp_path):
    np.savez(tmp_path / "x.npz", train_images=STACK, val_images=STACK, test_images=STACK)
    assert load_data(f"npz:{tmp_path}/x.npz").skipped == ("array val_images: not read",)


def sixteen(values):
    buffer = io.BytesIO()
    Image.fromarray(values.astype(np.uint16)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("values", "message", "error"),
    [
        ([GENERATOR.integers(0, 41, (8, 8)) for _ in range(3)], "every pixel is 0 of 0..255; masks", DataError),
        (
            [GENERATOR.integers(0, 4096, (8, 8)) for _ in range(3)],
            r"pixels use 0\.\.1[56] of 0\.\.255; .*12 bits",
            UserWarning,
        ),
        (
            [np.where(np.arange(4096).reshape(64, 64) == 7 + i, 65535, 3000 + i) for i in range(3)],
            r"all but 0\.2% of the pixels use 12\.\.12 of 0\.\.255, the rest 12\.\.255",
            UserWarning,
        ),
    ],
)
def test_sets_without_contrast(tmp_path, values, message, error):
    source = write_folder(tmp_path / "x", {f"{i}.png": sixteen(value) for i, value in enumerate(values)})
    config = DataConfig(source=source)
    if error is UserWarning:
        with pytest.warns(UserWarning, match=message):
            load_images(config)
    else:
        with pytest.raises(error, match=message):
            load_images(config)


def test_what_is_passed_over_is_said_before_training(tmp_path):
    source = write_folder(tmp_path / "x", {**files("a.jfif", "b.jpe", "c.PNG"), "d.txt": b"", "__MACOSX/e.png": b"no"})
    with pytest.warns(UserWarning, match=r"left out: 1 file \.txt: .*1 file \.png: hidden, or in a hidden folder"):
        images = load_images(DataConfig(source=source))
    assert len(images) + len(load_data(source, split="test")) == 3


def test_no_labels_says_why(tmp_path):

    source = write_folder(tmp_path / "x", files("a.png", "b.png", "c.png"))
    config = tiny.run_config(tiny.replace(tiny.SMALLEST, classes=2), steps=1)
    config = tiny.replace(config, data=DataConfig(source=source))
    with pytest.raises(ConfigError, match=r"has no labels \(none: the pictures lie in no folders of classes\)"):
        train(config, tmp_path / "run")


def test_zip_of_a_folder_and_its_shards_keep_their_notes(tmp_path):
    source = write_zip(tmp_path / "x.zip", files("train/a/", "train/b/", "test/a/"))
    convert(source, tmp_path / "shards", None, Reading())
    shards, images = (load_data(name, split="all") for name in (f"shards:{tmp_path}/shards", source))
    assert shards.notes == images.notes and torch.equal(shards.labels, images.labels)
