import json
import math
from dataclasses import dataclass
from typing import Literal

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from closed_forms import GaussianDenoiser
from multistage_diffusion.clustering import cluster
from multistage_diffusion.clustering.gradient import gradient_affinity
from multistage_diffusion.clustering.levels import noise_levels
from multistage_diffusion.clustering.optimal import extrapolated
from multistage_diffusion.clustering.options import ClusterOptions
from multistage_diffusion.clustering.posterior import OptimalDenoiser
from multistage_diffusion.clustering.similarity import (
    Similarity,
    bootstrap_weights,
    compare_levels,
    compare_to_ends,
    draw_grid,
    draw_random,
    first_crossings,
)
from multistage_diffusion.data import load_data
from multistage_diffusion.data.user import as_data
from multistage_diffusion.errors import ConfigError, DataError
from multistage_diffusion.noise import EDM, LDM, VE, VP, Flow
from multistage_diffusion.stages import Stages


@pytest.fixture(scope="module")
def digits():
    return torch.from_numpy(load_digits().images).float()[:, None] / 8 - 1


def curves(u, low, high, pairs=8):
    """Similarities that are functions of u alone."""
    grid = ((torch.arange(200) + 0.5) / 200).double().expand(pairs, -1) if u is None else u
    return Similarity(grid, low(grid), high(grid), torch.ones_like(grid))


def test_algorithm_1_finds_the_crossing_of_known_curves():
    """The mean of 1 - u over [0, tau] is 1 - tau/2, which is .9 at tau = .2; the upper end mirrors it."""
    found = first_crossings(curves(None, lambda u: 1 - u, lambda u: u), 0.9, resamples=20, seed=0)
    assert found.edges == pytest.approx((0.2, 0.8), abs=0.005)
    assert found.intervals[0] == pytest.approx((0.2, 0.2), abs=0.005)


def test_the_first_crossing_counts_not_the_far_side():
    """A U-shaped curve climbs back over alpha: the literal arg max is the whole range, the first crossing is not."""
    u_shaped = curves(None, lambda u: 1 - 0.9 * torch.exp(-(((u - 0.25) / 0.08) ** 2)), lambda u: u)
    found = first_crossings(u_shaped, 0.8, resamples=0, seed=0)
    assert float(u_shaped.low.mean()) > 0.8
    assert 0.15 < found.edges[0] < 0.3


@pytest.mark.parametrize(
    ("low", "high", "message"),
    [
        (lambda u: 0.5 * torch.ones_like(u), lambda u: u, "no noise level is similar enough to the low-noise end"),
        (lambda u: 1 - u, lambda u: 0 * u, "no noise level is similar enough to the high-noise end"),
        (lambda u: torch.ones_like(u), lambda u: u, "every noise level is similar to the low-noise end"),
        (lambda u: 1 - 0.25 * u, lambda u: 0.75 + 0.25 * u, "the edges cross"),
    ],
)
def test_criteria_without_an_answer_are_refused(low, high, message):
    with pytest.raises(ConfigError, match=message):
        first_crossings(curves(None, low, high), 0.9, resamples=0, seed=0)


@pytest.mark.parametrize("reference", ["data-mean", "definition"])
def test_similarities_agree_with_the_definition_of_algorithm_1(digits, reference):
    """Formed from eps* of the direct denoiser, as the paper writes (or codes) it."""
    process, eta = VP(), 0.05
    images = digits[:300]
    denoiser = OptimalDenoiser(images)
    pairs = draw_random(process, "time", len(images), 128, seed=3)
    result = compare_to_ends(denoiser, pairs, eta, reference, process.sigma_max)
    from multistage_diffusion import rng

    noise = rng.normal(3, "cluster/noise", torch.arange(len(pairs.image)), (1, 8, 8)).double()
    x0 = images[pairs.image].double()

    def predicted(sigma):
        column = sigma[:, None, None, None]
        x = x0 + column * noise
        return (x - denoiser(x, sigma)) / column, (x - images.double().mean(0)) / column

    top = predicted(torch.full((len(x0),), process.sigma_max, dtype=torch.float64))[0]
    for column in range(pairs.sigma.shape[1]):
        optimal, constant = predicted(pairs.sigma[:, column])
        low = ((optimal - noise).abs() <= eta).flatten(1).double().mean(1)
        high = (optimal - (constant if reference == "data-mean" else top)).abs() <= eta
        assert float((low - result.low[:, column]).abs().max()) <= 2 / 64
        assert float((high.flatten(1).double().mean(1) - result.high[:, column]).abs().max()) <= 2 / 64


