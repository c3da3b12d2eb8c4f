"""The presets against the table of the paper's networks (measured on the published code), stage by stage."""

import math
from dataclasses import replace

import pytest
import torch

from multistage_diffusion.clustering.levels import time_shares
from multistage_diffusion.config import ModelConfig
from multistage_diffusion.errors import ConfigError
from multistage_diffusion.metrics.cost import network_cost
from multistage_diffusion.recipes import RECIPES, preset, recipe
from multistage_diffusion.sampling import Sampler
from multistage_diffusion.stages import Stages

UNETS = [name for name in RECIPES if isinstance(recipe(name).model, ModelConfig)]
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


# Multistage: encoder and decoders (counted on the published code), GMACs of a stage.
MULTISTAGE = {
    "vp-cifar10": (43_482_624, (125_995_843, 64_038_787, 3_652_083), (30.97, 18.58, 7.15)),
    "edm-cifar10": (19_632_768, (68_284_547, 36_101_123, 4_774_947), (35.75, 21.19, 7.725)),
    "ldm-celebahq": (107_911_776, (208_055_363, 128_777_923, 67_678_531), (120.44, 84.15, 56.64)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MULTISTAGE)
def test_the_multistage_networks_are_the_published_ones(name):
    encoder, decoders, gmacs = MULTISTAGE[name]
    counted = cost(name, "multistage")
    assert (counted.encoder, counted.decoders) == (encoder, decoders)
    assert [stage.gmacs for stage in counted.stages] == pytest.approx(gmacs, rel=CLOSE)


@pytest.mark.slow
def test_the_ncsnpp_like_network_in_one_stage():
    base = preset("vp-cifar10")
    counted = network_cost(base.model.unified(), base.shape)
    assert counted.parameters == 107_521_411
    assert counted.stages[0].gmacs == pytest.approx(18.581, rel=CLOSE)


def test_the_released_latent_decoders_lost_their_attention_but_for_the_first():
    base = preset("ldm-celebahq")
    model = replace(base.model, decoder_attention="first-stage")
    with torch.device("meta"):
        network = model.network(base.shape)
    assert sum(parameter.numel() for parameter in network.parameters()) == 493_841_449
    assert [attentions(decoder) for decoder in network.decoders] == [9, 0, 0]


def test_steps_442_and_631_begin_a_stage_in_any_precision():
    base = preset("ldm-celebahq")
    steps = torch.tensor([441.0, 442.0, 630.0, 631.0], dtype=torch.float64)
    sigma, stages = base.process.sigma(steps), Stages(base.edges)
    for levels in (sigma, sigma.float()):
        assert stages.of(levels).tolist() == [0, 1, 1, 2]
    assert stages.shares(base.process) == pytest.approx((0.442, 0.189, 0.369), abs=1e-12)


def test_the_initialisation_of_edm():
    base = preset("edm-cifar10", "unified")
    model = replace(base.model, width=64, blocks=1, classes=5)
    state = model.network((3, 16, 16)).state_dict()
    for name, tensor in state.items():  # a uniform variable on (-a, a) has variance a^2/3
        if not name.endswith("weight") or tensor.ndim < 2:
            continue
        size = tensor[0, 0].numel()
        deviation = math.sqrt(2 / (size * sum(tensor.shape[:2])))
        if ".qkv." in name:
            deviation *= math.sqrt(0.2)
        elif any(last in name for last in ("conv1", "attention.out", "head")):
            deviation *= 1e-5
        elif ".label." in name:
            deviation = math.sqrt(2 * 5 / (5 + 64))
            assert not tensor[5].any()
            tensor = tensor[:5]
        assert tensor.std().item() == pytest.approx(deviation, rel=0.12), name


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["multistage", "separate"])
@pytest.mark.parametrize("name", PAPER)
def test_stages_cost_what_their_widths_say(name, architecture):
    base, found = preset(name, architecture), cost(name, architecture)
    unified = network_cost(base.model.unified(), base.shape)
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


@pytest.mark.parametrize("name", UNETS)
def test_a_decoder_as_wide_as_the_encoder_has_the_unified_decoders_parameters(name):
    found, alone = preset(name, "separate"), preset(name, "unified")
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
