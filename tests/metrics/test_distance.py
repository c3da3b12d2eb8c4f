"""Distances against scipy, closed forms, hand counts and each other."""

import warnings

import numpy as np
import pytest
import scipy.linalg
import torch

from multistage_diffusion.errors import ConfigError, DataError, NumericsError
from multistage_diffusion.metrics import table
from multistage_diffusion.metrics.distance import FrechetDistance, InceptionScore, KernelDistance, prdc
from multistage_diffusion.metrics.extractor import Features
from multistage_diffusion.metrics.statistics import Statistics
from multistage_diffusion.metrics.table import METRICS, feature_metrics, keeps_features, with_followers


def normal(count, features=8, seed=0, mean=0.0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, features, generator=generator, dtype=torch.float64) * scale + mean


def statistics(rows, batch=10_000, *, keep=True, classes=4, first=0):
    classes = min(classes, rows.shape[1])
    result = Statistics(rows.shape[1], classes, keep=keep, first=first)
    for part in rows.float().split(batch):
        result.update(Features(part, part[:, :classes]))
    return result


def measure(metrics, real, generated, batch=10_000, **options):
    metrics = feature_metrics(metrics)
    kept = keeps_features(metrics)
    sets = [statistics(rows, batch, keep=keep) for rows, keep in zip((real, generated), kept, strict=True)]
    return table.measure(metrics, *sets, **options)


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
    sure = statistics(torch.eye(4).repeat(10, 1) * 200)
    assert table.measure([METRICS["is"]], Statistics(4, 4), sure) == {
        "is": pytest.approx(4.0),
        "is_std": 0.0,
        "is_splits": 1,
        "cautions": ["is is of one split of 40 images; from 10000 on it is a mean over 10, as published"],
    }


def test_figures_agree_with_torchmetrics():
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.inception import InceptionScore
    from torchmetrics.image.kid import KernelInceptionDistance

    class Bare(torch.nn.Module):
        num_features = 16

        def forward(self, features):
            return features

    real, generated = normal(200, 16), normal(200, 16, seed=1, mean=0.3, scale=1.2)
    figures = measure(["fd", "kid"], real, generated)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of memory, and of one split
        references = {
            "fd": FrechetInceptionDistance(Bare()).set_dtype(torch.float64),
            "kid": KernelInceptionDistance(Bare(), subsets=1, subset_size=200).set_dtype(torch.float64),
        }
        score = InceptionScore(Bare(), splits=1)
        score.update(generated.float().double())
        information = float(score.compute()[0])
    for name, metric in references.items():
        metric.update(real.float().double(), real=True)
        metric.update(generated.float().double(), real=False)
        figure = metric.compute()
        assert figures[name] == pytest.approx(float(figure[0] if name == "kid" else figure), rel=1e-7)
    alone = table.measure([METRICS["is"]], Statistics(16, 16), statistics(generated, classes=16))
    assert alone["is"] == pytest.approx(information, rel=1e-7)


def test_a_tenth_of_the_images_makes_a_split():
    rows = normal(203).float().double()
    scores = []
    for k in range(10):
        probability = rows[k::10, :4].softmax(1)
        scores.append((probability * (probability / probability.mean(0)).log()).sum(1).mean().exp())
    result = measure([InceptionScore(split_size=20)], rows, rows, batch=7)
    assert result["is"] == pytest.approx(float(torch.stack(scores).mean()), rel=1e-9)
    assert result["is_std"] == pytest.approx(float(torch.stack(scores).std()), rel=1e-9)
    assert result["is_splits"] == 10


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


