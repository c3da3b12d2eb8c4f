"""Latent diffusion: the first stage, the cache of latents, a run from images to images."""

import json
from dataclasses import replace

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from diffusers.models.autoencoders.vq_model import VQModel
from PIL import Image

import tiny
from multistage_diffusion.cli import dispatch
from multistage_diffusion.config import DataConfig
from multistage_diffusion.data import load_data
from multistage_diffusion.data.autoencoder import load_autoencoder
from multistage_diffusion.data.latents import encode, load_codec, load_examples
from multistage_diffusion.errors import CheckpointError, ConfigError, DataError
from multistage_diffusion.evaluation import evaluate
from multistage_diffusion.noise import LDM
from multistage_diffusion.runs import load_run
from multistage_diffusion.training.autoencoder import AutoencoderConfig, reconstruction_error, train_autoencoder
from multistage_diffusion.training.run import train

BLOCKS = {"block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 2,
          "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}  # fmt: skip
TINY = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8), "num_encoder_blocks": (1, 1),
        "num_decoder_blocks": (1, 1), "latent_channels": 2}  # fmt: skip
KINDS = [
    (AutoencoderKL, BLOCKS),
    (VQModel, {**BLOCKS, "num_vq_embeddings": 16}),
    (AutoencoderTiny, TINY),
]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MSD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def save(kind, options, folder, channels=1, seed=0):
    module = kind(in_channels=channels, out_channels=channels, **options)
    tiny.randomise(module, seed).save_pretrained(folder)
    return module.eval()


def saved(folder, seed=0):
    save(AutoencoderKL, BLOCKS, folder, seed=seed)
    return str(folder)


@torch.no_grad()
@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_every_kind_encodes_and_decodes_as_diffusers_does(kind, options, tmp_path):
    module = save(kind, options, tmp_path / "ae")
    autoencoder = load_autoencoder(str(tmp_path / "ae"))
    images = tiny.images(3).floats()
    encoded = module.encode(images)
    expected = encoded.latent_dist.mean if kind is AutoencoderKL else encoded.latents
    latents = autoencoder.encode(images)
    torch.testing.assert_close(latents, expected)
    torch.testing.assert_close(autoencoder.decode(latents, 1), module.decode(latents).sample)


def test_grey_images_pass_through_an_autoencoder_of_colours(tmp_path):
    save(AutoencoderKL, BLOCKS, tmp_path / "ae", channels=3)
    autoencoder = load_autoencoder(str(tmp_path / "ae"))
    latents = autoencoder.encode(tiny.images(3).floats())
    assert latents.shape == (3, 2, 4, 4)
    assert autoencoder.decode(latents, 1).shape == (3, 1, 8, 8)


def test_latents_are_encoded_once_and_keyed_by_content(tmp_path, cache):
    autoencoder = load_autoencoder(saved(tmp_path / "ae"))
    images, told = tiny.images(10, labels=True), []
    first = encode(images, autoencoder, batch_size=4, progress=lambda done, total: told.append((done, total)))
    assert told == [(4, 10), (8, 10), (10, 10)]
    torch.testing.assert_close(first.images[:], autoencoder.encode(images.floats()))
    assert float(first.floats().std(correction=0)) == pytest.approx(1, abs=1e-4)
    assert first.shape == (2, 4, 4) and len(first) == 10 and first.classes == images.classes
    again = encode(images, autoencoder, progress=lambda done, total: pytest.fail("encoded twice"))
    assert torch.equal(again.images[:], first.images[:]) and again.digest == first.digest
    other = load_autoencoder(saved(tmp_path / "other", seed=1))
    digests = {first.digest, encode(images, other).digest, encode(tiny.images(10, seed=1), autoencoder).digest,
               encode(images, autoencoder, scale=2.0).digest}  # fmt: skip
    assert len(digests) == 4
    values = next((cache / "latents").glob("*/shard-00000.bin"))
    values.write_bytes(values.read_bytes()[:-4])  # a damaged cache is made again
    assert len(encode(images, autoencoder)) == 10


def test_mirrored_images_have_latents_of_their_own(tmp_path):
    config = DataConfig(source="digits", autoencoder=saved(tmp_path / "ae"), flip=True, latent_scale=0.5)
    images, examples = load_data("digits"), load_examples(config)
    assert len(examples) == 2 * len(images)
    autoencoder = load_autoencoder(config.autoencoder)
    rows = torch.tensor([5, len(images) + 5])
    pixels = images.floats(rows[:1])
    expected = autoencoder.encode(torch.cat((pixels, pixels.flip(3)))) / 2
    torch.testing.assert_close(examples.floats(rows), expected)


