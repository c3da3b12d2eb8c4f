"""The tables of a study, for the page and the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from multistage_diffusion.studies.estimate import difference, differs
from multistage_diffusion.studies.frontiers import pairs

Rows = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Item:
    """An entry of a table.

    Attributes:
        text: What it says.
        significant: Whether the 95% interval of the difference leaves out 0; none where there is no difference or only
            one seed.
    """

    text: str
    significant: bool | None = None


@dataclass(frozen=True)
class Sheet:
    """A table.

    Attributes:
        title: What it shows.
        head: Names of its columns; the first `words` of them hold words.
        lines: Its entries.
        words: How many columns, from the left, hold words.
    """

    title: str
    head: tuple[str, ...]
    lines: tuple[tuple[Item, ...], ...]
    words: int = 1


def sheets(document: dict[str, Any]) -> list[Sheet]:
    """The tables of a study: its result, and the models that it compares.

    Returns:
        The tables, the result first.
    """
    rows = document["rows"]
    match document["study"]:
        case "sampling":
            return [_sampling(rows)]
        case "intervals":
            return [_intervals(rows)]
        case "interference":
            return [_interference(rows)]
        case "efficiency":
            return [*(_reach(rows, other) for other in references(rows)), _quality(rows), _models(rows)]
        case "scaling":
            return [_frontiers(rows), _ratios(rows), _tried(rows)]
        case _:
            return [_quality(rows), _models(rows)]


def _quality(rows: Rows) -> Sheet:
    """Distance and loss with the difference from the first row."""
    head = (
        "model",
        "Fréchet distance",
        "difference",
        "95% interval",
        "held-out loss",
        "difference",
        "95% interval",
        "KD x 1000",
    )
    lines = []
    for place, entry in enumerate(rows):
        line = [Item(entry["label"])]
        for metric in ("fd", "loss"):
            line.append(Item(mean_and_error(entry[metric])))
            line += [Item(""), Item("")] if place == 0 else _change(entry[metric], rows[0][metric])
        thousand = {"mean": 1e3 * entry["kid"]["mean"], "error": _times(1e3, entry["kid"]["error"])}
        lines.append((*line, Item(mean_and_error(thousand))))
    return Sheet(
        "Quality at the end of training; differences from the first row, seed by seed; KD: kernel distance",
        head,
        tuple(lines),
    )


def _models(rows: Rows) -> Sheet:
    """What each model is and costs."""
    head = (
        "model",
        "edges, sigma",
        "encoder; decoders",
        "parameters",
        "MFLOPs an image",
        "MFLOPs a sample",
        "steps",
        "training TFLOPs",
        "loss by stage",
    )
    lines = []
    for entry in rows:
        words = (
            entry["label"],
            " / ".join(f"{edge:.3g}" for edge in entry["edges"]) or "none",
            f"{entry['width']}; " + " / ".join(map(str, entry["decoder_widths"])),
            count(entry["parameters"]),
            digits(entry["mflops"]),
            digits(entry["mflops_per_sample"]),
            f"{entry['steps']:,}",
            digits(entry["training_tflops"]),
            " / ".join(f"{loss['mean']:.3g}" for loss in entry["stage_loss"]),
        )
        lines.append(tuple(map(Item, words)))
    return Sheet("The models; loss by stage in the common partition", head, tuple(lines), words=3)


def _frontiers(rows: Rows) -> Sheet:
    """The best of each arm at each budget, and the compute at which the staged one has the unified one's loss."""
    head = (
        "arm, budget",
        "network",
        "rate",
        "steps",
        "seconds",
        "images/s",
        "loss",
        "FLOPs to the unified loss",
        "95% interval",
        "seconds to it",
        "95% interval",
    )
    lines = []
    for entry in rows:
        line = [
            entry["label"],
            entry["design"],
            f"{entry['rate']:g}",
            f"{entry['steps']:,}",
            digits(entry["seconds"]),
            digits(entry["images_per_second"]),
            mean_and_error(entry["loss"]),
        ]
        reach = entry.get("reach")
        shares = [Item("")] * 4 if reach is None else [*_share(reach["flops"]), *_share(reach["seconds"])]
        lines.append((*map(Item, line), *shares))
    return Sheet(
        "Best of each arm; seconds are steps times the time of a step, measured in turn", head, tuple(lines), words=2
    )


