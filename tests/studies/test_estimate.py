"""Means, intervals and crossings against scipy and closed forms; findings that follow them."""

import math

import pytest
import scipy.stats
from hypothesis import assume, given
from hypothesis import strategies as st

from multistage_diffusion.studies.curves import (
    best_solvers,
    crossing,
    efficiency_findings,
    sampling_findings,
)
from multistage_diffusion.studies.estimate import difference, differs, estimate
from multistage_diffusion.studies.tables import change, compared, findings

values = st.lists(st.floats(-100, 100).map(lambda value: round(value, 3)), min_size=2, max_size=8)


@given(values)
def test_interval_is_students(own):
    found = estimate(own)
    error = scipy.stats.sem(own)
    assert found.error == pytest.approx(error, rel=1e-9, abs=1e-9)
    assume(error > 1e-6)
    expected = scipy.stats.t.interval(0.95, len(own) - 1, loc=sum(own) / len(own), scale=error)
    assert found.interval == pytest.approx(expected, rel=1e-9, abs=1e-9)


@given(
    st.integers(2, 8).flatmap(
        lambda size: st.tuples(*[st.lists(st.integers(-50, 50), min_size=size, max_size=size)] * 2)
    )
)
def test_a_difference_is_told_where_the_paired_test_rejects(pair):
    ours, theirs = ([float(value) for value in side] for side in pair)
    assume(len({own - other for own, other in zip(ours, theirs, strict=True)}) > 1)
    p = scipy.stats.ttest_rel(ours, theirs).pvalue
    assume(abs(p - 0.05) > 1e-6)
    assert differs(difference(ours, theirs)) is bool(p < 0.05)


def test_one_seed_has_no_interval():
    found = estimate([2.0])
    assert found.mean == 2.0 and found.error is None and found.interval is None and differs(found) is None
    assert found.document() == {"mean": 2.0, "error": None, "values": [2.0], "interval": None}


def test_pairing_needs_equal_seeds():
    with pytest.raises(ValueError, match="shorter"):
        difference([1.0, 2.0], [1.0])


@given(st.floats(0.1, 3), st.floats(0.05, 0.95))
def test_crossing_is_exact_for_an_exponential(rate, place):
    """Interpolation in the logarithm: a curve exp(-rate x) is crossed where it is, whatever the points."""
    spent = [0.0, 1.0, 3.0, 4.5]
    curve = [math.exp(-rate * x) for x in spent]
    assert crossing(spent, curve, math.exp(-rate * 4.5 * place)) == pytest.approx(4.5 * place, rel=1e-6)


def test_crossing_at_the_ends():
    assert crossing([1.0, 2.0], [5.0, 4.0], 6.0) == 1.0  # there from the start
    assert crossing([1.0, 2.0], [5.0, 4.0], 3.0) is None
    assert crossing([1.0, 2.0], [5.0, 4.0], 4.0) == pytest.approx(2.0)
    assert crossing([1.0, 2.0, 3.0], [5.0, 4.0, 4.5], 4.5) == pytest.approx(1 + math.log(5 / 4.5) / math.log(5 / 4))


def test_a_moment_at_the_target_is_no_crossing():
    assert 2.0 < (crossing([1.0, 2.0, 3.0], [5.0, 6.0, 4.0], 5.5) or 0) < 3.0
    assert crossing([1.0, 2.0, 3.0], [5.0, 4.0, 4.6], 4.5) is None


def figure(*values):
    return estimate(values).document()


def row(label, fd, loss):
    return {"label": label, "fd": figure(*fd), "loss": figure(*loss)}


def test_findings_say_what_the_seeds_do_not_tell():
    rows = compared([
        row("unified", (10.0, 11.0, 12.0), (1.0, 1.1, 1.2)),
        row("a", (9.0, 12.0, 12.0), (0.9, 1.0, 1.1)),
        row("b", (20.0, 21.0, 22.1), (1.0, 1.1, 1.2)),
    ])  # fmt: skip
    assert findings(rows) == [
        "a against unified: Fréchet distance not told apart, held-out loss 9.1% lower.",
        "b against unified: Fréchet distance 91% higher, held-out loss not told apart.",
    ]
    assert rows[1]["difference"]["fd"]["values"] == [-1.0, 1.0, 0.0]
    assert change(figure(1.0), figure(2.0)) == "50% lower (one seed)"


def test_efficiency_findings_know_when_a_share_may_be_all():
    reach = {"a": (0.5, 0.6, 0.55), "b": (0.8, 1.1, 0.9)}
    rows = [{"label": "unified", "reach": {}}]
    for name, shares in reach.items():
        rows.append({"label": name, "reach": {"unified": {"fd": figure(*shares), "loss": None}}})
    assert efficiency_findings(rows) == [
        "a reaches the final quality of unified, by Fréchet distance at 55% of its training FLOPs (95% interval 43% to "
        "67%) and by held-out loss not with every seed.",
        "b reaches the final quality of unified, by Fréchet distance at 93% of its training FLOPs (95% interval 55% to "
        "131%), not told apart from all of them, and by held-out loss not with every seed.",
    ]


def test_solvers_are_compared_within_the_same_evaluations():
    def drawn(label, solver, steps, nfe, *fd):
        return {"label": label, "solver": solver, "steps": steps, "nfe": nfe, "fd": figure(*fd)}

    rows = [
        drawn("unified", "ddim", 4, 4, 9.0, 9.1), drawn("unified", "ddim", 8, 8, 5.0, 5.1),
        drawn("unified", "heun", 2, 3, 8.0, 8.1), drawn("unified", "heun", 4, 7, 6.0, 6.1),
        drawn("multistage", "ddim", 4, 4, 7.0, 9.5), drawn("multistage", "ddim", 8, 8, 2.5, 2.6),
        drawn("multistage", "heun", 2, 3, 9.0, 9.1), drawn("multistage", "heun", 4, 7, 6.0, 6.1),
    ]  # fmt: skip
    assert {nfe: own["solver"] for nfe, own in best_solvers(rows, "unified").items()} == {4: "heun", 8: "ddim"}
    assert sampling_findings(rows)[1].endswith(
        "ddim within 4 (8.2, not told apart from unified), ddim within 8 (2.5, 50% lower than unified)."
    )
