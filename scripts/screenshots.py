"""Pictures of pages in Chromium: python scripts/screenshots.py serve RUN, or report FILE [FOLDER].

`serve` draws with a run and writes docs/img/serve.png; `report` shows a report wide, narrow and dark.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from browser import Browser

IMAGES = Path(__file__).parents[1] / "docs" / "img"


def serve(
    run: str, out: Path = IMAGES / "serve.png", *, width: int = 1100, height: int = 800, dark: bool = False
) -> None:
    """Draw in the page of `msd serve` and take its picture."""
    words = [sys.executable, "-m", "multistage_diffusion", "serve", run, "--port", "0", "--json"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        with Browser(width, height, dark=dark) as browser:
            browser.open(json.loads(process.stdout.readline())["url"])
            browser.until("!document.getElementById('save').hidden", 300)
            browser.screenshot(out)
    finally:
        process.terminate()
        process.wait()


def report(file: str, folder: str = ".") -> None:
    """A report as people see it: on a wide screen, on a phone, in the dark."""
    for name, width, dark in (("wide", 1200, False), ("narrow", 390, False), ("dark", 1200, True)):
        with Browser(width, 2000, dark=dark) as browser:
            browser.open(Path(file).absolute().as_uri())
            browser.screenshot(Path(folder) / f"{Path(file).stem}-{name}.png")


if __name__ == "__main__":
    {"serve": serve, "report": report}[sys.argv[1]](*sys.argv[2:])
