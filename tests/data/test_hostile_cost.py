"""What a hostile file costs until it is refused: time and memory, measured in a process that does nothing else."""

import json
import shutil
import subprocess
import sys

import pytest
from hostile import write_hostile

import tiny
from multistage_diffusion.data.collection import Reading
from multistage_diffusion.data.sources import convert
from multistage_diffusion.files import sha256
from multistage_diffusion.runs.checkpoints import list_checkpoints
from multistage_diffusion.training.run import train

MEASURE = '''
import ctypes, json, re, sys, time, warnings
from pathlib import Path

def forget():
    """Give free memory back, and let the peak begin anew."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")

def peak():
    with open("/proc/self/status") as status:
        return int(re.search(r"VmHWM:\\s+(\\d+)", status.read())[1]) / 1024

def measure(cases):
    cost = {}
    for name, (refuse, error) in cases.items():
        forget()
        before, begin = peak(), time.perf_counter()
        try:
            refuse()
        except error as said:
            line = str(said)
        else:
            raise AssertionError(f"{name} was taken")
        assert "\\n" not in line, line
        cost[name] = (time.perf_counter() - begin, peak() - before)
    print(json.dumps(cost))

warnings.simplefilter("ignore")
here = Path(sys.argv[1])
'''

CHECKPOINTS = """
from multistage_diffusion.data.sources import load_data
from multistage_diffusion.errors import CheckpointError, DataError
from multistage_diffusion.runs.checkpoints import newest_valid
from multistage_diffusion.runs import load_run

load_run(here / "run" / "model")
load_data(f"shards:{here}/digits")

refuse = {
    "weights": (load_run, CheckpointError),
    "manifest": (newest_valid, CheckpointError),
    "shards": (lambda path: load_data(f"shards:{path}"), DataError),
    "index": (lambda path: load_data(f"shards:{path}"), DataError),
}
measure({
    f"{kind}: {path.name}": (lambda call=call, path=path: call(path), error)
    for kind, (call, error) in refuse.items() for path in sorted((here / kind).iterdir())
})
"""


PICTURES = """
from multistage_diffusion.data.decode import PictureError, decode, read_regular

def look(path):
    decode(read_regular(path))
    raise PictureError("taken: it decodes to pixels")

look_at = lambda path: lambda: look(path)
measure({str(path.relative_to(here)): (look_at(path), PictureError) for path in sorted(here.rglob("*"))})
"""


def header(text, size=None):
    return (len(text) if size is None else size).to_bytes(8, "little") + text + bytes(4)


def entry(name, shape):
    return f'"{name}":{{"dtype":"F32","shape":{shape},"data_offsets":[0,4]}}'


def braces(*entries):
    return ("{" + ",".join(entries) + "}").encode()


WEIGHTS = {
    "a header of 1 TB": header(b"", 10**12),
    "a header of 90 MB": header(b"{" + b" " * 90_000_000 + b"}"),
    "tensors that overlap": header(braces(entry("a", [1]), entry("b", [1]))),
    "10^9 x 10^9 numbers": header(braces(entry("a", [10**9, 10**9]))),
    "many tensors": header(braces(*(entry(i, [1]) for i in range(30_000)))),
    "more tensors": header(braces(*(entry(i, [1]) for i in range(600_000)))),
    "deep": header(b"[" * 100_000 + b"]" * 100_000),
}
MANIFESTS = {
    "deep": "[" * 100_000 + "]" * 100_000,
    "wide": "[" + "[]," * 170_000 + "[]]",
    "wider": "[" + "[]," * 20_000_000 + "[]]",
    "outside": '{"files": {"../x": {"bytes": 1, "sha256": ""}}}',
    "vast": '{"files": {"model.safetensors": {"bytes": 1' + "0" * 4000 + "}}}",
}


@pytest.fixture
def hostile(tmp_path):
    """A folder of each kind, with a folder of each fault in it."""
    train(tiny.run_config(), tmp_path / "run", data=tiny.images())
    convert("digits", tmp_path / "digits", None, Reading())
    for name, content in WEIGHTS.items():
        folder = shutil.copytree(tmp_path / "run" / "model", tmp_path / "weights" / name)
        (folder / "manifest.json").unlink()
        (folder / "model.safetensors").write_bytes(content)
    checkpoint = list_checkpoints(tmp_path / "run" / "checkpoints")[-1].path
    for name, content in MANIFESTS.items():
        folder = shutil.copytree(checkpoint, tmp_path / "manifest" / name / "step-00000008")
        (folder / "manifest.json").write_text(content)
        folder = shutil.copytree(tmp_path / "digits", tmp_path / "shards" / name)
        (folder / "manifest.json").write_text(content)
        folder = shutil.copytree(tmp_path / "digits", tmp_path / "index" / name)
        (folder / "index.json").write_text(content)
        facts = json.loads((folder / "manifest.json").read_text())
        facts["files"]["index.json"] = {"bytes": len(content), "sha256": sha256(folder / "index.json")}
        (folder / "manifest.json").write_text(json.dumps(facts))
    return tmp_path


def costs(script, folder):
    """Seconds and MiB that each refusal took, in a process of its own."""
    command = [sys.executable, "-c", MEASURE + script, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def dearest(cost, place):
    return max(cost.items(), key=lambda item: item[1][place])


@pytest.mark.slow
def test_hostile_weights_and_manifests_cost_less_than_a_second_and_50_mib(hostile):
    cost = costs(CHECKPOINTS, hostile)
    assert len(cost) == 22
    name, (seconds, _) = dearest(cost, 0)
    assert seconds < 1, (name, seconds)
    name, (_, memory) = dearest(cost, 1)
    assert memory < 50, (name, memory)


@pytest.mark.slow
def test_each_hostile_picture_costs_less_than_5_seconds_and_300_mib(tmp_path):
    names = write_hostile(tmp_path)
    cost = costs(PICTURES, tmp_path)
    assert len(cost) >= len(names) >= 200
    name, (seconds, _) = dearest(cost, 0)
    assert seconds < 5, (name, seconds)
    name, (_, memory) = dearest(cost, 1)
    assert memory < 300, (name, memory)
