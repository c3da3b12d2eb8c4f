"""The examples run."""

import ast
import importlib.util
from pathlib import Path

import pytest

import tiny
from multistage_diffusion.training.run import train

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
