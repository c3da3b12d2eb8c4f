"""Studies that are curves: quality against training FLOPs, and against network evaluations of the sampler."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

from multistage_diffusion.sampling import Sampler
from multistage_diffusion.studies.designs import Variants
from multistage_diffusion.studies.estimate import estimate
from multistage_diffusion.studies.tables import METRICS, NOT_TOLD, Lab, change, compared, measured, row, summed

SOLVERS = ("ddim", "dpm-3", "dpmpp-2m", "heun")


def efficiency(lab: Lab, variants: Variants) -> list[dict[str, Any]]:
    """Quality on the way, and the FLOPs at which each model reaches the final quality of the unified ones.

    Returns:
        A row a model with `curve`, one entry a point, and `reach`: for the first model, and the unified one of least
        loss if that is another, by label; each has for `fd` and `loss` the share of its training FLOPs at which its
        final mean is reached, interpolated, as an estimate over seeds; none where a seed does not reach it.
    """
    rows = []
    for label, config in variants.items():
        cells = lab.runs(config)
        curve = []
        for point in range(cells[0].points):
            figures = [measured(lab, one, point, samples=lab.budget.samples_on_the_way) for one in cells]
            spent = lab.cells.spent(cells[0], point)
            curve.append({"tflops": spent["tflops"], "steps": spent["steps"], **summed(figures)})
        rows.append({**row(lab, label, config), "curve": curve})
    best = min((entry for entry in rows if entry["architecture"] == "unified"), key=lambda entry: entry["loss"]["mean"])
    for entry in rows:
        entry["reach"] = {
            other["label"]: {name: _reach(entry["curve"], other["curve"], name) for name in METRICS}
            for other in (rows[0], best)
            if other is not entry
        }
    return compared(rows)


def crossing(spent: Sequence[float], values: Sequence[float], target: float) -> float | None:
    """Where a falling curve reaches a target for good, interpolated in the logarithm of the values.

    A noisy curve may be at the target for a moment and above it again: what counts is from where on it stays.

    Args:
        spent: Increasing costs.
        values: Positive values at these costs.
        target: The value to reach.

    Returns:
        The cost; that of the first point if no value is above the target, none if the last one is.
    """
    if values[-1] > target:
        return None
    above = [index for index, value in enumerate(values) if value > target]
    if not above:
        return spent[0]
    last = above[-1]
    before, after = values[last], values[last + 1]
    return spent[last] + (spent[last + 1] - spent[last]) * math.log(before / target) / math.log(before / after)


def _reach(curve: list[dict[str, Any]], reference: list[dict[str, Any]], name: str) -> dict[str, Any] | None:
    """The share of the reference's FLOPs at which each seed is where the reference's same seed ends."""
    shares = []
    for seed, target in enumerate(reference[-1][name]["values"]):
        spent = [point["tflops"] for point in curve]
        spent_tflops = crossing(spent, [point[name]["values"][seed] for point in curve], target)
        if spent_tflops is None:
            return None
        shares.append(spent_tflops / reference[-1]["tflops"])
    return estimate(shares).document()


def efficiency_findings(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A sentence for each model and unified model to beat: at which share of its FLOPs it is as good."""
    return [
        f"{entry['label']} reaches the final quality of {other}, by {_reached(reach)}."
        for entry in rows[1:]
        for other, reach in entry["reach"].items()
    ]


def _reached(reach: dict[str, Any]) -> str:
    """Like `Fréchet distance at 60% (95% interval 47% to 73%) and by held-out loss not with every seed`."""
    parts = []
    for name, words in METRICS.items():
        if reach[name] is None:
            parts.append(f"{words} not with every seed")
            continue
        interval = reach[name]["interval"]
        suffix = "" if interval is None else f" (95% interval {interval[0]:.0%} to {interval[1]:.0%})"
        if interval is not None and interval[0] <= 1 <= interval[1]:
            suffix += ", not told apart from all of them,"
        parts.append(f"{words} at {reach[name]['mean']:.0%} of its training FLOPs{suffix}")
    return " and by ".join(parts).removesuffix(",")


def sampling(lab: Lab, variants: Variants) -> list[dict[str, Any]]:
    """Fréchet distance against the sampler's network evaluations.

    Returns:
        A row for each model, solver and number of evaluations.
    """
    rows = []
    for label, config in variants.items():
        cells = lab.runs(config)
        for solver, evaluations in itertools.product(SOLVERS, lab.budget.evaluations):
            chosen = Sampler(solver=solver, steps=_steps(solver, evaluations))
            measured_fd = [
                lab.cells.distance(one, lab.extractor, chosen, lab.budget.samples_on_the_way) for one in cells
            ]
            denoiser = lab.cells.denoiser(cells[0])
            calls = chosen.stage_calls(denoiser.process, denoiser.stages)
            cost = cells[0].cost(lab.data.shape)
            rows.append(
                {
                    "label": label,
                    "solver": solver,
                    "steps": chosen.steps,
                    "nfe": sum(calls),
                    "mflops_per_sample": cost.flops(calls) / 1e6,
                    "fd": estimate([item["fd"] for item in measured_fd]).document(),
                }
            )
    return rows


def sampling_findings(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The best solver of each model within each number of evaluations, against the first model's best."""
    sentences, first = list[str](), rows[0]["label"]
    first_best = best_solvers(rows, first)
    for label in dict.fromkeys(entry["label"] for entry in rows):
        parts = []
        for allowed, best in best_solvers(rows, label).items():
            text = f"{best['solver']} within {allowed} ({best['fd']['mean']:.1f}"
            if label != first:
                difference = change(best["fd"], first_best[allowed]["fd"])
                text += f", {difference} {'from' if difference == NOT_TOLD else 'than'} {first}"
            parts.append(f"{text})")
        sentences.append(f"{label}: least Fréchet distance by network evaluations: {', '.join(parts)}.")
    return sentences


def best_solvers(rows: Sequence[dict[str, Any]], label: str) -> dict[int, dict[str, Any]]:
    """The row of least distance within each number of evaluations that a one-call solver takes.

    Returns:
        By number of evaluations, increasing.
    """
    entries = [row for row in rows if row["label"] == label]
    allowed = sorted({row["nfe"] for row in rows if row["nfe"] == row["steps"]})
    return {
        nfe: min((row for row in entries if row["nfe"] <= nfe), key=lambda row: row["fd"]["mean"]) for nfe in allowed
    }


def _steps(solver: str, evaluations: int) -> int:
    """Steps of a solver that takes at most so many evaluations: Heun's takes two a step but for the last."""
    return max(1, (evaluations + 1) // 2) if solver == "heun" else evaluations
