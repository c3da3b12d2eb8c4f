"""Image to image, inpainting and paths between seeds, against closed forms on Gaussian data."""

import pytest
import torch
from torch import nn

import multistage_diffusion as msd
import tiny
from closed_forms import GaussianDenoiser
from multistage_diffusion.errors import ConfigError
from multistage_diffusion.sampling import SOLVERS, Sampler, Trace
from multistage_diffusion.sampling.editing import between, seeded

SHAPE = (1, 2, 3)
KEPT = torch.tensor([[False, True, True], [False, False, True]])  # of which the mask is the inverse


class Exact(nn.Module):
    """What sampling needs of a denoiser, around a closed form."""

    classes, label_optional, sampler, device = 0, True, None, torch.device("cpu")
    process, stages = msd.EDM(sigma_max=20.0), msd.Stages((0.1, 2.0))

    def __init__(self, estimate, shape=SHAPE):
        super().__init__()
        self.estimate, self.shape = estimate, shape

    def forward(self, x, sigma, conditioning):
        return self.estimate(x, sigma)

    def offload(self, stage):
        pass


class Correlated:
    """The exact denoiser of N(mean, covariance), all pixels correlated: mean + C (C + sigma^2)^-1 (x - mean)."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        factor = torch.randn(6, 6, generator=generator, dtype=torch.float64)
        self.mean = 0.3 * torch.randn(6, generator=generator, dtype=torch.float64)
        self.covariance = factor @ factor.T / 12

    def __call__(self, x, sigma):
        gain = torch.linalg.solve(self.covariance + sigma**2 * torch.eye(6, dtype=torch.float64), self.covariance)
        return (self.mean + (x.double().flatten(1) - self.mean) @ gain).reshape(x.shape).to(x)

    def given(self, kept, values):
        """Mean and covariance of the other pixels, given some."""
        rest = ~kept
        cross = self.covariance[rest][:, kept] @ torch.linalg.inv(self.covariance[kept][:, kept])
        mean = self.mean[rest] + cross @ (values - self.mean[kept])
        return mean, self.covariance[rest][:, rest] - cross @ self.covariance[kept][:, rest]


@pytest.fixture(scope="module")
def denoiser():
    return tiny.denoiser()


def pictures(count=1, shape=tiny.SHAPE):
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(3)) * 2 - 1


def test_images_start_noised_and_follow_the_flow():
    gaussian = GaussianDenoiser(0.3, 0.5)
    images = pictures(4, SHAPE)
    samples = msd.sample(Exact(gaussian), 4, seed=7, start=msd.Start(images=images, sigma=1.5), steps=60)
    noise = seeded("prior", torch.arange(4) + 7, SHAPE)  # the noise of a seed is the same as without images
    expected = gaussian.flow(images + 1.5 * noise, 1.5, 0.0)
    torch.testing.assert_close(samples.images, expected, atol=2e-3, rtol=0)
    assert samples.nfe == 119 and samples.stage_calls[2] == 0 and min(samples.stage_calls[:2]) > 0


def test_from_the_highest_level_and_nothing_the_images_are_those_of_the_seeds(denoiser):
    plain = msd.sample(denoiser, 3, steps=4, seed=5)
    started = msd.sample(denoiser, 3, steps=4, seed=5, start=msd.Start(images=torch.zeros(1, *tiny.SHAPE)))
    assert torch.equal(plain.images, started.images) and plain.stage_calls == started.stage_calls


@pytest.mark.parametrize("solver", ["heun", "ancestral", "sde-dpmpp-2s"])
@pytest.mark.parametrize("resample", [1, 2])
def test_an_edited_image_is_that_of_its_seed_in_any_batch(denoiser, solver, resample):
    images, mask = pictures(3), torch.arange(8).expand(8, 8) < 4
    start = msd.Start(images=images, sigma=2.0, mask=mask, resample=resample)
    sampler = Sampler(solver=solver, steps=3)
    together = sampler.draw(denoiser, [4, 9, 2], start=start).images
    assert torch.equal(together, sampler.draw(denoiser, [4, 9, 2], start=start).images)
    by_twos = sampler.draw(denoiser, [4, 9, 2], start=start, batch_size=2).images
    torch.testing.assert_close(by_twos, together, atol=1e-5, rtol=1e-5)
    alone = msd.Start(images=images[1:2], sigma=2.0, mask=mask, resample=resample)
    torch.testing.assert_close(sampler.draw(denoiser, [9], start=alone).images, together[1:2], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("solver", SOLVERS)
def test_kept_pixels_stay_to_the_bit_in_every_solver(denoiser, solver):
    images, mask = pictures(), torch.zeros(1, 1, 8, 8)
    mask[..., 2:6, 2:6] = 1
    samples = msd.sample(denoiser, 2, solver=solver, steps=3, start=msd.Start(images=images, mask=mask))
    keep = mask.bool().expand(2, -1, -1, -1)
    assert torch.equal(samples.images[~keep], images.expand(2, -1, -1, -1)[~keep])
    assert not torch.equal(samples.images[keep], images.expand(2, -1, -1, -1)[keep])
    assert samples.nfe == sum(samples.stage_calls) == SOLVERS[solver].nfe(3)


def errors(resample, num=1000):
    """How far mean and covariance of the repainted pixels lie from the conditional's, as shares of its deviation."""
    data = Correlated()
    images = torch.zeros(1, *SHAPE)
    images[0, 0][KEPT] = data.mean.reshape(2, 3)[KEPT].float() + 0.4
    start = msd.Start(images=images, mask=~KEPT, resample=resample)
    samples = msd.sample(Exact(data), num, start=start, batch_size=num).images.double()
    pixels = samples.flatten(1)[:, ~KEPT.flatten()]
    mean, covariance = data.given(KEPT.flatten(), images[0, 0][KEPT].double())
    off = (pixels.mean(0) - mean).norm() / covariance.trace().sqrt()
    return float(off), float((pixels.T.cov() - covariance).norm() / covariance.norm())


