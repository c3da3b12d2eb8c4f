"""Pictures of a clustering: similarity along the noise levels with its edges, and what the optimal denoiser sees."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from multistage_diffusion import rng
from multistage_diffusion.clustering.find import Clustering
from multistage_diffusion.clustering.levels import noise_levels
from multistage_diffusion.clustering.posterior import OptimalDenoiser
from multistage_diffusion.clustering.similarity import running_mean
from multistage_diffusion.errors import CheckpointError, ConfigError
from multistage_diffusion.noise import Process
from multistage_diffusion.stages import STAGE_COLOURS, Stages

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito 2008: distinct for every common kind of colour vision, and in grey.
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#6E6E6E"
_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "savefig.dpi": 150,
    "svg.fonttype": "none",
}
_PAPER = {"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 1.0}
_BINS = 40  # points of a similarity curve
_TOUCHING = (0.08, 0.05)  # labels of edges in a matrix nearer than this touch, side by side and one above the other
_APART = 0.06  # least distance between marks on the axis of noise levels
_MEASURES = {
    "time": "share of the noise levels below (uniform in time)",
    "log-sigma": "share of the noise levels below (uniform in log sigma)",
    "training": "share of the training draws below",
}


def similarity_figure(clustering: Clustering) -> Figure:
    """The figure that explains the edges: curves for Algorithm 1, matrix and elbow for a dynamic programme.

    Raises:
        ConfigError: The method measured no similarity (the baselines).
    """
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        if clustering.similarity is not None:
            return _curves(clustering)
        if clustering.matrices is not None:
            return _matrix(clustering)
    method = clustering.stages.provenance["method"]
    raise ConfigError(f"the method {method} measures no similarity of denoisers to plot; use optimal-denoiser")


def save(figure: Figure, path: Path) -> None:
    """Write a figure in the format that the path's ending says.

    Raises:
        ConfigError: No such format.
        CheckpointError: The file cannot be written.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    if path.suffix[1:].lower() not in FigureCanvasAgg(figure).get_supported_filetypes():
        raise ConfigError(f"{path}: a plot's name must end in png, svg or pdf")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with matplotlib.rc_context(_STYLE):
            figure.savefig(path, bbox_inches="tight")
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror}") from error


def _curves(clustering: Clustering) -> Figure:
    """Similarity of each level to both ends, with the running means that alpha cuts."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.add_subplot()
    similarity, options = clustering.similarity, clustering.stages.provenance["options"]
    assert similarity is not None
    u, order = similarity.u.flatten().sort()
    bins = min(_BINS, len(u) // 8)
    centres = torch.stack([part.mean() for part in u.tensor_split(bins)])
    ends = ((similarity.low, BLUE, "low-noise end", False), (similarity.high, ORANGE, "high-noise end", True))
    for values, colour, name, backwards in ends:
        draws = values.flatten()[order]
        local = torch.stack([part.mean() for part in draws.tensor_split(bins)])
        axes.plot(centres.numpy(), local.numpy(), color=colour, lw=1, alpha=0.55, label=f"similarity to the {name}")
        turned = draws.flip(0) if backwards else draws
        mean = running_mean(torch.ones(1, len(u), dtype=torch.float64), turned.double())[0]
        mean = mean.flip(0) if backwards else mean
        keep = slice(0, len(u) - 20) if backwards else slice(20, None)
        axes.plot(u[keep].numpy(), mean[keep].numpy(), color=colour, lw=2, label="its mean from that end")
    axes.axhline(options["alpha"], color=GREY, lw=0.8, ls=":")
    axes.annotate(f" alpha = {options['alpha']:g}", (0.0, options["alpha"]), color=GREY, fontsize=8, va="top")
    axes.set(xlim=(0, 1), ylim=(0, 1.03), xlabel=_MEASURES[clustering.measure], ylabel=_entries(options["eta"]))
    _shade(axes, clustering)
    _sigma_axis(axes, clustering)
    axes.legend(loc="lower center", ncols=2, fontsize=8, bbox_to_anchor=(0.5, -0.42))
    return figure


def _matrix(clustering: Clustering) -> Figure:
    """Similarity of every two levels, the stages as squares, and what each added stage buys."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.patches import Rectangle

    matrices, record = clustering.matrices, clustering.stages.provenance
    assert matrices is not None
    figure = Figure(figsize=(8.0, 4.1), layout=ConstrainedLayoutEngine(wspace=0.09))
    left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
    image = left.imshow(
        matrices.similar.mean(0).numpy(), origin="lower", extent=(0, 1, 0, 1), vmin=0, vmax=1, cmap="cividis"
    )
    figure.colorbar(image, ax=left, label=_entries(record["options"]["eta"]), location="top", aspect=30, shrink=0.8)
    edges = [0.0, *_shares(clustering, clustering.stages.edges), 1.0]
    for low, high in itertools.pairwise(edges):
        left.add_patch(Rectangle((low, low), high - low, high - low, fill=False, ec="white", lw=1.4))
    marks = ["0", *(f"{edge:.2f}" for edge in edges[1:-1]), "1"]
    below, beside = _staggered(edges, _TOUCHING[0]), _staggered(edges, _TOUCHING[1])
    left.set_xticks(edges, [f"\n{mark}" if away else mark for mark, away in zip(marks, below, strict=True)])
    left.set_yticks(edges, [f"{mark}{' ' * 10}" if away else mark for mark, away in zip(marks, beside, strict=True)])
    left.tick_params(labelsize=8)
    left.set(xlabel=_MEASURES[clustering.measure])
    left.spines[:].set_visible(False)
    counts = list(range(1, len(clustering.elbow) + 1))
    gain = [100 * value / clustering.ceiling for value in clustering.elbow]
    right.plot(counts, gain, "o-", color=BLUE, lw=1.5, ms=4)
    count = len(clustering.stages)
    right.plot(count, gain[count - 1], "o", color=ORANGE, ms=8)
    explained = "similarity within stages" if record["objective"] == "similarity" else "variation explained"
    right.set(xlabel="stages", ylabel=f"{explained} (%)", xticks=counts, ylim=(0, 102))
    right.grid(axis="y", lw=0.4, color="#DDDDDD")
    return figure


