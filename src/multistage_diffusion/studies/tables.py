"""Studies that are tables: a row a model, quality at equal training FLOPs, differences from the first row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from multistage_diffusion.config import RunConfig
from multistage_diffusion.data import Images
from multistage_diffusion.denoiser import Denoiser
from multistage_diffusion.evaluation import distances, generated, held_out_loss
from multistage_diffusion.metrics.classifier import classifier_features
from multistage_diffusion.metrics.extractor import FeatureExtractor
from multistage_diffusion.stages import Stages
from multistage_diffusion.studies.budgets import Budget
from multistage_diffusion.studies.cells import IMAGE_SEED, Cell, Cells, cell, encoder_width
from multistage_diffusion.studies.designs import Finder, Variants
from multistage_diffusion.studies.estimate import difference, differs, estimate

METRICS = {"fd": "Fréchet distance", "loss": "held-out loss"}
NOT_TOLD = "not told apart"


@dataclass(frozen=True)
class Lab:
    """What every study works with.

    Attributes:
        budget: Cost and care.
        data: Training images.
        test: Held-out images.
        cells: The trained models.
        finder: Edges and widths.
    """

    budget: Budget
    data: Images
    test: Images
    cells: Cells
    finder: Finder

    @cached_property
    def extractor(self) -> FeatureExtractor:
        """Features of the source's own classifier."""
        return classifier_features(self.data, self.test, device=self.cells.device)

    def runs(self, config: RunConfig, *, seeds: int | None = None, times: float = 1.0) -> list[Cell]:
        """A model's cells, one a seed.

        Args:
            config: The run.
            seeds: How many; by default the budget's.
            times: Training FLOPs, in budgets.
        """
        count = self.budget.seeds if seeds is None else seeds
        return [
            cell(
                replace(config, training=replace(config.training, seed=seed)),
                self.budget.tflops * times,
                self.budget.points,
            )
            for seed in range(count)
        ]


def table(lab: Lab, variants: Variants) -> list[dict[str, Any]]:
    """A row a model, all at the same training FLOPs, with the difference of each from the first."""
    rows = [row(lab, label, config) for label, config in variants.items()]
    return compared(rows)


def row(lab: Lab, label: str, config: RunConfig) -> dict[str, Any]:
    """What a model costs and how good it is, over seeds."""
    cells = lab.runs(config)
    figures = [measured(lab, one) for one in cells]
    return {"label": label, **costs(lab, cells), **summed(figures)}


def measured(lab: Lab, one: Cell, point: int = -1, *, samples: int | None = None) -> dict[str, Any]:
    """Distance and losses of one trained model at a point; by default the last one, on the budget's samples.

    Returns:
        `fd`, `kid`, `loss`, `stage_loss`.
    """
    samples = samples or lab.budget.samples
    loss = lab.cells.loss(one, point)
    return {**lab.cells.distance(one, lab.extractor, one.config.sampling, samples, point), **loss}


def costs(lab: Lab, cells: Sequence[Cell]) -> dict[str, Any]:
    """What a row's model is and costs; the same for all seeds but for what was spent.

    Returns:
        Architecture, edges, widths, parameters, FLOPs of an image in training and in sampling, FLOPs and steps spent.
    """
    first, model = cells[0], cells[0].config.model
    cost, denoiser = first.cost(lab.data.shape), lab.cells.denoiser(first)
    calls = first.config.sampling.stage_calls(denoiser.process, denoiser.stages, labels=denoiser.classes > 0)
    spent = [lab.cells.spent(one) for one in cells]
    return {
        "architecture": model.architecture,
        "edges": list(first.config.edges),
        "width": encoder_width(model),
        "decoder_widths": list(model.capacities),
        "shares": list(first.shares),
        "parameters": cost.parameters,
        "mflops": cost.flops(first.shares) / 1e6,
        "mflops_per_sample": cost.flops(calls) / 1e6,
        "training_tflops": estimate([item["tflops"] for item in spent]).mean,
        "steps": spent[0]["steps"],
    }


