"""The scaling study: what stops, what goes on, what is reported, and the shares and laws behind its figures."""

import json
from dataclasses import replace

import pytest

import tiny
from multistage_diffusion.cli import dispatch
from multistage_diffusion.config import Sampler
from multistage_diffusion.noise import VP
from multistage_diffusion.stages import Stages
from multistage_diffusion.studies import budgets, frontiers, scaling
from multistage_diffusion.studies.budgets import Budget, Ladder
from multistage_diffusion.studies.cells import Cells
from multistage_diffusion.studies.designs import Finder
from multistage_diffusion.studies.drawing import svg
from multistage_diffusion.studies.figures import draw
from multistage_diffusion.studies.frontiers import Curve, Law, fit_laws, ratio_band, shares
from multistage_diffusion.studies.sheets import sheets
from multistage_diffusion.studies.tables import Lab

BASE = replace(
    tiny.run_config(tiny.SMALLEST, batch_size=8, warmup_images=16, ema_half_life=50.0),
    process=VP(prediction="v"), sampling=Sampler(solver="ddim", steps=2),
)  # fmt: skip
BUDGET = Budget(base=BASE, tflops=1e-5, points=2, seeds=2)
FEW = replace(BUDGET, ladder=Ladder(unified=(1.0,), staged=((0.5,) * 5,), rungs=(0.5, 1.0)))


def lab(folder, cells=None):
    data = tiny.images()
    cells = cells or Cells(folder, data, tiny.images(6, seed=1), Stages(tiny.EDGES))
    return Lab(BUDGET, data, cells.test, cells, Finder(folder, data, BUDGET, lambda: cells, print))


class Pretended(Cells):
    """Trains nothing: a loss is the distance of the rate from the best one of its width, less with the budget."""

    def __init__(self, folder):
        super().__init__(folder, tiny.images(), tiny.images(6, seed=1), Stages(tiny.EDGES))
        self.filled, self.best = {}, {4: 0.016, 8: 0.004}

    def fill(self, cells, watch=None, *, point=-1):
        for one in cells:
            self.filled[one] = max(point, self.filled.get(one, -1))

    def loss(self, cell, point=-1, *, validation=False):
        assert validation and self.filled[cell] >= point
        rate, width = cell.config.training.learning_rate, cell.config.model.capacities[0]
        return {"loss": 1 + abs(rate - self.best[width]) + width / 1000 - point / 100}


def test_the_worse_half_stops_and_the_best_rate_lies_inside(tmp_path):
    cells = Pretended(tmp_path)
    rungs = scaling.sweep(lab(tmp_path, cells))
    assert [rung.tflops for rung in rungs] == [share * BUDGET.tflops for share in BUDGET.ladder.rungs]
    for arm in scaling.ARMS:
        designs = [{one.candidate.design for one in rung.tried[arm]} for rung in rungs]
        assert [len(own) for own in designs] == [2, 1, 1, 1]
        assert len(rungs[0].tried[arm]) == 4 and all(len(rung.tried[arm]) == 1 for rung in rungs[1:])
        best, rates = rungs[0].best(arm), sorted(
            one.candidate.rate for one in rungs[0].tried[arm] if one.candidate.design == rungs[0].best(arm).design
        )  # fmt: skip
        assert rates[0] < best.rate < rates[-1]
        losses = [one.loss for one in rungs[0].tried[arm]]
        assert losses == sorted(losses)
    for rung in rungs:
        for arm in scaling.ARMS:
            for seed in range(BUDGET.seeds):
                assert cells.filled[scaling.climb(lab(tmp_path, cells), rung.best(arm), seed)] >= rung.point


def test_both_arms_are_tried_at_rates_inverse_to_the_encoders_width(tmp_path):
    found = scaling.candidates(lab(tmp_path))
    assert {len(found[arm]) > 1 for arm in scaling.ARMS} == {True}
    for one in (*found["unified"], *found["staged"]):
        assert one.rate * one.config.model.width == pytest.approx(2 * 3e-3 * BASE.model.width)
    assert {one.config.stages.edges for one in found["staged"]} == {scaling.EDGES["vp"]}


