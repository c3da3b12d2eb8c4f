"""Stages whose images enter the U-Net halved: what they compute, what they cost, and that all else works with them."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

import tiny
from multistage_diffusion.config import ModelConfig, to_dict
from multistage_diffusion.denoiser import Denoiser
from multistage_diffusion.errors import ConfigError
from multistage_diffusion.inherit import inherit, inheritance
from multistage_diffusion.interop.merge import merge
from multistage_diffusion.metrics.cost import network_cost
from multistage_diffusion.noise import VP
from multistage_diffusion.runs import load_run
from multistage_diffusion.stages import Stages, stage_of
from multistage_diffusion.training.run import train
from runs import same_run, tensors, train_until

MODEL = ModelConfig(
    width=8,
    decoder_widths=(8, 12, 4),
    multipliers=(1, 1, 2),
    blocks=1,
    attention=(2,),
    dropout=0.0,
    entry_levels=(0, 1, 1),
)
KINDS = [
    MODEL,
    replace(MODEL, entry_levels=(0, 1, 2)),
    replace(MODEL, entry_levels=(1, 0, 1), middle="decoder"),
    replace(MODEL, architecture="separate"),
    replace(MODEL, resampling="conv", decoder_attention="first-stage"),
    replace(MODEL, filter="fir", input_pyramid="ncsnpp"),
]


@pytest.mark.parametrize("model", KINDS)
def test_each_image_gets_what_it_gets_alone(model):
    network = tiny.randomise(model.network((2, 8, 8))).eval()
    x, c_noise = torch.randn(6, 2, 8, 8), torch.randn(6)
    together = network(x, c_noise, [2, 1, 3])
    stages = [0, 0, 1, 2, 2, 2]
    alone = torch.cat([network(x[row : row + 1], c_noise[row : row + 1], stage) for row, stage in enumerate(stages)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    order = torch.tensor([5, 2, 0, 4, 1, 3])
    mixed = network(x[order], c_noise[order], torch.tensor(stages)[order])
    torch.testing.assert_close(mixed, together[order], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_stage_that_enters_halved_is_the_network_of_images_with_pixels_moved_into_channels():
    entered = replace(MODEL, architecture="unified", entry_levels=(1,))
    halved = replace(entered, multipliers=MODEL.multipliers[1:], entry_levels=())
    network = tiny.randomise(entered.network((2, 8, 8))).eval()
    other = halved.network((8, 4, 4)).eval()
    state = network.state_dict()
    for old, new in (("levels.1", "levels.0"), ("levels.2", "levels.1"), ("downs.1", "downs.0")):
        moved = {name: name.replace(f"encoders.0.{old}", f"encoders.0.{new}") for name in state if f".{old}." in name}
        state |= {new_name: state[name] for name, new_name in moved.items()}
    state |= {f"encoders.0.stem.{name}": state[f"decoders.0.entry.1.{name}"] for name in ("weight", "bias")}
    # The decoder lists its resolutions from the lowest on, so their names agree.
    other.load_state_dict(
        {
            name: network.state_dict()[name] if name.startswith("decoders") else state[name]
            for name in other.state_dict()
        }
    )
    x, c_noise = torch.randn(3, 2, 8, 8), torch.randn(3)
    with torch.enable_grad():  # counting runs a backward pass
        cost, of_halved = network_cost(entered, (2, 8, 8)).stages[0], network_cost(halved, (8, 4, 4)).stages[0]
    assert (cost.flops, cost.training_flops) == (of_halved.flops, of_halved.training_flops)
    expected = F.pixel_shuffle(other(F.pixel_unshuffle(x, 2), c_noise, 0), 2)
    torch.testing.assert_close(network(x, c_noise, 0), expected, rtol=0, atol=0)


@pytest.mark.slow
def test_entries_make_stages_cheaper_and_leave_others_as_they_were():
    plain = network_cost(replace(MODEL, entry_levels=()), (1, 32, 32)).stages
    entered = network_cost(MODEL, (1, 32, 32)).stages
    assert entered[0] == plain[0]
    assert entered[1].flops < 0.6 * plain[1].flops


def test_a_decoder_that_was_not_called_gets_no_gradient_nor_does_its_entry():
    network = MODEL.network((1, 8, 8))
    network(torch.randn(4, 1, 8, 8), torch.randn(4), [2, 0, 2]).sum().backward()
    assert all(parameter.grad is None for parameter in network.decoders[1].parameters())
    assert network.decoders[2].entry[1].weight.grad is not None


@pytest.mark.slow
def test_a_stopped_run_resumes_to_the_bit(tmp_path):
    config = tiny.run_config(MODEL)
    train(config, tmp_path / "whole", data=tiny.images())
    train_until(5, tmp_path / "run", config)
    train(config, tmp_path / "run", data=tiny.images())
    same_run(tmp_path / "run", tmp_path / "whole")
    assert any("decoders.1.entry.1.weight" in name for name in tensors(tmp_path / "run"))


def test_saved_and_converted_folders_hold_the_entries(tmp_path):
    denoiser, sigma, x = tiny.denoiser(MODEL), torch.tensor([0.3, 1.0, 5.0]), torch.randn(3, *tiny.SHAPE)
    denoiser.save_pretrained(tmp_path / "model")
    torch.testing.assert_close(Denoiser.from_pretrained(tmp_path / "model")(x, sigma), denoiser(x, sigma))


def test_a_pipeline_of_diffusers_draws_with_them(tmp_path):
    pytest.importorskip("diffusers")
    from multistage_diffusion.interop.multistage_unet import MultistageUNet

    denoiser = tiny.denoiser(MODEL)
    unet = MultistageUNet(
        model=to_dict(MODEL), process=to_dict(denoiser.process), edges=list(tiny.EDGES), shape=list(tiny.SHAPE)
    )
    unet.network.load_state_dict(denoiser.network.state_dict())
    unet.save_pretrained(tmp_path / "unet")
    unet = MultistageUNet.from_pretrained(tmp_path / "unet", low_cpu_mem_usage=False)
    x = torch.randn(3, *tiny.SHAPE)
    for timestep in (20.0, 400.0, 999.0):
        expected = denoiser.network(
            x, torch.full((3,), timestep), stage_of(unet.level(torch.tensor(timestep)).item(), tiny.EDGES)
        )
        torch.testing.assert_close(unet(x, timestep).sample, expected)


def test_checkpointed_blocks_give_the_same_gradients():
    network = tiny.randomise(MODEL.network((1, 8, 8)))
    x, c_noise = torch.randn(4, 1, 8, 8), torch.randn(4)

    def gradients():
        network.zero_grad()
        network(x, c_noise, [1, 2, 1]).square().sum().backward()
        return {name: parameter.grad.clone() for name, parameter in network.named_parameters()}

    before = gradients()
    network.checkpoint_activations()
    assert tiny.bits_equal(gradients(), before)


def test_stages_that_enter_halved_start_from_a_trunk_where_both_have_the_blocks():
    stages = Stages(tiny.EDGES)
    trunk = tiny.denoiser(MODEL.unified())
    staged = Denoiser.from_backbone(MODEL, VP(), tiny.SHAPE, stages)
    fresh = {name: tensor.clone() for name, tensor in staged.network.state_dict().items()}
    plan = inheritance(staged, trunk)
    inherit(staged, trunk)
    state, of_trunk = staged.network.state_dict(), trunk.network.state_dict()
    assert torch.equal(state["encoders.0.levels.2.0.conv0.weight"], of_trunk["encoders.0.levels.2.0.conv0.weight"])
    for name in ("entry.1.weight", "head.weight", "norm.weight"):  # between the images and the shared resolutions
        assert torch.equal(state[f"decoders.1.{name}"], fresh[f"decoders.1.{name}"])
    same = replace(MODEL, decoder_widths=(8, 8, 8))
    equal = Denoiser.from_backbone(same, VP(), tiny.SHAPE, stages)
    inherit(equal, trunk)
    for name in ("levels.0.0.conv0.weight", "levels.1.1.conv1.weight", "ups.0.conv0.weight"):
        assert torch.equal(equal.network.state_dict()[f"decoders.2.{name}"], of_trunk[f"decoders.0.{name}"])
    moments = plan.moments(of_trunk)
    assert all(moments[name].shape == state[name].shape for name in moments)
    assert "decoders.1.head.weight" not in moments


@pytest.mark.slow
def test_a_run_may_branch_into_stages_that_enter_halved(tmp_path):
    config = tiny.run_config(MODEL, branch_at=0.5)
    summary = train(config, tmp_path / "run", data=tiny.images())
    assert summary.step == 8
    assert load_run(tmp_path / "run").denoiser.backbone.entry_levels == (0, 1, 1)


def test_odd_entries_are_refused_in_one_line():
    with pytest.raises(ConfigError, match=r"model.entry-levels must be 3 numbers in 0\.\.2, one a stage"):
        replace(MODEL, entry_levels=(0, 1))
    with pytest.raises(ConfigError, match="entry-levels"):
        replace(MODEL, entry_levels=(0, 1, 3))
    staged = tiny.denoiser(replace(MODEL, decoder_widths=(8, 8, 8)))
    with pytest.raises(ConfigError, match=r"stages \[1, 2\] enter below"):
        merge(staged, None)
