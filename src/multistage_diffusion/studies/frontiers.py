"""What the scaling study found: the best of each arm, and the share of compute at which staged is as good."""

from __future__ import annotations

import hashlib
import json
import math
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from multistage_diffusion.config import RunConfig
from multistage_diffusion.files import read_json, write_json
from multistage_diffusion.studies.cells import distinct
from multistage_diffusion.studies.curves import crossing
from multistage_diffusion.studies.estimate import Estimate, estimate
from multistage_diffusion.studies.scaling import ARMS, BEFORE, Candidate, Rung, climb, sweep
from multistage_diffusion.studies.tables import Lab
from multistage_diffusion.training.run import build_trainer
from multistage_diffusion.training.trainer import Trainer


@dataclass(frozen=True)
class StepTime:
    """Time of a training step, taken in turn with the other networks in one process.

    Attributes:
        milliseconds: Median.
        ratio: Median of the ratio to the first network, turn by turn.
        quartiles: Of that ratio.
    """

    milliseconds: float
    ratio: float
    quartiles: tuple[float, float]


def step_times(lab: Lab, runs: Sequence[RunConfig], turns: int = 40) -> list[StepTime]:
    """Time of a step of each network: each takes one in turn, so that what else the machine does slows all alike.

    Args:
        lab: What to work with; times are measured once and kept.
        runs: The networks, the reference first.
        turns: Steps of each.

    Returns:
        The times.
    """
    key = json.dumps([[distinct(run) for run in runs], turns, str(lab.cells.device), torch.get_num_threads()])
    path = lab.finder.folder / f"step-times-{hashlib.sha256(key.encode()).hexdigest()[:12]}.json"
    if not path.is_file():
        device = torch.device(lab.cells.device)
        trainers = [build_trainer(run, lab.data, device=device) for run in runs]
        times = [[_step(trainer, device) for trainer in trainers] for _ in range(turns + 3)][3:]  # the first warm up
        write_json(path, {"seconds": times})
    times = read_json(path)["seconds"]
    found = []
    for place in range(len(runs)):
        ratios = [turn[place] / turn[0] for turn in times]
        low, _, high = statistics.quantiles(ratios, n=4)
        own = statistics.median(turn[place] for turn in times)
        found.append(StepTime(1e3 * own, statistics.median(ratios), (low, high)))
    return found


def _step(trainer: Trainer, device: torch.device) -> float:
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    wait()
    start = time.perf_counter()
    for _ in trainer.run(trainer.step + 1):
        pass
    wait()
    return time.perf_counter() - start


@dataclass(frozen=True)
class Curve:
    """A run's loss on the half that reports, at its points.

    Attributes:
        tflops: FLOPs spent, in 10^12.
        loss: A row a seed, an entry a point.
    """

    tflops: tuple[float, ...]
    loss: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Law:
    """loss = floor + factor * TFLOPs^-exponent."""

    floor: float
    factor: float
    exponent: float

    def spent(self, loss: float) -> float:
        """FLOPs at which it has a loss, in 10^12."""
        return ((loss - self.floor) / self.factor) ** (-1 / self.exponent)

    def loss(self, tflops: float) -> float:
        """The loss after so many FLOPs."""
        return self.floor + self.factor * tflops**-self.exponent


def curve(lab: Lab, candidate: Candidate, point: int) -> Curve:
    """What a candidate's runs, one a seed, reach on their way to a point."""
    runs = [climb(lab, candidate, seed, point) for seed in range(lab.budget.seeds)]
    spent = tuple(lab.cells.spent(runs[0], place)["tflops"] for place in range(point + 1))
    return Curve(spent, tuple(tuple(lab.cells.loss(one, place)["loss"] for place in range(point + 1)) for one in runs))


def shares(unified: Curve, staged: Curve, place: int) -> list[float]:
    """Share of the unified run's FLOPs at a point at which the staged run of the same seed has its loss, by seed.

    A staged run that is behind there has no such share within the budget: it gets the inverse of the share of its
    own FLOPs at which the unified run has its loss, above 1.

    Args:
        unified: The unified runs.
        staged: The staged runs, at the same points.
        place: The point.

    Returns:
        The shares, interpolated between the logarithms of both.
    """
    found = []
    for own, other in zip(staged.loss, unified.loss, strict=True):
        ahead = own[place] <= other[place]
        leader, target = (staged, other[place]) if ahead else (unified, own[place])
        values = (own if ahead else other)[: place + 1]
        reached = crossing([math.log(spent) for spent in leader.tflops[: place + 1]], values, target)
        assert reached is not None, "the leader is there"
        share = math.exp(reached) / (unified if ahead else staged).tflops[place]
        found.append(share if ahead else 1 / share)
    return found


