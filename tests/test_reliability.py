"""docs/reliability.md names tests that exist, and leaves no fault out."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "reliability.md").read_text()


def test_every_test_and_file_that_the_page_names_exists():
    functions = {
        name for path in (ROOT / "tests").rglob("test_*.py") for name in re.findall(r"def (test_\w+)", path.read_text())
    }
    files = set(re.findall(r"`((?:\w+/)*test_\w+\.py)`", PAGE))
    missing = [name for name in files if not any((ROOT / place / name).is_file() for place in ("", "tests"))]
    assert missing == [] and len(files) > 20
    named = set(re.findall(r"`(test_\w+)`", PAGE))
    assert sorted(named - functions) == [] and len(named) > 40


def test_no_row_is_missing():
    rows = {
        name
        for line in PAGE.splitlines()
        if line.startswith("| ")
        for name in re.findall(r"\b[RNDFW]\d+\b", line.split("|")[1])
    }
    wanted = {f"{letter}{number}" for letter, last in (("R", 13), ("N", 10), ("D", 8), ("F", 10), ("W", 7))
              for number in range(1, last + 1)}  # fmt: skip
    assert wanted - rows == set()