@pytest.mark.slow
def test_resampling_brings_inpainting_nearer_to_the_conditional_of_gaussian_data():
    (mean_once, spread_once), (mean_often, spread_often) = errors(1), errors(20)
    assert mean_often < 0.16 and spread_often < 0.14
    assert mean_once > 1.8 * mean_often and spread_once > 1.8 * spread_often


@pytest.mark.slow
def test_inpainting_comes_to_the_conditional_of_gaussian_data():
    mean, spread = errors(100)
    assert mean < 0.08 and spread < 0.1  # of which the noise of 1,000 draws is 0.03 and 0.05


def test_resampling_counts_traces_and_leaves_the_last_step_alone(denoiser):
    start = msd.Start(images=pictures(), mask=torch.ones(8, 8, dtype=torch.bool), resample=3)
    trace, calls = Trace(1), []
    hook = denoiser.network.register_forward_pre_hook(lambda *_: calls.append(1))
    samples = msd.sample(denoiser, 1, solver="euler", steps=4, start=start, callback=trace)
    hook.remove()
    assert samples.nfe == len(calls) == 3 * 3 + 1 and len(trace.sigmas) == 4
    assert trace.sigmas == pytest.approx(Sampler(solver="euler", steps=4).levels(denoiser.process)[:4].tolist())


@pytest.mark.parametrize("options", [{}, {"solver": "ancestral"}, {"churn": 10.0}])
def test_the_ends_of_a_path_are_the_images_of_the_seeds(options):
    exact = Exact(Correlated())
    path = msd.interpolate(exact, 3, 11, 5, steps=6, **options)
    ends = msd.sample(exact, seeds=[3, 11], steps=6, **options).images
    assert torch.equal(path.images[[0, -1]], ends) and path.seeds == (0, 1, 2, 3, 4)
    again = msd.interpolate(exact, 11, 3, 5, steps=6, **options).images
    torch.testing.assert_close(again.flip(0), path.images)
    assert torch.equal(msd.interpolate(exact, 3, 11, 5, steps=6, batch_size=2, **options).images, path.images)


def test_noise_between_seeds_is_as_long_as_noise():
    shape = (3, 16, 16)
    noise = between(0, 1, 9)("prior", torch.arange(9), shape).flatten(1)
    ends = noise[[0, -1]].norm(dim=1)
    assert ((noise.norm(dim=1) > ends.min() * 0.999) & (noise.norm(dim=1) < ends.max() * 1.001)).all()
    angles = torch.cosine_similarity(noise[:-1], noise[1:]).arccos()
    torch.testing.assert_close(
        angles, angles[:1].expand(8), atol=0.03, rtol=0
    )  # of 0.2; exactly even if both were equally long


@pytest.mark.parametrize(
    ("start", "options", "words"),
    [
        ({"images": pictures(2)}, {}, "the images to start from must be 1 or 3, one for each drawn, got 2"),
        (
            {"images": torch.zeros(1, 3, 8, 8)},
            {},
            "the images to start from must be of shape (N, 1, 8, 8), got (1, 3, 8, 8)",
        ),
        ({"images": torch.zeros(1, 8, 8)}, {}, "the images to start from must be of shape (N, 1, 8, 8), got (1, 8, 8)"),
        ({"images": torch.zeros(1, 1, 8, 8, dtype=torch.uint8)}, {}, "must be floats in the unit of the data"),
        ({"sigma": 1000.0}, {}, "from-sigma must be above 0.00317798 and at most 152"),
        ({"sigma": 0.001}, {}, "from-sigma must be above 0.003"),
        ({"sigma": float("nan")}, {}, "from-sigma must be above 0.003"),
        ({"mask": torch.ones(4, 8)}, {}, "the mask must be 8 x 8, as the images, got 4 x 8"),
        ({"mask": torch.ones(2, 1, 8, 8)}, {}, "the mask must be 8 x 8, as the images, got 2 x 1 x 8 x 8"),
        ({"resample": 2}, {}, "resample must be 1 without a mask, got 2"),
        ({"resample": 0, "mask": torch.ones(8, 8)}, {}, "resample must be at least 1, got 0"),
        ({"resample": 2, "mask": torch.ones(8, 8)}, {"churn": 1.0}, "resample 2 adds noise before each step, as churn"),
    ],
)
def test_what_does_not_fit_is_one_line(denoiser, start, options, words):
    with pytest.raises(ConfigError) as caught:
        msd.sample(denoiser, 3, start=msd.Start(**{"images": pictures()} | start), **options)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("seeds", "num", "words"),
    [((3, 3), 4, "two different seeds, got 3 twice"), ((3, 4), 1, "at least 2"), ((-1, 4), 4, "in [0, 2^63), got -1")],
)
def test_wrong_paths_are_one_line(denoiser, seeds, num, words):
    with pytest.raises(ConfigError) as caught:
        msd.interpolate(denoiser, *seeds, num)
    assert words in str(caught.value) and "\n" not in str(caught.value)