def fit_laws(curves: Sequence[Curve], first: int) -> list[Law]:
    """Power laws with one floor, the loss that no training removes, of least error in the logarithm above it.

    Args:
        curves: The arms' runs; means over their seeds are fitted.
        first: The first point that counts.

    Returns:
        A law an arm.
    """
    from scipy.optimize import minimize_scalar

    means = [[statistics.fmean(values) for values in zip(*own.loss, strict=True)][first:] for own in curves]

    def laws(floor: float) -> tuple[list[Law], float]:
        fitted, error = [], 0.0
        for own, loss in zip(curves, means, strict=True):
            along, above = [math.log(spent) for spent in own.tflops[first:]], [math.log(own - floor) for own in loss]
            slope, intercept = statistics.linear_regression(along, above)
            law = Law(floor, math.exp(intercept), -slope)
            error += sum((law.loss(x) - y) ** 2 for x, y in zip(own.tflops[first:], loss, strict=True))
            fitted.append(law)
        return fitted, error

    least = min(min(loss) for loss in means)
    best = minimize_scalar(lambda floor: laws(floor)[1], bounds=(0.0, 0.999 * least), method="bounded")
    return laws(float(best.x))[0]  # pyright: ignore[reportAttributeAccessIssue]


def ratio_band(unified: Curve, staged: Curve, first: int, at: Sequence[float], draws: int = 500) -> list[list[float]]:
    """Share of FLOPs at equal loss by the fitted laws, with the 2.5th and 97.5th percentile over resampled seeds.

    Three seeds have ten different resamples: the band shows how far seeds move the laws, not 95% confidence.

    Args:
        unified: The unified runs.
        staged: The staged runs.
        first: The first point that counts.
        at: FLOPs of the unified runs, in 10^12.
        draws: Resamples of the seeds, the same in both arms.

    Returns:
        By budget: TFLOPs, the share, the band's ends.
    """

    def ratios(seeds: Sequence[int]) -> list[float]:
        parts = [Curve(own.tflops, tuple(own.loss[seed] for seed in seeds)) for own in (unified, staged)]
        one, other = fit_laws(parts, first)
        return [other.spent(one.loss(tflops)) / tflops for tflops in at]

    seeds, dice = range(len(unified.loss)), random.Random(0)
    drawn = [ratios(dice.choices(seeds, k=len(seeds))) for _ in range(draws)]
    samples = [sorted(own) for own in zip(*drawn, strict=True)]
    low, high = round(0.025 * (draws - 1)), round(0.975 * (draws - 1))
    rows = zip(at, ratios(seeds), samples, strict=True)
    return [[tflops, middle, own[low], own[high]] for tflops, middle, own in rows]


@dataclass(frozen=True)
class Best:
    """The best network of an arm at a budget.

    Attributes:
        label: Arm and budget.
        arm: `unified` or `staged`.
        tflops: The budget, in 10^12 FLOPs.
        design: Width of a unified network, encoder and decoder widths of a staged one.
        rate: Its learning rate.
        edges: Edges of its stages, in sigma.
        width: Width of its encoder.
        decoder_widths: Widths of its decoders.
        parameters: Their number.
        mflops: FLOPs of an image in training's mix of levels, forward, in 10^6.
        steps: Steps of training.
        training_tflops: What they spent.
        step: Time of a step.
        seconds: Steps times that.
        images_per_second: Images trained on in a second, by that.
        loss: On the half that reports, over seeds.
        curve: On the way there.
        tried: What the arm tried at this rung and those before: `tflops`, `design`, `rate`, and `loss` on the half that
            chooses, one seed.
    """

    label: str
    arm: str
    tflops: float
    design: str
    rate: float
    edges: tuple[float, ...]
    width: int
    decoder_widths: tuple[int, ...]
    parameters: int
    mflops: float
    steps: int
    training_tflops: float
    step: StepTime
    seconds: float
    images_per_second: float
    loss: Estimate
    curve: Curve
    tried: tuple[dict[str, Any], ...]

    def document(self) -> dict[str, Any]:
        """As JSON types."""
        return _json({**asdict(self), "loss": self.loss.document()})


@dataclass(frozen=True)
class Equal:
    """Shares of the unified network's compute at which the staged one has its loss.

    Attributes:
        tflops: FLOPs of the unified network, in 10^12.
        flops: Share of its FLOPs, over seeds.
        seconds: Share of its seconds, over seeds.
    """

    tflops: float
    flops: Estimate
    seconds: Estimate

    def document(self) -> dict[str, Any]:
        """As JSON types, with intervals."""
        return {"tflops": self.tflops, "flops": self.flops.document(), "seconds": self.seconds.document()}


@dataclass(frozen=True)
class Comparison:
    """The staged arm's best against the unified arm's best at a budget.

    Attributes:
        slower: Seconds of a FLOP of the staged network, those of the unified one being 1.
        ratio: At each point from the first rung on; the last is the budget.
        laws: Power laws of both, where there are enough points.
        band: By these laws, at the same points: TFLOPs, share of FLOPs, the ends of its band.
    """

    slower: float
    ratio: tuple[Equal, ...]
    laws: tuple[Law, ...]
    band: tuple[tuple[float, ...], ...]

    def document(self) -> dict[str, Any]:
        """As JSON types; `reach` is the ratio at the budget."""
        ratio = [equal.document() for equal in self.ratio]
        return _json({**asdict(self), "ratio": ratio, "reach": ratio[-1]})