@pytest.mark.parametrize(
    "options", [{}, {"stages": 2, "unit_range": True}, {"max_images": 400}, {"method": "gradient"}]
)
def test_pixels_give_what_their_floats_give(digits, options):
    pixels = ((digits[:500] + 1) * 127.5).round().to(torch.uint8)
    floats = pixels.float().div(127.5).sub(1)
    found = [
        cluster(images, VP(), samples=800, resamples=20, denoiser=Affine(), **options) for images in (pixels, floats)
    ]
    assert found[0].stages.edges == found[1].stages.edges
    assert found[0].intervals == found[1].intervals


def test_a_device_may_be_a_name(digits):
    by_name, plain = (cluster(digits[:300], VP(), samples=800, resamples=0, device=device) for device in ("cpu", None))
    assert by_name.stages == plain.stages


def test_gradients_are_taken_on_the_device_asked_for(digits):
    class Elsewhere(nn.Linear):
        def forward(self, x, sigma):
            raise RuntimeError(f"called on {x.device} with weights on {self.weight.device}")

    denoiser = Elsewhere(2, 2)
    for device, seen in (("meta", "meta"), (torch.device("meta"), "meta"), ("cpu", "cpu"), (None, "cpu")):
        with pytest.raises(RuntimeError, match=f"called on {seen} with weights on {seen}"):
            cluster(digits[:100], VP(), method="gradient", denoiser=denoiser, device=device)
    assert denoiser.weight.device.type == "cpu"


def test_matrices_are_similarities_and_inner_products(digits):
    denoiser = OptimalDenoiser(digits[:200])
    pairs = draw_grid(VP(), "time", 200, 60, 6, seed=0)
    found = compare_levels(denoiser, pairs, 0.05)
    assert found.similar.shape == (10, 6, 6)
    torch.testing.assert_close(found.similar, found.similar.mT)
    torch.testing.assert_close(found.similar.diagonal(dim1=1, dim2=2), torch.ones(10, 6))
    assert bool((torch.linalg.eigvalsh(found.gram.double()) > -1e-6).all())


def test_draws_fill_the_measure_evenly_and_images_do_not_repeat():
    pairs = draw_random(VP(), "time", 1000, 4000, seed=1)
    assert pairs.u.numel() == 4000
    assert len(pairs.image.unique()) == len(pairs.image)
    counts = torch.histc(pairs.u.float().flatten(), 8, 0, 1)
    assert counts.tolist() == [500] * 8


def test_bootstrap_weights_count_pairs():
    weights = bootstrap_weights(30, 5, seed=0)
    assert weights.shape == (6, 30)
    assert weights[0].tolist() == [1.0] * 30
    assert weights.sum(1).tolist() == [30.0] * 6


@pytest.mark.parametrize(("process", "tolerance"), [(VP(), 0.02), (EDM(), 0.06), (LDM(), 0.06)])
def test_edges_of_digits_are_about_the_same_sigma_in_every_process(digits, process, tolerance):
    """Regression: an independent prototype found t = .189/.579 under VP."""
    found = cluster(digits, process, samples=2000, resamples=50)
    clock = VP().t(torch.tensor(found.stages.edges, dtype=torch.float64)).tolist()
    assert clock == pytest.approx((0.189, 0.579), abs=tolerance)
    assert all(low < edge < high for edge, (low, high) in zip(found.stages.edges, found.intervals, strict=True))
    assert process.t(torch.tensor(found.stages.edges, dtype=torch.float64)).tolist() == pytest.approx(found.edges_t)


