"""What the reports draw with: figures as deterministic SVG, pictures in the page, one style a model everywhere."""

from __future__ import annotations

import base64
import io
import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import Image

from multistage_diffusion.data.pictures import png

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SOFT = "#6b7280"  # colour of what is not data
MUTED = "#c3c8d0"


class Style(NamedTuple):
    """How a model looks in every figure: told apart without colour, too."""

    colour: str
    marker: str
    line: str


# Unified models are grey and dashed, the multistage one is black; the others have colours of Okabe and Ito.
MODEL_STYLE = {
    "multistage": Style("#111827", "o", "-"),
    "unified": Style("#8a8f98", "s", "--"),
    "multistage, allocated": Style("#0072B2", "^", "-"),
    "multistage, narrowing": Style("#D55E00", "D", "-"),
}
GREYS = (Style("#8a8f98", "v", ":"), Style("#8a8f98", "P", "-."))
OTHERS = (
    Style("#0072B2", "o", "-"),
    Style("#E69F00", "s", "--"),
    Style("#009E73", "^", "-."),
    Style("#CC79A7", "D", ":"),
    Style("#56B4E9", "v", "-"),
    Style("#D55E00", "P", "--"),
)


def styles(labels: Sequence[str]) -> dict[str, Style]:
    """A style for each label: the model's own, a grey one for unified models, or the next of the others."""
    fixed = {label: MODEL_STYLE[label] for label in dict.fromkeys(labels) if label in MODEL_STYLE}
    greys = itertools.cycle(GREYS)
    rest = itertools.cycle([look for look in OTHERS if look.colour not in {taken.colour for taken in fixed.values()}])
    return {label: fixed.get(label) or next(greys if label.startswith("unified") else rest) for label in labels}


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
    axes = list(figure.subplots(rows, columns, squeeze=False, **grid).flat)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


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


def svg(figure: Figure) -> str:
    """The figure as SVG text, the same for the same figure: no date, fixed identifiers, text as text.

    Returns:
        The element, without the declaration of a file.
    """
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "multistage", "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def picture_url(image: Image.Image) -> dict[str, Any]:
    """A picture inside the page."""
    data = base64.b64encode(png(image)).decode()
    return {"url": f"data:image/png;base64,{data}", "width": image.width, "height": image.height}
