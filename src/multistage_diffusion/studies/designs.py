"""Which models each study trains: a label and a run for each row of its table."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from multistage_diffusion.allocation import allocate, proxy_widths
from multistage_diffusion.backbones import Architecture
from multistage_diffusion.clustering import cluster
from multistage_diffusion.config import RunConfig, StagesConfig, to_dict
from multistage_diffusion.data import Images
from multistage_diffusion.files import read_json, write_json
from multistage_diffusion.studies.budgets import PUBLISHED, Budget
from multistage_diffusion.studies.cells import Cell, Cells, Say, cell, distinct, encoder_width, widths

METHODS = {
    "timestep": "uniform in timestep",
    "snr": "log-SNR",
    "gradient": "gradient affinity",
    "optimal-denoiser": "optimal denoiser",
}
STAGES = (1, 2, 3, 4, 5, 6)
DECODERS = {  # decoder widths in encoder widths, low to high noise
    "published, 1.5 / 1 / 0.125": PUBLISHED,
    "equal": (1.0, 1.0, 1.0),
    "narrow, 1 / 0.5 / 0.25": (1.0, 0.5, 0.25),
    "reversed, 0.5 / 1 / 1.5": (0.5, 1.0, 1.5),
}
# Four stages inside the training distribution and their decoders, in encoder widths: the best of a first trial.
NARROWING = ((0.25, 0.9, 4.0), (1.0, 1.0, 0.5, 0.25))
NARROWER = (0.75, 0.5)  # unified networks beside the multistage ones, in base widths
SIZES = (0.5, 1.0, 1.5)  # networks of the interval study, in base widths
Variants = dict[str, RunConfig]


@dataclass(frozen=True)
class Finder:
    """Finds what the designs need and training cannot say: edges and allocated widths. Each is found once and kept.

    Attributes:
        folder: Where they are kept.
        data: Training images.
        budget: The budget.
        cells: The trained models, for the clustering by gradients.
        say: Told what happens, in lines.
        guess: Train nothing: edges and widths that need training are stand-ins unless they were found before.
        keep: Write what is found to the folder.
    """

    folder: Path
    data: Images
    budget: Budget
    cells: Callable[[], Cells]
    say: Say
    guess: bool = False
    keep: bool = True
    _values: dict[str, dict[str, Any]] = field(default_factory=dict, repr=False, compare=False)
    _requested: set[str] = field(default_factory=set, repr=False)

    def edges(self, method: str = "optimal-denoiser", stages: int = 3, measure: str = "time") -> tuple[float, ...]:
        """Edges in sigma, to four digits: their accuracy, and the same on every machine.

        Args:
            method: A method of `cluster`.
            stages: Number of stages.
            measure: What averages over noise levels are taken in.

        Returns:
            The edges; none for one stage.
        """
        if stages == 1:
            return ()

        def find() -> dict[str, Any]:
            denoiser = None
            if method == "gradient":
                trained = self.trained_for_gradients()
                self.cells().fill([trained])
                denoiser = self.cells().denoiser(trained).requires_grad_()
            clustering = cluster(
                self.data,
                self.budget.base.process,
                method=method,
                stages=stages,
                measure=measure,
                objective="variance" if measure == "training" else None,
                denoiser=denoiser,
            )
            rounded = [float(f"{edge:.4g}") for edge in clustering.stages.edges]
            self.say(f"edges by {method} ({stages} stages, {measure}): {', '.join(f'{edge:g}' for edge in rounded)}")
            return {
                "edges": rounded,
                "edges_t": list(clustering.edges_t),
                "intervals": clustering.stages.provenance["intervals"],
            }

        def stand_in() -> dict[str, Any]:
            return {"edges": list(self.edges(stages=stages))}

        name = f"edges-{method}-{stages}-{measure}"
        return tuple(self._kept(name, find, stand_in if method == "gradient" else None)["edges"])

    def allocated(self) -> RunConfig:
        """The run that clustering and allocation choose; no held-out image has a say in it.

        Four stages of least variance under the training distribution, and the decoder widths of least expected loss at
        the budget.
        """
        edges = self.edges(stages=4, measure="training")
        base = _multistage(self.budget.base, edges, (self.budget.base.model.capacity,) * 4)

        def find() -> dict[str, Any]:
            self.say("decoder widths by proxy runs")
            choice = allocate(
                base,
                self.data,
                self.budget.tflops / 1e3,
                "training",
                steps=self.budget.proxy_steps,
                device=self.cells().device,
                say=self.say,
            )
            return choice.to_dict()

        def stand_in() -> dict[str, Any]:
            return {"decoder_widths": list(base.model.capacities)}

        allocation = self._kept(f"widths-{self.budget.tflops:g}", find, stand_in)
        return _multistage(self.budget.base, edges, tuple(allocation["decoder_widths"]))

    def search_tflops(self) -> float:
        """Training FLOPs of the proxy runs behind the allocated widths, in 10^12; spent once, if asked for."""
        if not any(name.startswith("widths") for name in self._requested):
            return 0.0
        base, steps = self.allocated(), self.budget.proxy_steps
        runs = (_multistage(base, base.stages.edges, (width,) * 4) for width in proxy_widths(base.model))
        return sum(steps * Cell(run, 1.0, 1).step_flops(self.data.shape) for run in runs) / 1e12

    def trained_for_gradients(self) -> Cell:
        """The unified model whose gradients are compared."""
        return cell(unified(self.budget.base), self.budget.tflops, self.budget.points)

    def _kept(
        self, name: str, find: Callable[[], dict[str, Any]], stand_in: Callable[[], dict[str, Any]] | None
    ) -> dict[str, Any]:
        """What was found under this name for this data and base run; found now if it was not.

        What needs training has a stand-in, which is never written.
        """
        self._requested.add(name)
        if name in self._values:
            return self._values[name]
        base = self.budget.base
        question: dict[str, Any] = {"data": self.data.digest, "process": to_dict(base.process)}
        if name.startswith(("widths", "edges-gradient")):
            question |= {
                "base": distinct(base),
                "tflops": self.budget.tflops,
                "points": self.budget.points,
                "proxy_steps": self.budget.proxy_steps,
            }
        path = self.folder / f"{name}.json"
        question = json.loads(json.dumps(question))
        if path.is_file() and (document := read_json(path))["asked"] == question:
            return self._values.setdefault(name, document)
        if self.guess and stand_in is not None:
            return stand_in()
        document = {"asked": question, **find()}
        if self.keep:
            write_json(path, document)
        return self._values.setdefault(name, document)


def unified(base: RunConfig) -> RunConfig:
    """One network for all noise levels, of the encoder's width."""
    return replace(base, model=replace(base.model, architecture="unified"))


