"""Fields: numbers of any range and number of channels; their statistics, and the way back to their unit."""

import json

import numpy as np
import pytest
import torch

import tiny
from multistage_diffusion.cli import dispatch
from multistage_diffusion.data import load_data
from multistage_diffusion.data.collection import Reading
from multistage_diffusion.data.fields import Fields
from multistage_diffusion.data.latents import load_codec
from multistage_diffusion.data.sources import convert
from multistage_diffusion.errors import DataError

OFFSET = np.array([0.0, 1e5, -3.0, 7e-6, 2.0]).reshape(1, 5, 1, 1)
SPREAD = np.array([1.0, 0.5, 20.0, 1e-6, 0.0]).reshape(1, 5, 1, 1)
GENERATOR = np.random.default_rng(0)
FIELDS = (OFFSET + SPREAD * GENERATOR.standard_normal((40, 5, 8, 8))).astype(np.float32)


@pytest.fixture
def source(tmp_path):
    np.savez(tmp_path / "a.npz", images=FIELDS, labels=np.arange(40) % 2)
    return f"npz:{tmp_path}/a.npz"


@pytest.mark.parametrize("split", ["train", "test", "all"])
@pytest.mark.parametrize("scale", ["none", "range", "standardise"])
def test_fields_are_scaled_by_the_training_set_and_come_back(scale, split, source):
    data, train = load_data(source, scale=scale, split=split), load_data(source, scale="none")
    assert isinstance(data, Fields) and data.shape == (5, 8, 8) and data.classes == ("0", "1")
    assert data.images.dtype == data.floats().dtype == torch.float32
    seen = train.images.double()
    low, high = seen.amin((0, 2, 3)), seen.amax((0, 2, 3))
    deviation, mean = torch.std_mean(seen, (0, 2, 3), correction=0)
    shift, factor = {"none": (0 * mean, mean * 0 + 1), "range": ((low + high) / 2, (high - low) / 2)}.get(
        scale, (mean, deviation)
    )
    factor[4] = 1.0  # a constant channel
    expected = (data.images.double() - shift[:, None, None]) / factor[:, None, None]
    torch.testing.assert_close(data.floats().double(), expected, rtol=1e-5, atol=3e-2 if scale != "none" else 0)
    channels = [0, 2, 3, 4]  # in channel 1 float32 itself has two decimals
    torch.testing.assert_close(data.floats().double()[:, channels], expected[:, channels], rtol=1e-5, atol=1e-5)
    back = data.to_images(data.floats())
    assert torch.equal(back, data.images) or (back - data.images).abs().max() <= 0.01
    preview = data.codec.preview(train.codec.to_model(train.floats()) if scale == "none" else data.floats())
    assert preview[:, :4].min() >= -1.8 and preview[:, :4].max() <= 1.8


def test_what_a_scale_makes_of_the_training_set(source):
    ranged, standard = (load_data(source, scale=scale).floats()[:, :4] for scale in ("range", "standardise"))
    assert torch.allclose(ranged.amin((0, 2, 3)), torch.tensor(-1.0)) and ranged.max() <= 1.0001
    deviation, mean = torch.std_mean(standard, (0, 2, 3), correction=0)
    assert torch.allclose(deviation, torch.tensor(1.0), atol=1e-3) and mean.abs().max() < 1e-2


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4", np.int16, np.uint8])
def test_every_kind_of_number_is_read(dtype, tmp_path):
    array = np.round(20 * GENERATOR.standard_normal((30, 2, 6, 5)) + 100).astype(dtype)
    np.save(tmp_path / "a.npy", array)
    np.savez(tmp_path / "a.npz", x=array)
    data = load_data(f"npy:{tmp_path}/a.npy", scale="none", split="all")
    assert sorted(map(tuple, data.images.flatten(1).tolist())) == sorted(map(tuple, array.reshape(30, -1).tolist()))
    assert data.digest == load_data(f"npz:{tmp_path}/a.npz", scale="none", split="all").digest
    assert load_data(f"npy:{tmp_path}/a.npy", scale="range").shape == (2, 6, 5)


