"""`msd study`: the paper's tables and figures, with seeds, intervals and a report."""

from __future__ import annotations

import contextlib
import math
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from multistage_diffusion.cli.common import Compute, prepare
from multistage_diffusion.noise import process_by_kind

if TYPE_CHECKING:
    from multistage_diffusion.studies.budgets import Budget
    from multistage_diffusion.studies.cells import Cell, Watch
    from multistage_diffusion.studies.sheets import Sheet
    from multistage_diffusion.studies.tables import Lab


@dataclass(frozen=True, kw_only=True)
class Options(Compute):
    """A table or figure of the paper: what it compares is trained over seeds, measured and reported.

    Studies: efficiency (quality against training FLOPs), architectures, clusterings, stages (their number), decoders
    (their widths), sampling (quality against network evaluations), intervals (a network under test on one stage),
    interference (do the stages' gradients agree?), scaling (loss against compute, both arms tuned), or all.

    Prints what each model costs before it trains any. Trained models and measurements are kept in the folder: the same
    command goes on where it was, other studies of the folder share what they can, and several processes may work on one
    folder at once. Writes NAME.json, NAME.svg and report.html.

    example: msd study efficiency --budget small --out runs/study
    """

    name: tyro.conf.Positional[str]
    """The study, or all."""
    data: str = "fashion-mnist"
    """Source of images with classes: the distances are taken on the features of a classifier of theirs."""
    data_root: str | None = None
    """Folder that holds the source's files."""
    budget: Literal["small", "gpu", "paper"] = "small"
    """Network, data size, training FLOPs and generated images: small for two CPU cores, gpu for one GPU, paper for the
    networks and lengths of the paper's CIFAR-10 runs."""
    backbone: Literal["unet", "dit"] = "unet"
    """Family of all networks: the U-Net, or the staged transformer."""
    process: Literal["vp", "edm", "flow"] | None = None
    """Noise process of all models; by default the budget's, VP."""
    seeds: int | None = None
    """Runs of each model; by default the budget's 3."""
    tflops: float | None = None
    """Training FLOPs of each model, in 10^12, forward and backward; by default the budget's."""
    rungs: int | None = None
    """Rungs that scaling climbs, each twice the one before, from an eighth of the training FLOPs on; by default all."""
    out: str = "runs/study"
    """Folder for models, measurements and the report."""
    dry_run: bool = False
    """Print what each model would cost, train nothing and write nothing."""


def run(options: Options, console: Console) -> dict[str, Any]:
    """Do a study, or all.

    Returns:
        The command's document: `rows`, `figures`, `findings`, `report`, `models`; in a dry run `models` alone has rows.
    """
    device = prepare(options)

    from multistage_diffusion.studies.pages import publish, write_page
    from multistage_diffusion.studies.study import STUDIES, costs, names, open_lab, run_study

    studies, budget = names(options.name), chosen(options)
    out = Path(options.out)
    lab = open_lab(budget, out, device=device, say=console.print, guess=True, keep=not options.dry_run)
    models = costs(lab, studies)
    _print_costs(console, models)
    if search := lab.finder.search_tflops():
        console.print(f"allocated widths come from proxy runs of {search:.3g} TFLOPs in all, made once")
    document: dict[str, Any] = {"study": options.name, "rows": [], "figures": {}, "findings": {}, "models": models}
    if options.dry_run:
        return document
    if any(STUDIES[name].distances for name in studies):
        features = lab.extractor  # before hours of training: a source without classes has none
        console.print(f"features: {features.name}, {features.accuracy:.1%} of the held-out images named right")
    lab = replace(lab, finder=replace(lab.finder, guess=False))
    command = shlex.join(["msd", "study", options.name, *_words(options)])
    for name in studies:
        console.rule(Text(name, "bold")) if console.is_terminal else console.print(f"study {name}")
        with _progress(lab, console) as watch:
            result = run_study(name, lab, out, watch=watch)
        result = publish(result, out, command, device)
        _print_result(console, result)
        document["rows"] += [{"study": name, **entry} for entry in result["rows"]]
        document["figures"][name] = str(out / result["figures"][0])
        document["findings"][name] = result["findings"]
        document["report"] = str(write_page(out))  # after each study: an interrupted command leaves what it has
    console.print(f"report: {document['report']}")
    return document


