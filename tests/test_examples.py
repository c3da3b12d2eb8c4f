"""The examples run."""

import ast
import importlib.util
import math
from pathlib import Path

import pytest
import torch

import multistage_diffusion as msd
import tiny
from multistage_diffusion.config import from_dict, to_dict
from multistage_diffusion.errors import UserError
from multistage_diffusion.noise import VP, Process
from multistage_diffusion.training.run import train

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def laplace(monkeypatch):
    """The example's process; other tests see only those of the library."""
    monkeypatch.setattr(Process, "_kinds", Process.kinds())
    return load("own_process")


def test_own_process(laplace, tmp_path, capsys):
    laplace.main(str(tmp_path / "run"), steps=2)
    assert "drew (16, 1, 8, 8) with 20 network calls each" in capsys.readouterr().out
    denoiser = msd.load_run(tmp_path / "run").denoiser
    denoiser.save_pretrained(tmp_path / "model")
    again = msd.load_run(tmp_path / "model").denoiser
    assert again.process == laplace.Laplace()
    assert torch.equal(*(msd.sample(each, 2, steps=2, seed=0).images for each in (denoiser, again)))


def test_a_process_that_is_not_imported_is_named(laplace, tmp_path, capsys):
    laplace.main(str(tmp_path / "run"), steps=1)
    del Process._kinds["laplace"]
    for path in ("run", "run/model"):
        with pytest.raises(
            UserError, match=r"no process laplace \(a class of your own must be imported first\); known: .*edm, "
        ):
            msd.load_run(tmp_path / path)


def test_own_process_is_a_process(laplace):
    process = laplace.Laplace(width=0.5)
    sigma = torch.tensor([0.0, 0.05, 0.3, 1.0, 4.0, math.inf], dtype=torch.float64)
    torch.testing.assert_close(process.sigma(process.t(sigma)), sigma)
    u = torch.linspace(0.01, 0.99, 9, dtype=torch.float64)
    torch.testing.assert_close(process.cdf(process.icdf(u)), u)
    share = math.log(process.sigma_max) / 0.5
    assert process.t(torch.tensor(process.sigma_max)).item() == pytest.approx(1 - math.exp(-share) / 2)
    assert from_dict(Process, to_dict(process)) == process


def test_a_name_that_is_taken_or_missing_is_refused():
    with pytest.raises(TypeError, match="needs a name of its own"):
        type("Mine", (VP,), {})
    with pytest.raises(TypeError, match=r"Mine\.kind is vp, as VP's is"):
        type("Mine", (VP,), {"kind": "vp"})


@pytest.mark.slow
def test_by_hand(capsys):
    load("by_hand").main(steps=2)
    assert "calls of each stage's decoder" in capsys.readouterr().out


@pytest.mark.slow
def test_own_images(tmp_path, capsys):
    import numpy as np
    from PIL import Image

    generator = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    ramp = np.linspace(0, 1, 48)[None, :, None]
    for index in range(40):  # ramps between two colours
        first, second = generator.integers(0, 256, (2, 1, 1, 3))
        pixels = np.repeat(first + ramp * (second - first), 40, axis=0).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{index}.png")
    load("own_images").main(str(tmp_path / "pictures"), str(tmp_path / "run"), steps=2)
    assert "drew (16, 3, 32, 32) with 20 network calls" in capsys.readouterr().out


def test_own_metric(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MSD_CACHE", str(tmp_path / "cache"))
    train(tiny.run_config(steps=2), tmp_path / "run")
    load("own_metric").main(str(tmp_path / "run"), num=20)
    figures = ast.literal_eval(capsys.readouterr().out)
    assert list(figures) == ["mean_shift", "psnr", "fd", "loss"] and all(value > 0 for value in figures.values())


def test_own_data(tmp_path):
    fields = load("own_data").main(str(tmp_path / "run"), steps=3)
    assert fields.shape == (16, 5, 8, 8) and 200 < fields.mean() < 360


def test_own_network(tmp_path, capsys):
    load("own_network").main(str(tmp_path / "run"), steps=4)
    loss = load("own_network").main(str(tmp_path / "run"), steps=8)  # resumes
    assert 0 < loss < 10 and "images: torch.Size([4, 1, 8, 8])" in capsys.readouterr().out


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("own_*.py")), ids=lambda path: path.stem)
def test_examples_of_ones_own_parts_are_short(path):
    assert len([line for line in path.read_text().splitlines() if line.strip()]) <= 40


def test_the_page_on_extending_shows_the_examples_as_they_are():
    page = (EXAMPLES.parent / "docs" / "extending.md").read_text()
    shown = [path for path in EXAMPLES.glob("own_*.py") if f"```python\n{path.read_text().rstrip()}\n```" in page]
    assert {path.stem for path in EXAMPLES.glob("own_*.py")} - {path.stem for path in shown} <= {"own_images"}


def test_own_callback(tmp_path, capsys):
    example = load("own_callback")
    example.main(str(tmp_path / "run"), steps=4, low_enough=0.0)
    lines = [line.split(",") for line in (tmp_path / "run.csv").read_text().splitlines()]
    assert [line[0] for line in lines] == ["2", "4"] and "step 4: " in capsys.readouterr().out
    with pytest.raises(example.LowEnoughError, match="after step 2"):
        example.main(str(tmp_path / "stopped"), steps=4, low_enough=1e9)
    assert len((EXAMPLES / "own_callback.py").read_text().splitlines()) < 40
