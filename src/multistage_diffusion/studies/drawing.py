"""What the reports draw with: figures as deterministic SVG, pictures in the page, one style a model everywhere."""

from __future__ import annotations

import base64
import io
import itertools
import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import Image

from multistage_diffusion.data.pictures import png
from multistage_diffusion.studies.sheets import digits, mean_and_error

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, FigureBase

INK, PAPER = "#111827", "#ffffff"
SOFT = "#6b7281"  # colour of what is not data
MUTED, FAINT = "#c3c8d0", "#eef0f3"
_TIP = "tip "  # begins the name of what is shown under the pointer
# Colours that a page replaces by its own, which differ in the dark.
_ROLES = {
    INK: "ink", "#000000": "ink", PAPER: "paper", SOFT: "soft", "#6b7280": "grey", "#6e6e6e": "soft", MUTED: "muted",
    FAINT: "line", "#dddddd": "line", "#0072b2": "blue", "#e69f00": "orange", "#009e73": "green", "#cc79a7": "pink",
    "#56b4e9": "sky", "#d55e00": "red",
}  # fmt: skip

Rows = Sequence[dict[str, Any]]


class Style(NamedTuple):
    """How a model looks in every figure: told apart without colour, too."""

    colour: str
    marker: str
    line: Any


# Unified models are dashed, staged ones solid, and each has a colour of its own (Okabe and Ito). Grey is the first
# unified model, with which the others are compared, and nothing else.
MODEL_STYLE = {
    "unified": Style("#6b7280", "s", "--"),
    "multistage": Style("#0072B2", "o", "-"),
    "multistage, allocated": Style("#009E73", "^", "-"),
    "multistage, narrowing": Style("#D55E00", "D", "-"),
}
OTHERS = (
    Style("#0072B2", "o", "-"),
    Style("#E69F00", "s", "--"),
    Style("#009E73", "^", "-."),
    Style("#CC79A7", "D", ":"),
    Style("#56B4E9", "v", "-"),
    Style("#D55E00", "P", "--"),
)
_MARKERS = "osvPX^D*"
_DASHES, _SOLID = ((0, (5, 1.5, 1, 1.5)), ":"), "-"


def styles(labels: Sequence[str]) -> dict[str, Style]:
    """A style for each label: the model's own, or the next colour that is free; dashes for unified models."""
    fixed = {label: MODEL_STYLE[label] for label in dict.fromkeys(labels) if label in MODEL_STYLE}
    taken = {look.colour for look in fixed.values()}
    free, dashes = itertools.cycle([look for look in OTHERS if look.colour not in taken]), itertools.cycle(_DASHES)
    used = {look.marker for look in fixed.values()}
    markers = itertools.cycle([marker for marker in _MARKERS if marker not in used])
    looks = {}
    for label in dict.fromkeys(labels):
        own = fixed.get(label) or next(free)
        line = next(dashes) if label.startswith("unified") else _SOLID
        looks[label] = own if label in fixed else own._replace(line=line, marker=next(markers))
    return looks


def new_figure(rows: int, columns: int, width: float, height: float, **grid: Any) -> tuple[Figure, list[Axes]]:
    """An empty figure.

    Args:
        rows: Rows of axes.
        columns: Columns of axes.
        width: Width in inches.
        height: Height in inches.
        **grid: Further options of `Figure.subplots`, like `sharey`.

    Returns:
        The figure and its axes, row by row.
    """
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    return figure, panels(figure, rows, columns, **grid)


def panels(figure: FigureBase, rows: int, columns: int, **grid: Any) -> list[Axes]:
    """Axes of a figure, or of a part of it, without a frame above and at the right.

    Args:
        figure: The figure, or the part.
        rows: Rows of axes.
        columns: Columns of axes.
        **grid: Further options of `Figure.subplots`, like `sharey`.

    Returns:
        The axes, row by row.
    """
    axes = list(figure.subplots(rows, columns, squeeze=False, **grid).flat)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color(SOFT)
        axis.tick_params(colors=SOFT, labelcolor=INK)
    return axes


def tip(axis: Axes, x: int | float, y: int | float, text: str) -> None:
    """A value that the figure shows under the pointer: a transparent disc with a title.

    Args:
        axis: The axes.
        x: Where, in data.
        y: Where, in data.
        text: What it says.
    """
    axis.plot([x], [y], marker="o", markersize=11, color=SOFT, alpha=0.0, linestyle="none", zorder=9, gid=_TIP + text)


