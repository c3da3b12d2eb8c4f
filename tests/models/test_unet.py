"""The multi-decoder U-Net: an image is its own, a decoder learns from its stage, one stage is the plain network."""

from dataclasses import replace

import pytest
import torch

import tiny
from multistage_diffusion.conditioning import Conditioning
from multistage_diffusion.config import ModelConfig
from multistage_diffusion.errors import ConfigError
from multistage_diffusion.multidecoder import MultiDecoder
from multistage_diffusion.recipes import RECIPES, preset, recipe

VARIANTS = {
    "block": tiny.MODEL,
    "edm": replace(tiny.MODEL, middle="decoder", decoder_attention="all"),
    "pyramid": replace(tiny.MODEL, filter="fir", input_pyramid="ncsnpp"),
    "conv": replace(tiny.MODEL, resampling="conv", head_channels=4, skip_scale=1.0, decoder_attention="all"),
}
UNETS = [name for name in RECIPES if isinstance(recipe(name).model, ModelConfig)]
ORDERS = [[2, 0, 1, 0, 2], [1, 1, 1, 1, 1]]


def network(model: ModelConfig = tiny.MODEL, shape=tiny.SHAPE) -> MultiDecoder:
    return tiny.randomise(model.network(shape)).eval()


def batch(count=7, shape=tiny.SHAPE, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, *shape, generator=generator), torch.randn(count, generator=generator) * 100


@pytest.mark.parametrize("architecture", ["multistage", "separate"])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_a_mixed_batch_equals_its_images_one_by_one_in_any_order(variant, architecture):
    unet = network(tiny.architecture(architecture, VARIANTS[variant]))
    x, c_noise = batch(5)
    for order in ORDERS:
        stage = torch.tensor(order)
        alone = torch.cat([unet(x[i : i + 1], c_noise[i : i + 1], k) for i, k in enumerate(order)])
        together = unet(x, c_noise, stage)
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
        shuffle = torch.tensor([3, 0, 1, 4, 2])
        torch.testing.assert_close(
            unet(x[shuffle], c_noise[shuffle], stage[shuffle]), alone[shuffle], rtol=1e-5, atol=1e-5
        )
        rows = stage.argsort(stable=True)
        counts = stage.bincount(minlength=3).tolist()
        assert torch.equal(unet(x[rows], c_noise[rows], counts), together[rows])
    assert alone.std() > 0.1  # not the zeros of a fresh network


@torch.no_grad()
def test_each_stage_has_a_network_of_its_own():
    unet = network()
    x, c_noise = batch(1)
    outputs = [unet(x, c_noise, stage) for stage in range(3)]
    assert all((outputs[a] - outputs[b]).abs().max() > 0.1 for a, b in ((0, 1), (0, 2), (1, 2)))


@pytest.mark.parametrize("architecture", ["multistage", "separate"])
def test_a_decoder_gets_no_gradient_from_other_stages(architecture):
    unet = network(tiny.architecture(architecture))
    x, c_noise = batch()
    unet(x, c_noise, torch.tensor([2, 0, 2, 0, 0, 2, 2])).square().sum().backward()
    touched = [any(p.grad is not None for p in decoder.parameters()) for decoder in unet.decoders]
    assert touched == [True, False, True]
    encoders = [any(p.grad is not None for p in encoder.parameters()) for encoder in unet.encoders]
    assert encoders == ([True] if architecture == "multistage" else [True, False, True])


