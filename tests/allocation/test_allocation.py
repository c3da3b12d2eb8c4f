"""Laws of loss against width and images, and the widths that a budget buys."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from multistage_diffusion.allocation import proxies
from multistage_diffusion.allocation.laws import (
    Law,
    Measurement,
    allocate_sampling,
    allocate_training,
    fit_law,
)
from multistage_diffusion.config import StagesConfig
from multistage_diffusion.data import Images
from multistage_diffusion.errors import ConfigError
from multistage_diffusion.recipes import recipe

LAWS = (
    Law(0.05, 3.0, 1.0, 40.0, 0.5, 0.25, 0.0),
    Law(0.02, 0.5, 1.0, 20.0, 0.5, 0.0, 0.0),
    Law(0.2, 0.01, 1.0, 5.0, 0.5, 0.5, 0.0),
)
SHARES = (0.3, 0.3, 0.4)
WIDTHS = (4, 8, 16, 32)
FLOPS = [[1.0 + width**2 / 100 for width in WIDTHS]] * 3


def loss(widths, images):
    return sum(share * law.loss(width, images) for share, law, width in zip(SHARES, LAWS, widths, strict=True))


@pytest.mark.parametrize("law", LAWS)
def test_a_law_is_recovered_from_its_own_values(law):
    points = [Measurement(w, n, (law.loss(w, float(n)),)) for w in (4, 8, 16) for n in (1_000, 4_000, 16_000)]
    fitted = fit_law(points, 0)
    assert fitted.error < 1e-6
    for width, images in ((6, 2_000), (32, 100_000)):
        assert fitted.loss(width, float(images)) == pytest.approx(law.loss(width, float(images)), rel=1e-3)


def test_parts_of_a_law_are_never_negative():
    noisy = [Measurement(w, n, (0.5 + 0.01 * w,)) for w in (4, 8, 16) for n in (100, 200)]  # wider is worse
    law = fit_law(noisy, 0)
    assert min(law.floor, law.capacity_scale, law.image_scale) >= 0


def test_a_law_needs_two_widths_and_two_lengths():
    with pytest.raises(ConfigError, match="at least two decoder widths"):
        fit_law([Measurement(8, 100, (1.0,)), Measurement(8, 200, (0.9,))], 0)


@given(budget=st.floats(5e3, 1e7))
@settings(max_examples=30, deadline=None)
def test_training_widths_equal_exhaustive_search(budget):
    result = allocate_training(LAWS, SHARES, WIDTHS, FLOPS, budget)

    def cost(widths):
        pairs = zip(SHARES, widths, strict=True)
        return sum(share * FLOPS[0][WIDTHS.index(width)] for share, width in pairs)

    best = min(itertools.product(WIDTHS, repeat=3), key=lambda widths: loss(widths, budget / cost(widths)))
    assert result.loss == pytest.approx(loss(best, budget / cost(best)), rel=1e-12)
    assert result.images * result.flops == pytest.approx(budget)


def test_sampling_widths_equal_exhaustive_search():
    calls = (10, 5, 5)
    for budget in (25.0, 60.0, 150.0, 300.0):
        result = allocate_sampling(LAWS, SHARES, WIDTHS, FLOPS, calls, budget, 10_000.0)
        allowed = [
            widths
            for widths in itertools.product(WIDTHS, repeat=3)
            if sum(n * FLOPS[0][WIDTHS.index(width)] for n, width in zip(calls, widths, strict=True)) <= budget
        ]
        assert result.loss == pytest.approx(min(loss(widths, 10_000.0) for widths in allowed), rel=1e-12)
        assert result.flops <= budget


def test_capacity_goes_where_it_helps():
    widths = allocate_training(LAWS, SHARES, WIDTHS, FLOPS, 1e6).capacities
    assert widths[0] > widths[1] > widths[2]


def test_budgets_that_buy_nothing_are_refused():
    with pytest.raises(ConfigError, match="less than one image costs"):
        allocate_training(LAWS, SHARES, WIDTHS, FLOPS, 0.5)
    with pytest.raises(ConfigError, match="below that of the narrowest decoders"):
        allocate_sampling(LAWS, SHARES, WIDTHS, FLOPS, (10, 5, 5), 10.0, 1_000.0)


@pytest.fixture
def measured(monkeypatch):
    """What the proxy runs were given; in their place stand laws that are known."""
    given = {}

    def run_proxies(config, data, test, widths, **_):
        given.update(data=data, test=test, widths=widths)
        return [
            Measurement(w, n, tuple(law.loss(w, float(n)) for law in LAWS), 5.0 + 1e-6 * w**2 * n)
            for w in widths
            for n in (1_000, 2_000, 4_000)
        ]

    def flops(config, shape, candidates, stages, read):
        return [[1e9 * width**2 for width in replace(config.model, decoder_widths=candidates).decoder_widths]] * stages

    monkeypatch.setattr(proxies, "run_proxies", run_proxies)
    monkeypatch.setattr(proxies, "_flops", flops)
    return given


def run_of(name, edges=(0.7, 5.7)):
    run = recipe(name)
    model = replace(run.model, architecture="multistage", decoder_widths=(run.model.width,) * (len(edges) + 1))
    return replace(run, model=model, stages=StagesConfig(edges=edges))


def numbered(count, shape=(1, 8, 8)):
    """Images told apart by their first two pixels."""
    images = torch.zeros(count, *shape, dtype=torch.uint8)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = torch.arange(count) % 256, torch.arange(count) // 256
    return Images("numbered", images)


def test_widths_are_measured_on_a_tenth_of_the_training_images(measured):
    data = numbered(400)
    proxies.allocate(run_of("digits"), data, 1.0, "training")
    parts = [{tuple(image.flatten()[:2].tolist()) for image in measured[name].images} for name in ("data", "test")]
    assert [len(part) for part in parts] == [360, 40]
    assert not parts[0] & parts[1]
    with pytest.raises(ConfigError, match="at least two images"):
        proxies.split(numbered(1), seed=0)


@pytest.mark.parametrize(
    ("name", "shape"), [("digits", (1, 8, 8)), ("edm-cifar10", (3, 32, 32)), ("ldm-celebahq", (3, 64, 64))]
)
def test_no_recipe_is_too_wide_to_choose_widths_for(measured, name, shape):
    run = run_of(name)
    proxies.allocate(run, numbered(20, shape), 1e6, "training")
    with torch.device("meta"):
        for width in (*proxies.candidate_widths(run.model)[:2], *measured["widths"]):
            network = replace(run.model, blocks=1, decoder_widths=(width,)).network(shape)
            assert len(network.decoders) == 1


@given(width=st.integers(2, 1_000).map(lambda number: 4 * number), head=st.sampled_from([None, 16, 32]))
def test_candidates_fit_into_one_network(width, head):
    model = replace(recipe("digits").model, width=width, head_channels=head)
    result = proxies.candidate_widths(model)
    assert width in result and max(result) <= 1.5 * width
    replace(model, decoder_widths=result)  # which refuses more than 64


@pytest.mark.parametrize("purpose", ["training", "sampling"])
def test_a_budget_that_buys_nothing_is_refused_before_the_proxies_run(measured, purpose):
    with pytest.raises(ConfigError, match="a budget of"):
        proxies.allocate(run_of("digits"), numbered(40), 1e-12, purpose)
    assert not measured


def test_seconds_that_are_in_proportion_to_flops_choose_the_same_widths(measured):
    by_flops = proxies.allocate(run_of("digits"), numbered(40), 1.0, "training")
    # An image of width w takes 1e9 w^2 FLOPs and 1e-6 w^2 seconds: a PFLOP is a second.
    by_seconds = proxies.allocate(run_of("digits"), numbered(40), 1.0, "seconds")
    assert by_seconds.unit == "training seconds"
    assert by_seconds.allocation.capacities == by_flops.allocation.capacities
    assert by_seconds.allocation.images == pytest.approx(by_flops.allocation.images)
    assert by_seconds.equal_loss == pytest.approx(by_flops.equal_loss)
    with pytest.raises(ConfigError, match="training seconds is less than one image costs"):
        proxies.allocate(run_of("digits"), numbered(40), 1e-9, "seconds")


def test_seconds_of_an_image_follow_their_law_between_the_proxies_and_no_part_is_negative():
    timed = [Measurement(w, n, (1.0,), 7.0 + n * (2e-3 + 1e-5 * w**2)) for w in (8, 16, 24) for n in (100, 200, 400)]
    assert proxies.seconds_an_image(timed, (4, 12, 32)) == pytest.approx([2e-3 + 1e-5 * w**2 for w in (4, 12, 32)])
    slower = [Measurement(w, n, (1.0,), n * (2e-3 - 1e-5 * w)) for w in (8, 16, 24) for n in (100, 200)]
    assert min(proxies.seconds_an_image(slower, range(1, 1000))) > 0
    with pytest.raises(ConfigError, match="were not timed"):
        proxies.seconds_an_image([Measurement(8, 100, (1.0,))], (8,))
