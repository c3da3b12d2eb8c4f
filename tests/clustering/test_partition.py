import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from multistage_diffusion.clustering.levels import noise_levels
from multistage_diffusion.clustering.options import MEASURES
from multistage_diffusion.clustering.partition import affinity_cost, block_cost, distance_cost, partition, size_limits
from multistage_diffusion.errors import ConfigError
from multistage_diffusion.noise import EDM, VP, Process, process_by_kind


def total(cost, cuts):
    ends = (0, *cuts, len(cost) - 1)
    return sum(float(cost[a, b]) for a, b in itertools.pairwise(ends))


def exhaustive(cost, stages, smallest, largest):
    count = len(cost) - 1
    return min(
        total(cost, cuts)
        for cuts in itertools.combinations(range(1, count), stages - 1)
        if all(smallest <= b - a <= largest for a, b in itertools.pairwise((0, *cuts, count)))
    )


@given(seed=st.integers(0, 2**31), count=st.integers(4, 10), stages=st.integers(1, 4), limited=st.booleans())
@settings(max_examples=60, deadline=None)
def test_the_dynamic_programme_equals_exhaustive_search(seed, count, stages, limited):
    matrix = torch.rand(count, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    values = matrix[0].cumsum(0)
    smallest, largest = size_limits(count, stages) if limited else (1, count)
    for cost in (block_cost(matrix + matrix.T), affinity_cost(matrix), distance_cost(values)):
        cuts = partition(cost, stages, smallest=smallest, largest=largest)
        assert len(cuts) == stages - 1
        assert total(cost, cuts) == pytest.approx(exhaustive(cost, stages, smallest, largest), abs=1e-9)


def test_costs_are_what_they_say():
    matrix = torch.rand(7, 7, dtype=torch.float64)
    values = torch.rand(7, dtype=torch.float64).sort(descending=True).values
    for a, b in itertools.combinations(range(8), 2):
        centre = a + (b - a) // 2
        assert distance_cost(values)[a, b] == pytest.approx(float((values[a:b] - values[centre]).abs().sum()))
        assert affinity_cost(matrix)[a, b] == pytest.approx(-float(matrix[a:b, centre].sum()))
        assert block_cost(matrix)[a, b] == pytest.approx(-float(matrix[a:b, a:b].sum()) / (b - a))


def test_gram_blocks_are_within_stage_variance():
    function = torch.randn(9, 5, dtype=torch.float64)
    cost = block_cost(function @ function.T)
    for a, b in itertools.combinations(range(10), 2):
        variance = (function[a:b] - function[a:b].mean(0)).square().sum()
        assert float(cost[a, b] + function[a:b].square().sum()) == pytest.approx(float(variance), abs=1e-9)


@given(count=st.integers(6, 60), stages=st.integers(2, 5))
def test_ties_break_the_same_way_from_both_ends(count, stages):
    """Mirrored levels give mirrored cuts wherever the nearest cuts to equal spacing are unique."""
    cost = distance_cost(torch.arange(count, dtype=torch.float64))
    cuts = partition(cost, stages)
    mirrored = tuple(count - cut for cut in reversed(cuts))
    spread = [sum((cut - count * (k + 1) / stages) ** 2 for k, cut in enumerate(c)) for c in (cuts, mirrored)]
    assert spread[0] == pytest.approx(spread[1])
    if count % stages == 0:
        assert cuts == tuple(count * k // stages for k in range(1, stages))


def test_published_baselines():
    """The paper's Table 4: .330/.670 and .348/.709 in VP time."""
    u = torch.arange(1, 101, dtype=torch.float64) / 100
    assert partition(distance_cost(u), 3, smallest=16, largest=50) == (33, 67)
    u = torch.arange(1, 1001, dtype=torch.float64) / 1000
    cuts = partition(distance_cost(noise_levels(VP(), "time", u).log()), 3, smallest=166, largest=500)
    assert cuts == pytest.approx((348, 709), abs=1)


def test_limits_that_no_partition_keeps_are_refused():
    with pytest.raises(ConfigError, match="5 levels cannot be cut into 3 stages of 2 to 5"):
        partition(block_cost(torch.eye(5)), 3, smallest=2)


@pytest.mark.parametrize("kind", Process.kinds())
@pytest.mark.parametrize("measure", MEASURES)
def test_levels_increase_within_the_range(kind, measure):
    process = process_by_kind(kind)
    sigma = noise_levels(process, measure, torch.linspace(0, 1, 101, dtype=torch.float64)[1:-1])
    assert bool((sigma.diff() > 0).all())
    if measure != "training":
        ends = noise_levels(process, measure, torch.tensor([0.0, 1.0], dtype=torch.float64)).tolist()
        assert ends == pytest.approx([process.sigma_min, process.sigma_max], rel=1e-6)


def test_edm_averages_in_vp_time_because_its_own_time_is_sigma():
    sigma = noise_levels(EDM(), "time", torch.tensor([0.5], dtype=torch.float64))
    ends = VP().t(torch.tensor([0.002, 80.0], dtype=torch.float64))
    assert float(VP().t(sigma)) == pytest.approx(float(ends.mean()))
    with pytest.raises(ConfigError, match='no measure tim; did you mean "time"'):
        noise_levels(EDM(), "tim", torch.tensor([0.5]))
