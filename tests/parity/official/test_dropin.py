"""The denoiser in other projects' loops: EDM's in float64, k-diffusion's with a level for each image; and cast."""

import copy
import itertools

import pytest
import torch

import tiny
from multistage_diffusion.backbones import Transformer
from multistage_diffusion.noise import sigma_schedule
from multistage_diffusion.sampling import dpmpp_2m, heun

TRANSFORMER = Transformer(width=16, decoder_widths=(16, 16, 16), depth=2, trunk=1, head_channels=8)


def start(denoiser, dtype=torch.float32):
    noise = torch.randn(3, *denoiser.shape, generator=torch.Generator().manual_seed(0))
    return noise.to(dtype) * denoiser.sigma_max


@torch.no_grad()
def test_edm_s_sampler_takes_it_as_it_is():
    """Heun's steps in float64 with 0-d levels, which the network rounds (Karras et al. 2022, Alg. 1)."""
    net = tiny.denoiser(process="edm")
    steps = torch.arange(6, dtype=torch.float64)
    levels = (80 ** (1 / 7) + steps / 5 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    levels = torch.cat((net.round_sigma(levels), torch.zeros(1, dtype=torch.float64)))
    assert net.sigma_min == pytest.approx(0.002) and net.sigma_max == pytest.approx(80)
    x = begin = start(net, torch.float64)
    for now, then in itertools.pairwise(levels):
        slope = (x - net(x, now, None).to(torch.float64)) / now
        ahead = x + (then - now) * slope
        if then > 0:
            slope = (slope + (ahead - net(ahead, then, None).to(torch.float64)) / then) / 2
        x = x + (then - now) * slope
    torch.testing.assert_close(x, heun(net, begin, sigma_schedule(net.process, "karras", 6)), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_k_diffusion_s_loop_takes_it_as_it_is():
    """2M with a level for each image, of the images' own type."""
    model = tiny.denoiser(process="vp")
    levels = sigma_schedule(model.process, "log-snr", 16).float()
    x = begin = start(model)
    before = None
    for i in range(16):
        denoised = model(x, levels[i] * x.new_ones([x.shape[0]]))
        ratio = levels[i + 1] / levels[i]
        blend = denoised
        if before is not None and levels[i + 1] > 0:
            r = (levels[i - 1] / levels[i]).log() / (1 / ratio).log()
            blend = denoised + (denoised - before) / (2 * r)
        x, before = ratio * x + (1 - ratio) * blend, denoised
    torch.testing.assert_close(x, dpmpp_2m(model, begin, levels), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("model", [tiny.MODEL, TRANSFORMER], ids=["unet", "dit"])
@pytest.mark.parametrize(("cast", "error"), [("half", 1e-2), ("bfloat16", 0.15), ("double", 1e-5)])
@torch.no_grad()
def test_a_cast_denoiser_takes_images_of_any_type(cast, error, model):
    whole = tiny.denoiser(model)
    changed = getattr(copy.deepcopy(whole), cast)()
    x = torch.randn(4, *whole.shape, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.float64, next(changed.parameters()).dtype):
        for sigma in (0.9, torch.tensor(0.9), torch.full((4,), 0.9, dtype=dtype)):
            estimate = changed(x.to(dtype), sigma)
            assert estimate.dtype == dtype
            expected = whole(x, 0.9)
            assert (estimate.float() - expected).std() < error * expected.std()
