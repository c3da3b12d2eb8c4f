"""A fresh autoencoder depends on its seed alone, and nobody else's random numbers depend on it."""

import pytest
import torch

import tiny
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