def line(axis: Axes, along: Sequence[float | int], points: Rows, look: Style, label: str, says: str = "") -> None:
    """Means with a band of one standard error; under the pointer, their values.

    Args:
        axis: The axes.
        along: Where the points stand.
        points: Documents of estimates.
        look: The model's style.
        label: What the legend calls it.
        says: What a point says of itself, with `{mean}` and `{x}`; by default nothing is shown.
    """
    means = [point["mean"] for point in points]
    axis.plot(along, means, color=look.colour, marker=look.marker, linestyle=look.line, markersize=4.5, label=label)
    if all(point["error"] is not None for point in points):
        low, high = (
            [mean + sign * point["error"] for mean, point in zip(means, points, strict=True)] for sign in (-1, 1)
        )
        floor = [max(value, 0.1 * mean) for value, mean in zip(low, means, strict=True)]  # the axis is logarithmic
        axis.fill_between(along, floor, high, color=look.colour, alpha=0.18, linewidth=0)
    if says:
        for x, point in zip(along, points, strict=True):
            tip(axis, x, point["mean"], f"{label}: {says.format(mean=mean_and_error(point), x=digits(x))}")


def dot(
    axis: Axes, figure: dict[str, Any], place: int | float, look: Style, interval: Sequence[float] | None,
    *, filled: bool, says: str = "",
) -> None:  # fmt: skip
    """A mean on its interval, with its seeds as small ticks.

    Args:
        axis: The axes.
        figure: Document of an estimate.
        place: Its row.
        look: The model's style.
        interval: The interval drawn, if any.
        filled: Whether the mark is filled.
        says: What is shown under the pointer.
    """
    if interval is not None:
        axis.plot(interval, [place, place], color=look.colour, linewidth=1.8, solid_capstyle="butt")
    seeds = figure["values"]
    axis.plot(
        seeds,
        [place] * len(seeds),
        linestyle="none",
        marker="|",
        markersize=9,
        markeredgewidth=1,
        color=look.colour,
        alpha=0.55,
    )
    axis.plot(
        figure["mean"],
        place,
        marker=look.marker,
        markersize=6.5,
        markeredgecolor=look.colour,
        markerfacecolor=look.colour if filled else PAPER,
        markeredgewidth=1.4,
    )
    if says:
        tip(axis, figure["mean"], place, says)


def plain_numbers(axis: Axes, *, which: str = "y") -> None:
    """Round numbers on a logarithmic axis, whatever it spans: 0.2, 5, 1000, and no powers of ten.

    Args:
        axis: The axes.
        which: `x` or `y`.
    """
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    scale = axis.xaxis if which == "x" else axis.yaxis
    low, high = sorted(axis.get_xlim() if which == "x" else axis.get_ylim())
    scale.set_major_locator(FixedLocator(round_numbers(low, high)))
    scale.set_major_formatter(FuncFormatter(lambda value, place: f"{value:g}"))
    scale.set_minor_locator(NullLocator())


def round_numbers(low: float, high: float) -> list[float]:
    """Some 3 to 8 round numbers between two positive ones.

    Args:
        low: The lower one.
        high: The higher one.

    Returns:
        Ticks for a logarithmic axis.
    """
    from matplotlib.ticker import MaxNLocator

    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1,), (1, 3), (1, 2, 5)):
        ticks = [float(f"{step * 10.0**decade:.5g}") for decade in decades for step in steps]
        shown = [tick for tick in ticks if low <= tick <= high]
        if len(shown) >= 3:
            return shown[:: -(-len(shown) // 8)]
    return [float(f"{tick:.5g}") for tick in MaxNLocator(5).tick_values(low, high) if low <= tick <= high]


def svg(figure: Figure, *, page: bool = False) -> str:
    """The figure as SVG text, the same for the same figure: no date, fixed identifiers, text as text.

    Args:
        figure: The figure.
        page: For a place in a page: no background, and the page's colours by their roles, which change in the dark.

    Returns:
        The element, without the declaration of a file.
    """
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "multistage", "font.family": "sans-serif"}):
        figure.savefig(
            buffer, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None}, transparent=page
        )
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(rf'<g id="{_TIP}([^"]*)">', r'<g class="tip"><title>\1</title>', text)
    if page:
        text = re.sub(r"#[0-9a-f]{6}\b", lambda found: _role(found[0]), text)
        text = re.sub(r' width="[\d.]+pt" height="[\d.]+pt"', "", text, count=1)  # as wide as the page lets it
    return text


def minus(text: str) -> str:
    """Numbers with the sign that print has for them."""
    return re.sub(r"(?<![\w.])-(?=\d)", "\N{MINUS SIGN}", text)


def _role(colour: str) -> str:
    """A colour as the page names it, where it does."""
    return f"var(--{_ROLES[colour]})" if colour in _ROLES else colour


def picture_url(image: Image.Image) -> dict[str, Any]:
    """A picture inside the page."""
    data = base64.b64encode(png(image)).decode()
    return {"url": f"data:image/png;base64,{data}", "width": image.width, "height": image.height}
