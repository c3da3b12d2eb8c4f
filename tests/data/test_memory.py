"""What a conversion holds in memory does not grow with the pixels, only with the list of the pictures."""

import json
import subprocess
import sys

import pytest

CONVERT = """
import json, re, sys
from pathlib import Path

import numpy as np
from PIL import Image

from multistage_diffusion.cli import dispatch

def peak():
    with open("/proc/self/status") as status:
        return int(re.search(r"VmHWM:\\s+(\\d+)", status.read())[1]) / 1024

def pictures(folder, count):
    folder.mkdir()
    for i in range(count):
        shape = (64, 64, 3) if i == count - 1 else (64, 64)  # the last one makes all that were written before wider
        Image.fromarray(np.random.default_rng(i).integers(0, 256, shape, dtype=np.uint8)).save(folder / f"{i:05}.bmp")

peaks = []
for count in (1500, 12000):
    folder = Path(sys.argv[1]) / str(count)
    pictures(folder, count)
    assert dispatch(["data", f"folder:{folder}", "--convert", f"{folder}-shards", "--json"]) == 0
    peaks.append(peak())
print(json.dumps(peaks))
"""


@pytest.mark.slow
def test_converting_a_folder_takes_the_memory_of_a_list_of_its_pictures(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", CONVERT, str(tmp_path)], capture_output=True, text=True, check=True, timeout=300
    )
    *documents, peaks = map(json.loads, done.stdout.splitlines())
    assert [document["shape"] for document in documents] == [[3, 64, 64]] * 2
    few, many = peaks
    assert many - few < 48  # MiB; the pixels are 123 more
