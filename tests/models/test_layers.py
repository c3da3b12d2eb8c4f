"""Layers against what they stand for."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import tiny
from multistage_diffusion.backbones import UNet
from multistage_diffusion.backbones.layers import Attention, NoiseEmbedding, Resample, ResidualBlock, group_norm
from multistage_diffusion.records import from_dict, new_words, to_dict


@pytest.mark.parametrize("kind", ["box", "fir"])
def test_resampling_keeps_constants_and_halves_or_doubles(kind):
    x = torch.full((2, 3, 8, 12), 0.7)
    down, up = Resample("down", kind)(x), Resample("up", kind)(x)
    assert down.shape == (2, 3, 4, 6) and up.shape == (2, 3, 16, 24)
    torch.testing.assert_close(down[:, :, 1:-1, 1:-1], torch.full((2, 3, 2, 4), 0.7))
    torch.testing.assert_close(up[:, :, 2:-2, 2:-2], torch.full((2, 3, 12, 20), 0.7))


def test_fir_down_is_the_separable_1_3_3_1_filter():
    x = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
    rows = F.conv2d(x, taps.view(1, 1, 4, 1), stride=(2, 1), padding=(1, 0))
    both = F.conv2d(rows, taps.view(1, 1, 1, 4), stride=(1, 2), padding=(0, 1))
    torch.testing.assert_close(Resample("down", "fir")(x), both)


def test_fir_up_is_the_transpose_of_down_times_4():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(1, 2, 8, 8, generator=generator), torch.randn(1, 2, 4, 4, generator=generator)
    down, up = Resample("down", "fir"), Resample("up", "fir")
    torch.testing.assert_close((down(x) * y).sum() * 4, (x * up(y)).sum())


@pytest.mark.parametrize(("kind", "taps"), [("box", [1.0, 1.0]), ("fir", [1.0, 3.0, 3.0, 1.0])])
def test_the_input_pyramid_is_one_strided_convolution_with_the_filtered_kernel(kind, taps):
    """Filtering and convolving are linear: their kernels convolve to one, which moves by 2 pixels."""
    unet = UNet(width=4, multipliers=(1, 1), blocks=1, attention=(), filter=kind, input_pyramid="ncsnpp")
    step = tiny.randomise(unet.encoder((3, 8, 8)).pyramid[0]).double()
    x = torch.randn(2, 3, 8, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    filter_ = torch.outer(*2 * [torch.tensor(taps, dtype=torch.float64) / sum(taps)])
    size = 2 + len(taps)
    kernel = torch.zeros(4, 3, size, size, dtype=torch.float64)
    for row, column in itertools.product(range(3), repeat=2):
        weight = step[1].weight[:, :, row, column, None, None].detach()
        kernel[:, :, row : row + len(taps), column : column + len(taps)] += weight * filter_.flip(0, 1)
    expected = F.conv2d(x, kernel, step[1].bias, stride=2, padding=len(taps) // 2)
    torch.testing.assert_close(step(x), expected, rtol=1e-12, atol=1e-12)


def test_old_files_keep_the_input_pyramid_that_they_were_trained_with():
    old = from_dict(UNet, {"input_pyramid": True, "filter": "fir"})
    assert old == UNet(input_pyramid=True, filter="fir") and to_dict(old)["input_pyramid"] is True
    with pytest.warns(FutureWarning, match="--model.input-pyramid now takes a value; without one it means True"):
        assert new_words(["--model.input-pyramid", "--seed", "1"]) == ["--model.input-pyramid=True", "--seed", "1"]
    assert new_words(words := ["--model.input-pyramid", "ncsnpp"]) == words
    x = torch.randn(2, 3, 8, 8)
    step = old.encoder((3, 8, 8)).pyramid[0]
    torch.testing.assert_close(step(x), step[1](Resample("down", "fir")(x)))


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_attention_equals_its_definition(heads):
    layer = tiny.randomise(Attention(8, head_channels=8 // heads, groups=16, scale=0.7))
    x = torch.randn(2, 8, 3, 5, generator=torch.Generator().manual_seed(0))
    qkv = layer.qkv(layer.norm(x)).reshape(2, 3, heads, 8 // heads, 15)
    query, key, value = qkv.unbind(1)
    weight = torch.einsum("bhci,bhcj->bhij", query, key).mul((8 // heads) ** -0.5).softmax(dim=-1)
    mixed = torch.einsum("bhij,bhcj->bhci", weight, value).reshape(2, 8, 3, 5)
    torch.testing.assert_close(layer(x), (x + layer.out(mixed)) * 0.7, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_attention_is_fused_and_keeps_the_layout(layout):
    layer = Attention(16, head_channels=8, groups=16, scale=tiny.MODEL.skip_scale).to(memory_format=layout)
    x = torch.randn(2, 16, 4, 4).contiguous(memory_format=layout).requires_grad_()
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # an error where the heads do not lie as the kernel wants them
        output = layer(x)
    output.sum().backward()
    assert output.is_contiguous(memory_format=layout)


def test_half_precision_leaves_the_noise_level_as_it_is():
    embedding, c_noise = NoiseEmbedding(8), torch.rand(4)
    block = tiny.randomise(ResidualBlock(8, 8, 32, groups=16, scale=tiny.MODEL.skip_scale))
    x, told = torch.randn(4, 8, 4, 4), embedding(c_noise)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(embedding(c_noise), told, rtol=0, atol=0)
        seen = []
        block.affine.register_forward_hook(lambda module, inputs, output: seen.append(output))
        assert block(x.bfloat16(), told).dtype == torch.bfloat16
    assert seen[0].dtype == torch.float32


def test_a_fresh_block_is_its_shortcut():
    x, embedding = torch.randn(2, 8, 4, 4), torch.randn(2, 32)
    torch.testing.assert_close(
        ResidualBlock(8, 8, 32, groups=16, scale=tiny.MODEL.skip_scale)(x, embedding), x * tiny.MODEL.skip_scale
    )


def test_the_embedding_is_the_sinusoid_of_ddpm():
    embedding = NoiseEmbedding(8)
    embedding.first, embedding.second = torch.nn.Identity(), torch.nn.Identity()
    embedding.first.weight = torch.zeros(1)
    c_noise = torch.tensor([0.0, 3.5])
    rates = torch.tensor([10_000 ** (-i / 3) for i in range(4)])
    wave = torch.cat(((c_noise[:, None] * rates).cos(), (c_noise[:, None] * rates).sin()), 1)
    torch.testing.assert_close(embedding(c_noise), F.silu(F.silu(wave)))


@pytest.mark.parametrize(("channels", "groups"), [(8, 2), (12, 3), (16, 4), (128, 16), (320, 16), (144, 16), (4, 1)])
def test_group_norms_have_at_least_4_channels_a_group(channels, groups):
    assert group_norm(channels, groups=16, eps=1e-6).num_groups == groups