def latent_run(folder):
    """A run on 4x4 latents of 2 channels."""
    data = DataConfig(source="digits", autoencoder=saved(folder / "ae"))
    config = replace(tiny.run_config(), data=data, process=LDM())
    return replace(config, training=replace(config.training, steps=2, save_every=1))


def test_a_run_from_images_to_images(tmp_path, capsys):
    config, out = latent_run(tmp_path), tmp_path / "run"
    train(config, out)
    loaded, codec = load_run(out), load_codec(out / "model")
    assert loaded.denoiser.shape == (2, 4, 4) and codec is not None
    record = json.loads((out / "latents.json").read_text())
    assert record["scale"] == codec.scale and record["channels"] == 1
    words = ["sample", str(out), "--num", "2", "--steps", "2", "--denoise-trace", "--out", str(tmp_path / "images")]
    assert dispatch([*words, "--json"]) == 0
    files = json.loads(capsys.readouterr().out)["files"]
    assert len(files) == 2
    for file in files:
        with Image.open(file) as picture:
            assert picture.size == (8, 8)
    assert evaluate(loaded.denoiser, load_data("digits", split="test"), codec=codec).loss > 0
    summary = train(replace(config, training=replace(config.training, steps=3)), out)
    assert summary.resumed == 2 and summary.step == 3


def test_stages_of_latents(tmp_path, capsys):
    words = ["cluster", "digits", "--process", "ldm", "--autoencoder", saved(tmp_path / "ae"), "--method", "timestep"]
    assert dispatch([*words, "--out", str(tmp_path / "stages.json"), "--json"]) == 0
    found = json.loads((tmp_path / "stages.json").read_text())
    assert found["data"]["shape"] == [2, 4, 4]
    assert dispatch([*words[:-1], "gradient"]) == 2
    assert "--method gradient needs pictures, not latents of --autoencoder" in capsys.readouterr().err


def test_latents_of_another_autoencoder_are_refused(tmp_path):
    config, out = latent_run(tmp_path), tmp_path / "run"
    train(config, out)
    saved(tmp_path / "ae", seed=1)
    with pytest.raises(CheckpointError, match="is another autoencoder than"):
        load_codec(out)
    with pytest.raises(ConfigError, match="not those that"):
        train(replace(config, training=replace(config.training, steps=3)), out)


def test_an_autoencoder_learns(tmp_path):
    data = load_data("digits")
    config = AutoencoderConfig(steps=40, batch_size=32, widths=(16, 16), latent_channels=2, learning_rate=5e-3)
    losses = []
    autoencoder = train_autoencoder(data, config, tmp_path / "ae", on_step=lambda step, loss: losses.append(loss))
    assert len(losses) == 40 and sum(losses[-5:]) < 0.7 * sum(losses[:5])
    assert reconstruction_error(autoencoder, load_data("digits", split="test"), 50) < float(data.floats().var())
    assert autoencoder.encode(data.floats(torch.arange(2))).shape == (2, 2, 4, 4)


@pytest.mark.parametrize(
    ("name", "message"), [("missing", "no autoencoder at missing; train one"), ("/nowhere/at/all", "no autoencoder at")]
)
def test_a_missing_autoencoder_is_one_line(name, message):
    with pytest.raises(ConfigError, match=message):
        load_autoencoder(name)


def test_images_that_do_not_fit_are_one_line(tmp_path):
    with pytest.raises(ConfigError, match="cannot be halved 4 times"):
        train_autoencoder(tiny.images(), AutoencoderConfig(widths=(8,) * 5), tmp_path / "ae")
    save(AutoencoderKL, BLOCKS, tmp_path / "colours", channels=3)
    with pytest.raises(DataError, match="cannot encode images of"):
        load_autoencoder(str(tmp_path / "colours")).encode(torch.zeros(1, 2, 8, 8))
    (tmp_path / "colours" / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(ConfigError, match="must be of one of AutoencoderKL, VQModel, AutoencoderTiny, got UNet2DModel"):
        load_autoencoder(str(tmp_path / "colours"))