def architectures(finder: Finder) -> Variants:
    """Table 3; the rows with early stopping are read off the separate networks' own history."""
    base, edges = finder.budget.base, finder.edges()
    equal, tailored = widths(base.model, 1.0, 1.0, 1.0), widths(base.model, *PUBLISHED)
    return {
        "unified": unified(base),
        "separate": _multistage(base, edges, equal, "separate"),
        "separate, tailored": _multistage(base, edges, tailored, "separate"),
        "multistage": _multistage(base, edges, tailored),
        "multistage, allocated": finder.allocated(),
    }


def clusterings(finder: Finder) -> Variants:
    """Table 4: the same network on the edges of four clusterings, and on the one that training asks for."""
    base = finder.budget.base
    tailored = widths(base.model, *PUBLISHED)
    rows = {label: _multistage(base, finder.edges(method), tailored) for method, label in METHODS.items()}
    rows["least variance in training"] = _multistage(base, finder.edges(measure="training"), tailored)
    return rows


def efficiency(finder: Finder) -> Variants:
    """Table 2 and Fig. 1d: the unified model, the paper's edges and widths, and two choices of our own.

    These are what clustering and allocation choose, and four stages that narrow with the noise. As narrow networks buy
    more steps, narrower unified networks stand beside them, and the allocated decoders on an encoder of their width.
    """
    base = finder.budget.base
    rows = {
        "unified": unified(base),
        "multistage": _multistage(base, finder.edges(), widths(base.model, *PUBLISHED)),
        "multistage, allocated": finder.allocated(),
        "multistage, narrowing": _multistage(base, NARROWING[0], widths(base.model, *NARROWING[1])),
    }
    for factor in NARROWER:
        run = _scaled(base, factor)
        rows[f"unified, width {encoder_width(run.model)}"] = unified(run)
    run = _scaled(finder.allocated(), NARROWER[-1])
    rows[f"multistage, allocated, width {encoder_width(run.model)}"] = run
    return rows


def contenders(finder: Finder) -> Variants:
    """The unified model, the paper's and the allocated one: those that sampling and interference are looked at on."""
    rows = efficiency(finder)
    return {label: rows[label] for label in ("unified", "multistage", "multistage, allocated")}


def stages(finder: Finder) -> Variants:
    """App. B.6: 1 to 6 stages, each of least variance under the training distribution; equal decoders."""
    base = finder.budget.base
    rows = {"1 stage": unified(base)}
    for number in STAGES[1:]:
        equal = widths(base.model, *(1.0,) * number)
        rows[f"{number} stages"] = _multistage(base, finder.edges(stages=number, measure="training"), equal)
    return rows


def decoders(finder: Finder) -> Variants:
    """App. B.5: decoder widths at equal training FLOPs, on the edges of the optimal denoiser."""
    base, edges = finder.budget.base, finder.edges()
    rows = {"unified": unified(base)}
    return rows | {label: _multistage(base, edges, widths(base.model, *factors)) for label, factors in DECODERS.items()}


def intervals(finder: Finder) -> Variants:
    """Fig. 2: separate networks of three sizes, and the unified one, each to be put in place on one stage."""
    base, edges = finder.budget.base, finder.edges()
    rows = {"unified": unified(base)}
    for factor in SIZES:
        run = _scaled(base, factor)
        rows[f"separate, width {encoder_width(run.model)}"] = _multistage(
            run, edges, (run.model.capacity,) * 3, "separate"
        )
    return rows


def _scaled(run: RunConfig, factor: float) -> RunConfig:
    """The run with another encoder and the same decoders."""
    return replace(run, model=run.model.with_width(factor))


def _multistage(
    base: RunConfig,
    edges: tuple[float, ...],
    decoder_widths: tuple[int, ...],
    architecture: Architecture = "multistage",
) -> RunConfig:
    model = replace(base.model.with_capacities(decoder_widths), architecture=architecture)
    return replace(base, stages=StagesConfig(edges=edges), model=model)
