"""Runs of a few steps: no waiting for the disk, except where a test is about it."""

import os

import pytest

import tiny
from multistage_diffusion.training.run import train


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of 8 steps that nothing interrupted; not to be changed."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(tiny.run_config(), folder, data=tiny.images())
    return folder
