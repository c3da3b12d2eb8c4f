"""The staged transformer: closed forms of its parts, routing, published sizes, and a run from end to end."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import tiny
from multistage_diffusion.backbones import Transformer
from multistage_diffusion.backbones.layers import TokenAttention, modulated, positions
from multistage_diffusion.conditioning import Conditioning
from multistage_diffusion.denoiser import Denoiser
from multistage_diffusion.errors import ConfigError
from multistage_diffusion.inherit import branch, inherit
from multistage_diffusion.metrics.cost import network_cost
from multistage_diffusion.recipes import preset
from multistage_diffusion.stages import Stages

SHAPE = (3, 8, 16)
MODEL = Transformer(
    width=16,
    depth=3,
    trunk=1,
    decoder_widths=(24, 16, 8),
    decoder_blocks=(1, 2, 1),
    decoder_patches=(2, 2, 4),
    head_channels=8,
    classes=3,
)
MODERN = replace(MODEL, mlp="swiglu", norm="rms", qk_norm=True)
# Parameters in 10^6 and GFLOPs of Peebles and Xie 2023, Tables 1 and 4; their GFLOPs are multiply-accumulates.
PUBLISHED = {
    "dit-s-2": (33, 6.06),
    "dit-s-4": (33, 1.41),
    "dit-b-2": (130, 23.01),
    "dit-b-4": (130, 5.56),
    "dit-l-2": (458, 80.71),
    "dit-l-4": (458, 19.70),
    "dit-xl-2": (675, 118.64),
    "dit-xl-4": (675, 29.05),
}


def network(model=MODEL, shape=SHAPE):
    return tiny.randomise(model.network(shape)).eval()


def batch(count=5, shape=SHAPE):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, *shape, generator=generator), torch.rand(count, generator=generator) * 1000


LARGE = ("dit-b-4", "dit-l-2", "dit-l-4", "dit-xl-4")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in LARGE else name for name in PUBLISHED]
)
def test_the_undivided_networks_have_the_published_size(name):
    parameters, gmacs = PUBLISHED[name]
    found = preset(name, "unified")
    cost = network_cost(found.model, found.shape)
    assert cost.parameters / 1e6 == pytest.approx(parameters, rel=5e-3)
    assert cost.flops((1,)) / 2e9 == pytest.approx(gmacs, rel=5e-3)


@pytest.mark.parametrize(
    "name",
    ["fashion-mnist-dit", "dit-s-2", *(pytest.param(name, marks=pytest.mark.slow) for name in LARGE)],
)
def test_staged_networks_cost_what_the_undivided_ones_cost(name):
    found, alone = preset(name), preset(name, "unified")
    shares = Stages(found.edges).shares(found.process)
    staged = network_cost(found.model, found.shape)
    assert staged.flops(shares) == pytest.approx(network_cost(alone.model, alone.shape).flops((1,)), rel=5e-3)
    assert staged.stages[0].flops > staged.stages[1].flops > staged.stages[2].flops


@torch.no_grad()
def test_a_block_is_its_formula():
    model = replace(MODEL, architecture="unified", depth=1, trunk=0)
    unified = network(model)
    trunk, head = unified.encoders[0], unified.decoders[0]
    x, c_noise = batch(2)
    tokens, embedding = trunk(x, c_noise, Conditioning(torch.tensor([0, 2])))
    block = head.layers[0]
    shift, scale, gate, shift2, scale2, gate2 = block.modulation(embedding)[:, None].chunk(6, dim=2)
    normed = F.layer_norm(tokens, (16,), eps=1e-6) * (1 + scale) + shift
    query, key, value = block.attention.qkv(normed).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)
    weights = (query @ key.transpose(2, 3) / math.sqrt(8)).softmax(dim=3)
    h = tokens + gate * block.attention.out((weights @ value).transpose(1, 2).flatten(2))
    normed = F.layer_norm(h, (16,), eps=1e-6) * (1 + scale2) + shift2
    expected = h + gate2 * block.second(F.gelu(block.first(normed), approximate="tanh"))
    torch.testing.assert_close(block(tokens, embedding), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_patch_is_a_token_with_its_place():
    trunk = network().encoders[0]
    x = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(1))
    seen = []
    trunk.layers[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    trunk(x, torch.zeros(2))
    rates = [1.0, 1e-1, 1e-2, 1e-3]
    for row, column in ((0, 0), (3, 5), (1, 7)):
        patch = x[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].flatten(1)
        place = [f(at * rate) for at in (column, row) for f in (math.sin, math.cos) for rate in rates]
        torch.testing.assert_close(seen[0][:, 8 * row + column], trunk.stem(patch) + torch.tensor(place))
    assert positions(4, 8, 16).unique(dim=0).shape == (32, 16)


@torch.no_grad()
def test_rms_norm_and_normed_queries_and_keys():
    x, zero = torch.randn(2, 6, 8), torch.zeros(2, 1, 8)
    root = x.square().mean(dim=2, keepdim=True).sqrt()
    torch.testing.assert_close(modulated(x, zero, zero, rms=True), x / root, rtol=1e-4, atol=1e-5)
    layer = tiny.randomise(TokenAttention(8, head_channels=4, qk_norm=True))
    once = layer(x)
    layer.qkv.weight[:16] *= 7  # of queries and keys: their length is normed away
    layer.qkv.bias[:16] *= 7
    torch.testing.assert_close(layer(x), once, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model", [MODEL, MODERN], ids=["dit", "modern"])
def test_a_fresh_network_predicts_zero_and_its_seed_is_the_only_chance(model):
    x, c_noise = batch()
    torch.manual_seed(3)
    first = model.network(SHAPE)
    torch.manual_seed(3)
    assert tiny.bits_equal(first.state_dict(), model.network(SHAPE).state_dict())
    assert first(x, c_noise, [2, 2, 1]).abs().max() == 0
    features = first.encoders[0](x, c_noise)
    torch.testing.assert_close(first.encoders[0].layers[0](*features), features.tokens)  # a fresh block passes on


@pytest.mark.parametrize("architecture", ["multistage", "separate"])
@pytest.mark.parametrize("model", [MODEL, MODERN], ids=["dit", "modern"])
@torch.no_grad()
def test_a_mixed_batch_equals_its_images_one_by_one(model, architecture):
    staged = network(replace(model, architecture=architecture))
    (x, c_noise), labels = batch(), torch.tensor([0, 3, 1, 2, 3])
    stage = torch.tensor([2, 0, 1, 0, 2])
    alone = [staged(x[i : i + 1], c_noise[i : i + 1], int(stage[i]), Conditioning(labels[i : i + 1])) for i in range(5)]
    torch.testing.assert_close(staged(x, c_noise, stage, Conditioning(labels)), torch.cat(alone), rtol=1e-4, atol=1e-5)
    assert torch.cat(alone).std() > 0.1
    torch.testing.assert_close(staged(x[1:2], c_noise[1:2], 0), alone[1])  # no label is the last one


@torch.no_grad()
def test_one_network_in_three_architectures():
    unified = network(replace(MODEL, architecture="unified"))
    state, (x, c_noise) = unified.state_dict(), batch()
    for architecture in ("multistage", "separate"):
        equal = replace(MODEL.with_capacities((32, 32, 32)), architecture=architecture, decoder_patches=())
        staged = equal.network(SHAPE)
        copied = {
            name: state[".".join((name.split(".")[0], "0", *name.split(".")[2:]))] for name in staged.state_dict()
        }
        staged.load_state_dict(copied)
        torch.testing.assert_close(staged(x, c_noise, torch.tensor([2, 0, 1, 0, 2])), unified(x, c_noise, 0))


@torch.no_grad()
def test_stages_start_from_a_trained_network_whatever_their_depth():
    unified = replace(MODEL, architecture="unified")
    trained = tiny.randomise(Denoiser.from_backbone(unified, "vp", SHAPE)).eval()
    x, sigma = torch.randn(3, *SHAPE), torch.tensor([0.2, 1.0, 9.0])
    branched = branch(trained, Stages((0.5, 4.0)))
    torch.testing.assert_close(branched(x, sigma), trained(x, sigma), rtol=1e-4, atol=1e-4)
    staged = replace(MODEL, decoder_widths=(16, 16, 16), decoder_blocks=(4, 2, 1), decoder_patches=())
    target = Denoiser.from_backbone(staged, "vp", SHAPE, Stages((0.5, 4.0)))
    assert inherit(target, trained).kinds == ("widened", "copied", "narrowed")
    found, expected = target(x, sigma), trained(x, sigma)
    torch.testing.assert_close(found[:2], expected[:2], rtol=1e-4, atol=1e-4)
    assert (found[2] - expected[2]).abs().max() > 0.1  # without its second block
    with pytest.raises(ConfigError, match="the heads of a transformer start from trained ones of the same width"):
        inherit(Denoiser.from_backbone(MODEL, "vp", SHAPE, Stages((0.5, 4.0))), trained)


@pytest.mark.parametrize("model", [MODEL, MODERN], ids=["dit", "modern"])
def test_every_parameter_learns(model):
    staged = network(replace(model, augment_labels=9))
    x, c_noise = batch()
    conditioning = Conditioning(torch.arange(5) % 4, torch.ones(5, 9))
    staged.checkpoint_activations()
    staged(x, c_noise, [2, 2, 1], conditioning).square().sum().backward()
    assert [name for name, p in staged.named_parameters() if p.grad is None or not p.grad.abs().max() > 0] == []


def test_half_precision_leaves_the_noise_level_as_it_is():
    staged, seen = network(MODERN), []
    for layer in (staged.encoders[0].embedding.second, staged.decoders[0].modulation):
        layer.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    x, c_noise = batch()
    with torch.autocast("cpu", torch.bfloat16):
        half = staged(x, c_noise, 0)
    assert seen == [torch.float32] * 2
    torch.testing.assert_close(half.float(), staged(x, c_noise, 0), rtol=0.1, atol=0.1)


def test_capacity_is_depth_times_width():
    assert MODEL.capacity == 32 and MODEL.capacities == (24, 32, 8)
    assert MODEL.with_capacities(MODEL.capacities) == MODEL
    large = preset("dit-b-2").model
    for number in range(64, 5_000, 100):
        capacity = large.nearest_capacity(number)
        assert large.with_capacities((capacity,)).capacities == (capacity,)
        assert abs(capacity - number) <= max(128, number / 4)
    assert large.nearest_capacity(large.capacity) == large.capacity
    assert large.with_capacities((large.capacity // 4,)).heads == ((384, 2, 2),)
    assert large.unified().heads == large.with_capacities((large.capacity,)).heads == ((768, 4, 2),)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 20}, "model.width and model.decoder-widths must be multiples of model.head-channels 8"),
        ({"trunk": 3}, "model.trunk must be at least 0 and below model.depth 3, got 3"),
        ({"decoder_blocks": (1, 2)}, "model.decoder-blocks must be 3 numbers in 1..256, one a stage"),
        ({"decoder_patches": (2, 3, 2)}, "model.decoder-patches must be 3 multiples of model.patch 2"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        replace(MODEL, **options)


def test_images_are_whole_patches():
    with pytest.raises(ConfigError, match="images of 10x8 pixels cannot be cut into patches of 4x4"):
        MODEL.network((3, 10, 8))