@pytest.mark.parametrize("architecture", ["multistage", "separate", "unified"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_gets_a_gradient_in_a_mixed_batch(variant, architecture):
    unet = network(replace(tiny.architecture(architecture, VARIANTS[variant]), classes=3))
    x, c_noise = batch()
    counts = [7] if architecture == "unified" else [3, 2, 2]
    unet(x, c_noise, counts, Conditioning(torch.arange(7) % 4)).square().sum().backward()
    still = [name for name, p in unet.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert still == []


@torch.no_grad()
def test_one_stage_equals_the_unified_network():
    unified = network(tiny.architecture("unified"))
    for architecture in ("multistage", "separate"):
        single = network(replace(tiny.MODEL, architecture=architecture, decoder_widths=(8,)))
        single.load_state_dict(unified.state_dict())  # the same names and shapes
        x, c_noise = batch()
        assert torch.equal(single(x, c_noise, torch.zeros(7, dtype=torch.int64)), unified(x, c_noise, 0))


@torch.no_grad()
def test_tied_decoders_equal_one():
    tied = network(replace(tiny.MODEL, decoder_widths=(8, 8, 8)))
    single = network(replace(tiny.MODEL, decoder_widths=(8,)))
    state = single.state_dict()
    own = {
        name: state[f"decoders.0.{name.split('.', 2)[2]}" if "decoders" in name else name] for name in tied.state_dict()
    }
    tied.load_state_dict(own)
    x, c_noise = batch()
    torch.testing.assert_close(
        tied(x, c_noise, torch.tensor([2, 0, 1, 0, 2, 1, 1])), single(x, c_noise, 0), rtol=1e-5, atol=1e-5
    )


@torch.no_grad()
def test_separate_encoders_are_independent():
    unet = network(tiny.architecture("separate"))
    x, c_noise = batch()
    before = [unet(x, c_noise, stage) for stage in range(3)]
    for parameter in unet.encoders[1].parameters():
        parameter.add_(1.0)
    changed = [not torch.equal(unet(x, c_noise, stage), old) for stage, old in enumerate(before)]
    assert changed == [False, True, False]


@torch.no_grad()
def test_labels_matter_and_none_is_the_last_one():
    unet = network(replace(tiny.MODEL, classes=3))
    x, c_noise = batch(4)
    same = x[:1].expand(4, -1, -1, -1), c_noise[:1].expand(4)
    outputs = unet(*same, [4, 0, 0], Conditioning(torch.arange(4)))
    assert min((outputs[a] - outputs[b]).abs().max() for a in range(4) for b in range(a)) > 1e-3
    torch.testing.assert_close(unet(*same, 0), outputs[3:].expand(4, -1, -1, -1))
    stage, labels = torch.tensor([2, 0, 1, 0]), torch.tensor([1, 3, 0, 2])
    alone = [unet(x[i : i + 1], c_noise[i : i + 1], int(stage[i]), Conditioning(labels[i : i + 1])) for i in range(4)]
    torch.testing.assert_close(unet(x, c_noise, stage, Conditioning(labels)), torch.cat(alone), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_noise_level_matters():
    unet = network()
    x, c_noise = batch()
    assert (unet(x, c_noise, 0) - unet(x, c_noise + 50, 0)).abs().max() > 1e-2


@torch.no_grad()
def test_a_fresh_network_predicts_zero_and_its_seed_is_the_only_chance():
    x, c_noise = batch()
    torch.manual_seed(3)
    first = tiny.MODEL.network(tiny.SHAPE)
    torch.manual_seed(3)
    second = tiny.MODEL.network(tiny.SHAPE)
    assert tiny.bits_equal(first.state_dict(), second.state_dict())
    assert first(x, c_noise, 0).abs().max() == 0


@torch.no_grad()
def test_dropout_acts_in_training_alone():
    unet = network(replace(tiny.MODEL, dropout=0.5))
    x, c_noise = batch()
    assert torch.equal(unet(x, c_noise, 0), unet(x, c_noise, 0))
    unet.train()
    assert not torch.equal(unet(x, c_noise, 0), unet(x, c_noise, 0))


@pytest.mark.parametrize(
    ("name", "architecture"),
    [(name, "multistage") for name in UNETS]
    + [(name, other) for name in ("digits", "edm-cifar10", "fashion-mnist") for other in ("separate", "unified")],
)
def test_every_preset_builds_and_runs_without_memory(name, architecture):
    found = preset(name, architecture)
    assert len(found.model.decoder_widths) == len(found.edges) + 1
    with torch.device("meta"):
        unet = found.model.network(found.shape)
        counts = [2] if architecture == "unified" else [1, 0, 1]
        assert unet(torch.empty(2, *found.shape), torch.empty(2), counts).shape == (2, *found.shape)


@torch.no_grad()
def test_images_need_not_be_square():
    unet = network(shape=(3, 8, 12))
    x, c_noise = batch(shape=(3, 8, 12))
    assert unet(x, c_noise, [3, 2, 2]).shape == (7, 3, 8, 12)


def test_images_that_cannot_be_halved_are_refused():
    with pytest.raises(ConfigError, match=r"cannot be halved 1 times .* set data.resolution to a multiple of 2"):
        tiny.MODEL.network((1, 7, 8))


def test_heads_that_do_not_divide_the_channels_are_refused():
    with pytest.raises(ConfigError, match=r"model\.head-channels 5 must divide the 16"):
        replace(tiny.MODEL, head_channels=5).network(tiny.SHAPE)
