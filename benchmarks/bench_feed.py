"""Reading random batches from shards on disk: threads, worker processes, and no reading ahead, beside one another.

    python benchmarks/bench_feed.py --out benchmarks/results/feed-cpu.json

Every image is compared with its digest. `images_per_second` is the rate with nothing else to do; `wait_ms` is
what a training step of `--step` milliseconds waits for its batch, when the coming ones are read meanwhile. Medians of
several turns are kept, each way in turn.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from multistage_diffusion import rng
from multistage_diffusion.data import Images
from multistage_diffusion.data.feed import Resident, Streamed
from multistage_diffusion.data.shards import ShardWriter, open_shards
from multistage_diffusion.files import whole_directory

CPU = torch.device("cpu")


class Rows(Dataset[Tensor]):
    """A set as worker processes read it, a batch at a time."""

    def __init__(self, data: Images) -> None:
        self.data = data

    def __getitems__(self, index: list[int]) -> Tensor:
        return self.data.pixels(torch.tensor(index))


def as_it_is(batch: Tensor) -> Tensor:
    return batch


def processes(data: Images, batches: list[Tensor], workers: int) -> Iterator[Tensor]:
    sampler: Any = [batch.tolist() for batch in batches]
    loader = DataLoader(
        Rows(data), batch_sampler=sampler, num_workers=workers, collate_fn=as_it_is, prefetch_factor=2, timeout=60
    )
    return (data.seen(rows) for rows in loader)


def threads(data: Images, batches: list[Tensor], workers: int) -> Iterator[Tensor]:
    feed = Streamed(data, CPU, workers=workers, timeout=60.0)
    for number, batch in enumerate(batches):
        for later in batches[number + 1 : number + 1 + feed.ahead]:
            feed.prefetch(later)
        yield feed.floats(batch)


def memory(data: Images, batches: list[Tensor], workers: int) -> Iterator[Tensor]:
    feed = Resident(data, CPU)
    return (feed.floats(batch) for batch in batches)


def compute(milliseconds: float, square: Tensor) -> None:
    """A step's work, which does not hold the interpreter's lock."""
    stop = time.perf_counter() + milliseconds / 1e3
    while time.perf_counter() < stop:
        square @ square


def rate(ready: Iterator[Tensor], images: int) -> float:
    start = time.perf_counter()
    for _ in ready:
        pass
    return images / (time.perf_counter() - start)


def waits(ready: Iterator[Tensor], step: float, square: Tensor) -> float:
    """Milliseconds that a step waits for its batch; the first is left out."""
    next(ready)
    found = []
    while True:
        compute(step, square)
        start = time.perf_counter()
        if next(ready, None) is None:
            return statistics.median(found)
        found.append((time.perf_counter() - start) * 1e3)


def main() -> None:
    """Write shards of random images, read them in every way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=40_000)
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--step", type=float, default=100.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out")
    options = parser.parse_args()
    torch.set_num_threads(1)
    shape = (3, options.resolution, options.resolution)
    with tempfile.TemporaryDirectory() as place:
        with whole_directory(Path(place) / "shards") as folder:
            writer = ShardWriter(folder, expected=options.images)
            for index in torch.arange(options.images).split(256):
                writer.add(
                    rng.bits(0, "bench", index, shape[0] * shape[1] * shape[2] // 8).view(torch.uint8).view(-1, *shape)
                )
            writer.finish()
        data = Images("shards", open_shards(Path(place) / "shards")[0])
        batches = list(rng.permutation(0, "order", 0, options.images).split(options.batch))[:40]
        seen, square = sum(len(batch) for batch in batches), torch.randn(256, 256)
        ways: dict[str, Callable[[], Iterator[Tensor]]] = {
            "memory": lambda: memory(data, batches, 0),
            "threads 0": lambda: threads(data, batches, 0),
            "threads 1": lambda: threads(data, batches, 1),
            "threads 2": lambda: threads(data, batches, 2),
            "processes 1": lambda: processes(data, batches, 1),
            "processes 2": lambda: processes(data, batches, 2),
        }
        rates: dict[str, list[float]] = {name: [] for name in ways}
        waited: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(options.repeats):
            for name, way in ways.items():
                rates[name].append(rate(way(), seen))
                waited[name].append(waits(way(), options.step, square))
    document = {
        "device": platform.processor() or platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__,
        "command": f"python benchmarks/bench_feed.py --images {options.images} --resolution {options.resolution} "
        f"--batch {options.batch} --step {options.step:g} --repeats {options.repeats}",
        "shape": list(shape), "batch": options.batch, "step_ms": options.step,
        "ways": {
            name: {"images_per_second": round(statistics.median(rates[name])),
                   "wait_ms": round(statistics.median(waited[name]), 2)}
            for name in ways
        },
    }  # fmt: skip
    print(json.dumps(document, indent=2))
    if options.out:
        Path(options.out).write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
