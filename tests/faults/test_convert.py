"""A conversion that is killed, or finds the disk full, leaves nothing half done; a disk that hangs ends a run."""

import os
import random
import subprocess
import sys
import time

import pytest
import torch
from lives import MODEL
from PIL import Image
from test_stop import small_disk, wait_for  # noqa: F401  (a fixture)

from multistage_diffusion import rng
from multistage_diffusion.data import load_data

HANGS = """
import sys, time
from multistage_diffusion.cli import dispatch
from multistage_diffusion.data.shards import Shards
read = Shards.__getitem__
Shards.__getitem__ = lambda self, index: time.sleep(3600) if len(index) == 4 else read(self, index)
sys.exit(dispatch(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Three hundred pictures of 64 x 64, 3.7 MB as pixels."""
    folder = tmp_path_factory.mktemp("pictures")
    words = rng.bits(0, "pictures", torch.arange(300), 64 * 64 * 3 // 8)
    for i, picture in enumerate(words.view(torch.uint8).reshape(300, 64, 64, 3)):
        Image.fromarray(picture.numpy()).save(folder / f"{i:03}.png")
    return f"folder:{folder}"


def leftovers(folder):
    return [path for path in folder.parent.iterdir() if path.name.startswith(f".{folder.name}.")]


@pytest.mark.slow
def test_a_killed_conversion_is_made_again_from_the_start(lives, pictures, tmp_path):
    out, chance, inside = tmp_path / "shards", random.Random(0), 0
    for _ in range(10):
        life = lives.run("data", pictures, "--convert", str(out))
        wait_for(lambda: leftovers(out) or out.exists())
        time.sleep(chance.uniform(0, 0.1))
        life.kill()
        assert life.wait() in (-9, 0)
        inside += len(leftovers(out)) > 0
        assert len(leftovers(out)) <= 1  # what the one before left is gone
        if out.exists():
            assert len(load_data(f"shards:{out}", split="all").pixels()) == 300
    assert inside >= 3
    life = lives.run("data", pictures, "--convert", str(out))
    assert life.wait() == 0, life.errors
    assert leftovers(out) == []
    assert load_data(f"shards:{out}").digest == load_data(pictures).digest


@pytest.mark.slow
def test_a_full_disk_ends_a_conversion_with_one_line(lives, pictures, small_disk):  # noqa: F811
    out = small_disk / "shards"
    life = lives.run("data", pictures, "--convert", str(out))
    assert life.wait() == 5
    assert life.errors[-1].startswith(f"error: cannot write {out}: 3691200 bytes are needed and ")
    life = lives.run("data", "digits", "--convert", str(out), limit=50_000)
    assert life.wait() == 5
    assert life.errors[-1].startswith(f"error: cannot write {out}: File too large")
    assert os.listdir(small_disk) == []
    assert lives.run("data", "digits", "--convert", str(out)).wait() == 0


@pytest.mark.slow
def test_a_disk_that_hangs_ends_the_run_in_time_and_says_so(lives, pictures, tmp_path):
    assert lives.run("data", "digits", "--convert", str(tmp_path / "shards")).wait() == 0
    words = ["train", "digits", "--data.source", f"shards:{tmp_path}/shards", "--data.memory", "0",
             "--data.timeout", "3", "--out", str(tmp_path / "run"), *MODEL]  # fmt: skip
    life = subprocess.Popen([sys.executable, "-c", HANGS, *words], stderr=subprocess.PIPE, text=True)
    wait_for(lambda: (tmp_path / "run" / "metrics.jsonl").exists() or life.poll() is not None, 60)
    start = time.monotonic()
    _, errors = life.communicate(timeout=60)
    assert life.returncode == 3, errors
    assert time.monotonic() - start < 3 + 5
    assert "4 images were not read within 3 seconds; the disk or network" in errors.splitlines()[-1]
    assert "Traceback" not in errors
