"""The exact denoiser beside the straightforward form, its share of the machine's matrix-product peak, and its scaling.

    python benchmarks/bench_clustering.py --out benchmarks/results/clustering-cpu.json

One process, one thread; everything that is compared is timed in turn, several times over, and the medians are kept.
Times of single evaluations are CPU seconds of the thread, which are wall seconds where it has a core to itself; whole
calls of `cluster` are wall seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from multistage_diffusion import rng
from multistage_diffusion.clustering import cluster
from multistage_diffusion.clustering.posterior import OptimalDenoiser
from multistage_diffusion.data import load_data
from multistage_diffusion.noise import VP

BATCHES = (128, 500, 5000)  # images a batch of the straightforward form, preloaded
DENSE = 4.0  # above this noise level every image of Fashion-MNIST takes part, so nothing is skipped
SIDE = 2048  # of the square matrices whose product is the peak


def straightforward(batches: list[Tensor], x: Tensor, sigma: float) -> Tensor:
    """One sample at one level: distances batch by batch, a softmax, the mean batch by batch."""
    logits = torch.cat([-(x - batch).square().sum((1, 2, 3)) / (2 * sigma**2) for batch in batches])
    weights = logits.softmax(0).split([len(batch) for batch in batches])
    parts = [(w[:, None, None, None] * batch).sum(0) for w, batch in zip(weights, batches, strict=True)]
    return torch.stack(parts).sum(0)


def one_by_one(batches: list[Tensor], x: Tensor, sigma: Tensor) -> None:
    for row, level in zip(x, sigma.tolist(), strict=True):
        straightforward(batches, row, level)


def seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def medians(works: dict[str, tuple[Callable[[], object], int]], repeats: int) -> dict[str, float]:
    """Milliseconds an evaluation: each work in turn, with its number of evaluations, `repeats` times over."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(repeats + 1):
        for name, (work, evaluations) in works.items():
            taken = seconds(work) * 1e3 / evaluations
            if turn:  # the first turn warms up
                times[name].append(taken)
    return {name: statistics.median(values) for name, values in times.items()}


def draws(images: Tensor, pairs: int, levels: int, lowest: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs on levels spread over VP time above `lowest`."""
    index = torch.arange(pairs)
    first = float(VP().t(torch.tensor(lowest, dtype=torch.float64)))
    u = first + (1 - first) * (torch.arange(levels) + rng.uniform(0, "bench/u", index, levels)) / levels
    noise = rng.normal(0, "bench/noise", index, images.shape[1:])
    return index * (len(images) // pairs), noise, VP().sigma(u)


def side_by_side(images: Tensor, repeats: int) -> dict[str, object]:
    """All forms on the same evaluations, and the peak measured beside them."""
    denoiser = OptimalDenoiser(images)
    splits = {size: list(images.split(size)) for size in BATCHES}
    index, noise, sigma = draws(images, 64, 8)
    x = (images[index][:, None] + sigma.float()[:, :, None, None, None] * noise[:, None]).flatten(0, 1)
    flat = sigma.flatten()
    few = list(range(0, len(x), len(x) // 6))
    _, _, high = draws(images, 64, 8, DENSE)
    noisy = (images[index][:, None] + high.float()[:, :, None, None, None] * noise[:, None]).flatten(0, 1)
    square = torch.randn(SIDE, SIDE)
    exact = torch.stack([straightforward(splits[500], x[i], float(flat[i])) for i in few])
    error = float((exact - denoiser(x[few], flat[few])).abs().max())
    times = medians(
        {
            **{
                f"straightforward, batches of {size}": (partial(one_by_one, splits[size], x[few], flat[few]), len(few))
                for size in BATCHES
            },
            "any x, any level": (lambda: denoiser(x, flat), len(x)),
            "pairs, 8 levels": (lambda: denoiser.pairs(index, noise, sigma), sigma.numel()),
            "any x, no image skipped": (lambda: denoiser(noisy, high.flatten()), len(noisy)),
            "peak": (lambda: square @ square, 1),
        },
        repeats,
    )
    plain = min(value for name, value in times.items() if name.startswith("straightforward"))
    peak = 2 * SIDE**3 / times["peak"] / 1e6
    work = 4 * len(images) * images[0].numel() / 1e6  # two products of N x d an evaluation
    return {
        "images": list(images.shape),
        "milliseconds an evaluation": {name: value for name, value in times.items() if name != "peak"},
        "largest difference": error,
        "times faster, any x": plain / times["any x, any level"],
        "times faster, pairs": plain / times["pairs, 8 levels"],
        "peak GFLOP/s": peak,
        "share of peak, no image skipped": work / times["any x, no image skipped"] / peak,
    }


def scaling(images: Tensor) -> Iterator[dict[str, object]]:
    """Pairs, 8 levels unless said, in milliseconds an evaluation."""
    generator = torch.Generator().manual_seed(0)
    for count in (3750, 7500, 15000, 30000, 60000):
        yield timed(images[:count], 64, 8, "images")
    for pairs in (8, 32, 128, 512):
        yield timed(images[:20000], pairs, 8, "pairs")
    for levels in (1, 2, 4, 8, 16, 64):
        yield timed(images[:20000], 64, levels, "levels")
    for side in (8, 14, 28, 32, 56):
        yield timed(torch.rand(10000, 1, side, side, generator=generator) * 2 - 1, 64, 8, "side")


def timed(images: Tensor, pairs: int, levels: int, varied: str) -> dict[str, object]:
    denoiser = OptimalDenoiser(images)
    index, noise, sigma = draws(images, pairs, levels)
    taken = medians({"pairs": (lambda: denoiser.pairs(index, noise, sigma), pairs * levels)}, 2)["pairs"]
    return {"varied": varied, "images": list(images.shape), "pairs": pairs, "levels": levels, "milliseconds": taken}


def commands(images: Tensor) -> Iterator[dict[str, object]]:
    """Whole calls of `cluster` over all images."""
    for options in ({"samples": 4000}, {"samples": 16000}, {"stages": 4}, {"samples": 4000, "max_images": 20000}):
        for threads in (1, os.cpu_count() or 1):
            torch.set_num_threads(threads)
            found = cluster(images, VP(), **options)  # pyright: ignore[reportArgumentType]
            yield {"options": options, "threads": threads, "seconds": found.seconds, "edges_t": list(found.edges_t)}
    torch.set_num_threads(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    images = load_data("fashion-mnist").floats()
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2), value=-1.0)
    result = {
        "command": " ".join(["python", *sys.argv]),
        "device": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load before": os.getloadavg()[0],
        "torch": torch.__version__,
        "threads": 1,
        "side by side": [side_by_side(images, options.repeats), side_by_side(padded, options.repeats)],
        "scaling": list(scaling(images)),
        "cluster, all images": list(commands(images)),
    }
    text = json.dumps(result, indent=1)
    print(text)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
