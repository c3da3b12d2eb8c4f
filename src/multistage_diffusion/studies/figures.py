"""One figure a study, drawn from its document."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from multistage_diffusion.studies.curves import best_solvers
from multistage_diffusion.studies.drawing import (
    FAINT,
    INK,
    MODEL_STYLE,
    MUTED,
    OTHERS,
    PAPER,
    SOFT,
    Rows,
    Style,
    dot,
    line,
    new_figure,
    panels,
    plain_numbers,
    styles,
    tip,
)
from multistage_diffusion.studies.estimate import difference, differs, estimate
from multistage_diffusion.studies.frontiers import Law, pairs
from multistage_diffusion.studies.sheets import mean_and_error, references
from multistage_diffusion.studies.tables import METRICS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, FigureBase

WIDTH = 8.6  # inches: the width of the page, so that labels have one size in all figures
_WORDS = {"fd": "Fréchet distance", "loss": "held-out denoising loss"}


def draw(document: dict[str, Any]) -> Figure:
    """The figure of a study."""
    rows = document["rows"]
    match document["study"]:
        case "efficiency":
            return efficiency_figure(rows)
        case "sampling":
            return sampling_figure(rows)
        case "intervals":
            return intervals_figure(rows, document["settings"]["stages"])
        case "interference":
            return interference_figure(rows)
        case "scaling":
            return scaling_figure(rows)
        case _:
            return table_figure(rows)


def efficiency_figure(rows: Rows) -> Figure:
    """Quality against training FLOPs with bands of a standard error, and where others reach the unified quality."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(WIDTH, 4.7 + 0.3 * len(rows)), layout="constrained")
    FigureCanvasSVG(figure)
    parts: Any = figure.subfigures(2, 1, height_ratios=(3.9, 0.8 + 0.3 * len(rows)))
    above, below = parts
    looks = styles([entry["label"] for entry in rows])
    for axis, metric in zip(panels(above, 1, 2), METRICS, strict=True):
        for entry in rows:
            spent, says = [point["tflops"] for point in entry["curve"]], f"{_WORDS[metric]} {{mean}} at {{x}} TFLOPs"
            line(axis, spent, [point[metric] for point in entry["curve"]], looks[entry["label"]], entry["label"], says)
        axis.axhline(rows[0]["curve"][-1][metric]["mean"], color=SOFT, linewidth=0.7, linestyle=":")
        axis.set(xlabel="training TFLOPs", ylabel=_WORDS[metric], yscale="log", xlim=(0, None))
        axis.xaxis.set_major_locator(MaxNLocator(5))
        plain_numbers(axis)
    handles, _ = above.axes[0].get_legend_handles_labels()
    words = [f"{entry['label']}: {_described(entry)}" for entry in rows]
    above.legend(handles, words, loc="outside upper left", ncols=2, frameon=False, fontsize=8, handlelength=3)
    for axis, metric in zip(panels(below, 1, 2, sharey=True), METRICS, strict=True):
        _reaches(axis, rows, metric, looks)
    _explain(below, rows)
    return figure


def _described(entry: dict[str, Any]) -> str:
    """What a model is, in a legend."""
    if entry["architecture"] == "unified":
        return f"one decoder of width {entry['decoder_widths'][0]}"
    return f"encoder {entry['width']}, decoders {' / '.join(map(str, entry['decoder_widths']))}"


def _explain(figure: FigureBase, rows: Rows) -> None:
    """A legend of what marks, bars and ticks mean."""
    from matplotlib.lines import Line2D

    first, *best = references(rows)
    marks = [Line2D([], [], color=SOFT, marker="o", linestyle="none", label=f"as good as {first} at its end")]
    marks += [
        Line2D([], [], color=SOFT, marker="o", linestyle="none", markerfacecolor=PAPER, label=f"as good as {other}")
        for other in best
    ]
    bar = Line2D([], [], color=SOFT, linewidth=1.8, label="95% interval")
    seed = Line2D([], [], color=SOFT, marker="|", markersize=9, linestyle="none", label="one seed")
    figure.legend(handles=[*marks, bar, seed], loc="outside lower left", ncols=4, frameon=False, fontsize=8)


