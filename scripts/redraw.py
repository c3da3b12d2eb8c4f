"""Draw the figures and pages of docs/results again from the rows beside them: python scripts/redraw.py [FOLDER ...]."""

import sys
from pathlib import Path

from multistage_diffusion.studies.pages import redraw

RESULTS = Path(__file__).parents[1] / "docs" / "results"

if __name__ == "__main__":
    for folder in map(Path, sys.argv[1:]) if sys.argv[1:] else sorted(RESULTS.iterdir()):
        print(*redraw(folder), sep="\n")