def results(lab: Lab) -> list[tuple[Best, Best, Comparison]]:
    """The best unified and staged network of each budget, and how they compare.

    Args:
        lab: What to work with; its sweep is done.

    Returns:
        An entry for each rung.
    """
    rungs, found = sweep(lab), list[tuple[Best, Best, Comparison]]()
    for place, rung in enumerate(rungs, 1):
        curves = [curve(lab, rung.best(arm), rung.point) for arm in ARMS]
        times = step_times(lab, [rung.best(arm).config for arm in ARMS])
        unified, staged = (
            _best(lab, rungs[:place], arm, own, taken) for arm, own, taken in zip(ARMS, curves, times, strict=True)
        )
        one, other = ((own.step.ratio * own.steps / own.training_tflops) for own in (unified, staged))
        slower = other / one  # turn by turn, so that what else the machine does is left out
        found.append((unified, staged, compare(curves[0], curves[1], slower)))
    return found


def rows(lab: Lab) -> list[dict[str, Any]]:
    """The results as JSON types: a row for each budget and arm; the staged arm's holds the comparison, too."""
    return [
        row
        for unified, staged, comparison in results(lab)
        for row in (unified.document(), staged.document() | comparison.document())
    ]


def _best(lab: Lab, rungs: Sequence[Rung], arm: str, own: Curve, taken: StepTime) -> Best:
    """The best network of an arm at the last of some rungs."""
    rung = rungs[-1]
    best = rung.best(arm)
    run = climb(lab, best, 0, rung.point)
    cost, steps, model = run.cost(lab.data.shape), run.steps(lab.data.shape)[-1], run.config.model
    tried = tuple(
        {"tflops": one.tflops, "design": item.candidate.design, "rate": item.candidate.rate, "loss": item.loss}
        for one in rungs for item in one.tried[arm]
    )  # fmt: skip
    return Best(
        f"{arm}, {rung.tflops:g} TFLOPs", arm, rung.tflops, best.design, best.rate, run.config.edges, model.capacity,
        model.capacities, cost.parameters, cost.flops(run.shares) / 1e6, steps, own.tflops[-1], taken,
        steps * taken.milliseconds / 1e3, 1e3 * run.config.training.batch_size / taken.milliseconds,
        estimate([loss[-1] for loss in own.loss]), own, tried,
    )  # fmt: skip


def compare(unified: Curve, staged: Curve, slower: float) -> Comparison:
    """How staged runs compare with unified ones.

    Args:
        unified: The unified runs.
        staged: The staged runs of the same seeds, at the same points.
        slower: Seconds of a FLOP of the staged network, those of the unified one being 1.

    Returns:
        The comparison.
    """
    ratio = []
    for place in range(BEFORE, len(unified.tflops)):
        flops = shares(unified, staged, place)
        seconds = estimate([slower * share for share in flops])
        ratio.append(Equal(unified.tflops[place], estimate(flops), seconds))
    at = unified.tflops[BEFORE:]
    if len(at) < 3:
        return Comparison(slower, tuple(ratio), (), ())
    band = ratio_band(unified, staged, BEFORE, at)
    return Comparison(slower, tuple(ratio), tuple(fit_laws([unified, staged], BEFORE)), tuple(map(tuple, band)))


def _json(document: dict[str, Any]) -> dict[str, Any]:
    """With lists for tuples, as a file has it when it is read again."""
    return json.loads(json.dumps(document))


def findings(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A sentence for each budget.

    Args:
        rows: From `rows`.

    Returns:
        The sentences.
    """
    sentences = []
    for unified, staged in pairs(rows):
        parts = []
        for name, words in (("flops", "FLOPs"), ("seconds", "seconds")):
            reach = staged["reach"][name]
            low, high = reach["interval"] or (0.0, 0.0)
            interval = f" (95% interval {low:.0%} to {high:.0%})" if reach["interval"] else " (one seed)"
            parts.append(f"{reach['mean']:.0%} of its {words}{interval}")
        arms = [f"({own['design']} at rate {own['rate']:g}) {own['loss']['mean']:.4f}" for own in (unified, staged)]
        sentences.append(
            f"{unified['tflops']:g} TFLOPs: the best unified network {arms[0]}, the best staged one {arms[1]}; staged "
            f"has the unified one's final loss at {' and '.join(parts)}."
        )
    return sentences


def pairs(rows: Sequence[dict[str, Any]]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The unified and the staged row of each budget."""
    return list(zip(rows[::2], rows[1::2], strict=True))
