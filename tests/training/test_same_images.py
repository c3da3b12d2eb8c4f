"""The same training from wherever the images come: a folder, an archive, arrays, shards in memory or streamed."""

import io
import tarfile
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import tiny
from multistage_diffusion.config import DataConfig
from multistage_diffusion.data import load_data, shards
from multistage_diffusion.data.collection import Reading
from multistage_diffusion.data.feed import make_feed
from multistage_diffusion.data.sources import convert
from multistage_diffusion.errors import ConfigError, DataError
from multistage_diffusion.runs.checkpoints import list_checkpoints
from multistage_diffusion.stages import Stages
from multistage_diffusion.training.batches import Batches
from multistage_diffusion.training.run import train
from runs import log, same_run, train_until


@pytest.fixture(autouse=True)
def small_shards(monkeypatch, tmp_path):
    monkeypatch.setattr(shards, "_SHARD_BYTES", 500)
    monkeypatch.setenv("MSD_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def sources(tmp_path):
    """Thirty grey pictures of two classes, in every form."""
    pixels = np.random.default_rng(0).integers(0, 256, (30, 8, 8), dtype=np.uint8)
    labels = np.arange(30) // 15
    (tmp_path / "folder").mkdir()
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive, tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i, (picture, label) in enumerate(zip(pixels, labels, strict=True)):
            buffer = io.BytesIO()
            Image.fromarray(picture).save(buffer, "PNG")
            (tmp_path / "folder" / str(label)).mkdir(exist_ok=True)
            (tmp_path / "folder" / str(label) / f"{i:02}.png").write_bytes(buffer.getvalue())
            archive.writestr(f"{label}/{i:02}.png", buffer.getvalue())
            for name, content in ((f"{i:02}.png", buffer.getvalue()), (f"{i:02}.cls", str(label).encode())):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    np.savez(tmp_path / "a.npz", images=pixels, labels=labels)
    convert(f"folder:{tmp_path}/folder", tmp_path / "shards", None, Reading())
    return {
        "folder": f"folder:{tmp_path}/folder", "zip": f"zip:{tmp_path}/a.zip", "npz": f"npz:{tmp_path}/a.npz",
        "webdataset": f"webdataset:{tmp_path}/a.tar", "shards": f"shards:{tmp_path}/shards",
    }  # fmt: skip


def config_of(source, **data):
    model = replace(tiny.SMALLEST, classes=2)
    config = tiny.run_config(model, log_every=1)
    return replace(config, data=DataConfig(source=source, flip=True, **data))


@pytest.mark.slow
def test_losses_are_the_same_to_the_last_digit(sources, tmp_path):
    for name, source in sources.items():
        train(config_of(source), tmp_path / f"run-{name}")
    for workers in (0, 1, 2):
        train(config_of(sources["shards"], memory=0.0, workers=workers), tmp_path / f"run-{workers}")
    first, *others = [tmp_path / f"run-{name}" for name in (*sources, 0, 1, 2)]
    assert len(log(first)) == 8
    for other in others:
        same_run(other, first)


def test_losses_from_a_saved_dataset_are_the_same(sources, tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["0", "1"])})
    with np.load(tmp_path / "a.npz") as arrays:
        pictures = [Image.fromarray(picture) for picture in arrays["images"]]
        rows = {"image": pictures, "label": arrays["labels"].tolist()}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "saved"))
    assert load_data(f"hf:{tmp_path}/saved", split="all").digest == load_data(sources["folder"], split="all").digest
    train(config_of(f"hf:{tmp_path}/saved"), tmp_path / "hf")
    train(config_of(sources["zip"]), tmp_path / "zip")
    same_run(tmp_path / "hf", tmp_path / "zip")


def test_a_run_goes_on_from_the_same_images_elsewhere(sources, tmp_path):
    train(config_of(sources["folder"]), tmp_path / "whole")
    train_until(5, tmp_path / "run", config_of(sources["folder"]), load_data(sources["folder"]))
    train(config_of(sources["shards"], memory=0.0, workers=1), tmp_path / "run")
    same_run(tmp_path / "run", tmp_path / "whole")
    train_until(5, tmp_path / "other", config_of(sources["folder"]), load_data(sources["folder"]))
    pixels = np.random.default_rng(1).integers(0, 256, (30, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "other.npz", images=pixels, labels=np.arange(30) // 15)
    with pytest.raises(ConfigError, match="not those that"):
        train(config_of(f"npz:{tmp_path}/other.npz"), tmp_path / "other")


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_parts_of_a_batch_are_streamed_as_they_are_held(parts, sources):
    data, config = load_data(sources["shards"]), tiny.run_config()
    makers = [
        Batches(
            data,
            config.process,
            Stages(tiny.EDGES),
            config.training,
            classes=2,
            feed=make_feed(data, "cpu", DataConfig(**words)),
        )
        for words in ({}, {"memory": 0.0}, {"memory": 0.0, "workers": 0})
    ]
    for step in (0, 1, 2, 3, 9, 8, 30, 31):  # in order, and not
        for part in range(parts):
            first, *others = [make(step, part, parts) for make in makers]
            for other in others:
                assert torch.equal(other.images, first.images) and torch.equal(other.labels, first.labels)
                assert torch.equal(other.sigma, first.sigma) and torch.equal(other.noise, first.noise)


def test_skipped_pictures_are_counted_in_the_checkpoint_and_skipped_again(sources, tmp_path, monkeypatch):
    monkeypatch.setenv("MSD_CACHE", str(tmp_path / "empty"))  # nobody has looked at the folder
    bad = tmp_path / "folder" / "0" / "bad.png"
    bad.write_bytes(b"no")
    with pytest.raises(DataError, match=r"0/bad\.png: not a picture"):
        train(config_of(sources["folder"]), tmp_path / "run")
    with pytest.raises(DataError, match="1 of 31 pictures cannot be read"):
        train(config_of(sources["folder"], on_bad_file="skip"), tmp_path / "run")
    config = config_of(sources["folder"], on_bad_file="skip", max_bad=0.05)
    with pytest.warns(UserWarning, match=r"left out: 0/bad.png: not a picture"):
        train(replace(config, training=replace(config.training, steps=4)), tmp_path / "run")
        train(config, tmp_path / "run")
    train(config_of(sources["zip"]), tmp_path / "whole")
    same_run(tmp_path / "run", tmp_path / "whole")
    state = list_checkpoints(tmp_path / "run" / "checkpoints")[-1].state()
    assert state["skipped"]["count"] == 1 and state["skipped"]["first"][0].startswith("0/bad.png: ")
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(bad)
    with pytest.raises(ConfigError, match="not those that"):
        train(replace(config, training=replace(config.training, steps=9)), tmp_path / "run")