def test_the_paper_reading_halves_the_images(digits):
    half = cluster(digits, VP(), samples=2000, unit_range=True, resamples=0)
    same = cluster(as_data(digits / 2 + 0.5, scale="none"), VP(), samples=2000, resamples=0)
    assert half.stages.edges == pytest.approx(same.stages.edges, rel=1e-3)


def test_a_constant_border_changes_nothing(digits):
    padded = nn.functional.pad(digits[:400], (2, 2, 2, 2), value=-1.0)
    assert cluster(digits[:400], VP(), samples=800).stages == cluster(padded, VP(), samples=800).stages


def test_three_stages_of_the_baselines_under_vp(digits):
    timestep, snr = (cluster(digits[:4], VP(), method=method) for method in ("timestep", "snr"))
    assert timestep.edges_t == pytest.approx((0.330, 0.670), abs=0.005)
    assert snr.edges_t == pytest.approx((0.348, 0.709), abs=0.005)
    assert timestep.intervals == ()


@pytest.mark.parametrize("objective", ["similarity", "variance"])
@pytest.mark.parametrize("stages", [2, 3, 8])
def test_any_number_of_stages(digits, objective, stages):
    found = cluster(digits[:300], VP(), stages=stages, objective=objective, eta=0.05, samples=1000, resamples=10)
    assert len(found.stages) == stages
    assert all(b >= a for a, b in zip(found.elbow[:-1], found.elbow[1:], strict=True))
    assert found.elbow[-1] <= found.ceiling * (1 + 1e-6)


def test_the_training_measure_moves_edges_into_the_training_mass(digits):
    by_time = cluster(digits, EDM(), objective="variance", samples=2000, resamples=0)
    by_training = cluster(digits, EDM(), objective="variance", measure="training", samples=2000, resamples=0)
    assert max(by_training.shares) < max(by_time.shares)
    assert sum(by_training.shares) == pytest.approx(1.0)


def test_classes_and_seeds(digits):
    labels = torch.from_numpy(load_digits().target)
    plain = cluster(digits, VP(), samples=1000, resamples=0)
    assert plain.stages == cluster(digits, VP(), samples=1000, resamples=0).stages
    assert plain.stages != cluster(digits, VP(), samples=1000, resamples=0, seed=1).stages
    within = cluster(digits, VP(), samples=1000, resamples=0, labels=labels)
    assert within.stages.edges[1] < plain.stages.edges[1]  # a class is closer to its mean than the data to theirs
    assert within.similarity is not None and plain.similarity is not None
    assert bool((within.similarity.effective.mean(0) < plain.similarity.effective.mean(0) + 1e-3).all())


def test_options_are_a_record_and_single_ones_replace_its_values(digits):
    options = ClusterOptions(stages=4, samples=1000, resamples=0)
    assert options.criterion == "variance" and options.draws == 1000
    assert cluster(digits[:300], VP(), options).stages == cluster(digits[:300], VP(), stages=4, samples=1000).stages
    three = cluster(digits[:300], VP(), options, stages=3)
    assert three.stages == cluster(digits[:300], VP(), samples=1000).stages
    assert three.stages.provenance["options"]["resamples"] == 0
    with pytest.raises(TypeError, match="stags"):
        cluster(digits, VP(), stags=3)


