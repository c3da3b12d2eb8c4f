"""The answer of a study in a sentence and a few figures, each with its uncertainty, from the study's rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from multistage_diffusion.studies.curves import best_solvers
from multistage_diffusion.studies.drawing import Rows, minus
from multistage_diffusion.studies.estimate import difference, differs
from multistage_diffusion.studies.frontiers import pairs
from multistage_diffusion.studies.sheets import digits, mean_and_error, references
from multistage_diffusion.studies.tables import METRICS, change


@dataclass(frozen=True)
class Card:
    """A figure that stands out.

    Attributes:
        value: The figure.
        text: What it is.
        uncertainty: Its interval, or why there is none.
        significant: Whether the seeds tell it from no difference; none where one cannot say.
    """

    value: str
    text: str
    uncertainty: str
    significant: bool | None = None


@dataclass(frozen=True)
class Answer:
    """What a study says.

    Attributes:
        sentence: The answer to its question.
        cards: The figures behind it.
    """

    sentence: str
    cards: tuple[Card, ...]


def answer(document: dict[str, Any]) -> Answer:
    """The answer of a study.

    Args:
        document: What `run_study` returned.
    """
    rows = document["rows"]
    match document["study"]:
        case "efficiency":
            return _efficiency(rows)
        case "sampling":
            return _sampling(rows)
        case "intervals":
            return _intervals(rows)
        case "interference":
            return _interference(rows)
        case "scaling":
            return _scaling(rows)
        case _:
            return _table(rows)


def _efficiency(rows: Rows) -> Answer:
    """The staged model of least loss, against the best unified one: the hardest comparison of the table."""
    reference = references(rows)[-1]
    staged = min(
        (entry for entry in rows if entry["architecture"] != "unified"), key=lambda entry: entry["loss"]["mean"]
    )
    parts, cards = [], []
    for metric, words in METRICS.items():
        reach = staged["reach"][reference][metric]
        if reach is None:
            parts.append(f"does not reach its {words} with every seed")
            cards.append(Card("not reached", f"by every seed: the {words} of “{reference}”", ""))
            continue
        interval, significant = reach["interval"], None
        if interval is not None:
            significant = not interval[0] <= 1 <= interval[1]
        told = "; not told apart from 100%" if significant is False else ""
        share, interval_words = f"{reach['mean']:.0%}", _interval(interval, "{:.0%}")
        parts.append(f"needs {share} of its training FLOPs for the same {words} ({interval_words}{told})")
        text = f"of the training FLOPs of “{reference}” to its {words}"
        cards.append(Card(share, text, interval_words, significant))
    against = f"The best staged network, “{staged['label']}”, against the best unified one, “{reference}”"
    return Answer(f"{against}: it {' and '.join(parts)}.", tuple(cards))


def _table(rows: Rows) -> Answer:
    """The best row by each metric, against the first."""
    first, parts, cards = rows[0], [], []
    for metric, words in METRICS.items():
        best = min(rows, key=lambda entry: entry[metric]["mean"])
        if best is first:
            parts.append(f"least {words}: “{first['label']}”, with which the others are compared")
            cards.append(Card(mean_and_error(first[metric]), f"{words} of “{first['label']}”, the least", ""))
            continue
        step = difference(best[metric]["values"], first[metric]["values"])
        scale, significant = first[metric]["mean"], differs(step)
        than = "from" if significant is False else "than"
        parts.append(
            f"least {words}: “{best['label']}”, {change(best[metric], first[metric])} {than} “{first['label']}”"
        )
        interval = None if step.interval is None else [bound / scale for bound in step.interval]
        text = f"{words} of “{best['label']}” against “{first['label']}”"
        cards.append(Card(minus(f"{step.mean / scale:+.1%}"), text, _interval(interval, "{:+.1%}"), significant))
    sentence = "; ".join(parts)
    return Answer(f"{sentence[:1].upper()}{sentence[1:]}.", tuple(cards))


def _sampling(rows: Rows) -> Answer:
    """The best model and solver within each number of evaluations, against the first model's best."""
    labels = list(dict.fromkeys(entry["label"] for entry in rows))
    best = {label: best_solvers(rows, label) for label in labels}
    cards, parts = [], []
    for nfe, first in best[labels[0]].items():
        row = min((best[label][nfe] for label in labels), key=lambda entry: entry["fd"]["mean"])
        against, significant = "", None
        if row["label"] != labels[0]:
            significant = differs(difference(row["fd"]["values"], first["fd"]["values"]))
            than = "from" if significant is False else "than"
            against = f"{change(row['fd'], first['fd'])} {than} the best of “{labels[0]}”"
        text = f"Fréchet distance within {nfe} evaluations: “{row['label']}” with {row['solver']}"
        cards.append(Card(mean_and_error(row["fd"]), text, against, significant))
        parts.append(f"within {nfe} evaluations “{row['label']}” with {row['solver']}")
    return Answer(f"Least Fréchet distance: {', '.join(parts)}.", tuple(cards))


