"""The script that measures a GPU, as far as a CPU can take it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"


def run(out, *words):
    return subprocess.run(
        [sys.executable, SCRIPT, "--device", "cpu", "--quick", "--out", out, *words],
        cwd=out.parent, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_all_parts_pass_on_a_cpu_and_are_done_once(tmp_path):
    pytest.importorskip("diffusers")
    out = tmp_path / "gpu.json"
    first = run(out, "--parts", "clustering", "sampling")
    assert first.returncode == 0, first.stderr[-2000:]
    whole = run(out)
    assert whole.returncode == 0, whole.stderr[-2000:]
    assert "clustering: done before" in whole.stdout
    parts = json.loads(out.read_text())["parts"]
    assert list(parts) == ["clustering", "sampling", "correctness", "steps", "scaling"]
    checks = parts["correctness"]["result"]
    assert {"estimates", "losses, fp32", "losses, bf16", "losses, process group of one"} <= checks.keys()
    assert all(item["difference"] <= item["bound"] for item in checks.values())


@pytest.mark.slow
@pytest.mark.skipif("__import__('torch').cuda.is_available()", reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    done = subprocess.run(
        [sys.executable, SCRIPT, "--device", "cuda"], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 1 and done.stderr == (
        "error: torch sees no GPU; --device cpu --quick tries the script without one\n"
    )
