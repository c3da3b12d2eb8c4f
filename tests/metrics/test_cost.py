"""Parameters and FLOPs against counts by hand, and how they add up over stages and architectures."""

from dataclasses import replace

import pytest
import torch

import tiny
from multistage_diffusion.clustering.levels import time_shares
from multistage_diffusion.config import ModelConfig
from multistage_diffusion.metrics.cost import network_cost
from multistage_diffusion.noise import EDM, VP
from multistage_diffusion.recipes import preset
from multistage_diffusion.stages import Stages


def hand_count(model, shape, stage):
    """2 FLOPs a multiply-accumulate, of convolutions, linear layers and the two products inside attention, by hooks."""
    network, total = model.network(shape), []

    def convolution(module, inputs, output):
        total.append(2 * output[0].numel() * module.weight[0].numel())

    def attention(module, inputs, output):
        channels, pixels = output.shape[1], output.shape[2] * output.shape[3]
        total.append(2 * 2 * pixels * pixels * channels)

    for module in network.modules():
        kind = type(module).__name__
        if kind in ("Conv2d", "Linear"):
            module.register_forward_hook(convolution)
        elif kind == "Attention":
            module.register_forward_hook(attention)
    network(torch.zeros(1, *shape), torch.zeros(1), stage)
    return sum(total)


@pytest.mark.parametrize(("resampling", "heads"), [("block", None), ("conv", 4)])
def test_flops_are_those_counted_by_hand(resampling, heads):
    model = replace(tiny.MODEL, resampling=resampling, head_channels=heads, decoder_attention="all")
    cost = network_cost(model, tiny.SHAPE)
    assert [stage.flops for stage in cost.stages] == [hand_count(model, tiny.SHAPE, stage) for stage in range(3)]
    for stage in cost.stages:
        assert 2.5 * stage.flops < stage.training_flops < 3.2 * stage.flops
        assert stage.flops_without_attention < stage.flops


@pytest.mark.parametrize("architecture", ["multistage", "separate", "unified"])
def test_parameters_add_up(architecture):
    model = tiny.architecture(architecture, tiny.SMALLEST)
    cost, network = network_cost(model, tiny.SHAPE), model.network(tiny.SHAPE)
    assert cost.parameters == sum(p.numel() for p in network.parameters())
    encoders = 3 if architecture == "separate" else 1
    for stage, decoder in zip(cost.stages, cost.decoders, strict=True):
        assert stage.parameters == cost.encoder // encoders + decoder


def test_a_stage_of_the_encoder_s_width_costs_what_the_unified_network_does():
    model = replace(tiny.SMALLEST, decoder_widths=(12, 8, 4))
    unified = network_cost(tiny.architecture("unified", model), tiny.SHAPE)
    stages = network_cost(model, tiny.SHAPE).stages
    assert stages[1] == unified.stages[0]
    assert stages[0].flops > stages[1].flops > stages[2].flops


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "unified", "calls", "published"),
    [("vp-cifar10", 17.65, (9, 3, 8), 18.65), ("ldm-celebahq", 88.39, (8, 4, 8), 76.19)],
)
def test_figures_of_the_paper(name, unified, calls, published):
    # The weights are not published; the calls of 20 levels evenly spaced in time give the published figures.
    # The table counts DDPM++ for VP in all rows, as the unified and the separate networks are.
    found = preset(name, "separate")
    whole = network_cost(found.model.unified(), found.shape)
    assert round(whole.paper_gflops((1.0,)), 2) == unified
    shares = [count / 20 for count in calls]
    assert round(network_cost(found.model, found.shape).paper_gflops(shares), 2) == published


def test_weighted_sums():
    cost = network_cost(tiny.SMALLEST, tiny.SHAPE)
    first, second, third = (stage.flops for stage in cost.stages)
    assert [stage.gmacs for stage in cost.stages] == [first / 2e9, second / 2e9, third / 2e9]
    assert cost.flops((0.5, 0.25, 0.25)) == pytest.approx(0.5 * first + 0.25 * second + 0.25 * third)
    assert cost.training_flops((2, 0, 1)) == 2 * cost.stages[0].training_flops + cost.stages[2].training_flops
    with pytest.raises(ValueError, match="zip"):
        cost.flops((1.0,))


def test_shares():
    vp = VP()
    edges = vp.sigma(torch.tensor([0.442, 0.631], dtype=torch.float64)).tolist()
    stages = Stages(tuple(edges))
    assert time_shares(vp, stages) == pytest.approx((0.442, 0.189, 0.369), abs=1e-4)
    assert stages.shares(vp) == pytest.approx(time_shares(vp, stages), abs=1e-4)
    edm = EDM()
    assert Stages((2.5103, 7.6577)).shares(edm) == pytest.approx((0.961, 0.035, 0.0035), rel=0.03)
    assert sum(time_shares(edm, Stages((0.001, 100.0)))) == pytest.approx(1)
    assert time_shares(edm, Stages(tuple(edges))) == pytest.approx((0.4735, 0.2025, 0.3241), abs=1e-4)
    assert Stages().shares(edm) == (1.0,)


def test_counting_takes_no_memory_and_leaves_the_generator_alone():
    state = torch.get_rng_state()
    network_cost(ModelConfig(width=64, decoder_widths=(64,), architecture="unified", blocks=1), (3, 16, 16))
    assert torch.equal(torch.get_rng_state(), state)
