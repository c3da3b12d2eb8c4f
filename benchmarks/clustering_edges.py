"""Edges of data sets under processes, methods, options, sizes and seeds: the numbers of docs/clustering.md.

python benchmarks/clustering_edges.py digits fashion-mnist noto-emoji@32 --out benchmarks/results/clustering-edges.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from multistage_diffusion.clustering import cluster
from multistage_diffusion.clustering.levels import noise_levels
from multistage_diffusion.clustering.optimal import elbow
from multistage_diffusion.clustering.partition import block_cost, partition
from multistage_diffusion.clustering.similarity import bootstrap_weights
from multistage_diffusion.data import Images, load_data
from multistage_diffusion.errors import ConfigError
from multistage_diffusion.noise import process_by_kind

ALGORITHM_1 = [{"eta": eta / 256, "alpha": alpha} for eta in (1, 2, 4, 8) for alpha in (0.8, 0.9, 0.95)]
READINGS = [{"reference": "definition"}, {"unit_range": True}, {"measure": "log-sigma"}, {"measure": "training"}]
BASELINES = [{"method": "timestep"}, {"method": "snr"}]
DRAWS = [{"samples": 1000}, {"samples": 16000}]
SEEDS = [{"seed": seed} for seed in range(1, 5)]
PROCESSES = ("vp", "vp-cosine", "edm", "ldm", "flow")
MATRICES = [("vp", {}), ("vp", {"eta": 0.05}), ("edm", {}), ("edm", {"measure": "training"})]


def rows(data: Images) -> Iterator[dict[str, Any]]:
    """One row a case; then parts of the images, with and without the line in ln N; then matrices."""
    images = data.floats()
    for kind in PROCESSES:
        yield row(data, images, kind, {})
    for options in (*BASELINES, *ALGORITHM_1, *READINGS, *SEEDS, *DRAWS):
        yield row(data, images, "vp", options)
    for share in (16, 8, 4, 2):
        part = len(images) // share
        yield row(data, images[:part], "vp", {})
        yield row(data, images, "vp", {"max_images": part})
    for kind, options in MATRICES:
        yield from matrix(data, images, kind, options)


def matrix(data: Images, images: Tensor, kind: str, options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Both objectives for every number of stages from one set of matrices."""
    process = process_by_kind(kind)
    start = {"source": data.name, "images": len(images), "process": kind, "options": options}
    found = cluster(images, process, objective="variance", source=data.name, digest=data.digest, **options)
    assert found.matrices is not None
    weights = bootstrap_weights(len(found.matrices.gram), 100, 0)
    for objective, by_pair in (("variance", found.matrices.gram), ("similarity", found.matrices.similar)):
        means = torch.einsum("rp,pab->rab", weights / weights.sum(1, keepdim=True), by_pair.double())
        reached = elbow(means[0])
        for stages in range(2, 7):
            cuts = torch.tensor([partition(block_cost(mean), stages) for mean in means]) / means.shape[1]
            edges = noise_levels(process, found.measure, cuts.double())
            ends = torch.quantile(edges[1:], torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0).T
            line = {**start, "objective": objective, "stages": stages, "edges": edges[0].tolist(),
                    "edges_t": process.t(edges[0]).tolist(), "intervals": ends.tolist(),
                    "intervals_t": process.t(ends).tolist(), "seconds": found.seconds,
                    "reached": reached[stages - 1] / (found.ceiling if objective == "variance" else 1.0)}  # fmt: skip
            print(data.name, kind, options, objective, line["edges_t"], file=sys.stderr, flush=True)
            yield line


def row(data: Images, images: Tensor, kind: str, options: dict[str, Any]) -> dict[str, Any]:
    start = {"source": data.name, "images": len(images), "process": kind, "options": options}
    try:
        found = cluster(images, process_by_kind(kind), source=data.name, digest=data.digest, **options)
    except ConfigError as error:
        return {**start, "error": str(error)}
    record = found.stages.provenance
    line = {**start, "edges": found.stages.edges, "edges_t": found.edges_t, "intervals": found.intervals,
            "intervals_t": record["intervals_t"], "shares": found.shares, "elbow": found.elbow,
            "ceiling": found.ceiling, "seconds": found.seconds}  # fmt: skip
    print(data.name, kind, options, [round(edge, 3) for edge in found.edges_t], file=sys.stderr, flush=True)
    return line


def load(source: str) -> Images:
    """`name`, or `name@pixels` to resize."""
    name, _, side = source.partition("@")
    return load_data(name, resolution=int(side) if side else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    command = json.dumps(" ".join(["python", *sys.argv]))
    lines = [json.dumps(line) for source in options.sources for line in rows(load(source))]
    text = f'{{\n "command": {command},\n "rows": [\n  ' + ",\n  ".join(lines) + "\n ]\n}"
    print(text)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
