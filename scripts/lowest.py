"""The lowest versions that pyproject.toml allows, one requirement a line: `python scripts/lowest.py [EXTRA ...]`."""

import re
import sys
import tomllib
from pathlib import Path

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]


def requirements(extras: list[str]) -> list[str]:
    """Those of the package and of extras; an extra that names extras of the package is followed."""
    found = list(PROJECT["dependencies"])
    for extra in extras:
        for requirement in PROJECT["optional-dependencies"][extra]:
            itself = re.match(rf"{PROJECT['name']}\[(.*)\]", requirement)
            found += requirements(itself[1].split(","))[len(PROJECT["dependencies"]) :] if itself else [requirement]
    return found


def lowest(requirement: str) -> str:
    """`name>=1.2,<3` as `name==1.2`; what has no lower bound as it is."""
    name, bound = re.match(r"([\w.-]+(?:\[.*\])?)(?:>=([\w.]+))?", requirement).groups()
    return f"{name}=={bound}" if bound else requirement


if __name__ == "__main__":
    print(*map(lowest, requirements(sys.argv[1:])), sep="\n")
