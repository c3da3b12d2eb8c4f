"""Loss against training compute: at each budget the best tuned unified network beside the best tuned staged one.

Both arms choose width, design and learning rate by the same rule, on one half of the held-out images; what is reported
is measured on the other half, over seeds. Runs are at a constant rate with an average of the weights, so a run on its
way to a larger budget is, at a smaller one, the run of that budget.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from multistage_diffusion.backbones import UNet
from multistage_diffusion.config import Backbone, RunConfig, StagesConfig
from multistage_diffusion.studies.budgets import Budget
from multistage_diffusion.studies.cells import Cell, Climb, Watch, encoder_width, plain, widths
from multistage_diffusion.studies.tables import Lab

EDGES = {"vp": (0.25, 0.9, 4.0), "edm": (0.15, 0.35, 0.8)}  # in sigma; other processes cluster
BEFORE = 2  # points of a run before the first rung
ARMS = ("unified", "staged")
Seen = Callable[[Cell], Watch]


@dataclass(frozen=True)
class Candidate:
    """A network and the rate it is trained at.

    Attributes:
        design: Width of a unified network, encoder and decoder widths of a staged one.
        config: The run, of seed 0.
    """

    design: str
    config: RunConfig

    @property
    def rate(self) -> float:
        """Its learning rate."""
        return self.config.training.learning_rate


@dataclass(frozen=True)
class Tried:
    """A candidate at a rung.

    Attributes:
        candidate: Which.
        loss: Its loss on the half that chooses.
    """

    candidate: Candidate
    loss: float


@dataclass(frozen=True)
class Rung:
    """A budget at which candidates were compared.

    Attributes:
        tflops: The budget, in 10^12 FLOPs.
        point: The point of the runs that ends it.
        tried: The candidates of each arm, the best first.
    """

    tflops: float
    point: int
    tried: dict[str, tuple[Tried, ...]]

    def best(self, arm: str) -> Candidate:
        """The arm's candidate of least loss on the half that chooses."""
        return self.tried[arm][0].candidate


def candidates(lab: Lab) -> dict[str, tuple[Candidate, ...]]:
    """What each arm begins with, the likely ones first: every design, at a rate inverse to its encoder's width.

    Args:
        lab: What to work with.

    Returns:
        By arm.
    """
    ladder, base, kind = lab.budget.ladder, lab.budget.base, lab.budget.base.process.kind
    edges = EDGES[kind] if kind in EDGES else lab.finder.edges(stages=4, measure="training")
    found: dict[str, list[Candidate]] = {arm: [] for arm in ARMS}
    for model in dict.fromkeys(base.model.with_width(factor) for factor in ladder.unified):
        run = replace(base, model=replace(model, architecture="unified"))
        found["unified"].append(_first(f"width {encoder_width(model)}", plain(run), lab.budget))
    entries = (*ladder.entries, *[()] * len(ladder.staged))
    for model in dict.fromkeys(map(partial(_staged, base.model), ladder.staged, entries)):
        run = replace(base, stages=StagesConfig(edges=edges), model=model)
        entered = getattr(model, "entry_levels", ())
        design = f"{encoder_width(model)}; {' / '.join(map(str, model.capacities))}"
        design += f", entering at {' / '.join(map(str, entered))}" if entered else ""
        found["staged"].append(_first(design, run, lab.budget))
    return {arm: tuple(own) for arm, own in found.items()}


def _staged(model: Backbone, factors: tuple[float, ...], entries: tuple[int, ...]) -> Backbone:
    """A staged network by widths in those of the base, the encoder's first, and entries as deep as it halves images."""
    encoder, *decoders = factors
    model = model.with_width(encoder).with_capacities(widths(model, *decoders))
    if not isinstance(model, UNet):
        return model
    entries = tuple(min(entry, len(model.multipliers) - 1) for entry in entries)
    return replace(model, entry_levels=entries if any(entries) else ())


def climb(lab: Lab, candidate: Candidate, seed: int = 0, point: int | None = None) -> Climb:
    """A candidate's run of a seed, as far as a point; by default through all budgets."""
    config = replace(candidate.config, training=replace(candidate.config.training, seed=seed))
    rungs = lab.budget.ladder.rungs
    last = BEFORE + 2 * (len(rungs) - 1) if point is None else point
    return Climb(config, lab.budget.tflops * rungs[0] / 2 ** (BEFORE / 2), last + 1)


