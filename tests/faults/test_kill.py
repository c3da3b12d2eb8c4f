"""A run killed at any moment and started again ends as if nothing had happened."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from lives import MODEL

import tiny
from multistage_diffusion.runs.checkpoints import list_checkpoints, newest_valid
from runs import log, tensors

SAVE_EVERY = 4


SHOWN = [
    "--logging.grid-every", "4", "--logging.grid-images", "1", "--sampling.steps", "2", "--training.keep-every", "8",
    "--training.sigma-rel", "0.05", "0.1", "--training.ema-snapshot-every", "4",
]  # fmt: skip


def options(steps: int) -> list[str]:
    return ["--training.steps", str(steps), "--training.save-every", str(SAVE_EVERY)]


def wait_a_moment(out: Path, chance: random.Random) -> None:
    time.sleep(chance.uniform(0.02, 0.4))


def wait_for_a_write(out: Path, chance: random.Random) -> None:
    """Until a checkpoint is being written, and up to 20 ms more: it takes about 30."""
    deadline = time.monotonic() + 5
    skip = chance.randrange(3)
    seen: set[str] = set()
    while time.monotonic() < deadline and len(seen) <= skip:
        seen |= {path.name for path in out.glob("checkpoints/.step-*.tmp")}
    time.sleep(chance.uniform(0, 0.02))


def torture(lives, tmp_path, kills, steps, moment, more=()):
    """Kill runs as often as asked, compare those that get to their end; return the number of kills inside a write."""
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert lives.train(whole, *options(steps), *more).wait() == 0
    chance, inside, killed = random.Random(0), 0, 0
    while killed < kills:
        life = lives.train(out, *options(steps), *more)
        moment(out, chance)
        life.kill()
        code = life.wait()
        assert code in (0, -9), life.errors
        if code == 0:
            same(out, whole)
            out = tmp_path / f"run-{killed}"
            continue
        killed += 1
        inside += any(path.name.startswith(".step-") for path in out.glob("checkpoints/*"))
        undamaged(out)
    assert lives.train(out, *options(steps), *more).wait() == 0
    same(out, whole)
    print(f"{kills} kills, {inside} of them inside a write: 0 runs lost")
    return inside


def undamaged(out: Path) -> None:
    """No checkpoint is damaged, and the kill cost no more than the steps since the last one was due."""
    assert all(found.damage() is None for found in list_checkpoints(out / "checkpoints"))
    text = (out / "metrics.jsonl").read_text() if (out / "metrics.jsonl").exists() else ""
    logged = max((json.loads(line)["step"] for line in text.splitlines() if line.endswith("}")), default=0)
    found, damages = newest_valid(out / "checkpoints")
    assert damages == []
    assert (found.step if found else 0) >= logged - SAVE_EVERY


def same(out: Path, whole: Path) -> None:
    assert tiny.bits_equal(tensors(out), tensors(whole))
    assert log(out) == log(whole)
    assert (out / "model" / "model.safetensors").read_bytes() == (whole / "model" / "model.safetensors").read_bytes()
    assert kept(out) == kept(whole)
    assert not [path for path in out.rglob(".*") if path.name != ".lock"]


def kept(out: Path) -> dict[Path, bytes]:
    """Grids, and snapshots of the averages, where the run made some."""
    files = [*out.glob("samples/*.png"), *out.glob("ema/*/*"), *out.glob("checkpoints/*/*.safetensors")]
    return {path.relative_to(out): path.read_bytes() for path in files}


@pytest.mark.slow
def test_killed_5_times(lives, tmp_path):
    torture(lives, tmp_path, 5, 40, wait_a_moment)


@pytest.mark.slow
def test_killed_50_times(lives, tmp_path):
    torture(lives, tmp_path, 50, 200, wait_a_moment)


@pytest.mark.slow
def test_killed_50_times_inside_a_write(lives, tmp_path):
    assert torture(lives, tmp_path, 50, 200, wait_for_a_write) >= 25


@pytest.mark.slow
def test_killed_20_times_while_it_draws_and_keeps_snapshots(lives, tmp_path):
    torture(lives, tmp_path, 20, 200, wait_a_moment, SHOWN)
    assert len(list((tmp_path / "whole" / "samples").iterdir())) == 50
    assert len(list((tmp_path / "whole" / "ema").iterdir())) == 50
    assert len(list((tmp_path / "whole" / "checkpoints").iterdir())) == 26


@pytest.mark.slow
def test_a_fresh_process_elsewhere_makes_the_same_bits(lives, tmp_path):
    """Weights, averages and samples; also under another seed of Python's hashes, and in another folder."""
    runs = []
    for seed in ("0", "77"):
        folder = tmp_path / seed
        folder.mkdir()
        words = ["-m", "multistage_diffusion", "train", "digits", "--out", "run", *MODEL, *options(6), *SHOWN]
        environment = {**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, *words], cwd=folder, env=environment, check=True, capture_output=True)
        runs.append(folder / "run")
    same(*runs)
