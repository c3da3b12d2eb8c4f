"""Time of a training step beside its FLOPs: multistage networks and the unified one, in turn, in one process.

    python benchmarks/bench_training.py --out benchmarks/results/training-cpu.json

FLOPs are not time: narrow decoders and small slices of a batch keep a processor less busy. Each network takes a step in
turn, several times over; medians are kept, with the quartiles of the ratio to the unified network turn by turn.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from multistage_diffusion.config import RunConfig, StagesConfig
from multistage_diffusion.data import load_data
from multistage_diffusion.studies.budgets import budget
from multistage_diffusion.studies.cells import Cell, widths
from multistage_diffusion.training.run import build_trainer
from multistage_diffusion.training.trainer import Trainer

NETWORKS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {  # edges in sigma, decoder widths in encoder widths
    "unified": ((), (1.0,)),
    "published widths": ((0.7055, 10.41), (1.5, 1.0, 0.125)),
    "equal widths": ((0.7055, 10.41), (1.0, 1.0, 1.0)),
    "allocated": ((0.6679, 1.658, 5.868), (0.75, 0.5, 0.5, 0.25)),
}


def network(base: RunConfig, name: str) -> RunConfig:
    edges, factors = NETWORKS[name]
    architecture = "multistage" if edges else "unified"
    model = replace(base.model, architecture=architecture, decoder_widths=widths(base.model, *factors))
    return replace(base, model=model, stages=StagesConfig(edges=edges))


def step(trainer: Trainer, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in trainer.run(trainer.step + 1):
        pass
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--turns", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--budget", default="gpu" if torch.cuda.is_available() else "small", help="of msd study")
    parser.add_argument("--batch", type=int, help="images a step; the budget's own, if left out")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device, base = torch.device(options.device), budget(options.budget, "fashion-mnist").base
    if options.batch:
        base = replace(base, training=replace(base.training, batch_size=options.batch))
    data = load_data("fashion-mnist", resolution=base.data.resolution)
    runs = {name: network(base, name) for name in NETWORKS}
    trainers = {name: build_trainer(run, data, device=device) for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in NETWORKS}
    for turn in range(options.turns + 3):
        for name, trainer in trainers.items():
            taken = step(trainer, device)
            if turn >= 3:  # the first turns warm up
                times[name].append(taken)
    rows = []
    for name, run in runs.items():
        flops = Cell(run, 1.0, 1).step_flops(data.shape)
        ratios = [own / other for own, other in zip(times[name], times["unified"], strict=True)]
        rows.append({
            "network": name, "decoder widths": list(run.model.decoder_widths), "GFLOPs a step": flops / 1e9,
            "ms a step": 1e3 * statistics.median(times[name]),
            "GFLOP/s": flops / 1e9 / statistics.median(times[name]),
            "time, unified 1": statistics.median(ratios), "quartiles": statistics.quantiles(ratios, n=4)[::2],
            "FLOPs, unified 1": flops / Cell(runs["unified"], 1.0, 1).step_flops(data.shape),
        })  # fmt: skip
    result = {
        "command": " ".join(["python", *sys.argv]),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "cores": os.cpu_count(), "load before": os.getloadavg()[0], "torch": torch.__version__,
        "threads": options.threads, "batch": base.training.batch_size, "images": list(data.shape), "rows": rows,
    }  # fmt: skip
    text = json.dumps(result, indent=1)
    print(text)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
