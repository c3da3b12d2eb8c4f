"""Counter-based random numbers: pure functions, and random enough."""

import hashlib
import math

import pytest
import torch
from scipy import stats

from multistage_diffusion import rng

INDEX = torch.arange(4000)


def correlation(first, second):
    return float(torch.corrcoef(torch.stack((first.double().flatten(), second.double().flatten())))[0, 1])


def test_values_depend_on_their_own_index_alone():
    whole = rng.normal(3, "noise", INDEX[:50], (3, 5))
    shuffle = torch.tensor([7, 49, 0, 7])
    assert torch.equal(rng.normal(3, "noise", shuffle, (3, 5)), whole[shuffle])
    assert torch.equal(rng.normal(3, "noise", INDEX[12:13], (3, 5)), whole[12:13])
    state = torch.get_rng_state()
    torch.randn(10)
    assert torch.equal(rng.normal(3, "noise", INDEX[:50], (3, 5)), whole)
    rng.uniform(3, "sigma", INDEX, 2)
    torch.set_rng_state(state)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_global_generator_is_left_alone():
    state = torch.get_rng_state()
    rng.normal(0, "a", INDEX, (4,))
    rng.permutation(0, "a", 1, 100)
    assert torch.equal(torch.get_rng_state(), state)


def test_more_numbers_begin_with_the_same():
    assert torch.equal(rng.bits(1, "x", INDEX, 9)[:, :4], rng.bits(1, "x", INDEX, 4))


def splitmix64(state):
    """One step of the published generator, on Python's integers."""
    state = (state + 0x9E3779B97F4A7C15) % 2**64
    word = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB % 2**64
    return state, word ^ (word >> 31)


def test_it_is_splitmix64():
    key = int.from_bytes(hashlib.blake2b(b"7/noise", digest_size=8).digest(), "little")
    for index in (0, 1, 10**12):
        state = splitmix64((key + (index - 1) * 0x9E3779B97F4A7C15) % 2**64)[1]
        wanted = []
        for _ in range(3):
            state, word = splitmix64(state)
            wanted.append(word)
        assert [word % 2**64 for word in rng.bits(7, "noise", torch.tensor([index]), 3)[0].tolist()] == wanted


@pytest.mark.parametrize("other", [(1, "noise", 0), (0, "sigma", 0), (0, "noise", 1)])
def test_seeds_streams_and_indices_are_unrelated(other):
    seed, stream, shift = other
    first, second = rng.normal(0, "noise", INDEX, (8,)), rng.normal(seed, stream, INDEX + shift, (8,))
    assert abs(correlation(first, second)) < 4 / math.sqrt(first.numel())
    assert not torch.isin(rng.bits(0, "noise", INDEX, 8), rng.bits(seed, stream, INDEX + 10_000 * shift, 8)).any()


def test_neighbours_are_unrelated():
    values = rng.uniform(0, "x", INDEX, 16)
    limit = 4 / math.sqrt(values.numel())
    assert abs(correlation(values[:, 1:], values[:, :-1])) < limit
    assert abs(correlation(values[1:], values[:-1])) < limit
    normals = rng.normal(0, "x", INDEX, (16,))
    assert abs(correlation(normals[:, ::2], normals[:, 1::2])) < limit * 1.5  # the two of one Box-Muller pair
    assert abs(correlation(normals[:, ::2] ** 2, normals[:, 1::2] ** 2)) < limit * 1.5


def test_bits_are_fair():
    words = rng.bits(5, "x", INDEX, 16).flatten()
    for bit in range(64):
        share = ((words >> bit) & 1).double().mean()
        assert abs(share - 0.5) < 4 * 0.5 / math.sqrt(len(words))
    assert len(words.unique()) == len(words)


def test_uniform_numbers_are_uniform_and_inside():
    values = rng.uniform(0, "u", INDEX, 50)
    assert values.dtype == torch.float64 and 0 < values.min() and values.max() < 1
    assert stats.kstest(values.flatten().numpy(), "uniform").pvalue > 1e-3
    assert stats.kstest(values[:, 0].numpy(), "uniform").pvalue > 1e-3
    extreme = (torch.tensor([-1, 0], dtype=torch.int64).bitwise_right_shift(12) & ((1 << 52) - 1)).double()
    assert ((extreme + 0.5) * 2.0**-52).tolist() == [1 - 2.0**-53, 2.0**-53]


def test_normal_numbers_are_normal():
    values = rng.normal(0, "n", INDEX, (3, 17))
    assert values.shape == (4000, 3, 17) and values.dtype == torch.float32
    flat = values.flatten().double().numpy()
    assert stats.kstest(flat, "norm").pvalue > 1e-3
    count = flat.size
    for power, moment in ((1, 0), (2, 1), (3, 0), (4, 3)):
        spread = math.sqrt(stats.norm.moment(2 * power) - moment**2)
        assert abs((flat**power).mean() - moment) < 4 * spread / math.sqrt(count)
    assert 4.5 < abs(flat).max() < 6.77


def test_the_largest_normal_number(monkeypatch):
    for word in (0, -1, 1 << 32, 0xFFFFFFFF, 0xFFFFFF7F):
        monkeypatch.setattr(rng, "bits", lambda *_, word=word: torch.full((1, 1), word, dtype=torch.int64))
        values = rng.normal(0, "n", torch.tensor([0]), (2,))
        assert values.isfinite().all() and values.norm() < 6.77


@pytest.mark.parametrize("count", [1, 2, 10, 1797])
def test_permutations_are_permutations_and_differ(count):
    orders = [rng.permutation(0, "order", epoch, count) for epoch in range(3)]
    assert all(torch.equal(order.sort().values, torch.arange(count)) for order in orders)
    if count > 5:
        assert not torch.equal(orders[0], orders[1]) and not torch.equal(orders[1], orders[2])


def test_permutations_of_three_are_all_as_likely():
    seen = [tuple(rng.permutation(0, "order", epoch, 3).tolist()) for epoch in range(1200)]
    counts = [seen.count(order) for order in set(seen)]
    assert len(counts) == 6 and stats.chisquare(counts).pvalue > 1e-3
