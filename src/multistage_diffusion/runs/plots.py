"""The figure of a run: its training loss by stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from multistage_diffusion.stages import STAGE_COLOURS, Stages

if TYPE_CHECKING:
    from matplotlib.figure import Figure
else:
    Figure = Any

WINDOWS = 60  # smoothed over a sixtieth of the run


def loss_figure(records: Sequence[dict[str, Any]], stages: Stages, title: str) -> Figure:
    """The loss of each stage over steps: every logged value faint, a running mean bold.

    Args:
        records: Lines of `metrics.jsonl`; one without losses by stage is left out.
        stages: The partition, for the legend.
        title: What stands above.

    Returns:
        The figure; its one axis has a line and a running mean for each stage that was trained.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axes = figure.add_subplot()
    for stage in range(len(stages)):
        pairs = [
            (record["step"], losses[stage])
            for record in records
            if len(losses := record.get("stage_loss") or ()) == len(stages) and losses[stage] is not None
        ]
        if not pairs:
            continue
        steps, losses = zip(*pairs, strict=True)
        low, high = stages.bounds(stage)
        colour = STAGE_COLOURS[stage % len(STAGE_COLOURS)]
        axes.plot(steps, losses, color=colour, lw=0.6, alpha=0.3)
        label = f"stage {stage}: sigma {low:.3g} to {high:.3g}".replace("inf", "∞")
        axes.plot(steps, _running_mean(losses), color=colour, lw=1.8, label=label)
    axes.set(xlabel="step", ylabel="training loss", yscale="log", title=title)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.lines:
        axes.legend(frameon=False, fontsize="small")
    return figure


def _running_mean(values: Sequence[float]) -> list[float]:
    """Means of the values up to each."""
    width = max(1, len(values) // WINDOWS)
    return [sum(part) / len(part) for end in range(1, len(values) + 1) if (part := values[max(0, end - width) : end])]
