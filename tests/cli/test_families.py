"""Each small family in each architecture: trained, saved, loaded and sampled by the commands."""

import json

import pytest
from PIL import Image

from multistage_diffusion.cli import dispatch

OTHERS = ("unified", "separate")
SMALL = ["--model.width", "8", "--training.steps", "2", "--training.batch-size", "8", "--training.save-every", "2"]


@pytest.mark.parametrize("architecture", ["multistage", *(pytest.param(a, marks=pytest.mark.slow) for a in OTHERS)])
@pytest.mark.parametrize("recipe", ["digits", "digits-edm", "digits-flow", "digits-ldm"])
def test_from_recipe_to_images(tmp_path, capsys, recipe, architecture):
    run, images = str(tmp_path / "run"), str(tmp_path / "images")
    words = [*SMALL, "--model.decoder-widths", "8", "8", "8", "--model.architecture", architecture]
    assert dispatch(["train", recipe, "--out", run, *words]) == 0
    capsys.readouterr()
    assert dispatch(["sample", run, "--num", "2", "--steps", "2", "--out", images, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["images"] == 2 and len(document["stage_calls"]) == (1 if architecture == "unified" else 3)


def test_a_first_stage_that_cannot_be_fetched_is_one_line(tmp_path, capsys, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    words = ["--data.source", "digits", "--data.resolution", "8", "--out", str(tmp_path / "run")]
    assert dispatch(["train", "ldm-celebahq", *words]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: no autoencoder at CompVis/ldm-celebahq-256/vqvae, neither a folder nor on the hub: ")
    assert err.count("\n") == 1 and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_class_is_guided_within_an_interval_of_noise(tmp_path):
    run = str(tmp_path / "run")
    words = [*SMALL, "--model.decoder-widths", "8", "8", "8", "--model.classes", "10"]
    assert dispatch(["train", "digits-edm", "--out", run, *words]) == 0
    command = ["sample", run, "--num", "2", "--steps", "4", "--class", "3", "--out"]
    pictures = []
    for name, extra in (
        ("none", []),
        ("everywhere", ["--guidance", "3"]),
        ("nowhere", ["--guidance", "3", "--guidance-interval", "1000", "2000"]),
    ):
        assert dispatch([*command, str(tmp_path / name), *extra]) == 0
        pictures.append((tmp_path / name / "images" / "seed-00000000.png").read_bytes())
    assert pictures[0] == pictures[2]
    assert (
        dispatch(["sample", run, "--num", "4", "--steps", "1", "--class", "7", "3", "--out", str(tmp_path / "two")])
        == 0
    )
    with Image.open(tmp_path / "two" / "grid.png") as grid:
        assert grid.size == (2 * (64 + 4), 2 * (64 + 4))  # a column a class