def _reaches(axis: Axes, rows: Rows, metric: str, looks: dict[str, Style]) -> None:
    """Shares of a unified model's FLOPs at which the others are as good, with 95% intervals; the best one's below."""
    first, *best = references(rows)
    others = rows[1:]
    for place, entry in enumerate(others):
        look = looks[entry["label"]]
        for other, shift in ((first, -0.16 if best else 0.0), *((other, 0.2) for other in best)):
            reach = entry["reach"].get(other, {metric: None})[metric]
            if reach is not None:
                says = f"{entry['label']}: the {_WORDS[metric]} of {other} at {reach['mean']:.0%} of its training FLOPs"
                if reach["interval"] is not None:
                    says += ", 95% interval {:.0%} to {:.0%}".format(*reach["interval"])
                dot(axis, reach, place + shift, look, reach["interval"], filled=other == first, says=says)
            elif other in entry["reach"]:
                words = f"{other}: not with every seed"
                paper = {"facecolor": PAPER, "edgecolor": "none", "pad": 0.6}
                axis.text(1.23, place + shift, words, ha="right", va="center", fontsize=7, color=SOFT, bbox=paper)
    axis.axvline(1.0, color=SOFT, linewidth=0.8, linestyle="--")
    axis.set(
        yticks=range(len(others)),
        yticklabels=[entry["label"] for entry in others],
        ylim=(len(others) - 0.5, -0.5),
        xlabel=f"share of the training FLOPs, {METRICS[metric]}",
        xlim=(0, 1.25),
    )
    axis.xaxis.set_major_formatter(lambda value, place: f"{value:.0%}")
    axis.tick_params(axis="y", length=0, labelsize=8.5)
    axis.grid(axis="y", color=FAINT, linewidth=0.8)
    axis.set_axisbelow(True)


def table_figure(rows: Rows) -> Figure:
    """A row a model: means, seeds, and the 95% interval of the difference from the first row, about the mean.

    Returns:
        The figure; a bar that crosses the first row's line is a difference that the seeds do not tell from none.
    """
    from matplotlib.ticker import MaxNLocator

    figure, axes = new_figure(1, 2, WIDTH, 0.95 + 0.36 * len(rows), sharey=True)
    looks = _row_looks([entry["label"] for entry in rows])
    for axis, metric in zip(axes, METRICS, strict=True):
        first = rows[0][metric]["mean"]
        axis.axvline(first, color=SOFT, linewidth=0.8, linestyle="--")
        for place, entry in enumerate(rows):
            change = entry["difference"][metric]["interval"]
            significant = place > 0 and differs(difference(entry[metric]["values"], rows[0][metric]["values"])) is True
            around = None if change is None or place == 0 else [first + change[0], first + change[1]]
            says = f"{entry['label']}: {_WORDS[metric]} {mean_and_error(entry[metric])}"
            if change is not None and place > 0:
                low, high = (f"{bound / first:+.1%}" for bound in change)
                says += f"; against {rows[0]['label']} {low} to {high} (95%)"
            look = looks[entry["label"]]
            dot(axis, entry[metric], place, look, around, filled=significant or place == 0, says=says)
        axis.set(xlabel=_WORDS[metric], ylim=(len(rows) - 0.5, -0.5))
        axis.set_yticks(range(len(rows)), [entry["label"] for entry in rows])
        axis.tick_params(axis="y", length=0)
        axis.xaxis.set_major_locator(MaxNLocator(5))
        axis.grid(axis="y", color=FAINT, linewidth=0.8)
        axis.set_axisbelow(True)
    return figure


def _row_looks(labels: Sequence[str]) -> dict[str, Style]:
    """A colour a row, with one mark for all: the row is named beside it."""
    looks = styles(labels)
    return {
        label: Style(MODEL_STYLE["unified"].colour if place == 0 else looks[label].colour, "o", "-")
        for place, label in enumerate(labels)
    }


