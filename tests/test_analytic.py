import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from closed_forms import GaussianDenoiser, MixtureDenoiser
from multistage_diffusion.clustering.posterior import OptimalDenoiser
from multistage_diffusion.errors import ConfigError, DataError

LEVELS = (0.002, 0.02, 0.1, 0.3, 0.6, 1.0, 2.0, 5.0, 20.0, 80.0)


@pytest.fixture(scope="module")
def digits():
    return torch.from_numpy(load_digits().images).float()[:, None] / 8 - 1


def brute_force(images, x, sigma):
    """Posterior mean and effective number of images, row by row in float64 from direct differences."""
    rows, means, counts = images.flatten(1).double(), [], []
    for row, level in zip(x.flatten(1).double(), sigma.double(), strict=True):
        weights = torch.softmax(-(rows - row).square().sum(1) / (2 * level**2), 0)
        means.append(weights @ rows)
        counts.append(torch.special.entr(weights).sum().exp())
    return torch.stack(means).reshape(x.shape), torch.stack(counts)


def near_copies(images):
    """Sixteen images again with one pixel changed by a grey level, and again with jitter."""
    copies, jitter = images[:16].clone(), images[:16] + 0.002 * torch.randn(images[:16].shape)
    copies[:, 0, 3, 3] += 2 / 255
    return torch.cat((images, copies, jitter))


@pytest.mark.parametrize("change", [lambda images: images, near_copies], ids=["digits", "near-copies"])
@pytest.mark.parametrize("block", [500, 8192])
def test_both_forms_agree_with_brute_force_from_low_to_high_noise(digits, change, block):
    torch.manual_seed(0)
    images = change(digits)
    denoiser = OptimalDenoiser(images, block=block)
    index, noise = torch.arange(12), torch.randn(12, 1, 8, 8)
    levels = torch.tensor(LEVELS, dtype=torch.float64)
    pairs = denoiser.pairs(index, noise, levels.expand(12, -1))
    for column, sigma in enumerate(LEVELS):
        x = images[index].double() + sigma * noise.double()
        mean, count = brute_force(images, x, levels[column].expand(12))
        direct = denoiser.posterior(x, sigma)
        torch.testing.assert_close(direct.denoised / sigma, mean / sigma, atol=1e-4, rtol=0)
        torch.testing.assert_close(direct.effective.double(), count, atol=0, rtol=1e-3)
        delta = (images[index] - mean) / sigma
        torch.testing.assert_close(pairs.delta[:, column].double(), delta, atol=1e-5, rtol=0)
        torch.testing.assert_close(pairs.effective[:, column].double(), count, atol=0, rtol=1e-3)


@given(seed=st.integers(0, 2**31), count=st.integers(1, 40), block=st.integers(1, 50), sigma=st.floats(2e-3, 80.0))
@settings(max_examples=40, deadline=None)
def test_any_set_any_x_any_level(seed, count, block, sigma):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 2, 3, 3, generator=generator)
    x = 3 * torch.randn(5, 2, 3, 3, generator=generator)
    levels = sigma * torch.tensor([0.5, 1.0, 1.5, 1.0, 2.0])
    denoised = OptimalDenoiser(images, block=block)(x, levels)
    torch.testing.assert_close(denoised.double(), brute_force(images, x, levels)[0], atol=1e-4, rtol=0)


def test_no_noise_gives_the_image_and_endless_noise_the_mean(digits):
    denoiser, noise = OptimalDenoiser(digits), torch.randn(8, 1, 8, 8)
    low, high = denoiser.posterior(digits[:8] + 1e-4 * noise, 1e-4), denoiser.posterior(1e6 * noise, 1e6)
    torch.testing.assert_close(low.denoised, digits[:8], atol=1e-6, rtol=0)
    torch.testing.assert_close(high.denoised, digits.mean(0).expand(8, -1, -1, -1), atol=1e-4, rtol=0)
    torch.testing.assert_close(low.effective, torch.ones(8))
    torch.testing.assert_close(high.effective, torch.full((8,), float(len(digits))), rtol=1e-3, atol=0)


