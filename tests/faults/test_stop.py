"""Signals, two trainers in one directory, a full disk, odd paths: one line, the right code, nothing lost."""

import os
import shutil
import subprocess
import time

import pytest

import tiny
from multistage_diffusion.runs.checkpoints import list_checkpoints
from multistage_diffusion.training.guard import SIGNALS
from runs import log, tensors

STEPS = ["--training.steps", "30", "--training.save-every", "10"]
ENDLESS = ["--training.steps", "1000000", "--training.save-every", "1000000"]


def wait_for(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.005)


def lines_of(out):
    return len((out / "metrics.jsonl").read_text().splitlines()) if (out / "metrics.jsonl").exists() else 0


@pytest.fixture(scope="module")
def whole(lives, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    assert lives.train(out, *STEPS).wait() == 0
    return out


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_saves_and_stops(number, lives, tmp_path):
    out = tmp_path / "run"
    life = lives.train(out, *ENDLESS)
    wait_for(lambda: lines_of(out) >= 3)
    for _ in range(3):  # again, while it saves
        life.kill(number)
        time.sleep(0.002)
    assert life.wait() == 128 + number
    (found,) = list_checkpoints(out / "checkpoints")
    assert found.damage() is None
    assert found.step == lines_of(out)
    last = life.errors[-1]
    assert last.startswith(f"error: stopped by {number.name} after step {found.step};")
    steps = str(found.step + 2)
    assert lives.train(out, "--training.steps", steps, "--training.save-every", "1000000").wait() == 0
    assert lives.train(tmp_path / "whole", "--training.steps", steps, "--training.save-every", "1000000").wait() == 0
    assert tiny.bits_equal(tensors(out), tensors(tmp_path / "whole"))
    assert log(out) == log(tmp_path / "whole")


def test_a_second_trainer_is_refused_and_a_dead_one_is_not_waited_for(lives, tmp_path):
    out = tmp_path / "run"
    first = lives.train(out, *ENDLESS)
    wait_for(lambda: lines_of(out) >= 1)
    second = lives.train(out, *ENDLESS)
    assert second.wait() == 2
    assert second.errors[-1].startswith("error: ") and f"process {first.pid}" in second.errors[-1]
    first.kill()
    assert first.wait() == -9
    assert lives.train(out, "--training.steps", "2").wait() == 0


def test_a_file_that_may_not_grow_stops_the_run_with_one_line(lives, whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    life = lives.train(out, *STEPS[2:], "--training.steps", "40", limit=100_000)
    assert life.wait() == 5
    assert life.errors[-1].startswith(f"error: cannot write {out}") and "bytes)" in life.errors[-1]
    assert "Traceback" not in "\n".join(life.errors)
    assert not [path for path in out.rglob(".*") if path.name != ".lock"]
    assert [found.step for found in list_checkpoints(out / "checkpoints")] == [20, 30]
    assert all(found.damage() is None for found in list_checkpoints(out / "checkpoints"))
    assert lives.train(out, *STEPS[2:], "--training.steps", "40").wait() == 0


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MiB, where one may be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], capture_output=True, text=True)
    if mount.returncode:
        pytest.skip(f"cannot mount a small disk here: {mount.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_a_full_disk_stops_the_run_with_one_line_and_the_next_call_goes_on(lives, whole, small_disk):
    out = small_disk / "run"
    ballast = small_disk / "ballast"
    assert lives.train(out, *STEPS[:1], "10", *STEPS[2:]).wait() == 0
    free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
    ballast.write_bytes(bytes(max(free - 150_000, 0)))
    life = lives.train(out, *STEPS)
    assert life.wait() == 5
    assert life.errors[-1].startswith(f"error: cannot write {out}") and "No space left" in life.errors[-1]
    (found,) = list_checkpoints(out / "checkpoints")
    assert found.step == 10 and found.damage() is None
    assert not [path for path in out.rglob(".*") if path.name != ".lock"]
    ballast.unlink()
    life = lives.train(out, *STEPS, "--training.keep", "1")
    assert life.wait() == 0, life.errors
    assert tiny.bits_equal(tensors(out), tensors(whole))


@pytest.mark.parametrize(
    ("way", "code"),
    [("file", 2), ("below a file", 5), ("too long", 2), ("not a letter", 0)],
)
def test_ways_that_lead_nowhere(way, code, lives, tmp_path):
    (tmp_path / "file").write_text("mine")
    out = {
        "file": tmp_path / "file", "below a file": tmp_path / "file" / "run", "too long": tmp_path / ("x" * 300),
        "not a letter": tmp_path / "проба \N{SNOWMAN} ' \" run",
    }[way]  # fmt: skip
    life = lives.train(out, "--training.steps", "1")
    assert life.wait() == code, life.errors
    assert "Traceback" not in "\n".join(life.errors)
    if code:
        assert life.errors[-1].startswith("error: ")
    assert (tmp_path / "file").read_text() == "mine"


def test_the_clock_may_jump(lives, whole, tmp_path):
    out = tmp_path / "run"
    assert lives.train(out, *STEPS[:1], "10", *STEPS[2:]).wait() == 0
    for path in out.rglob("*"):
        os.utime(path, (0, 0) if path.name.startswith("step") else (2**32, 2**32))
    assert lives.train(out, *STEPS).wait() == 0
    assert tiny.bits_equal(tensors(out), tensors(whole))


def test_a_disk_that_may_only_be_read_is_one_line(lives, small_disk):
    assert lives.train(small_disk / "run", "--training.steps", "1").wait() == 0
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    for life in (lives.train(small_disk / "run", "--training.steps", "2"), lives.train(small_disk / "new"),
                 lives.run("data", "digits", "--convert", str(small_disk / "shards"))):  # fmt: skip
        assert life.wait() in (2, 5), life.errors
        assert life.errors[-1].startswith("error: ") and "Read-only file system" in life.errors[-1]
        assert "Traceback" not in "\n".join(life.errors)