def test_classes_are_those_of_the_data_where_none_are_given():
    data, options = load_data("digits"), ClusterOptions(samples=1000, resamples=0, max_images=600)
    by_class = cluster(data, VP(), options, by_class=True)
    assert by_class.stages == cluster(data, VP(), options, labels=data.labels).stages
    assert by_class.stages != cluster(data, VP(), options).stages
    assert by_class.stages.provenance["options"]["by_class"]
    with pytest.raises(ConfigError, match="--by-class needs data with classes; the data has none"):
        cluster(data.floats(), VP(), options, by_class=True)
    with pytest.raises(ConfigError, match="--by-class needs --method optimal-denoiser; it is snr"):
        ClusterOptions(method="snr", by_class=True)
    with pytest.raises(DataError, match="labels must be 1297 whole numbers"):
        cluster(data, VP(), options, labels=torch.zeros(5, dtype=torch.int64))


def test_a_process_of_the_users_own_is_clustered_under(digits, tmp_path):
    """Its time is sigma^(1/3), uniform in training: a VP of the same range has the same denoiser at the same sigma."""

    @dataclass(frozen=True, kw_only=True)
    class Cubic(VE):
        kind: Literal["cubic-of-a-test"] = "cubic-of-a-test"
        sigma_min: float = 0.01
        sigma_max: float = 80.0

        def sigma(self, t):
            return self.sigma_max * t**3

        def t(self, sigma):
            return (sigma / self.sigma_max) ** (1 / 3)

    found = cluster(digits, Cubic(), samples=2000, resamples=20)
    reference = cluster(digits, VP(), samples=2000, resamples=20)
    found.stages.save(tmp_path / "stages.json")
    document = json.loads((tmp_path / "stages.json").read_text())
    assert document["process"] == {"kind": "cubic-of-a-test", "sigma_min": 0.01, "sigma_max": 80.0}
    assert document["edges_t"] == pytest.approx([(edge / 80) ** (1 / 3) for edge in found.stages.edges])
    assert found.stages.edges == pytest.approx(reference.stages.edges, rel=0.5)
    assert sum(found.shares) == pytest.approx(1.0)


def test_fields_of_many_channels_are_clustered_as_they_are():
    waves = torch.linspace(0, 6, 16)
    phases = torch.rand(400, 7, 1, 1, generator=torch.Generator().manual_seed(0)) * 6
    found = cluster(3.0 + 2.0 * torch.sin(waves[None, None, None] + phases), VP(), samples=1000, resamples=0)
    assert found.stages.provenance["data"]["shape"] == [7, 1, 16]
    assert 0 < found.stages.edges[0] < found.stages.edges[1]


def test_a_part_of_the_images_extrapolates_to_all(digits):
    whole = cluster(digits, VP(), samples=2000)
    part = cluster(digits, VP(), samples=2000, max_images=800)
    direct = cluster(digits[:800], VP(), samples=2000)
    record = part.stages.provenance["extrapolation"]
    assert record["sizes"] == [200, 400, 800]
    assert abs(part.edges_t[0] - whole.edges_t[0]) < abs(direct.edges_t[0] - whole.edges_t[0])
    low, high = part.stages.provenance["intervals_t"][0]
    assert low < whole.edges_t[0] < high


def test_the_file_holds_how_the_stages_were_found(digits, tmp_path):
    found = cluster(digits, Flow(), samples=1000, source="digits")
    found.stages.save(tmp_path / "stages.json")
    document = json.loads((tmp_path / "stages.json").read_text())
    assert Stages.load(tmp_path / "stages.json") == found.stages
    assert document["data"]["images"] == 1797
    assert len(document["data"]["sha256"]) == 64
    assert document["process"]["kind"] == "flow"
    assert document["options"]["eta"] == 2 / 256
    assert document["edges_t"] == pytest.approx(list(found.edges_t))


def test_a_line_through_parts_that_have_no_edge_is_refused():
    """Two images may be so alike that every level agrees; a straight line through that means nothing."""
    whole = curves(None, lambda u: 1 - u, lambda u: u)
    blind = curves(None, lambda u: torch.ones_like(u), lambda u: u)
    options = ClusterOptions(eta=0.1, max_images=8, resamples=0)
    with pytest.raises(ConfigError, match="cannot be extrapolated from"):
        extrapolated([blind, whole, whole], [2, 4, 8], 16, 0.8, (0.7, 0.9), options)


