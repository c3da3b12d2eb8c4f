"""Write the golden numbers. Ran once, with version 0.1 and one thread; to run it again is to give up what it pins.

    OMP_NUM_THREADS=1 python tests/golden/make.py numbers   # losses.json, samples.json, profiles.json, clusters.json
    OMP_NUM_THREADS=1 python tests/golden/make.py profiles  # one of the four

The files of v0.1/ were written by the commands in v0.1/README.md (v0.1/make.sh), and `expected` then measured them.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

import pinned
import pinned_files as files
import torch


def losses(folder: Path) -> dict:
    return {
        run: {"config": pinned.config(run), "steps": pinned.steps(pinned.train(run, folder))} for run in pinned.RUNS
    }


def samples(folder: Path) -> dict:
    run = pinned.train(pinned.SAMPLED, folder)
    words = ["--num", pinned.SAMPLES, "--steps", pinned.SAMPLE_STEPS, "--solver"]
    solvers = {
        solver: {**pinned.draw(run, folder / solver, *words, solver), **pinned.floats(run, solver)}
        for solver in pinned.SOLVERS
    }
    return {"run": pinned.SAMPLED, "solvers": solvers, "held_out": pinned.held_out(run)}


def profiles(folder: Path) -> dict:
    return {
        f"{preset}-{architecture}": pinned.msd("profile", preset, "--architecture", architecture)
        for preset in (*pinned.SMALL_PRESETS, *pinned.LARGE_PRESETS)
        for architecture in pinned.ARCHITECTURES
    }


def clusters(folder: Path) -> dict:
    found = {name: pinned.msd("cluster", *words, *pinned.THREADS) for name, words in pinned.CLUSTERS.items()}
    return {name: {key: document[key] for key in pinned.CLUSTER_KEYS} for name, document in found.items()}


NUMBERS = {"losses": losses, "samples": samples, "profiles": profiles, "clusters": clusters}


def main() -> None:
    torch.set_num_threads(1)
    wanted = sys.argv[1]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MSD_CACHE"] = f"{folder}/cache"
        if wanted == "expected":
            write(pinned.OLD / "expected.json", files.expected(Path(folder)))
        for name, compute in NUMBERS.items():
            if wanted in (name, "numbers"):
                (Path(folder) / name).mkdir()
                write(pinned.HERE / f"{name}.json", compute(Path(folder) / name))


def write(path: Path, document: dict) -> None:
    """One line an entry, so that a change shows where it is."""
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in document.items()]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
