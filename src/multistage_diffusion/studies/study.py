"""Running a study: what it trains and costs, its rows, its findings, its document."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from multistage_diffusion.config import to_dict
from multistage_diffusion.data import load_parts
from multistage_diffusion.errors import ConfigError, suggest
from multistage_diffusion.files import write_json
from multistage_diffusion.stages import Stages
from multistage_diffusion.studies import curves, designs, frontiers, interference, intervals, scaling, tables
from multistage_diffusion.studies.budgets import Budget
from multistage_diffusion.studies.cells import Cell, Cells, Say, Watch
from multistage_diffusion.studies.designs import Finder, Variants
from multistage_diffusion.studies.tables import Lab

Rows = list[dict[str, Any]]
Seen = Callable[[Cell], Watch]
FORMAT = 1  # of a study's document: raised when its rows change, so that no page is made from rows of another kind


@dataclass(frozen=True)
class Study:
    """A table or figure of the paper.

    Attributes:
        title: What it is about.
        question: What it asks, in a sentence, with its place in the paper.
        variants: The models that it compares.
        rows: Measures them.
        findings: Says what the rows say.
        extra: Further cells that it trains, with their names.
        train: Trains where what is trained depends on what was measured, and returns what it trained; by default all
            cells are trained to their end.
        distances: Whether it measures distances, which take features.
    """

    title: str
    question: str
    variants: Callable[[Finder], Variants]
    rows: Callable[[Lab, Variants], Rows]
    findings: Callable[[Sequence[dict[str, Any]]], list[str]]
    extra: Callable[[Lab], list[tuple[str, Cell]]] = lambda lab: []
    train: Callable[[Lab, Seen | None], list[Cell]] | None = None
    distances: bool = True

    def cells(self, lab: Lab) -> list[Cell]:
        """All that it trains; all seeds of a model side by side."""
        return [one for _, one in self.labelled(lab)]

    def labelled(self, lab: Lab) -> list[tuple[str, Cell]]:
        """All that it trains, with the names of the models."""
        variants = self.variants(lab.finder)
        cells = [(label, one) for label, config in variants.items() for one in lab.runs(config)]
        return [*cells, *self.extra(lab)]

    def fill(self, lab: Lab, watch: Seen | None) -> list[Cell]:
        """Train all that it needs and return that, each cell as far as it was trained."""
        if self.train is not None:
            return self.train(lab, watch)
        cells = self.cells(lab)
        lab.cells.fill(cells, watch)
        return cells


def _architectures(lab: Lab, variants: Variants) -> Rows:
    rows = []
    for label, config in variants.items():
        rows.append(tables.row(lab, label, config))
        if config.model.architecture == "separate":
            rows.append(tables.early_stopped(lab, f"{label}, early stopping", config))
    return tables.compared(rows)


STUDIES = {
    "efficiency": Study(
        "Quality against training FLOPs",
        "At which share of the unified model's training FLOPs is a multistage model as good? (Table 2, Fig. 1d)",
        designs.efficiency,
        curves.efficiency,
        curves.efficiency_findings,
    ),
    "architectures": Study(
        "Architectures at equal training FLOPs",
        "What do separate networks, early stopping, tailored widths and a shared encoder each bring? (Table 3)",
        designs.architectures,
        _architectures,
        tables.findings,
    ),
    "clusterings": Study(
        "Clusterings at equal training FLOPs",
        "Does it matter where the stages are cut? (Table 4)",
        designs.clusterings,
        tables.table,
        tables.findings,
    ),
    "stages": Study(
        "Number of stages at equal training FLOPs",
        "How many stages, with equal decoders? (App. B.6)",
        designs.stages,
        tables.table,
        tables.findings,
    ),
    "decoders": Study(
        "Decoder widths at equal training FLOPs",
        "How wide should each stage's decoder be? (App. B.5)",
        designs.decoders,
        tables.table,
        tables.findings,
    ),
    "sampling": Study(
        "Quality against network evaluations",
        "How does each solver do with few evaluations, on unified and multistage models? (Table 1)",
        designs.contenders,
        curves.sampling,
        curves.sampling_findings,
    ),
    "intervals": Study(
        "One stage at a time",
        "How good is a network on one stage alone, by its size, with a well-trained one on the others? (Fig. 2)",
        designs.intervals,
        intervals.intervals,
        intervals.intervals_findings,
        lambda lab: [("well-trained", intervals.well_trained(lab))],
    ),
    "interference": Study(
        "Interference between stages",
        "Do the gradients of different stages agree, in the encoder and in the decoders? (section 3)",
        designs.contenders,
        interference.interference,
        interference.interference_findings,
    ),
    "scaling": Study(
        "Loss against training compute",
        "At which share of the FLOPs and seconds of the best unified network, tuned as well, does a staged one have "
        "its loss, and does that share grow or fade with the budget?",
        lambda finder: {},
        lambda lab, variants: frontiers.rows(lab),
        frontiers.findings,
        scaling.planned,
        scaling.trained,
        distances=False,
    ),
}


def open_lab(
    budget: Budget,
    folder: Path,
    *,
    device: torch.device | str = "cpu",
    say: Say = print,
    guess: bool = False,
    keep: bool = True,
) -> Lab:
    """Load the data and find the edges that losses by stage are given in.

    Args:
        budget: The budget; its base run says which data.
        folder: Where trained models and results are kept.
        device: Where to compute.
        say: Told what happens, in lines.
        guess: Train nothing: edges and widths that need training are stand-ins unless they were found before.
        keep: Write the edges that are found.

    Raises:
        DataError: The source cannot be read.
    """
    data, test = load_parts(budget.base.data)
    held: list[Cells] = []
    finder = Finder(folder / "found", data, budget, lambda: held[0], say, guess, keep)
    held.append(Cells(folder / "cells", data, test, Stages(finder.edges()), device=device, say=say))
    return Lab(budget, data, test, held[0], finder)


def names(name: str) -> tuple[str, ...]:
    """The studies that a name stands for.

    Args:
        name: A study, or `all`.

    Raises:
        ConfigError: No such study.
    """
    if name == "all":
        return tuple(STUDIES)
    if name not in STUDIES:
        raise ConfigError(f"no study {name}{suggest(name, (*STUDIES, 'all'))}")
    return (name,)


def costs(lab: Lab, studies: Sequence[str]) -> Rows:
    """What the studies train, each model once, and what that costs, before any of it runs.

    Args:
        lab: What to work with.
        studies: Names of studies.

    Returns:
        A row a cell: `study` (the first that needs it), `label`, `seed`, `cell`, `steps`, `tflops`, `parameters`,
        `done`.
    """
    rows, seen = [], set()
    for name in studies:
        for label, one in STUDIES[name].labelled(lab):
            if one in seen:
                continue
            seen.add(one)
            steps = one.steps(lab.data.shape)[-1]
            rows.append(
                {
                    "study": name,
                    "label": label,
                    "seed": one.config.training.seed,
                    "cell": lab.cells.path(one).name,
                    "steps": steps,
                    "tflops": steps * one.step_flops(lab.data.shape) / 1e12,
                    "parameters": one.cost(lab.data.shape).parameters,
                    "done": lab.cells.done(one),
                }
            )
    return rows


def run_study(name: str, lab: Lab, out: Path, *, watch: Seen | None = None) -> dict[str, Any]:
    """Train what a study needs and is not in the cache, measure it, and write its document.

    Args:
        name: The study.
        lab: What to work with.
        out: Where `NAME.json` goes.
        watch: Makes the function that is called after each step of a cell.

    Returns:
        The document: `format`, `study`, `title`, `question`, `rows`, `findings`, `settings`, `seconds`.

    Raises:
        NumericsError: A loss is not finite.
        StoppedError: SIGTERM or SIGINT came; the same call goes on from there.
    """
    begin, study = time.perf_counter(), STUDIES[name]
    cells = study.fill(lab, watch)
    rows = study.rows(lab, study.variants(lab.finder))
    trained = {lab.cells.path(one).name: lab.cells.spent(one)["tflops"] for one in cells}
    document = {
        "format": FORMAT,
        "study": name,
        "title": study.title,
        "question": study.question,
        "rows": rows,
        "findings": study.findings(rows),
        "settings": {
            "base": to_dict(lab.budget.base),
            "budget": {key: value for key, value in asdict(lab.budget).items() if key != "base"},
            "stages": list(lab.cells.stages.edges),
            "data": lab.data.name,
            "digest": lab.data.digest,
            "images": len(lab.data),
            "held_out": len(lab.test),
            "shape": list(lab.data.shape),
            "features": _features(lab) if study.distances else None,
            "cells": len(trained),
            "training_tflops": sum(trained.values()),
            "search_tflops": lab.finder.search_tflops(),
        },
        "seconds": round(time.perf_counter() - begin, 1),
    }
    write_json(out / f"{name}.json", document)
    return document


def _features(lab: Lab) -> dict[str, Any]:
    """What sees the images behind the distances."""
    return {"name": lab.extractor.name, "accuracy": lab.extractor.accuracy, "digest": lab.extractor.digest}
