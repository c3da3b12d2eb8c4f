"""Recipes are whole, fit their presets, and hold the paper's numbers."""

import pytest

from multistage_diffusion.errors import ConfigError
from multistage_diffusion.noise import EDM, VP
from multistage_diffusion.recipes import RECIPES, half_life, preset, recipe
from multistage_diffusion.stages import Stages


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_its_preset_and_trains_every_stage(name):
    config, found = recipe(name), preset(name)
    assert (config.model, config.process, config.stages.edges) == (found.model, found.process, found.edges)
    shares = Stages(config.stages.edges).shares(config.process)
    assert len(shares) == len(config.model.decoder_widths) and min(shares) > 0
    assert sum(shares) == pytest.approx(1)


def test_the_paper_s_vp_recipe():
    config = recipe("vp-cifar10")
    training = config.training
    assert isinstance(config.process, VP) and (config.process.beta_min, config.process.beta_max) == (0.1, 20.0)
    assert (training.learning_rate, training.betas, training.clip_norm) == (2e-4, (0.9, 0.999), 1.0)
    assert training.warmup_images == 5000 * 128 and training.batch_size == 128
    assert 0.5 ** (128 / training.ema_half_life) == pytest.approx(0.9999, abs=1e-9)
    assert config.model.decoder_widths == (192, 128, 16) and config.data.flip


def test_the_paper_s_edm_recipe():
    config = recipe("edm-cifar10")
    training = config.training
    assert isinstance(config.process, EDM) and config.process.sigma_data == 0.5
    assert (training.learning_rate, training.ema_half_life, training.ema_ramp_up) == (1e-3, 500_000, 0.05)
    assert training.warmup_images == 10_000_000
    assert training.steps * training.batch_size == pytest.approx(200e6, rel=1e-4)
    assert (config.sampling.solver, config.sampling.steps) == ("heun", 18)


def test_half_life():
    assert 0.5 ** (64 / half_life(0.999, 64)) == pytest.approx(0.999)


def test_unknown_recipes_name_the_nearest():
    with pytest.raises(ConfigError, match='no recipe digit; did you mean "digits"'):
        recipe("digit")


@pytest.mark.parametrize("name", ["digits", "fashion-mnist"])
def test_small_recipes_fit_in_a_laptop(name):
    found = preset(name)
    network = found.model.network(found.shape)
    assert sum(p.numel() for p in network.parameters()) < 2e6
