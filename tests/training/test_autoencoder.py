"""A fresh autoencoder depends on its seed alone, and nobody else's random numbers depend on it."""

import pytest
import torch
from PIL import Image

import tiny
from multistage_diffusion.cli import dispatch
from multistage_diffusion.data import load_data
from multistage_diffusion.training.autoencoder import AutoencoderConfig, _module


def test_nobody_elses_generator_is_touched(monkeypatch):
    pytest.importorskip("diffusers")
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    before = torch.get_rng_state()
    config = AutoencoderConfig(widths=(8, 8))
    first, second = (_module(tiny.images(), config).state_dict() for _ in range(2))
    assert tiny.bits_equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)
    assert seeded == []


@pytest.mark.slow
def test_bad_pictures_are_refused_or_left_out_as_in_training(tmp_path, capsys, monkeypatch):
    pytest.importorskip("diffusers")
    monkeypatch.setenv("MSD_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, pixels in enumerate(load_data("digits").pixels(torch.arange(40))[:, 0].numpy()):
        Image.fromarray(pixels).save(folder / f"{i:02}.png")
    (folder / "bad.png").write_bytes(b"no")
    words = [
        f"folder:{folder}",
        "--steps",
        "1",
        "--widths",
        "8",
        "8",
        "--resolution",
        "8",
        "--out",
        str(tmp_path / "a"),
    ]
    assert dispatch(["autoencoder", *words]) == 3
    assert capsys.readouterr().err.splitlines()[-1].endswith("leave it out (on-bad-file skip)")
    with pytest.warns(UserWarning, match=r"left out: bad\.png: not a picture"):
        assert dispatch(["autoencoder", *words, "--on-bad-file", "skip", "--max-bad", "0.1"]) == 0
    assert (tmp_path / "a" / "config.json").is_file()
