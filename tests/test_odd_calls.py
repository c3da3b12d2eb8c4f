"""Odd arguments from Python get an answer or one line of our own errors, never an exception of torch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("cluster", 290),
        pytest.param("several", 55, marks=pytest.mark.slow),
        pytest.param("use", 340, marks=pytest.mark.slow),
        pytest.param("train", 130, marks=pytest.mark.slow),
    ],
)
def test_odd_arguments_are_answered(name, least, tmp_path):
    """In a process of its own, as the types of this one are checked at every call."""
    script, environment = Path(__file__).parent / "odd_calls.py", {**os.environ, "MSD_CACHE": str(tmp_path)}
    done = subprocess.run([sys.executable, script, name], capture_output=True, text=True, env=environment)
    *unanswered, last = done.stdout.splitlines() or [done.stderr[-300:]]
    assert unanswered == [] and last.endswith(" calls") and int(last.split()[0]) >= least, done.stdout + done.stderr