def _ratios(rows: Rows) -> Sheet:
    """Shares of the best unified network's compute at equal loss, at each point of its training."""
    head = ("networks of", "TFLOPs of the unified", "FLOPs", "95% interval", "seconds", "95% interval")
    lines = [
        (
            Item(f"{staged['tflops']:g} TFLOPs"),
            Item(digits(point["tflops"])),
            *_share(point["flops"]),
            *_share(point["seconds"]),
        )
        for _, staged in pairs(rows)
        for point in staged["ratio"]
    ]
    return Sheet(
        "Share of the unified network's compute at which the staged one has its loss; marked where not 100%",
        head,
        tuple(lines),
    )


def _tried(rows: Rows) -> Sheet:
    """What each arm tried, on the half that chooses."""
    last = [entry for entry in rows if entry["tflops"] == rows[-1]["tflops"]]
    lines = [
        tuple(
            map(
                Item, (entry["arm"], item["design"], f"{item['rate']:g}", digits(item["tflops"]), f"{item['loss']:.4f}")
            )
        )
        for entry in last
        for item in entry["tried"]
    ]
    return Sheet(
        "What each arm tried, one seed, on the images that choose",
        ("arm", "network", "rate", "TFLOPs", "loss"),
        tuple(lines),
        words=2,
    )


def _share(reach: dict[str, Any]) -> list[Item]:
    """A share with its interval, marked where that leaves out 100%."""
    interval = reach["interval"]
    if interval is None:
        return [Item(f"{reach['mean']:.0%}"), Item("")]
    low, high = interval
    return [Item(f"{reach['mean']:.0%}"), Item(f"{low:.0%} to {high:.0%}", not low <= 1 <= high)]


def references(rows: Rows) -> list[str]:
    """The models whose final quality the others are to reach."""
    return [entry["label"] for entry in rows if any(entry["label"] in other["reach"] for other in rows)]


def _reach(rows: Rows, other: str) -> Sheet:
    """Shares of a unified model's FLOPs at which the others are as good."""
    head = ("model", "for its Fréchet distance", "95% interval", "for its loss", "95% interval")
    lines = []
    for entry in rows:
        if other not in entry["reach"]:
            continue
        line = [Item(entry["label"])]
        for metric in ("fd", "loss"):
            reach = entry["reach"][other][metric]
            if reach is None:
                line += [Item("not reached by every seed"), Item("")]
                continue
            error = "" if reach["error"] is None else f" ± {reach['error']:.1%}"
            interval, significant = reach["interval"], None
            if interval is not None:
                significant = not interval[0] <= 1 <= interval[1]
            text = "" if interval is None else f"{interval[0]:.0%} to {interval[1]:.0%}"
            line += [Item(f"{reach['mean']:.1%}{error}"), Item(text, significant)]
        lines.append(tuple(line))
    return Sheet(
        f"Share of the training FLOPs of {other} to its final quality; marked where not 100%", head, tuple(lines)
    )


