"""Odd arguments from Python get an answer or one line of our own errors, never an exception of torch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import multistage_diffusion as msd
import tiny
from multistage_diffusion.errors import ConfigError


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("cluster", 290),
        pytest.param("several", 55, marks=pytest.mark.slow),
        pytest.param("use", 340, marks=pytest.mark.slow),
        pytest.param("train", 130, marks=pytest.mark.slow),
    ],
)
def test_odd_arguments_are_answered(name, least, tmp_path):
    """In a process of its own, as the types of this one are checked at every call."""
    script, environment = Path(__file__).parent / "odd_calls.py", {**os.environ, "MSD_CACHE": str(tmp_path)}
    done = subprocess.run([sys.executable, script, name], capture_output=True, text=True, env=environment)
    *unanswered, last = done.stdout.splitlines() or [done.stderr[-300:]]
    assert unanswered == [] and last.endswith(" calls") and int(last.split()[0]) >= least, done.stdout + done.stderr


def test_wrong_kinds_of_arguments_are_one_line(tmp_path):
    denoiser = tiny.denoiser()
    x = torch.zeros(2, *tiny.SHAPE)
    assert torch.equal(denoiser(x, torch.ones(2, 1, 1, 1)), denoiser(x, torch.ones(2)))
    for call, text in (
        (lambda: msd.Stages("abc"), "stage edges must be noise levels"),  # pyright: ignore[reportArgumentType]
        (lambda: msd.Stages(0.5), "stage edges must be noise levels"),  # pyright: ignore[reportArgumentType]
        (lambda: msd.train("digits", tmp_path / "run"), "config must be a RunConfig"),  # pyright: ignore[reportArgumentType]
        (lambda: msd.sample(denoiser, 1, step=3), "no option step; did you mean"),
        (lambda: msd.Denoiser.from_backbone(msd.preset("digits"), "vp", tiny.SHAPE), "backbone must be a network's"),
        (lambda: denoiser(x, -1.0), "a noise level must be at least 0"),
        (lambda: denoiser(x, torch.ones(3)), "3 noise levels for 2 images"),
    ):
        with pytest.raises(ConfigError, match=text):
            call()


def test_reading_a_model_draws_no_random_numbers_of_the_caller(tmp_path):
    tiny.denoiser().save_pretrained(tmp_path / "model")
    before = torch.get_rng_state()
    msd.Denoiser.from_pretrained(tmp_path / "model")
    assert torch.equal(torch.get_rng_state(), before)