def summed(figures: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Figures of several seeds as estimates.

    Returns:
        `fd`, `kid`, `loss`, and `stage_loss`, a list.
    """
    estimates = {name: estimate([item[name] for item in figures]).document() for name in ("fd", "kid", "loss")}
    by_stage = zip(*(item["stage_loss"] for item in figures), strict=True)
    return {**estimates, "stage_loss": [estimate(values).document() for values in by_stage]}


def compared(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with `difference`: each metric's difference from the first row, seed by seed."""
    for entry in rows:
        entry["difference"] = {
            name: difference(entry[name]["values"], rows[0][name]["values"]).document() for name in METRICS
        }
    return rows


def findings(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A sentence for each row but the first: better, worse, or no difference that the seeds can tell."""
    sentences, first = list[str](), rows[0]["label"]
    for entry in rows[1:]:
        parts = [f"{words} {change(entry[name], rows[0][name])}" for name, words in METRICS.items()]
        sentences.append(f"{entry['label']} against {first}: {', '.join(parts)}.")
    return sentences


def change(entry: dict[str, Any], first: dict[str, Any]) -> str:
    """How a figure differs from another, in words.

    Args:
        entry: The document of an estimate.
        first: That of the estimate it is compared with, over the same seeds.

    Returns:
        Like `3.1% lower`, or `not told apart` where the 95% interval of the difference holds 0.
    """
    significant = differs(difference(entry["values"], first["values"]))
    if significant is False:
        return NOT_TOLD
    ratio = entry["mean"] / first["mean"] - 1
    size = f"{abs(ratio):.1%}" if abs(ratio) < 0.1 else f"{abs(ratio):.0%}"
    return f"{size} {'lower' if ratio < 0 else 'higher'}{'' if significant else ' (one seed)'}"


def early_stopped(lab: Lab, label: str, config: RunConfig) -> dict[str, Any]:
    """A separate network whose stages are each stopped where their loss on validation images was lowest.

    Returns:
        The row; `stopped` says at which share of its training each stage stopped, one list a seed. What was trained
        beyond that counts as spent, as it was.
    """
    cells, figures, stopped = lab.runs(config), [], []
    for one in cells:
        assert one.config.model.architecture == "separate", "stages that share an encoder cannot stop alone"

        def measure(one: Cell = one) -> dict[str, Any]:
            denoiser, chosen = _assembled(lab, one)
            images = generated(denoiser, lab.budget.samples, one.config.sampling, seed=IMAGE_SEED)
            loss = held_out_loss(denoiser, lab.cells.measured, stages=lab.cells.stages, max_images=1_000, repeats=4)
            return {
                **distances(lab.extractor, lab.test, images, ["fd", "kid"]),
                "loss": loss.loss,
                "stage_loss": list(loss.stage_loss),
                "stopped": [(point + 1) / one.points for point in chosen],
            }

        measurements = lab.cells.cached(
            one, -1, f"early-stopped-{lab.budget.samples}-{lab.extractor.digest[:8]}", measure
        )
        figures.append(measurements)
        stopped.append(measurements["stopped"])
    return {"label": label, **costs(lab, cells), **summed(figures), "stopped": stopped}


def _assembled(lab: Lab, one: Cell) -> tuple[Denoiser, list[int]]:
    """The denoiser of each stage's best point, and which points these are."""
    losses = [lab.cells.loss(one, point, validation=True)["stage_loss"] for point in range(one.points)]
    if Stages(one.config.edges).edges != lab.cells.stages.edges:
        raise AssertionError("early stopping reads the losses of the network's own stages")
    chosen = [min(range(one.points), key=lambda point: losses[point][k]) for k in range(len(lab.cells.stages))]
    denoiser = lab.cells.denoiser(one)
    for stage, point in enumerate(chosen):
        source = lab.cells.denoiser(one, point).network
        denoiser.network.encoders[stage].load_state_dict(source.encoders[stage].state_dict())
        denoiser.network.decoders[stage].load_state_dict(source.decoders[stage].state_dict())
    return denoiser, chosen
