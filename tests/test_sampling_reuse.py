"""Features of the trunk reused over sampling steps: what runs, what is exact, what is refused."""

import json
import math
from dataclasses import replace

import pytest
import torch

import tiny
from multistage_diffusion.backbones import Transformer
from multistage_diffusion.cli import dispatch
from multistage_diffusion.conditioning import Conditioning
from multistage_diffusion.denoiser import Denoiser
from multistage_diffusion.errors import ConfigError
from multistage_diffusion.metrics.cost import encoder_flops, network_cost
from multistage_diffusion.sampling import Sampler
from multistage_diffusion.stages import Stages

MODEL = Transformer(width=16, depth=4, trunk=3, decoder_widths=(16, 16, 8), head_channels=8, classes=3)


def denoiser(model=MODEL):
    return tiny.randomise(Denoiser.from_backbone(model, "vp", tiny.SHAPE, Stages(tiny.EDGES))).eval()


@torch.no_grad()
def test_features_of_the_same_images_and_noise_level_are_the_same():
    trunk = denoiser().network.encoders[0]
    x, c_noise = torch.randn(2, *tiny.SHAPE), torch.tensor([100.0, 7.0])
    conditioning = Conditioning(torch.tensor([0, 2]))
    first = trunk(x, c_noise, conditioning)
    again = trunk.refresh(first, torch.zeros_like(x), c_noise, conditioning)
    assert torch.equal(first.tokens, again.tokens) and torch.equal(first.embedding, again.embedding)
    # Without blocks the residual stream is all, and so is the refreshed one.
    bare = denoiser(replace(MODEL, trunk=0, depth=1)).network.encoders[0]
    moved = bare.refresh(bare(x, c_noise, conditioning), 0.3 * x, c_noise / 2, conditioning)
    expected = bare(1.3 * x, c_noise / 2, conditioning)
    torch.testing.assert_close(moved.tokens, expected.tokens, rtol=1e-4, atol=1e-5)
    assert torch.equal(moved.embedding, expected.embedding)


@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("architecture", ["multistage", "separate"])
def test_the_trunk_runs_in_every_nth_evaluation(every, architecture):
    model = denoiser(replace(MODEL, architecture=architecture))
    calls = []
    for encoder in model.network.encoders:
        encoder.layers[0].register_forward_hook(lambda module, inputs, output: calls.append(len(output)))
    sampler = Sampler(solver="euler", steps=10, trunk_every=every)
    samples = sampler.draw(model, range(5), labels=1, batch_size=3)
    assert samples.nfe == 10 and samples.encoder_passes == len(calls) // 2  # two batches
    if architecture == "multistage":
        assert samples.encoder_passes == math.ceil(10 / every)
    assert all(not hasattr(encoder, "every") for encoder in model.network.encoders)  # they are back
    if every == 1:
        plain = Sampler(solver="euler", steps=10).draw(model, range(5), labels=1)
        torch.testing.assert_close(samples.images, plain.images, rtol=1e-4, atol=1e-2)  # by sums of another order


def test_guided_and_unguided_evaluations_do_not_share_features():
    sampler = Sampler(solver="euler", steps=6, trunk_every=6, guidance=2.0, guidance_interval=(0.1, 5.0))
    samples = sampler.draw(denoiser(), range(2), labels=1)
    assert samples.encoder_passes == 3  # above, within and below the interval


def test_networks_that_cannot_are_refused_and_left_as_they_are():
    unet = tiny.denoiser()
    with pytest.raises(ConfigError, match=r"sampling\.trunk-every 2 needs a network whose encoder can be refreshed"):
        Sampler(steps=2, trunk_every=2).draw(unet, range(1))
    with pytest.raises(ConfigError, match=r"sampling\.trunk-every must be at least 1"):
        Sampler(trunk_every=0)


def test_flops_of_the_trunk_are_those_that_all_stages_share():
    for stage in network_cost(MODEL, tiny.SHAPE).stages:
        assert 0 < encoder_flops(MODEL, tiny.SHAPE) < stage.flops
    more = encoder_flops(replace(MODEL, depth=5, trunk=4), tiny.SHAPE) - encoder_flops(MODEL, tiny.SHAPE)
    block = 2 * (16 * 12 * 16**2 + 2 * 16**2 * 16 + 6 * 16**2)  # 16 tokens of 16 channels, and the modulation
    assert more == block


def test_the_command_says_what_is_saved_and_lost(tmp_path, capsys):
    model = denoiser(replace(MODEL, classes=0))
    model.save_pretrained(tmp_path / "model")
    words = ["sample", str(tmp_path / "model"), "--num", "3", "--solver", "euler", "--steps", "8", "--trunk-every", "4"]
    assert dispatch([*words, "--out", str(tmp_path / "out"), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["encoder_passes"] == 2 and document["reuse_error"] > 0
    cost = network_cost(model.backbone, tiny.SHAPE).flops(document["stage_calls"])
    assert document["saved_flops"] == pytest.approx(6 * encoder_flops(model.backbone, tiny.SHAPE) / cost)
