"""What a run asks of the file system, seen and disturbed by strace: the order of its calls, a fault at each of them."""

import re
import shutil
import signal
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest
from test_stop import wait_for

import tiny
from multistage_diffusion.files import is_leftover
from multistage_diffusion.runs.checkpoints import list_checkpoints, newest_valid
from runs import log, tensors

STEPS = ["--training.steps", "4", "--training.save-every", "2", "--training.keep", "1"]
SHORT = ["--training.steps", "2", "--training.save-every", "2"]
CALLS = ("fsync", "rename", "unlink")

pytestmark = pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")


@contextmanager
def traced(life, record, *words):
    """Follow a life that waits, from its first step to its last."""
    command = ["strace", "-f", "-y", "-qq", "-o", str(record), *words, "-p", str(life.pid)]
    wait_for(lambda: "State:\tT" in status(life))  # else it would stop after it was told to go on
    tracer = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: tracer.poll() is not None or f"TracerPid:\t{tracer.pid}\n" in status(life))
    if tracer.poll() is not None:
        life.kill()
        life.wait()
        pytest.skip(f"strace cannot attach here: {tracer.stderr.read().strip()}")
    life.kill(signal.SIGCONT)
    try:
        yield
    finally:
        tracer.wait(120)
        tracer.stderr.close()


def same(out, whole):
    """But for an old checkpoint that there was no time to delete."""
    assert tiny.bits_equal(tensors(out), tensors(whole))
    assert log(out) == log(whole)
    assert (out / "model" / "model.safetensors").read_bytes() == (whole / "model" / "model.safetensors").read_bytes()
    assert not [path for path in out.rglob(".*") if path.name != ".lock"]


def status(life):
    return Path(f"/proc/{life.pid}/status").read_text()


def calls_of(record):
    """The calls that succeeded, as (name, paths)."""
    for line in record.read_text().splitlines():
        match = re.match(r"\d+ +(\w+)\((.*)\) += 0$", line)
        if match:
            yield match[1], re.findall(r"<(/[^>]*)>" if match[1] == "fsync" else r'"([^"]*)"', match[2])


@pytest.fixture(scope="module")
def whole(lives, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    assert lives.train(out, *STEPS).wait() == 0
    return out


@pytest.mark.slow
def test_everything_is_on_the_disk_before_it_has_its_name(lives, tmp_path):
    """What a power loss can leave: flushed data under temporary names, or all of it under the right one."""
    out, record = tmp_path / "run", tmp_path / "log"
    life = lives.train(out, *SHORT, stopped=True)
    with traced(life, record, "-e", "trace=fsync,rename,renameat,renameat2"):
        assert life.wait() == 0, life.errors
    flushed, waiting, renamed = set(), [], 0
    for name, paths in calls_of(record):
        if name == "fsync":
            flushed.add(paths[0])
            waiting = [folder for folder in waiting if folder != paths[0]]
            continue
        old, new = paths
        flushed |= {new} if old in flushed else set()
        if is_leftover(Path(new).parent.name):  # safetensors writes each file so, inside a directory of ours
            continue
        renamed += 1
        waiting.append(str(Path(new).parent))
        if Path(new).is_dir():
            written = {str(path) for path in Path(new).rglob("*") if path.is_file()}
            assert written and {path.replace(new, old) for path in written} <= flushed
            assert old in flushed
        else:
            assert old in flushed
    assert renamed >= 5  # configuration, stages, metrics, a checkpoint, the model
    assert waiting == []  # each folder was flushed after the last rename in it


@pytest.mark.slow
@pytest.mark.parametrize("call", CALLS)
def test_killed_at_each_call(call, lives, whole, tmp_path):
    record = tmp_path / "log"
    life = lives.train(tmp_path / "count", *STEPS, stopped=True)
    with traced(life, record, "-e", f"trace={call}"):
        assert life.wait() == 0, life.errors
    times = len(re.findall(rf"^\d+ +{call}\(", record.read_text(), re.MULTILINE))
    assert times >= {"fsync": 20, "rename": 8, "unlink": 0}[call]
    for k in range(1, times + 1):
        out = tmp_path / f"run-{k}"
        life = lives.train(out, *STEPS, stopped=True)
        with traced(life, record, "-e", f"trace={call}", "-e", f"inject={call}:signal=SIGKILL:when={k}"):
            assert life.wait() == -signal.SIGKILL
        assert all(found.damage() is None for found in list_checkpoints(out / "checkpoints"))
        found, damages = newest_valid(out / "checkpoints")
        assert damages == [] and (found is None or found.step in (2, 4))
        life = lives.train(out, *STEPS)
        assert life.wait() == 0, (k, life.errors)
        same(out, whole)
        shutil.rmtree(out)
    print(f"{times} kills at {call}: 0 runs lost")


@pytest.mark.parametrize(("call", "error", "words"), [
    ("fsync", "ENOSPC", "No space left on device"), ("rename", "EIO", "Input/output error"),
    ("fsync", "EDQUOT", "Disk quota exceeded"),
])  # fmt: skip
def test_a_call_that_fails_stops_the_run_with_one_line(call, error, words, lives, whole, tmp_path):
    out = tmp_path / "run"
    assert lives.train(out, *SHORT).wait() == 0
    life = lives.train(out, *STEPS, stopped=True)
    with traced(life, tmp_path / "log", "-e", f"trace={call}", "-e", f"inject={call}:error={error}:when=6+"):
        assert life.wait() == 5, life.errors
    assert life.errors[-1].startswith(f"error: cannot write {out}") and words in life.errors[-1]
    assert "Traceback" not in "\n".join(life.errors)
    assert not [path for path in out.rglob(".*") if path.name != ".lock"]
    found = list_checkpoints(out / "checkpoints")
    assert [item.step for item in found] in ([2], [2, 4]) and all(item.damage() is None for item in found)
    assert lives.train(out, *STEPS).wait() == 0
    same(out, whole)