def _staggered(places: Sequence[float], least: float) -> list[bool]:
    """Which labels of an axis stand further away from it, so as not to touch their neighbour."""
    apart = [False]
    for before, place in itertools.pairwise(places):
        apart.append(place - before < least and not apart[-1])
    return apart


def _entries(eta: float) -> str:
    """What similarity is, with eta in grey values where it is a whole number of them."""
    greys = 256 * eta
    return f"share of entries within eta = {f'{greys:.0f}/256' if greys == round(greys) else f'{eta:.3g}'}"


def _shares(clustering: Clustering, sigmas: Sequence[float]) -> list[float]:
    """Noise levels as shares u of the measure."""
    grid = torch.linspace(0, 1, 4001, dtype=torch.float64)[1:-1]
    levels = noise_levels(clustering.process, clustering.measure, grid)
    return [float(grid[torch.searchsorted(levels, edge).clamp(max=len(grid) - 1)]) for edge in sigmas]


def _shade(axes: Axes, clustering: Clustering) -> None:
    """Stages as bands, edges as lines with their noise level, their 95% intervals in grey."""
    shares = _shares(clustering, clustering.stages.edges)
    for stage, (low, high) in enumerate(zip([0.0, *shares], [*shares, 1.0], strict=True)):
        axes.axvspan(low, high, color=STAGE_COLOURS[stage], alpha=0.13, lw=0)
        axes.text((low + high) / 2, 0.03, f"stage {stage}", ha="center", fontsize=8, color=GREY, bbox=_PAPER)
    for interval in clustering.intervals:
        low, high = _shares(clustering, interval)
        axes.axvspan(low, high, color="0.5", alpha=0.25, lw=0)
    for share, sigma in zip(shares, clustering.stages.edges, strict=True):
        axes.axvline(share, color="black", lw=1)
        axes.annotate(f"{share:.3f}\nsigma {sigma:.3g}", (share + 0.01, 0.13), fontsize=8, bbox=_PAPER)


def _sigma_axis(axes: Axes, clustering: Clustering) -> None:
    """Noise levels along the top."""
    grid = torch.linspace(0, 1, 2001, dtype=torch.float64)[1:-1]
    levels = noise_levels(clustering.process, clustering.measure, grid)
    marks: dict[float, str] = {}
    for mark in (1, 2, 5, 10, 20, 50, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01):
        share = float(grid[torch.searchsorted(levels, mark).clamp(max=len(grid) - 1)])
        if levels[0] < mark < levels[-1] and all(abs(share - other) > _APART for other in marks):
            marks[share] = f"{mark:g}"
    top = axes.secondary_xaxis("top")
    top.set_xticks(list(marks), list(marks.values()))
    top.set_xlabel("noise level sigma")


def strip_figure(
    images: Float[Tensor, "count channels height width"] | UInt8[Tensor, "count channels height width"],
    stages: Stages,
    process: Process,
    *,
    rows: int = 4,
    columns: int = 10,
    seed: int = 0,
) -> Figure:
    """A few images with growing noise, and below each what the optimal denoiser makes of it.

    Args:
        images: The data set, in [-1, 1] or as uint8.
        stages: The partition; each column is framed in its stage's colour.
        process: Gives the range of levels, uniform in time.
        rows: Number of images.
        columns: Number of levels.
        seed: Seed of the images chosen and of the noise.

    Returns:
        A matplotlib figure.
    """
    import matplotlib
    from matplotlib.figure import Figure

    u = torch.linspace(0.06, 0.94, columns, dtype=torch.float64)
    sigmas = noise_levels(process, "time", u)
    index = rng.permutation(seed, "cluster/image", 0, len(images))[:rows]
    noise = rng.normal(seed, "cluster/noise", torch.arange(len(index)), images.shape[1:])
    denoiser = OptimalDenoiser(images)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(columns * 0.72, 2 * len(index) * 0.72 + 0.5), layout="constrained")
        grid: Any = figure.subplots(2 * len(index), columns, squeeze=False)
        for column, sigma in enumerate(sigmas.tolist()):
            noisy = denoiser.images(index) + sigma * noise
            scaled = noisy / (1 + sigma**2) ** 0.5  # to the variance of an image, as VP does
            denoised = denoiser(noisy, sigma)
            colour = STAGE_COLOURS[stages.of(sigma) % len(STAGE_COLOURS)]
            grid[0, column].set_title(f"{sigma:.2g}", fontsize=8, loc="center")
            for row in range(len(index)):
                _picture(grid[2 * row, column], scaled[row], colour)
                _picture(grid[2 * row + 1, column], denoised[row], colour)
        figure.suptitle("noise level sigma; noisy image above, optimal denoiser below; frames: stages", fontsize=9)
    return figure


def _picture(axes: Axes, image: Tensor, colour: str) -> None:
    """One image in a coloured frame; grey, or the first three channels."""
    picture = ((image[:3] if len(image) >= 3 else image[:1]).clamp(-1, 1) + 1) / 2
    pixels = picture.permute(1, 2, 0) if len(picture) == 3 else picture[0]
    axes.imshow(pixels.cpu().numpy(), cmap="gray", vmin=0, vmax=1)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set(visible=True, color=colour, linewidth=2)
