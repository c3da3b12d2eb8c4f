"""Sources that need something installed: the datasets library, the emoji font."""

import sys

import numpy as np
import pytest
import torch
from hostile import encoded
from PIL import Image

from multistage_diffusion.data import emoji, load_data
from multistage_diffusion.errors import DataError


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'multistage-diffusion\[data\]'"):
        load_data("hf:somebody/something")


def test_a_saved_dataset_equals_a_folder(tmp_path):
    datasets = pytest.importorskip("datasets")
    generator = np.random.default_rng(0)
    pictures = [Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)) for _ in range(20)]
    features = datasets.Features({"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["a", "b"])})
    rows = {"picture": pictures, "kind": [i // 10 for i in range(20)]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "saved"))
    for i, picture in enumerate(pictures):
        folder = tmp_path / "folder" / "ab"[i // 10]
        folder.mkdir(parents=True, exist_ok=True)
        picture.save(folder / f"{i:02}.png")
    for split in ("train", "test", "all"):
        saved = load_data(f"hf:{tmp_path}/saved", split=split)
        assert saved.digest == load_data(f"folder:{tmp_path}/folder", split=split).digest
    (tmp_path / "parquet" / "data").mkdir(parents=True)
    saved = datasets.load_from_disk(str(tmp_path / "saved"))
    saved.to_parquet(str(tmp_path / "parquet" / "data" / "train-00000-of-00001.parquet"))
    assert load_data(f"hf:{tmp_path}/parquet").digest == load_data(f"folder:{tmp_path}/folder").digest
    with pytest.raises(DataError, match="cannot be loaded"):
        load_data(f"hf:{tmp_path}/folder/a/..")


def test_emoji_are_unique_and_on_white(tmp_path, monkeypatch):
    (tmp_path / "NotoColorEmoji.ttf").write_bytes(b"")
    clear = np.zeros((128, 136, 4), np.uint8)
    clear[40:80, 40:80] = (200, 0, 0, 255)
    from test_decode import saved

    glyphs = {f"u{i}": saved(Image.fromarray(np.roll(clear, i // 2, 0))) for i in range(40)}
    monkeypatch.setattr(emoji, "_bitmaps", lambda path: glyphs)
    images = load_data("noto-emoji", split="all", root=str(tmp_path))
    assert (len(images), images.shape) == (20, (3, 128, 136))
    assert images.skipped == ("20 glyphs: the same picture as another",)
    assert (images.images[:, :, 0, 0] == 255).all()
    assert load_data("noto-emoji", root=str(tmp_path), resolution=32).shape == (3, 32, 32)


def test_a_missing_or_damaged_font_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(emoji, "_DEBIAN", tmp_path / "nowhere")
    with pytest.raises(DataError, match="apt-get install fonts-noto-color-emoji"):
        load_data("noto-emoji")
    (tmp_path / "NotoColorEmoji.ttf").write_bytes(encoded("PNG"))
    with pytest.raises(DataError, match=r"NotoColorEmoji\.ttf cannot be read"):
        load_data("noto-emoji", root=str(tmp_path))


@pytest.mark.skipif(not (emoji._DEBIAN / "NotoColorEmoji.ttf").is_file(), reason="needs fonts-noto-color-emoji")
@pytest.mark.slow
def test_the_font_of_debian():
    images = load_data("noto-emoji", split="all", resolution=32)
    assert len(images) > 3000 and images.shape == (3, 32, 32)
    assert not torch.equal(images.images[:, 0], images.images[:, 1])


def test_labels_of_a_plain_column_and_parts_that_lack_them(tmp_path):
    datasets = pytest.importorskip("datasets")
    generator = np.random.default_rng(0)
    pictures = [Image.fromarray(generator.integers(0, 256, (8, 8), dtype=np.uint8)) for _ in range(12)]
    features = {"image": datasets.Image(), "label": datasets.Value("int32")}

    def saved(name, labels, **columns):
        kinds = datasets.Features({**features, **{key: datasets.Value("string") for key in columns}})
        rows = {"image": pictures[: len(labels)], "label": labels, **columns}
        datasets.Dataset.from_dict(rows, features=kinds).save_to_disk(str(tmp_path / name))
        return f"hf:{tmp_path / name}"

    images = load_data(saved("numbers", [7, 2] * 6, text=["a"] * 12), split="all")
    assert images.classes == ("2", "7") and images.labels.bincount().tolist() == [6, 6]
    assert images.notes["labels"] == "the column label"
    with pytest.raises(DataError, match=r"no label for 1 \(1 of 12 pictures; the labels are the column label\)"):
        load_data(saved("hidden", [7, -1] + [2] * 10))
    assert load_data(f"hf:{tmp_path}/hidden", labels="none").labels is None
