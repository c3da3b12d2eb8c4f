"""Laws of loss against width and images, and the widths that a budget buys."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from multistage_diffusion.clustering.allocation import (
    Law,
    Measurement,
    allocate_sampling,
    allocate_training,
    fit_law,
)
from multistage_diffusion.errors import ConfigError

LAWS = (Law(0.05, 3.0, 1.0, 40.0, 0.5, 0.0), Law(0.02, 0.5, 1.0, 20.0, 0.5, 0.0), Law(0.2, 0.01, 1.0, 5.0, 0.5, 0.0))
SHARES = (0.3, 0.3, 0.4)
WIDTHS = (4, 8, 16, 32)
FLOPS = [[1.0 + width**2 / 100 for width in WIDTHS]] * 3


def loss(widths, images):
    return sum(
        share * (law.floor + law.capacity(width) + law.training(images))
        for share, law, width in zip(SHARES, LAWS, widths, strict=True)
    )


def test_a_law_is_recovered_from_its_own_values():
    law = LAWS[0]
    points = [
        Measurement(w, n, (law.floor + law.capacity(w) + law.training(float(n)),))
        for w in (4, 8, 16) for n in (1_000, 4_000, 16_000)
    ]  # fmt: skip
    found = fit_law(points, 0)
    assert found.error < 1e-6
    for width, images in ((6, 2_000), (32, 100_000)):
        expected = law.floor + law.capacity(width) + law.training(float(images))
        assert found.floor + found.capacity(width) + found.training(float(images)) == pytest.approx(expected, rel=1e-3)


def test_parts_of_a_law_are_never_negative():
    noisy = [Measurement(w, n, (0.5 + 0.01 * w,)) for w in (4, 8, 16) for n in (100, 200)]  # wider is worse
    found = fit_law(noisy, 0)
    assert min(found.floor, found.width_scale, found.image_scale) >= 0


def test_a_law_needs_two_widths_and_two_lengths():
    with pytest.raises(ConfigError, match="at least two decoder widths"):
        fit_law([Measurement(8, 100, (1.0,)), Measurement(8, 200, (0.9,))], 0)


@given(budget=st.floats(5e3, 1e7))
@settings(max_examples=30, deadline=None)
def test_training_widths_equal_exhaustive_search(budget):
    found = allocate_training(LAWS, SHARES, WIDTHS, FLOPS, budget)

    def cost(widths):
        pairs = zip(SHARES, widths, strict=True)
        return sum(share * FLOPS[0][WIDTHS.index(width)] for share, width in pairs)

    best = min(itertools.product(WIDTHS, repeat=3), key=lambda widths: loss(widths, budget / cost(widths)))
    assert found.loss == pytest.approx(loss(best, budget / cost(best)), rel=1e-12)
    assert found.images * found.flops == pytest.approx(budget)


def test_sampling_widths_equal_exhaustive_search():
    calls = (10, 5, 5)
    for budget in (25.0, 60.0, 150.0, 300.0):
        found = allocate_sampling(LAWS, SHARES, WIDTHS, FLOPS, calls, budget, 10_000.0)
        allowed = [
            widths for widths in itertools.product(WIDTHS, repeat=3)
            if sum(n * FLOPS[0][WIDTHS.index(width)] for n, width in zip(calls, widths, strict=True)) <= budget
        ]  # fmt: skip
        assert found.loss == pytest.approx(min(loss(widths, 10_000.0) for widths in allowed), rel=1e-12)
        assert found.flops <= budget


def test_capacity_goes_where_it_helps():
    widths = allocate_training(LAWS, SHARES, WIDTHS, FLOPS, 1e6).widths
    assert widths[0] > widths[1] > widths[2]


def test_budgets_that_buy_nothing_are_refused():
    with pytest.raises(ConfigError, match="less than one image costs"):
        allocate_training(LAWS, SHARES, WIDTHS, FLOPS, 0.5)
    with pytest.raises(ConfigError, match="below that of the narrowest decoders"):
        allocate_sampling(LAWS, SHARES, WIDTHS, FLOPS, (10, 5, 5), 10.0, 1_000.0)