def test_a_longer_budget_goes_on_where_a_shorter_one_ended(tmp_path):
    own = lab(tmp_path)
    one = scaling.candidates(own)["unified"][0]
    short, long = (scaling.climb(own, one, 0, point) for point in (1, 3))
    assert own.cells.path(short) == own.cells.path(long)
    own.cells.fill([long], point=1)
    assert own.cells.done(short) and not own.cells.done(long)
    own.cells.fill([long])
    assert own.cells.spent(long)["steps"] == long.steps(tiny.SHAPE)[3] > own.cells.spent(short)["steps"]
    assert long.steps(tiny.SHAPE)[:2] == short.steps(tiny.SHAPE)


def curve(law, *offsets):
    spent = [0.25 * 2 ** (point / 2) for point in range(9)]
    return Curve(tuple(spent), tuple(tuple(law.loss(x) + offset for x in spent) for offset in offsets))


UNIFIED, STAGED = Law(0.18, 0.02, 0.5), Law(0.18, 0.016, 0.5)


def test_the_share_at_equal_loss_is_that_of_the_laws():
    unified, staged = curve(UNIFIED, 0.0, 1e-4), curve(STAGED, 0.0, 1e-4)
    truth = (STAGED.factor / UNIFIED.factor) ** 2
    for place in (4, 8):
        assert shares(unified, staged, place) == pytest.approx([truth, truth], rel=0.01)
        assert shares(staged, unified, place) == pytest.approx([1 / truth, 1 / truth], rel=0.01)
    assert shares(unified, unified, 8) == pytest.approx([1.0, 1.0])


def test_power_laws_with_one_floor_are_found_and_banded():
    unified, staged = curve(UNIFIED, 0.0), curve(STAGED, 0.0)
    for law, truth in zip(fit_laws([unified, staged], 2), (UNIFIED, STAGED), strict=True):
        assert law.floor == pytest.approx(truth.floor, rel=1e-3)
        assert law.exponent == pytest.approx(truth.exponent, rel=0.02)
        assert law.spent(law.loss(3.0)) == pytest.approx(3.0)
    band = ratio_band(unified, staged, 2, [1.0, 4.0], draws=20)
    assert [row[1] for row in band] == pytest.approx([0.64, 0.64], rel=0.01)
    noisy = curve(UNIFIED, 0.0, 2e-4), curve(STAGED, 2e-4, 0.0)
    for _, middle, low, high in ratio_band(*noisy, 2, [1.0, 4.0], draws=40):
        assert low < middle < high


@pytest.mark.slow
def test_the_command_writes_rows_tables_and_a_figure(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MSD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(budgets.BUDGETS, "small", lambda: FEW)
    step_times = frontiers.step_times
    monkeypatch.setattr(frontiers, "step_times", lambda lab, runs: step_times(lab, runs, turns=2))
    words = ["study", "scaling", "--data", "digits", "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert dispatch([*words, "--dry-run"]) == 0 and not (tmp_path / "out").exists()
    assert dispatch(words) == 0
    document = json.loads((tmp_path / "out" / "scaling.json").read_text())
    assert [own["arm"] for own in document["rows"]] == ["unified", "staged"] * 2
    assert document["settings"]["features"] is None and document["settings"]["training_tflops"] > 0
    for own in document["rows"]:
        assert own["seconds"] > 0 and len(own["loss"]["values"]) == 2 and own["step"]["milliseconds"] > 0
    for staged in document["rows"][1::2]:
        assert staged["reach"]["seconds"]["mean"] == pytest.approx(staged["slower"] * staged["reach"]["flops"]["mean"])
    assert svg(draw(document)) == svg(draw(document))
    assert all(len(line) == len(sheet.head) for sheet in sheets(document) for line in sheet.lines)
    assert "scaling" in (tmp_path / "out" / "report.html").read_text()
    capsys.readouterr()
    assert dispatch([*words, "--json"]) == 0  # from the cache
    again = json.loads(capsys.readouterr().out)["rows"]
    assert [{key: own[key] for key in own if key != "study"} for own in again] == document["rows"]