def test_fields_without_channels_and_npy_pictures(tmp_path):
    np.save(tmp_path / "a.npy", FIELDS[:, 0])
    assert load_data(f"npy:{tmp_path}/a.npy", scale="standardise").shape == (1, 8, 8)
    pixels = GENERATOR.integers(0, 256, (20, 6, 5, 3), dtype=np.uint8)
    np.save(tmp_path / "b.npy", pixels)
    np.savez(tmp_path / "b.npz", images=pixels)
    assert load_data(f"npy:{tmp_path}/b.npy").digest == load_data(f"npz:{tmp_path}/b.npz").digest


def change(place, value):
    fields = FIELDS.copy()
    fields[place] = value
    return fields


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (change((39, 4, 7, 7), np.nan), "not finite"),
        (change((0, 0, 0, 0), np.inf), "not finite"),
        (np.full((4, 1, 2, 2), 1e39), "not finite as float32"),
        (np.full((4, 1, 2, 2), 2**24 + 1), "whole numbers beyond 16,777,216"),
        (np.full((4, 1, 2, 2), 3.5), "every channel is constant"),
        (np.zeros((40, 16, 16, 3)), r"fields are \(N, C, H, W\), and \(40, 16, 16, 3\) looks like"),
        (np.zeros((32, 32, 3)), r"may be one picture in colours or 32 in grey: give"),
        (np.zeros((3, 32, 32)), "may be one picture in colours or 3 in grey"),
        (np.zeros((4, 4)), "3 or 4 dimensions"),
        (np.zeros((4, 1, 2, 2), bool), "are not read"),
        (np.zeros((4, 1, 2, 2), complex), "are not read"),
    ],
)
def test_fields_are_refused(array, message, tmp_path):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(DataError, match=message.replace(": give", "; give")) as caught:
        load_data(f"npy:{tmp_path}/a.npy", scale="range")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shape", [(32, 32, 1), (32, 32, 3), (32, 32, 4), (3, 32, 32), (8, 4, 3)])
def test_pictures_of_an_ambiguous_shape_are_refused(shape, tmp_path):
    np.save(tmp_path / "a.npy", np.zeros(shape, np.uint8))
    with pytest.raises(DataError, match="may be one picture"):
        load_data(f"npy:{tmp_path}/a.npy")


def test_pictures_stay_as_strict_as_they_were(source, tmp_path):
    with pytest.raises(DataError, match=r"C = 1 or 3.*data\.scale reads fields"):
        load_data(source)
    almost = np.abs(GENERATOR.random((20, 8, 8)))
    almost[0, 0, 0] = -1e-6  # one value below 0 does not make them pictures in [-1, 1]
    np.save(tmp_path / "a.npy", almost)
    with pytest.raises(DataError, match=r"must span \[-1, 1\], these -1e-06\.\..*mean 0\.\d+.*data\.scale"):
        load_data(f"npy:{tmp_path}/a.npy")
    for name in ("digits", "mnist", f"folder:{tmp_path}"):
        with pytest.raises(DataError, match=r"holds pictures; data\.scale range is for npz, npy, shards"):
            load_data(name, scale="range")
    with pytest.raises(DataError, match="images of 8 x 8, which are not resized"):
        load_data(source, scale="none", resolution=16)


@pytest.mark.parametrize("split", ["train", "test", "all"])
def test_fields_on_disk_are_the_same_set_in_any_scale(split, source, tmp_path):
    convert(source, tmp_path / "shards", None, Reading(scale="none"))
    for scale in ("none", "range", "standardise"):
        held, stored = (load_data(name, scale=scale, split=split) for name in (source, f"shards:{tmp_path}/shards"))
        assert held.digest == stored.digest and held.codec == stored.codec and stored.device is None
        assert torch.equal(held.floats(), stored.floats()) and torch.equal(held.labels, stored.labels)
    with pytest.raises(DataError, match=r"holds numbers of any range; choose data\.scale"):
        load_data(f"shards:{tmp_path}/shards")
    convert("digits", tmp_path / "digits", None, Reading())
    with pytest.raises(DataError, match=r"holds pictures; leave data\.scale out"):
        load_data(f"shards:{tmp_path}/digits", scale="none")


