"""Standard output that is closed, full, or without a reader: training goes on, other commands say so in one line."""

import subprocess
import sys

import pytest
from lives import MODEL

from multistage_diffusion.training.checkpoint import list_checkpoints

CLOSED, FULL, LEFT = ">&-", ">/dev/full", "| (exec 0<&-; sleep 1)"
WHY = {CLOSED: "I/O operation on closed file", FULL: "No space left on device", LEFT: "Broken pipe"}


def msd(words, redirection):
    command = f"set -o pipefail; {sys.executable} -m multistage_diffusion {words} {redirection}"
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=300)


def train(out):
    return f"train digits --out {out} {' '.join(MODEL)} --training.steps 3"


@pytest.mark.slow
@pytest.mark.parametrize("redirection", [FULL, *(pytest.param(way, marks=pytest.mark.slow) for way in (CLOSED, LEFT))])
def test_training_goes_on_where_nothing_can_be_printed(redirection, tmp_path):
    done = msd(train(tmp_path / "run"), redirection)
    assert (done.returncode, done.stderr) == (0, f"warning: cannot print: {WHY[redirection]}; training goes on\n")
    assert list_checkpoints(tmp_path / "run" / "checkpoints")[-1].step == 3


@pytest.mark.slow
@pytest.mark.parametrize("redirection", [FULL, CLOSED])
def test_training_goes_on_where_not_even_errors_can_be_printed(redirection, tmp_path):
    assert msd(train(tmp_path / "run"), f"{redirection} 2{redirection}").returncode == 0
    assert list_checkpoints(tmp_path / "run" / "checkpoints")[-1].step == 3


@pytest.mark.parametrize("redirection", [FULL, CLOSED])
@pytest.mark.parametrize("words", ["--version", "--help", "train digits --dry-run", "train digits --dry-run --json"])
def test_other_commands_say_that_they_cannot_print(words, redirection):
    done = msd(words, redirection)
    assert (done.returncode, done.stderr) == (1, f"error: cannot print: {WHY[redirection]}\n")


@pytest.mark.parametrize("redirection", [FULL, CLOSED])
def test_other_commands_end_where_not_even_errors_can_be_printed(redirection):
    assert msd("--version", f"{redirection} 2{redirection}").returncode == 1
    assert msd("nonsense", f"2{redirection}").returncode == 2