def sampling_figure(rows: Rows) -> Figure:
    """Fréchet distance against network evaluations, by model and solver; the first model's best in grey."""
    labels = list(dict.fromkeys(entry["label"] for entry in rows))
    columns = min(3, len(labels))
    lines = -(-len(labels) // columns)
    figure, axes = new_figure(lines, columns, WIDTH, 0.7 + 2.6 * lines, sharey=True, sharex=True)
    solvers = dict(zip(dict.fromkeys(entry["solver"] for entry in rows), OTHERS, strict=False))
    best = {nfe: row["fd"]["mean"] for nfe, row in best_solvers(rows, labels[0]).items()}
    for axis, label in zip(axes, labels, strict=False):
        if label != labels[0]:
            axis.plot(list(best), list(best.values()), color=MUTED, linewidth=4, label=f"best of {labels[0]}")
        for solver, look in solvers.items():
            curve = sorted(
                (row for row in rows if (row["label"], row["solver"]) == (label, solver)), key=lambda row: row["nfe"]
            )
            says = f"{label}, {_WORDS['fd']} {{mean}} with {{x}} evaluations"
            line(axis, [row["nfe"] for row in curve], [row["fd"] for row in curve], look, solver, says)
        axis.set(title=label, xscale="log", yscale="log")
        axis.title.set_fontsize(10)
    for axis in axes[: len(labels)]:
        plain_numbers(axis)
        axis.set_xticks(list(best), list(map(str, best)))
        axis.set_xticks([], minor=True)
    for axis in axes[len(labels) :]:
        axis.set_visible(False)
    figure.supxlabel("network evaluations of an image", fontsize=10)
    figure.supylabel(_WORDS["fd"], fontsize=10)
    handles, names = axes[len(labels) - 1].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper left", ncols=6, frameon=False, fontsize=8, handlelength=3)
    return figure


def intervals_figure(rows: Rows, edges: Sequence[float]) -> Figure:
    """A column a stage: held-out loss there, and the Fréchet distance with the network on that stage alone.

    Args:
        rows: From `intervals.intervals`.
        edges: Edges of the stages, in sigma.
    """
    stages = sorted({entry["stage"] for entry in rows})
    figure, axes = new_figure(2, len(stages), WIDTH, 5.0, sharex="col")
    looks = styles([entry["label"] for entry in rows])
    bounds = ["0", *(f"{edge:.3g}" for edge in edges), "∞"]
    for stage in stages:
        for place, metric in enumerate(("fd", "loss")):
            axis = axes[place * len(stages) + stage]
            for entry in (row for row in rows if row["stage"] == stage):
                label, says = entry["label"], f"{_WORDS[metric]} {{mean}} after {{x}} thousand images"
                along = [point["images"] / 1e3 for point in entry["curve"]]
                line(axis, along, [point[metric] for point in entry["curve"]], looks[label], label, says)
            axis.set(xscale="log", yscale="log")
            plain_numbers(axis)
            plain_numbers(axis, which="x")
        axes[stage].set_title(f"stage {stage}: sigma {bounds[stage]} to {bounds[stage + 1]}", fontsize=10)
        axes[len(stages) + stage].set_xlabel("thousand images at the stage's levels", fontsize=8)
    axes[0].set_ylabel("Fréchet distance")
    axes[len(stages)].set_ylabel("held-out loss of the stage")
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper left", ncols=4, frameon=False, fontsize=8, handlelength=3)
    return figure


def interference_figure(rows: Rows) -> Figure:
    """A panel a model: the cosine of the gradients of each pair of stages, for encoder and decoder.

    Returns:
        The figure; bars are the end of training, with a standard error, open marks its first point.
    """
    labels = list(dict.fromkeys(entry["label"] for entry in rows))
    last = max(entry["point"] for entry in rows)
    columns = min(2, len(labels))
    figure, axes = new_figure(
        -(-len(labels) // columns), columns, WIDTH, 0.4 + 2.2 * -(-len(labels) // columns), sharey=True
    )
    parts = {"encoder": OTHERS[0], "decoder": OTHERS[1]}
    for axis, label in zip(axes, labels, strict=False):
        for side, (part, look) in enumerate(parts.items()):
            for entry in rows:
                if (entry["label"], entry["part"]) == (label, part):
                    _bars(axis, entry, side, look, final=entry["point"] == last)
        axis.axhline(0, color=INK, linewidth=0.8)
        pairs = next(entry["pairs"] for entry in rows if entry["label"] == label)
        axis.set_xticks(range(len(pairs)), [f"stages {pair.replace('-', ' and ')}" for pair in pairs], fontsize=8)
        axis.set_title(label, fontsize=10)
        axis.set_xlim(-0.5, len(pairs) - 0.5)
        axis.set_ylim(min(-0.1, axis.get_ylim()[0]), 1.05)
    for axis in axes[len(labels) :]:
        axis.set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, fontsize=8, ncols=3, loc="outside upper right")
    figure.supylabel("cosine of gradients", fontsize=10)
    return figure


def scaling_figure(rows: Rows) -> Figure:
    """Loss of the best of each arm against training FLOPs with fitted laws, and the share of compute at equal loss.

    Returns:
        The figure; it shows the networks of the largest budget, and the others where they are other ones.
    """
    figure, axes = new_figure(1, 2, WIDTH, 3.5)
    unified, staged = pairs(rows)[-1]
    for entry, look, law in zip(
        (unified, staged), (MODEL_STYLE["unified"], OTHERS[0]), staged["laws"] or (None, None), strict=True
    ):
        spent, losses = entry["curve"]["tflops"], list(zip(*entry["curve"]["loss"], strict=True))
        points = [estimate(values).document() for values in losses]
        label = f"{entry['arm']}: {entry['design']}, rate {entry['rate']:g}"
        line(axes[0], spent, points, look, label, f"{_WORDS['loss']} {{mean}} at {{x}} TFLOPs")
        if law is not None:
            axes[0].plot(spent, [Law(**law).loss(x) for x in spent], color=look.colour, linewidth=0.8, alpha=0.6)
        for item in entry["tried"]:
            axes[0].plot(item["tflops"], item["loss"], marker=look.marker, markersize=3, color=look.colour, alpha=0.35)
            said = f"tried: {entry['arm']} {item['design']}, rate {item['rate']:g}: {item['loss']:.4f}"
            tip(axes[0], item["tflops"], item["loss"], said)
    highest = max(value for entry in (unified, staged) for losses in entry["curve"]["loss"] for value in losses)
    axes[0].set(xlabel="training TFLOPs", ylabel=_WORDS["loss"], xscale="log", yscale="log")
    axes[0].set_ylim(top=1.2 * highest)  # what was tried and is far worse stands in the table
    plain_numbers(axes[0])
    plain_numbers(axes[0], which="x")
    axes[0].legend(frameon=False, fontsize=8, loc="upper right")
    for (_, best), fill in zip(pairs(rows)[::-1], ("full", "none"), strict=False):
        for name, look in (("flops", OTHERS[0]), ("seconds", OTHERS[1])):
            _ratio(axes[1], best["ratio"], name, look, fill, f"{best['tflops']:g} TFLOPs")
    axes[1].axhline(1.0, color=SOFT, linewidth=0.8, linestyle="--")
    axes[1].set(
        xlabel="training TFLOPs of the best unified network", ylabel="share at equal loss", xscale="log", ylim=(0, None)
    )
    axes[1].yaxis.set_major_formatter(lambda value, place: f"{value:.0%}")
    plain_numbers(axes[1], which="x")
    axes[1].legend(frameon=False, fontsize=8)
    return figure


def _ratio(axis: Axes, points: Rows, name: str, look: Style, fill: str, label: str) -> None:
    """Shares against budgets with their 95% intervals."""
    along, means = [point["tflops"] for point in points], [point[name]["mean"] for point in points]
    words = {"flops": "FLOPs"}.get(name, name)
    axis.plot(
        along,
        means,
        color=look.colour,
        marker=look.marker,
        linestyle=look.line,
        markersize=5,
        fillstyle="full" if fill == "full" else "none",
        label=f"{words}, best at {label}",
    )
    for point in points:
        tip(axis, point["tflops"], point[name]["mean"], f"{label}: {point[name]['mean']:.0%} of the {words}")
        if point[name]["interval"] is not None:
            axis.plot([point["tflops"]] * 2, point[name]["interval"], color=look.colour, linewidth=1.2, alpha=0.5)


def _bars(axis: Axes, entry: dict[str, Any], side: int, look: Style, *, final: bool) -> None:
    """A bar for each pair at the end of training, an open mark at its first point."""
    places = [place + (side - 0.5) * 0.36 for place in range(len(entry["pairs"]))]
    if not entry["shared"]:
        if final:
            for place in places:
                axis.text(
                    place, 0.02, "no shared weight", rotation=90, ha="center", va="bottom", fontsize=7, color=SOFT
                )
        return
    means = [cosine["mean"] for cosine in entry["cosine"]]
    if final:
        errors = [cosine["error"] or 0.0 for cosine in entry["cosine"]]
        axis.bar(
            places,
            means,
            0.32,
            color=look.colour,
            yerr=errors,
            capsize=2,
            label=entry["part"],
            error_kw={"linewidth": 1},
            hatch="///" if side else None,
            edgecolor=PAPER,
        )
        for place, cosine in zip(places, entry["cosine"], strict=True):
            tip(axis, place, cosine["mean"], f"{entry['label']}, {entry['part']}: {mean_and_error(cosine, places=2)}")
    else:
        axis.plot(
            places,
            means,
            linestyle="none",
            marker="D",
            markersize=5,
            markerfacecolor=PAPER,
            markeredgecolor=INK,
            label="early in training" if side == 0 else None,
        )