def chosen(options: Options) -> Budget:
    """The budget with the options in place of its own.

    Raises:
        ConfigError: No such budget, no seed, or no FLOPs.
    """
    from multistage_diffusion.config import check
    from multistage_diffusion.studies.budgets import budget

    selected = budget(options.budget, options.data, options.backbone)
    selected = replace(selected, base=replace(selected.base, data=replace(selected.base.data, root=options.data_root)))
    if options.process not in (None, selected.base.process.kind):
        selected = replace(selected, base=replace(selected.base, process=process_by_kind(options.process)))
    if options.seeds is not None:
        check(options.seeds >= 1, "seeds", "at least 1", options.seeds)
        selected = replace(selected, seeds=options.seeds)
    if options.tflops is not None:
        check(0 < options.tflops < math.inf, "tflops", "positive", options.tflops)
        selected = replace(selected, tflops=options.tflops)
    if options.rungs is not None:
        most = len(selected.ladder.rungs)
        check(1 <= options.rungs <= most, "rungs", f"in 1..{most}", options.rungs)
        selected = replace(selected, ladder=replace(selected.ladder, rungs=selected.ladder.rungs[: options.rungs]))
    return selected


@contextlib.contextmanager
def _progress(lab: Lab, console: Console) -> Iterator[Callable[[Cell], Watch]]:
    """Makes a bar for each model that is trained; the one before ends."""
    from multistage_diffusion.cli.progress import training_progress

    with contextlib.ExitStack() as stack:

        def watch(cell: Cell) -> Watch:
            stack.close()
            last = cell.steps(lab.data.shape)[-1]
            shown = replace(cell.config.training, log_every=max(1, last // 4))  # plain lines: four a model
            step = stack.enter_context(training_progress(console, shown, lab.cells.path(cell).name))
            return lambda result, _: step(result, last)  # to the last point, not the next

        yield watch


def _words(options: Options) -> list[str]:
    """The options that decide the result, as they are written."""
    words = ["--data", options.data, "--budget", options.budget]
    if options.data_root is not None:
        words += ["--data-root", options.data_root]
    if options.backbone != "unet":
        words += ["--backbone", options.backbone]
    if options.process is not None:
        words += ["--process", options.process]
    if options.seeds is not None:
        words += ["--seeds", str(options.seeds)]
    if options.tflops is not None:
        words += ["--tflops", f"{options.tflops:g}"]
    if options.rungs is not None:
        words += ["--rungs", str(options.rungs)]
    return [*words, "--out", options.out]


def _print_costs(console: Console, models: Sequence[dict[str, Any]]) -> None:
    """A line a model, over its seeds: what is still to train, and what that costs."""
    table = Table(title="What it trains; a model that studies share stands at the first")
    for name in ("study", "model", "parameters", "steps", "TFLOPs a seed", "seeds", "trained"):
        table.add_column(name, justify="left" if name in ("study", "model") else "right")
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for entry in models:
        groups.setdefault((entry["study"], entry["label"]), []).append(entry)
    for (name, label), cells in groups.items():
        first = cells[0]
        table.add_row(
            name,
            label,
            f"{first['parameters']:,}",
            f"{first['steps']:,}",
            f"{first['tflops']:.3g}",
            str(len(cells)),
            str(sum(entry["done"] for entry in cells)),
        )
    console.print(table)
    left = [entry["tflops"] for entry in models if not entry["done"]]
    total = sum(entry["tflops"] for entry in models)
    text = f"{len(models)} models, {total:.4g} TFLOPs; {len(left)} of them, {sum(left):.4g} TFLOPs, to train."
    stand_ins = " Widths and edges that short runs will choose are stand-ins here until they are found."
    console.print(text + (stand_ins if left else ""))


def _print_result(console: Console, document: dict[str, Any]) -> None:
    """The study's first table, and its findings."""
    from multistage_diffusion.studies.sheets import sheets

    console.print(_table(sheets(document)[0]))
    for finding in document["findings"]:
        console.print(f"- {finding}")


def _table(sheet: Sheet) -> Table:
    """Without the columns of intervals, for which a terminal has no room: a star says that 0 (or 100%) lies outside."""
    kept = [place for place, name in enumerate(sheet.head) if name != "95% interval"]
    table = Table(title=f"{sheet.title.partition('; marked')[0]}; *: significant over the seeds (95%)")
    for place in kept:
        table.add_column(sheet.head[place], justify="left" if place < sheet.words else "right")
    for line in sheet.lines:
        stars = [
            " *" if item.significant else "" for item in (*line[1:], line[0])
        ]  # an interval stands behind its figure
        table.add_row(*(f"{line[place].text}{stars[place]}" for place in kept))
    return table
