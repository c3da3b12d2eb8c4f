"""The presets against the table of the paper's networks (measured on the published code), stage by stage."""

from dataclasses import replace

import pytest
import torch

from multistage_diffusion.clustering.levels import time_shares
from multistage_diffusion.errors import ConfigError
from multistage_diffusion.metrics.cost import network_cost
from multistage_diffusion.recipes import RECIPES, preset
from multistage_diffusion.sampling import Sampler
from multistage_diffusion.stages import Stages

CLOSE = 1e-3
# Unified network: parameters, GMACs of one image, GFLOPs in the paper's convention (none published for EDM).
PAPER = {
    "vp-cifar10": (106.63e6, 18.547, 17.647),
    "edm-cifar10": (55.73e6, 21.190, None),
    "edm-celeba": (55.73e6, 21.190, None),
    "ldm-celebahq": (274.06e6, 101.200, 88.388),
}
slow_vp = pytest.param("vp-cifar10", marks=pytest.mark.slow)  # eight blocks a level: 4 s to count


def cost(name, architecture):
    found = preset(name, architecture)
    return network_cost(found.model, found.shape)


@pytest.mark.parametrize("name", [slow_vp, "edm-cifar10", "edm-celeba", "ldm-celebahq"])
def test_the_unified_networks_are_those_of_the_paper(name):
    parameters, gmacs, paper = PAPER[name]
    found = cost(name, "unified")
    assert found.parameters == pytest.approx(parameters, rel=CLOSE)
    assert found.flops((1,)) / 2e9 == pytest.approx(gmacs, rel=CLOSE)
    if paper is not None:
        assert found.paper_gflops((1,)) == pytest.approx(paper, rel=CLOSE)


@pytest.mark.slow
def test_the_ncsnpp_variant_is_the_published_one():
    found = preset("vp-cifar10", "unified")
    variant = network_cost(replace(found.model, filter="fir", input_pyramid=True), found.shape)
    assert variant.parameters == pytest.approx(107.52e6, rel=CLOSE)
    assert variant.flops((1,)) / 2e9 == pytest.approx(18.581, rel=CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["multistage", "separate"])
@pytest.mark.parametrize("name", PAPER)
def test_stages_cost_what_their_widths_say(name, architecture):
    unified, found = cost(name, "unified"), cost(name, architecture)
    encoders = 1 if architecture == "multistage" else 3
    assert found.encoder == encoders * unified.encoder
    assert found.parameters == found.encoder + sum(found.decoders)
    model = preset(name).model
    for width, decoder, stage in zip(model.decoder_widths, found.decoders, found.stages, strict=True):
        assert stage.parameters == unified.encoder + decoder
        assert (stage.flops > unified.stages[0].flops) == (width > model.width)
        if width == model.width:  # the middle stage of VP and EDM is the unified network itself
            assert stage == unified.stages[0]


def shapes(module):
    return [(name, tuple(tensor.shape)) for name, tensor in module.state_dict().items()]


@pytest.mark.parametrize("name", RECIPES)
def test_a_decoder_as_wide_as_the_encoder_has_the_unified_decoders_parameters(name):
    found, alone = preset(name), preset(name, "unified")
    with torch.device("meta"):
        staged = replace(found.model, decoder_widths=(found.model.width, 8)).network(found.shape)
        unified = alone.model.network(alone.shape)
    assert shapes(staged.encoders[0]) == shapes(unified.encoders[0])
    assert shapes(staged.decoders[0]) == shapes(unified.decoders[0])


def attentions(module):
    return sum("qkv.weight" in name for name in module.state_dict())


def test_every_ldm_decoder_has_its_attention():  # the published second and third decoders lost theirs
    found = preset("ldm-celebahq")
    with torch.device("meta"):
        network = found.model.network(found.shape)
    assert [attentions(decoder) for decoder in network.decoders] == [9, 9, 9]  # three levels of three blocks


def test_stages_of_the_paper_in_three_weightings():
    found = preset("edm-cifar10")
    process, stages = found.process, Stages(found.edges)
    assert stages.shares(process) == pytest.approx((0.961, 0.035, 0.0035), abs=1e-3)
    # 9, 2 and 7 of the 18 levels lie in the stages; Heun visits each twice, but the highest once.
    assert Sampler().shares(process, stages) == pytest.approx((18 / 35, 4 / 35, 13 / 35), abs=1e-9)
    vp = preset("vp-cifar10")
    assert time_shares(vp.process, Stages(vp.edges)) == pytest.approx((0.442, 0.189, 0.369), abs=1e-3)


def test_an_unknown_preset_names_the_nearest_one():
    with pytest.raises(ConfigError, match='no preset edm-cifar; did you mean "edm-cifar10"'):
        preset("edm-cifar")