def planned(lab: Lab) -> list[tuple[str, Cell]]:
    """What it would train if none of its first candidates stopped early, with names: more than it will."""
    found = candidates(lab)
    return [(f"{arm}, {one.design}", climb(lab, one)) for arm in ARMS for one in found[arm]]


def trained(lab: Lab, watch: Seen | None = None) -> list[Cell]:
    """Do the sweep; each run as far as it was trained."""
    last: dict[tuple[Candidate, int], int] = {}
    for rung in sweep(lab, watch):
        for arm in ARMS:
            last |= {(item.candidate, 0): rung.point for item in rung.tried[arm]}
            last |= {(rung.best(arm), seed): rung.point for seed in range(lab.budget.seeds)}
    return [climb(lab, one, seed, point) for (one, seed), point in last.items()]


def sweep(lab: Lab, watch: Seen | None = None) -> tuple[Rung, ...]:
    """Train the candidates rung by rung, and the best of each arm with all seeds.

    At the first rung the best candidate's design is tried at twice and half of its rate, too, until its best rate has a
    worse one on each side. From there each design goes on at its best rate, and at each rung the worse half of an arm
    stops. All arms stand at one budget before any goes on, so what an interrupted sweep leaves is a fair comparison.
    What is trained and measured is read from the cache.

    Args:
        lab: What to work with.
        watch: Makes the function that is called after each step of a cell.

    Returns:
        The rungs.
    """
    going, rungs = candidates(lab), list[Rung]()
    for place, share in enumerate(lab.budget.ladder.rungs):
        point = BEFORE + 2 * place
        lab.cells.fill([climb(lab, one) for one in _in_turn(going)], watch, point=point)
        rung = Rung(share * lab.budget.tflops, point, {arm: _ranked(lab, going[arm], point, watch) for arm in ARMS})
        rungs.append(rung)
        best = [climb(lab, rung.best(arm), seed) for seed in range(lab.budget.seeds) for arm in ARMS]
        lab.cells.fill(best, watch, point=point)
        going = {arm: _going_on(rung.tried[arm]) for arm in ARMS}
    return tuple(rungs)


def _going_on(tried: Sequence[Tried]) -> tuple[Candidate, ...]:
    """The better half of an arm's designs, each at its best rate."""
    best = dict[str, Candidate]()
    for item in tried:  # the best first
        best.setdefault(item.candidate.design, item.candidate)
    return tuple(best.values())[: -(-len(best) // 2)]


def _ranked(lab: Lab, entrants: Sequence[Candidate], point: int, watch: Seen | None) -> tuple[Tried, ...]:
    """The candidates with their losses on the half that chooses, best first; at the first rung with further rates."""
    tried = dict[Candidate, float]()
    further = list(entrants)
    while further:
        lab.cells.fill([climb(lab, one) for one in further], watch, point=point)
        tried |= {one: lab.cells.loss(climb(lab, one), point, validation=True)["loss"] for one in further}
        best = min(tried, key=lambda one: tried[one])
        around = (_at(best, best.rate * factor) for factor in (2.0, 0.5))
        further = [one for one in around if one not in tried] if point == BEFORE else []
    return tuple(Tried(one, tried[one]) for one in sorted(tried, key=lambda one: tried[one]))


def _first(design: str, run: RunConfig, budget: Budget) -> Candidate:
    """A design at the rate that it is tried at first."""
    rate = budget.ladder.rate * budget.base.training.learning_rate
    return _at(Candidate(design, run), rate * budget.base.model.capacity / run.model.capacity)


def _at(candidate: Candidate, rate: float) -> Candidate:
    training = replace(candidate.config.training, learning_rate=float(f"{rate:.4g}"))
    return replace(candidate, config=replace(candidate.config, training=training))


def _in_turn(entrants: dict[str, tuple[Candidate, ...]]) -> Iterator[Candidate]:
    """One of each arm in turn."""
    for pair in itertools.zip_longest(*entrants.values()):
        yield from (one for one in pair if one is not None)
