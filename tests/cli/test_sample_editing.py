"""msd sample from pictures, with a mask, and between seeds."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import tiny
from multistage_diffusion.cli import dispatch
from multistage_diffusion.cli.editing import EditingOptions
from multistage_diffusion.data.autoencoder import Autoencoder
from multistage_diffusion.data.latents import LatentCodec
from multistage_diffusion.data.user import as_data
from multistage_diffusion.training.run import train


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(tiny.run_config(steps=2), folder, data=tiny.images())
    return folder


@pytest.fixture
def files(tmp_path):
    """A folder of three pictures, and a mask whose right half is white."""
    (tmp_path / "pictures").mkdir()
    for index, picture in enumerate(tiny.images(3).images):
        Image.fromarray(picture[0].numpy()).save(tmp_path / "pictures" / f"{index}.png")
    mask = np.zeros((8, 8), dtype=np.uint8)
    mask[:, 4:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    Image.fromarray(np.zeros((6, 8), dtype=np.uint8)).save(tmp_path / "small.png")
    Image.fromarray(np.zeros((8, 8, 3), dtype=np.uint8)).save(tmp_path / "colour.png")
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    return tmp_path


@pytest.fixture
def call(run, files, capsys, monkeypatch):
    monkeypatch.chdir(files)

    def call(out, *words):
        code = dispatch(["sample", str(run), "--steps", "2", "--out", out, "--json", *map(str, words)])
        captured = capsys.readouterr()
        return code, json.loads(captured.out) if code == 0 else captured.err

    return call


def pixels(path):
    with Image.open(path) as picture:
        return np.asarray(picture).copy()


def test_from_pictures(call, run, files):
    _, one = call("one", "--from", "pictures/1.png", "--from-sigma", 0.5)
    assert one["images"] == 1 and one["from"] == "pictures/1.png" and one["from_sigma"] == 0.5
    assert one["nfe"] == 3 and one["stage_calls"] == [3, 0, 0]  # the edges are 0.6 and 3
    _, all_three = call("all", "--from", "pictures", "--from-sigma", 0.5, "--batch-size", 2)
    assert [path.rpartition("/")[2] for path in all_three["files"]] == [f"seed-{seed:08d}.png" for seed in range(3)]
    _, again = call("again", "--from", "pictures", "--from-sigma", 0.5, "--num", 5)
    for first, second in zip(all_three["files"], again["files"], strict=False):
        assert np.abs(pixels(first).astype(int) - pixels(second)).max() <= 1
    _, near = call("near", "--from", "pictures", "--from-sigma", 0.01)
    for path, name in zip(near["files"], ("0.png", "1.png", "2.png"), strict=True):
        assert np.abs(pixels(path).astype(int) - pixels(files / "pictures" / name)).max() <= 8


def test_a_mask_keeps_what_is_black_and_changes_what_is_white(call, files):
    for words in ((), ("--resample", 2), ("--from-sigma", 2.0, "--solver", "dpmpp-2m")):
        _, document = call("masked", "--from", "pictures", "--mask", "mask.png", *words)
        assert document["mask"] == "mask.png" and document["resample"] == (2 if "--resample" in words else 1)
        for path, name in zip(document["files"], ("0.png", "1.png", "2.png"), strict=True):
            made, source = pixels(path), pixels(files / "pictures" / name)
            assert (made[:, :4] == source[:, :4]).all() and (made[:, 4:] != source[:, 4:]).any()


def test_between_two_seeds(call):
    _, path = call("path", "--interpolate", 3, 7, "--num", 4)
    assert [name.rpartition("/")[2] for name in path["files"]] == [f"frame-{index:08d}.png" for index in range(4)]
    assert path["interpolate"] == [3, 7]
    for seed, index in ((3, 0), (7, -1)):
        _, alone = call("alone", "--seed", seed, "--num", 1)
        assert np.abs(pixels(alone["files"][0]).astype(int) - pixels(path["files"][index])).max() <= 1
    assert not (pixels(path["files"][0]) == pixels(path["files"][1])).all()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--from", "pictures"), "--from needs --from-sigma, a noise level to begin at, or --mask, what to repaint"),
        (("--from-sigma", 1), "--from-sigma needs --from, the images to begin from"),
        (("--mask", "mask.png"), "--mask needs --from, the images to begin from"),
        (("--from", "pictures", "--from-sigma", 1, "--resample", 3), "--resample 3 needs --mask, what to repaint"),
        (("--from", "pictures", "--from-sigma", 900), "from-sigma must be above 0.00317798 and at most 152.167"),
        (("--from", "small.png", "--from-sigma", 1), "small.png: images of 1x6x8 do not fit a run that draws 1x8x8"),
        (("--from", "colour.png", "--from-sigma", 1), "images of 3x8x8 do not fit a run that draws 1x8x8"),
        (
            ("--from", "pictures", "--mask", "small.png"),
            "--mask small.png is of 6x8, and the images of --from are of 8x8",
        ),
        (("--from", "pictures", "--mask", "pictures"), "mask must be one picture, got 3"),
        (("--from", "broken.png", "--from-sigma", 1), "broken.png: not a picture of a known kind"),
        (("--from", "none.png", "--from-sigma", 1), "none.png: No such file or directory"),
        (("--from", "pictures", "--mask", "mask.png", "--resample", 0), "resample must be at least 1, got 0"),
        (("--interpolate", 3, 3), "interpolate must be two different seeds, got 3 twice"),
        (("--interpolate", 3, 4, "--num", 1), "num must be at least 2"),
        (("--num", 0), "num must be at least 1, got 0"),
    ],
)
def test_mistakes_are_one_line(call, files, words, message):
    code, error = call("out", *words)
    assert code in (2, 3) and message in error and error.startswith("error: ") and error.count("\n") == 1
    assert not (files / "out").exists()


def test_a_run_on_fields_begins_from_an_array(tmp_path, capsys):
    rows = torch.randn(12, 2, 8, 8, generator=torch.Generator().manual_seed(0)) * 5 + 290
    train(tiny.run_config(steps=1), tmp_path / "run", data=as_data(rows, scale="standardise"))
    np.save(tmp_path / "start.npy", rows[:2].numpy())
    half = np.zeros((8, 8), dtype=np.uint8)
    half[:4] = 255
    Image.fromarray(half).save(tmp_path / "mask.png")
    words = [
        "--from",
        tmp_path / "start.npy",
        "--mask",
        tmp_path / "mask.png",
        "--steps",
        "2",
        "--out",
        tmp_path / "out",
    ]
    assert dispatch(["sample", str(tmp_path / "run"), *map(str, words)]) == 0
    made = torch.from_numpy(np.load(tmp_path / "out" / "samples.npz")["images"])
    assert torch.equal(made[:, :, 4:], rows[:2, :, 4:]) and not torch.equal(made[:, :, :4], rows[:2, :, :4])
    capsys.readouterr()
    words[1] = tmp_path / "mask.png"
    assert dispatch(["sample", str(tmp_path / "run"), *map(str, words)]) == 2
    assert "the run draws fields; give an npy or npz file" in capsys.readouterr().err


def test_a_latent_model_takes_pictures(files, monkeypatch):
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    monkeypatch.setenv("MSD_CACHE", str(files / "cache"))
    torch.manual_seed(0)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    vae = AutoencoderKL(block_out_channels=(4, 4), norm_num_groups=2, layers_per_block=1, latent_channels=2, **blocks)
    codec = LatentCodec(Autoencoder(vae, "AutoencoderKL", "tiny"), 0.5, 1)
    options = EditingOptions(start=str(files / "pictures"), mask=str(files / "mask.png"))
    given = options.read((2, 4, 4), codec)
    start = given.start(5)
    assert start.images.shape == (5, 2, 4, 4) and torch.equal(start.images[3], start.images[0])
    images = tiny.images(3).floats()
    torch.testing.assert_close(start.images[:3], 0.5 * codec.autoencoder.encode(images))
    assert start.mask.tolist() == [[False, False, True, True]] * 4
    decoded = given.with_kept(codec.decode(start.images))
    assert torch.equal(decoded[3, :, :, :4], images[0, :, :, :4])
    assert not torch.equal(decoded[3, :, :, 4:], images[0, :, :, 4:])
