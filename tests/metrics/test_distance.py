"""Distances against scipy, closed forms, hand counts and each other."""

import numpy as np
import pytest
import scipy.linalg
import torch

from multistage_diffusion.errors import ConfigError, DataError, NumericsError
from multistage_diffusion.metrics.distance import Distances, prdc
from multistage_diffusion.metrics.features import Features


def normal(count, features=8, seed=0, mean=0.0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, features, generator=generator, dtype=torch.float64) * scale + mean


def measure(metrics, real, generated, batch=10_000, **options):
    distances = Distances(metrics, real.shape[1], **options)
    for kind, rows in ((True, real), (False, generated)):
        for part in rows.float().split(batch):
            distances.update(Features(part, part[:, :4]), real=kind)
    return distances.figures()


def frechet_by_scipy(a, b):
    a, b = a.float().double().numpy(), b.float().double().numpy()
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(first @ second).real
    return np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(first + second - 2 * root)


@pytest.mark.parametrize(("count", "features"), [(300, 8), (500, 64)])
def test_fd_agrees_with_scipy(count, features):
    a, b = normal(count, features), normal(count, features, seed=1, mean=0.3, scale=1.4)
    assert measure(["fd"], a, b)["fd"] == pytest.approx(frechet_by_scipy(a, b), rel=1e-6)


def test_fd_of_two_gaussians_is_their_closed_form():
    a = normal(500)
    a = a - a.mean(0)
    a = a @ torch.linalg.inv(torch.linalg.cholesky(a.T.cov())).T  # exactly mean 0, covariance 1
    shift, scale = torch.linspace(0.1, 0.8, 8, dtype=torch.float64), torch.linspace(0.5, 2.0, 8, dtype=torch.float64)
    expected = float(shift.square().sum() + (scale - 1.0).square().sum())
    assert measure(["fd"], a, a * scale + shift)["fd"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("count", "features"), [(500, 64), (40, 64), (2, 3)])
def test_fd_of_a_set_with_itself_is_zero(count, features):
    same = normal(count, features, mean=2.0)
    assert 0 <= measure(["fd"], same, same)["fd"] <= 1e-6


def test_kid_by_hand():
    a, b = normal(7, 3), normal(9, 3, seed=1, mean=0.5)

    def kernel(x, y):
        return (float(x @ y) / 3 + 1) ** 3

    first, second = a.float().double(), b.float().double()
    second = second[:7]
    within = sum(kernel(x, y) for i, x in enumerate(first) for j, y in enumerate(first) if i != j) / 42
    within += sum(kernel(x, y) for i, x in enumerate(second) for j, y in enumerate(second) if i != j) / 42
    across = sum(kernel(x, y) for x in first for y in second) / 49
    result = measure(["kid"], a, b[:7])
    assert result["kid"] == pytest.approx(within - 2 * across, rel=1e-9)
    assert result["kid_std"] == 0.0


def test_inception_score_by_hand():
    rows = normal(300)
    probability = rows.float().double()[:, :4].softmax(1)
    information = (probability * (probability / probability.mean(0)).log()).sum(1).mean()
    result = measure(["is"], rows, rows)
    assert result["is"] == pytest.approx(float(information.exp()), rel=1e-9)
    sure = Distances(["is"], 8)
    sure.update(Features(torch.zeros(40, 8), torch.eye(4).repeat(10, 1) * 200), real=False)
    assert sure.figures() == {"is": pytest.approx(4.0), "is_std": 0.0}


def naive_prdc(real, generated, k):
    def distance(a, b):
        return [[float((x - y).square().sum().sqrt()) for y in b] for x in a]

    radius_real = [sorted(row)[k] for row in distance(real, real)]
    radius_generated = [sorted(row)[k] for row in distance(generated, generated)]
    across = distance(real, generated)
    columns = list(zip(*across, strict=True))
    balls = [sum(d < r for d, r in zip(column, radius_real, strict=True)) for column in columns]
    return {
        "precision": np.mean([count > 0 for count in balls]),
        "recall": np.mean([any(d < r for d, r in zip(row, radius_generated, strict=True)) for row in across]),
        "density": np.mean(balls) / k,
        "coverage": np.mean([min(row) < r for row, r in zip(across, radius_real, strict=True)]),
    }


@pytest.mark.parametrize("k", [1, 3, 5])
def test_prdc_agrees_with_a_naive_count(k, monkeypatch):
    monkeypatch.setattr("multistage_diffusion.metrics.distance._BLOCK", 7)
    real, generated = normal(40, 3), normal(30, 3, seed=1, mean=0.7, scale=0.8)
    assert prdc(real, generated, k) == pytest.approx(naive_prdc(real, generated, k))


def test_prdc_of_extremes():
    real = normal(50, 4)
    same = prdc(real, real)
    assert same["precision"] == same["recall"] == same["coverage"] == 1.0 <= same["density"]
    far = prdc(real, real + 100.0)
    assert set(far.values()) == {0.0}


def test_batches_and_the_global_generator_do_not_matter(monkeypatch):
    monkeypatch.setattr("multistage_diffusion.metrics.distance._SUBSET", 100)
    real, generated = normal(300), normal(400, seed=1, mean=0.2)
    metrics = ["fd", "fd_infinity", "kid", "is", "prdc"]
    torch.manual_seed(1)
    state = torch.get_rng_state()
    once = measure(metrics, real, generated, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    again = measure(metrics, real, generated, batch=97, seed=3)
    assert list(once) == ["fd", "fd_infinity", "kid", "kid_std", "is", "is_std", "prdc"]
    for name, figure in once.items():
        assert again[name] == pytest.approx(figure, rel=1e-9)
    assert once["kid_std"] > 0


def test_fd_infinity_takes_the_bias_away():
    real, generated = normal(20_000, 16), normal(600, 16, seed=1)  # the same distribution: the true distance is 0
    result = measure(["fd", "fd_infinity"], real, generated)
    assert result["fd"] > 0.1
    assert abs(result["fd_infinity"]) < 0.15 * result["fd"]


def test_too_little_is_refused_or_cautioned():
    rows = normal(5)
    with pytest.raises(DataError, match="at least 2 generated images"):
        measure(["fd"], rows, rows[:1])
    with pytest.raises(DataError, match="prdc needs more than 5"):
        measure(["prdc"], rows, rows)
    with pytest.raises(DataError, match="fd_infinity needs at least 32"):
        measure(["fd_infinity"], rows, rows)
    distances = Distances(["fd"], 8)
    distances.update(Features(rows.float(), rows.float()), real=True)
    assert len(distances.cautions()) == 2
    assert Distances(["is"], 8).cautions() == ()


def test_wrong_input_is_refused():
    with pytest.raises(ConfigError, match='no metric fid; did you mean "fd"'):
        Distances(["fid"], 8)
    with pytest.raises(ConfigError, match="at least one metric"):
        Distances([], 8)
    with pytest.raises(DataError, match="must have 8 numbers, got 3"):
        Distances(["fd"], 8).update(Features(torch.zeros(2, 3), torch.zeros(2, 3)), real=True)
    with pytest.raises(NumericsError, match="generated images hold NaN"):
        Distances(["fd"], 2).update(Features(torch.full((2, 2), torch.nan), torch.zeros(2, 3)), real=False)