def _sampling(rows: Rows) -> Sheet:
    """A line for each model and solver, a column for each number of evaluations."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for entry in rows:
        groups.setdefault((entry["label"], entry["solver"]), []).append(entry)
    evaluations = [
        entry["nfe"] for entry in max(groups.values(), key=lambda group: sum(entry["nfe"] for entry in group))
    ]
    lines = []
    for (label, solver), group in groups.items():
        entries = [
            mean_and_error(entry["fd"]) + ("" if entry["nfe"] == number else f" ({entry['nfe']})")
            for entry, number in zip(group, evaluations, strict=True)
        ]
        cost = digits(group[-1]["mflops_per_sample"])
        lines.append(tuple(map(Item, (label, solver, *entries, cost))))
    head = (
        "model",
        "solver",
        *(f"{number} evaluations" for number in evaluations),
        f"MFLOPs a sample at {evaluations[-1]}",
    )
    return Sheet(
        "Fréchet distance; in brackets the evaluations where a solver cannot take as many", head, tuple(lines), words=2
    )


def _intervals(rows: Rows) -> Sheet:
    """The end of training; differences from the first network on the same stage."""
    head = (
        "stage",
        "network",
        "parameters in use",
        "loss of the stage",
        "difference",
        "95% interval",
        "Fréchet distance",
        "difference",
        "95% interval",
    )
    lines = []
    for entry in rows:
        first = next(row for row in rows if row["stage"] == entry["stage"])
        end, reference = entry["curve"][-1], first["curve"][-1]
        line = [Item(str(entry["stage"])), Item(entry["label"]), Item(count(entry["parameters"]))]
        for metric in ("loss", "fd"):
            line.append(Item(mean_and_error(end[metric])))
            line += [Item(""), Item("")] if entry is first else _change(end[metric], reference[metric])
        lines.append(tuple(line))
    return Sheet(
        "The end of training, a well-trained network on the other stages; differences from the first network",
        head,
        tuple(lines),
        words=2,
    )


def _interference(rows: Rows) -> Sheet:
    """Every cosine with its interval."""
    pairs = list(dict.fromkeys(pair for entry in rows for pair in entry["pairs"]))
    head = ("model", "part", "steps", *(text for pair in pairs for text in (f"stages {pair}", "95% interval")))
    lines = []
    for entry in rows:
        line = [Item(entry["label"]), Item(entry["part"]), Item(f"{entry['steps']:,}")]
        for cosine in entry["cosine"]:
            if not entry["shared"]:
                line += [Item("no shared weight"), Item("")]
                continue
            interval = cosine["interval"]
            text = "" if interval is None else f"{interval[0]:.2f} to {interval[1]:.2f}"
            significant = None if interval is None else interval[0] > 0 or interval[1] < 0
            line += [Item(mean_and_error(cosine, places=2)), Item(text, significant)]
        lines.append(tuple(line))
    return Sheet("Cosine of the gradients of two stages; marked where not 0", head, tuple(lines), words=2)


def _change(entry: dict[str, Any], first: dict[str, Any]) -> list[Item]:
    """The difference in per cent of the first row's mean, and its interval, marked where it leaves out 0."""
    change = difference(entry["values"], first["values"])
    interval, significant, scale = change.interval, differs(change), abs(first["mean"]) or 1.0
    text = "" if interval is None else f"{interval[0] / scale:+.1%} to {interval[1] / scale:+.1%}"
    return [Item(f"{change.mean / scale:+.1%}"), Item(text, significant)]


def mean_and_error(figure: dict[str, Any], places: int | None = None) -> str:
    """Mean and standard error, to the second digit of the error.

    Args:
        figure: Document of an estimate.
        places: Digits after the point, in place of those that the error asks for.

    Returns:
        Like `0.1995 ± 0.0012`.
    """
    mean, error = figure["mean"], figure["error"]
    if places is None:
        last = error / 10 if error else abs(mean) / 100
        places = min(6, max(0, -math.floor(math.log10(last)))) if last > 0 else 2
    return f"{mean:.{places}f}" if error is None else f"{mean:.{places}f} ± {error:.{places}f}"


def digits(value: float) -> str:
    """Three significant digits, without an exponent."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    places = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{places}f}"


def count(value: int) -> str:
    """Parameters in millions or thousands."""
    return f"{digits(value / 1e6)} M" if value >= 1e6 else f"{digits(value / 1e3)} k"


def _times(factor: float, value: float | None) -> float | None:
    return None if value is None else factor * value