def test_batches_and_the_global_generator_do_not_matter():
    real, generated = normal(300), normal(400, seed=1, mean=0.2)
    metrics = ["fd", "fd_infinity", KernelDistance(subset_size=100), InceptionScore(split_size=100), "prdc"]
    torch.manual_seed(1)
    state = torch.get_rng_state()
    once = measure(metrics, real, generated, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    again = measure(metrics, real, generated, batch=97, seed=3)
    assert list(once) == [
        "fd",
        "fd_infinity",
        "fd_infinity_images",
        "kid",
        "kid_std",
        "is",
        "is_std",
        "is_splits",
        "prdc",
        "cautions",
    ]
    assert once.pop("cautions") == again.pop("cautions")
    for name, figure in once.items():
        assert again[name] == pytest.approx(figure, rel=1e-9)
    assert once["kid_std"] > 0 and once["is_std"] == 0.0


def test_fd_infinity_takes_the_bias_away():
    real, generated = normal(20_000, 16), normal(600, 16, seed=1)  # the same distribution: the true distance is 0
    result = measure(["fd", "fd_infinity"], real, generated)
    assert result["fd"] > 0.1
    assert abs(result["fd_infinity"]) < 0.15 * result["fd"]


def test_too_little_is_refused_or_cautioned():
    rows = normal(5)
    with pytest.raises(
        DataError, match=r"at least 2 generated images, and there is 1; raise num, or take a folder of more images$"
    ):
        measure(["fd"], rows, rows[:1])
    with pytest.raises(
        DataError,
        match=r"prdc needs more than 5 .*; raise num, or take a folder of more images, or leave prdc out of metrics$",
    ):
        measure(["prdc"], rows, rows)
    with pytest.raises(
        DataError, match=r"fd_infinity needs at least 32 .*; raise num, or leave fd_infinity out of metrics$"
    ):
        measure(["fd_infinity"], rows, rows)
    assert len(FrechetDistance().cautions(5, 0, 8)) == 2
    assert FrechetDistance().cautions(16, 16, 8) == InceptionScore().cautions(5, 10_000, 8) == ()
    assert len(measure(["fd"], normal(20), normal(5))["cautions"]) == 1


def test_the_limit_stands_beside_the_plain_figure_when_few_images_are_drawn():
    def names(metrics, count):
        return [metric.name for metric in with_followers(feature_metrics(metrics), count, 64)]

    assert names(["fd", "kid"], 1_000) == ["fd", "kid", "fd_infinity"]
    for metrics, count in ((["fd"], 255), (["fd"], 50_000), (["kid"], 1_000), (["fd_infinity", "fd"], 1_000)):
        assert names(metrics, count) == metrics  # too few, customary, no fd, there already


@pytest.mark.parametrize("sizes", [(37, 263), (150, 150), (0, 300)])
def test_sets_may_come_from_several_processes(sizes):
    real, generated = normal(300), normal(300, seed=1, mean=0.2)
    whole = statistics(generated)
    start = [sum(sizes[:k]) for k in range(3)]
    parts = [statistics(generated[start[k] : start[k + 1]], first=start[k]) for k in range(2)]
    # Each sum is taken in the order of the calls: what `add` and `join` would get from the other process.
    names = ("total", "outer", "split_count", "split_probability", "split_information")
    summands = iter([torch.tensor(float(parts[1].count)).double(), *(getattr(parts[1], name) for name in names)])
    parts[0].combine(lambda values: values + next(summands), lambda rows: torch.cat((rows, parts[1].features)))
    assert torch.equal(parts[0].features, whole.features)
    metrics = ["fd", "fd_infinity", "kid", "is", "prdc"]
    once, again = (table.measure(feature_metrics(metrics), statistics(real), seen) for seen in (whole, parts[0]))
    assert once.pop("cautions") == again.pop("cautions")
    for name, figure in once.items():
        assert again[name] == pytest.approx(figure, rel=1e-9)
    assert again["is"] == pytest.approx(once["is"], rel=1e-12)


def test_wrong_input_is_refused():
    one = statistics(normal(5))
    with pytest.raises(ConfigError, match='no metric fid; did you mean "fd"'):
        feature_metrics(["fid"])
    with pytest.raises(ConfigError, match="at least one metric"):
        feature_metrics([])
    with pytest.raises(ConfigError, match="features that know classes"):
        table.measure([METRICS["is"]], one, statistics(normal(5), classes=0))
    with pytest.raises(DataError, match="must have 8 numbers, got 3"):
        one.update(Features(torch.zeros(2, 3), torch.zeros(2, 4)))
    with pytest.raises(NumericsError, match="hold NaN"):
        one.update(Features(torch.full((2, 8), torch.nan), torch.zeros(2, 4)))
