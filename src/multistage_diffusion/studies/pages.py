"""What a study leaves for people: its figure as a file, and one self-contained page for all studies of a folder."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from multistage_diffusion.files import read_json, write_atomic, write_json
from multistage_diffusion.studies.answers import answer
from multistage_diffusion.studies.drawing import svg
from multistage_diffusion.studies.figures import draw
from multistage_diffusion.studies.sheets import count, digits, sheets
from multistage_diffusion.studies.study import FORMAT, STUDIES
from multistage_diffusion.text import page_environment

CAPTIONS = {
    "efficiency": "Means over seeds, bands of one standard error; unified models are dashed, staged ones solid. Below: "
    "the share of a unified model's training FLOPs at which each model is as good as that one at its end.",
    "sampling": "Means over seeds, bands of one standard error; the broad grey line is the best that the first model "
    "does with any solver.",
    "intervals": "Means over seeds, bands of one standard error. Above, the network draws on its stage alone and a "
    "well-trained unified one on the others.",
    "scaling": "Left: the best of each arm at each budget, means over seeds with bands of one standard error; thin "
    "lines: power laws with a common floor; faint marks: what else was tried, on the images that choose. Right: the "
    "share of the best unified network's compute at which the staged one has its loss, with 95% intervals; below the "
    "dashed line stages save.",
    "interference": "Means over seeds with a standard error at the end of training, corrected for the noise of the "
    "gradients; open marks: the first point of training.",
}
_TABLE = (
    "Means and seeds (ticks). Bars are 95% intervals of the difference from the first row, drawn about the mean: a bar "
    "that crosses the dashed line, with an open mark, is a difference that these seeds do not tell from none."
)
_DECLARATION = '<?xml version="1.0" encoding="utf-8" standalone="no"?>\n'


def publish(document: dict[str, Any], out: Path, command: str, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Draw a study's figure, and add to its document where the figure is and what it was made with.

    Args:
        document: What `run_study` returned.
        out: Folder of `NAME.json` and `NAME.svg`.
        command: The command that made it.
        device: Where it computed.

    Returns:
        The document with `figures` and `made`.

    Raises:
        CheckpointError: The files cannot be written.
    """
    name = document["study"]
    write_atomic(out / f"{name}.svg", (_DECLARATION + svg(draw(document))).encode())
    made = {"command": command, "versions": versions(), "machine": machine(device)}
    document = {**document, "figures": [f"{name}.svg"], "made": made}
    write_json(out / f"{name}.json", document)
    return document


def write_page(out: Path) -> Path:
    """Write `report.html` for all studies in a folder; documents of another format are left out.

    Raises:
        CheckpointError: A document cannot be read, or the page cannot be written.
    """
    stored = [read_json(path) for name in STUDIES if (path := out / f"{name}.json").is_file()]
    documents = [document for document in stored if document.get("format") == FORMAT]
    page = render(
        "study.html.j2",
        studies=[
            {
                **document,
                "answer": answer(document),
                "figure": svg(draw(document), page=True),
                "sheets": sheets(document),
                "caption": CAPTIONS.get(document["study"], _TABLE),
            }
            for document in documents
        ],
        sources=sorted({document["settings"]["data"] for document in documents}),
        conditions=_conditions(documents),
    )
    write_atomic(out / "report.html", page.encode())
    return out / "report.html"


def redraw(folder: Path) -> list[Path]:
    """Draw the figures and the page of a folder again, from the documents in it.

    Args:
        folder: Where studies were published; the page is written where one is.

    Returns:
        What was written.

    Raises:
        CheckpointError: A document cannot be read, or a file cannot be written.
    """
    written = []
    for name in STUDIES:
        if (path := folder / f"{name}.json").is_file() and (document := read_json(path)).get("format") == FORMAT:
            write_atomic(path.with_suffix(".svg"), (_DECLARATION + svg(draw(document))).encode())
            written.append(path.with_suffix(".svg"))
    return [*written, write_page(folder)] if (folder / "report.html").is_file() else written


def render(template: str, **values: Any) -> str:
    """A page from one of this package's templates.

    Args:
        template: The template's file.
        **values: What it shows.
    """
    import jinja2

    environment = page_environment()
    environment.loader = jinja2.FunctionLoader(
        lambda name: files("multistage_diffusion.studies").joinpath(name).read_text()
    )
    environment.filters |= {"digits": digits, "count": count}
    return environment.get_template(template).render(**values)


def _conditions(documents: list[dict[str, Any]]) -> dict[tuple[tuple[str, str], ...], list[str]]:
    """Titles of the studies that were made alike, by how they were made: terms and words."""
    titles: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for document in documents:
        settings = document["settings"]
        features, budget = settings["features"], settings["budget"]
        process = settings["base"]["process"]
        terms = {
            "process": " with prediction ".join(filter(None, (process["kind"], process.get("prediction")))),
            "data": f"{settings['data']}: {settings['images']:,} training and {settings['held_out']:,} held-out images "
            f"of {' x '.join(map(str, settings['shape']))}, digest {settings['digest'][:12]}",
            "features": "none: losses only"
            if features is None
            else f"{features['name']}, {features['accuracy']:.1%} of the held-out images named right, digest "
            f"{features['digest'][:12]}",
            "common partition": f"sigma {', '.join(f'{edge:.4g}' for edge in settings['stages'])}",
            "budget": f"{digits(budget['tflops'])} TFLOPs a model; {budget['samples']:,} generated images behind a "
            f"distance at the end of training, {budget['samples_on_the_way']:,} behind the others",
        }
        if made := document.get("made"):
            numbers = ", ".join(f"{name} {number}" for name, number in made["versions"].items())
            terms |= {"command": made["command"], "versions": numbers, "machine": made["machine"]}
        titles.setdefault(tuple(terms.items()), []).append(document["title"])
    return titles


def versions() -> dict[str, str]:
    """What computed: the package, torch and Python.

    Returns:
        Versions by name; the package's with its commit, where it runs from a git checkout.
    """
    return {
        "multistage-diffusion": version("multistage-diffusion") + _commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _commit() -> str:
    """Like `, commit 1a2b3c4d5e6f`, with `+` if files differ from it; nothing for an installed package."""
    package = Path(__file__).parents[1]

    def git(*words: str) -> str:
        run = subprocess.run(["git", "-C", package, *words], capture_output=True, text=True, timeout=10, check=True)
        return run.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # a package may be installed into somebody's checkout
        return f", commit {git('describe', '--always', '--exclude=*', '--abbrev=12', '--dirty=+')}"
    except (OSError, subprocess.SubprocessError):
        return ""


def machine(device: torch.device | str = "cpu") -> str:
    """The machine in words, without its name.

    Args:
        device: Where the models ran.

    Returns:
        Like `2 x Intel Xeon ..., threads of a process: 2`.
    """
    processor = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.is_file():
        lines = information.read_text().splitlines()
        processor = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), processor)
    words = f"{os.cpu_count()} x {processor}, threads of a process: {torch.get_num_threads()}"
    return f"{torch.cuda.get_device_name(device)}; {words}" if torch.device(device).type == "cuda" else words