@pytest.mark.parametrize("change", [None, {}, {"mean": [0.0] * 4}, {"std": ["a"] * 5}, {"minimum": [float("nan")] * 5}])
def test_statistics_that_make_no_sense_are_refused(change, source, tmp_path):
    from multistage_diffusion.files import MANIFEST, whole_directory

    convert(source, tmp_path / "shards", None, Reading(scale="none"))
    with whole_directory(tmp_path / "again") as folder:
        for path in (tmp_path / "shards").iterdir():
            if path.name != MANIFEST:
                (folder / path.name).write_bytes(path.read_bytes())
        about = json.loads((folder / "images.json").read_text())
        about["scale"] = change and {**about["scale"], **change}
        (folder / "images.json").write_text(json.dumps(about))
    with pytest.raises(DataError, match="statistics"):
        load_data(f"shards:{tmp_path}/again", scale="none")


def words_of(source, *more):
    return ["train", "digits", "--data.source", source, "--model.width", "8", "--model.decoder-widths", "8",
            "--model.multipliers", "1", "--model.attention", "--model.blocks", "1", "--stages.edges",
            "--training.batch-size", "8", "--training.warmup-images", "0", "--training.log-every", "2",
            "--threads", "1", *more]  # fmt: skip


def test_a_run_from_fields_to_fields(source, tmp_path, capsys):
    out = str(tmp_path / "run")
    more = ["--data.scale", "standardise", "--out", out, "--model.architecture", "unified"]
    assert dispatch(words_of(source, *more, "--training.steps", "4")) == 0
    data = load_data(source, scale="standardise")
    assert load_codec(out) == load_codec(f"{out}/model") == data.codec
    capsys.readouterr()
    assert dispatch(["sample", out, "--num", "6", "--out", str(tmp_path / "samples"), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["images"] == 6 and document["files"] == [str(tmp_path / "samples" / "samples.npz")]
    with np.load(tmp_path / "samples" / "samples.npz") as arrays:
        images = arrays["images"]
        assert images.shape == (6, 5, 8, 8) and images.dtype == np.float32 and arrays["seeds"].tolist() == [*range(6)]
    assert abs(images[:, 1].mean() - 1e5) < 50  # in the unit of the source
    assert abs(images[:, 3].mean() - 7e-6) < 1e-4
    assert load_data(f"npz:{tmp_path}/samples/samples.npz", scale="none", split="all").shape == (5, 8, 8)
    assert dispatch(["sample", out, "--out", str(tmp_path / "no"), "--format", "png"]) == 2
    assert "was trained on fields: use npz" in capsys.readouterr().err
    assert dispatch(words_of(source, *more, "--training.steps", "6")) == 0
    assert dispatch(words_of(source, "--data.scale", "range", *more[2:], "--training.steps", "8")) == 2
    assert "another run: data.scale is standardise there and range here" in capsys.readouterr().err


def test_what_the_command_says_of_fields(source, tmp_path, capsys):
    words = ["data", source, "--scale", "standardise", "--grid", str(tmp_path / "grid.png")]
    assert dispatch([*words, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["dtype"] == "float32" and document["scale"] == "standardise" and len(document["channels"]) == 5
    channel = document["channels"][2]
    assert channel["shift"] == channel["mean"] and channel["factor"] == channel["std"]
    assert channel["minimum"] < channel["mean"] < channel["maximum"]
    assert dispatch(words) == 0
    shown = capsys.readouterr().out
    assert "scale standardise: the network sees (x - shift) / factor" in shown and "channel 4: 2..2" in shown
    assert dispatch([*words[:2], "--scale", "none", "--convert", str(tmp_path / "shards"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["source"] == f"shards:{tmp_path}/shards"


def test_samples_of_a_run_on_pictures_as_one_file(tmp_path, capsys):
    from multistage_diffusion.training.run import train

    train(tiny.run_config(), tmp_path / "run", data=tiny.images())
    words = ["sample", str(tmp_path / "run"), "--num", "3", "--out", str(tmp_path / "npz"), "--format", "npz"]
    assert dispatch(words) == 0
    with np.load(tmp_path / "npz" / "samples.npz") as arrays:
        assert arrays["images"].dtype == np.uint8 and arrays["images"].shape == (3, 1, 8, 8)
    assert load_data(f"npz:{tmp_path}/npz/samples.npz", split="all").shape == (1, 8, 8)