def test_a_row_ignores_its_batch_mates(digits):
    denoiser = OptimalDenoiser(digits)
    x, sigma = digits[:9] + torch.randn(9, 1, 8, 8), torch.linspace(0.01, 9, 9)
    alone = torch.cat([denoiser(row[None], level[None]) for row, level in zip(x, sigma, strict=True)])
    torch.testing.assert_close(denoiser(x, sigma), alone, atol=1e-5, rtol=0)


def test_a_memory_map_and_bytes_give_what_tensors_give(digits, tmp_path):
    levels = ((digits + 1) * 127.5).round().to(torch.uint8)
    np.save(tmp_path / "images.npy", levels.numpy())
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")
    floats = levels.float() / 127.5 - 1
    x, sigma = floats[:6] + torch.randn(6, 1, 8, 8), torch.linspace(0.01, 4, 6)
    expected = OptimalDenoiser(floats)(x, sigma)
    torch.testing.assert_close(OptimalDenoiser(mapped, block=300)(x, sigma), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(OptimalDenoiser(levels)(x, sigma), expected, atol=1e-5, rtol=0)


def test_a_posterior_within_a_class_is_that_of_the_class_alone(digits):
    labels = torch.from_numpy(load_digits().target)
    denoiser = OptimalDenoiser(digits, labels=labels, block=400)
    x, sigma = digits[:6] + torch.randn(6, 1, 8, 8), torch.linspace(0.05, 5, 6)
    classes = torch.tensor([3, 3, 7, 7, 0, 1])
    by_class = [
        OptimalDenoiser(digits[labels == c])(row[None], s[None]) for row, s, c in zip(x, sigma, classes, strict=True)
    ]
    torch.testing.assert_close(denoiser(x, sigma, classes), torch.cat(by_class), atol=1e-5, rtol=0)
    index, noise = torch.arange(4), torch.randn(4, 1, 8, 8)
    levels = torch.tensor([[0.05, 0.8, 3.0]], dtype=torch.float64).expand(4, -1)
    pairs = denoiser.pairs(index, noise, levels, within_class=True)
    for column, level in enumerate((0.05, 0.8, 3.0)):
        mean = denoiser(digits[:4] + level * noise, level, labels[:4])
        torch.testing.assert_close(pairs.delta[:, column], (digits[:4] - mean) / level, atol=1e-4, rtol=0)
    torch.testing.assert_close(denoiser.class_mean(torch.tensor([5]))[0], digits[labels == labels[5]].mean(0))


def test_reduced_precision_around_it_changes_nothing(digits):
    denoiser, x = OptimalDenoiser(digits), digits[:4] + torch.randn(4, 1, 8, 8)
    expected, before = denoiser(x, 1.0), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(denoiser(x, 1.0), expected)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_wrong_arguments_are_refused(digits):
    denoiser = OptimalDenoiser(digits)
    with pytest.raises(ConfigError, match="sigma > 0"):
        denoiser(digits[:1], 0.0)
    with pytest.raises(ConfigError, match="needs labels"):
        denoiser(digits[:1], 1.0, torch.tensor([0]))
    with pytest.raises(ConfigError, match="no image of class 7"):
        OptimalDenoiser(digits[:2], labels=torch.tensor([0, 1]))(digits[:1], 1.0, torch.tensor([7]))
    with pytest.raises(DataError, match="needs images"):
        OptimalDenoiser(digits[:0])
    with pytest.raises(DataError, match="not finite"):
        OptimalDenoiser(torch.full((3, 1, 2, 2), math.nan))


def test_gaussian_flow_solves_its_own_ode():
    denoiser = GaussianDenoiser(torch.linspace(-1, 1, 12).reshape(3, 2, 2), 0.5)
    x = denoiser.mean + 10 * torch.randn(4, 3, 2, 2).double()
    levels, state = torch.logspace(1, -3, 4001, dtype=torch.float64), x
    for high, low in zip(levels[:-1].tolist(), levels[1:].tolist(), strict=True):
        middle = state + (low - high) / 2 * (state - denoiser(state, high)) / high
        state = state + (low - high) * (middle - denoiser(middle, (high + low) / 2)) / ((high + low) / 2)
    torch.testing.assert_close(state, denoiser.flow(x, 10.0, 1e-3), atol=1e-4, rtol=1e-4)


def test_a_mixture_of_one_is_a_gaussian_and_a_narrow_one_the_data_set(digits):
    x, sigma = digits[:5] + torch.randn(5, 1, 8, 8), torch.linspace(0.3, 4, 5)
    one = MixtureDenoiser(digits[:1], torch.tensor([0.7]))
    torch.testing.assert_close(one(x, sigma), GaussianDenoiser(digits[0], 0.7)(x, sigma), atol=1e-5, rtol=1e-5)
    narrow = MixtureDenoiser(digits[:300], torch.full((300,), 1e-4))
    torch.testing.assert_close(narrow(x, sigma), OptimalDenoiser(digits[:300])(x, sigma), atol=1e-4, rtol=0)


def test_low_and_high_noise_may_share_a_column(digits):
    """Float64 is for the rows that need it, not for their neighbours, for whom every image would be a candidate."""
    denoiser, index, noise = OptimalDenoiser(digits), torch.arange(6), torch.randn(6, 1, 8, 8)
    sigma = torch.tensor([[0.003], [40.0], [0.5], [0.02], [80.0], [3.0]], dtype=torch.float64)
    pairs = denoiser.pairs(index, noise, sigma)
    for row, level in enumerate(sigma[:, 0].tolist()):
        alone = denoiser.pairs(index[row : row + 1], noise[row : row + 1], sigma[row : row + 1])
        torch.testing.assert_close(pairs.delta[row], alone.delta[0], atol=1e-6, rtol=1e-5, msg=f"sigma {level}")
        torch.testing.assert_close(pairs.effective[row], alone.effective[0], atol=1e-3, rtol=1e-4)


def test_images_in_float64_give_what_their_float32_gives(digits):
    index, noise = torch.arange(6), torch.randn(6, 1, 8, 8)
    sigma = torch.tensor([0.01, 0.5, 20.0], dtype=torch.float64).expand(6, -1)
    double, single = (OptimalDenoiser(images[:200]).pairs(index, noise, sigma) for images in (digits.double(), digits))
    assert double.delta.dtype == torch.float32
    torch.testing.assert_close(double.delta, single.delta, atol=1e-6, rtol=1e-5)


BACKENDS = """
import torch
from multistage_diffusion.clustering.posterior import OptimalDenoiser
from multistage_diffusion.devices import full_precision

images = torch.rand(20, 1, 4, 4) * 2 - 1
expected = OptimalDenoiser(images)(images, 0.3)
backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
{setting}
before = [backend.fp32_precision for backend in backends]
assert torch.equal(OptimalDenoiser(images)(images, 0.3), expected)
assert [backend.fp32_precision for backend in backends] == before
try:
    with full_precision(images.device):
        inside = [backend.fp32_precision for backend in backends]
        raise KeyError
except KeyError:
    pass
assert not {{"tf32", "bf16"}} & set(inside), inside
assert [backend.fp32_precision for backend in backends] == before
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "setting",
    [
        'torch.backends.cuda.matmul.fp32_precision = "tf32"',
        'torch.backends.mkldnn.matmul.fp32_precision = "bf16"',
        'torch.backends.fp32_precision = "tf32"',
        'torch.set_float32_matmul_precision("high")',
    ],
)
@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="torch before 2.9")
def test_precision_chosen_by_backend_is_left_alone_and_not_used(setting):
    """In a process of its own: torch cannot go back to where nothing was chosen."""
    done = subprocess.run([sys.executable, "-c", BACKENDS.format(setting=setting)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