def _intervals(rows: Rows) -> Answer:
    """The best network of each stage by its loss there."""
    cards, parts = [], []
    for stage in sorted({entry["stage"] for entry in rows}):
        entries = [entry for entry in rows if entry["stage"] == stage]
        best = min(entries, key=lambda entry: entry["curve"][-1]["loss"]["mean"])
        unified = next(entry for entry in entries if entry["label"] == "unified")
        end, other = best["curve"][-1]["loss"], unified["curve"][-1]["loss"]
        significant, against = None, "the unified network itself"
        if best is not unified:
            significant = differs(difference(end["values"], other["values"]))
            against = f"{change(end, other)} {'from' if significant is False else 'than'} “unified”"
        cards.append(Card(mean_and_error(end), f"loss of stage {stage}: “{best['label']}”", against, significant))
        parts.append(f"“{best['label']}” on stage {stage}")
    return Answer(f"Least loss: {', '.join(parts)}.", tuple(cards))


def _interference(rows: Rows) -> Answer:
    """How the gradients of the stages agree at the end, in the shared encoder of each model."""
    last = max(entry["point"] for entry in rows)
    first = next(entry for entry in rows if entry["point"] == last and entry["part"] == "encoder")
    cards, against = [], []
    for pair, cosine in zip(first["pairs"], first["cosine"], strict=True):
        interval = cosine["interval"]
        significant = None if interval is None else interval[0] > 0 or interval[1] < 0
        stages = pair.replace("-", " and ")
        text = f"cosine of the gradients of stages {stages} in the encoder of “{first['label']}”"
        cards.append(Card(minus(f"{cosine['mean']:.2f}"), text, _interval(interval, "{:.2f}"), significant))
        if significant and cosine["mean"] < 0:
            against.append(stages)
    names = f"In the encoder of “{first['label']}”"
    if against:
        sentence = f"{names} the gradients of stages {', '.join(against)} pull against each other."
    else:
        low = min(zip(first["cosine"], first["pairs"], strict=True), key=lambda item: item[0]["mean"])
        sentence = (
            f"{names} no two stages pull against each other; those that agree least, {low[1].replace('-', ' and ')}, "
            f"have a cosine of {mean_and_error(low[0], places=2)}."
        )
    return Answer(sentence, tuple(cards))


def _scaling(rows: Rows) -> Answer:
    """The share of the tuned unified network's compute at the largest budget."""
    unified, staged = pairs(rows)[-1]
    reach = staged.get("reach")
    if reach is None:
        return Answer(f"The staged network does not reach the loss of {unified['design']}.", ())
    cards = []
    for name in ("flops", "seconds"):
        interval = reach[name]["interval"]
        significant = None if interval is None else not interval[0] <= 1 <= interval[1]
        words = "training FLOPs" if name == "flops" else name
        cards.append(
            Card(
                f"{reach[name]['mean']:.0%}",
                f"of the {words} of the best unified network to its loss",
                _interval(interval, "{:.0%}"),
                significant,
            )
        )
    budget = digits(staged["tflops"])
    sentence = (
        f"At {budget} TFLOPs, both tuned, the staged network {staged['design']} has the loss of the best unified one "
        f"({unified['design']}) after {cards[0].value} of its FLOPs and {cards[1].value} of its seconds."
    )
    return Answer(sentence, tuple(cards))


def _interval(interval: Sequence[float] | None, form: str) -> str:
    """An interval in words."""
    if interval is None:
        return "one seed, so no interval"
    return minus(f"95% interval {form.format(interval[0])} to {form.format(interval[1])}")