@pytest.mark.parametrize(
    ("images", "options", "error", "message"),
    [
        (1, {}, DataError, "at least two images to train on, got 1"),
        (2, {}, DataError, "2 images cannot tell 3 stages apart"),
        (9, {"alpha": 1.2}, ConfigError, "alpha must be between 0 and 1, got 1.2"),
        (9, {"eta": 0.0}, ConfigError, "eta must be positive, got 0.0"),
        (9, {"stages": 9}, ConfigError, "stages must be from 2 to 8, got 9"),
        (9, {"stages": 4, "objective": "crossing"}, ConfigError, "crossing finds 3 stages"),
        (9, {"objective": "sum-of-means"}, ConfigError, "degenerate"),
        (9, {"method": "snrr"}, ConfigError, 'did you mean "snr"'),
        (9, {"method": "gradient"}, ConfigError, "needs a trained denoiser"),
        (9, {"eta": 1e9}, ConfigError, "every noise level is similar"),
    ],
)
def test_what_cannot_be_clustered_is_refused_in_one_line(digits, images, options, error, message):
    with pytest.raises(error, match=message) as caught:
        cluster(digits[:images], VP(), **options)
    assert "\n" not in str(caught.value)


def test_images_without_differences_are_refused(digits):
    with pytest.raises(DataError, match="all 5 images are equal"):
        cluster(digits[:1].expand(5, -1, -1, -1), VP())
    broken = digits[:5].clone()
    broken[2, 0, 3, 3] = math.nan
    with pytest.raises(DataError, match="not finite"):
        cluster(broken, VP())


class Affine(nn.Module):
    """Two parameters: one matters at low noise, one at high noise."""

    def __init__(self):
        super().__init__()
        self.low, self.high = nn.Parameter(torch.tensor(0.3)), nn.Parameter(torch.tensor(0.2))

    def forward(self, x, sigma):
        near = torch.exp(-(sigma[:, None, None, None] ** 2))
        return (near * self.low + (1 - near) * self.high) * x


def test_gradient_affinity_separates_what_different_parameters_learn(digits):
    u = (torch.arange(20, dtype=torch.float64) + 0.5) / 20
    affinity = gradient_affinity(Affine(), digits[:64], noise_levels(VP(), "time", u), VP())
    torch.testing.assert_close(affinity.diagonal(), torch.ones(20, dtype=torch.float64), atol=1e-5, rtol=0)
    torch.testing.assert_close(affinity, affinity.T)
    assert float(affinity[0, 1].abs()) > 0.99 > 0.2 > float(affinity[0, -1].abs())
    found = cluster(digits, VP(), method="gradient", stages=2, denoiser=Affine(), samples=1000)
    assert len(found.stages) == 2


def test_a_long_gradient_is_sketched_to_the_same_cosines(digits, monkeypatch):
    network = nn.Linear(64, 64)

    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network

        def forward(self, x, sigma):
            return self.network(x.flatten(1) / (1 + sigma[:, None])).reshape(x.shape)

    sigmas = torch.tensor([0.1, 1.0, 10.0], dtype=torch.float64)
    exact = gradient_affinity(Flat(), digits[:32], sigmas, VP())
    monkeypatch.setattr("multistage_diffusion.clustering.gradient._SKETCH", 1024)
    torch.testing.assert_close(gradient_affinity(Flat(), digits[:32], sigmas, VP()), exact, atol=0.1, rtol=0)


def test_a_denoiser_without_parameters_has_no_gradients(digits):
    class Fixed(nn.Module):
        def forward(self, x, sigma):
            return GaussianDenoiser(0.0, 1.0)(x, sigma)

    with pytest.raises(ConfigError, match="without"):
        gradient_affinity(Fixed(), digits[:4], torch.tensor([1.0]), VP())
