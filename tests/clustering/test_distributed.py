import json
import subprocess
import sys

import pytest
import torch

import ranks
from multistage_diffusion.clustering.posterior import OptimalDenoiser
from multistage_diffusion.clustering.similarity import compare_levels, compare_to_ends, draw_grid, draw_random
from multistage_diffusion.noise import VP
from multistage_diffusion.process_group import SINGLE, join


def both(images, processes=SINGLE):
    denoiser, process = OptimalDenoiser(images), VP()
    random = draw_random(process, "time", len(images), 200, 0)
    ends = compare_to_ends(denoiser, random, 0.05, "data-mean", 150.0, processes=processes)
    grid = compare_levels(denoiser, draw_grid(process, "time", len(images), 55, 5, 0), 0.05, processes=processes)
    return [ends.low, ends.high, ends.effective, grid.similar, grid.gram, grid.effective]


def worker(rank, images):
    """What two processes share; and what one of them finds alone while the other does something else."""
    with join(torch.device("cpu"), 1.0) as processes:
        shared = both(images, processes)
        alone = both(images) if processes.is_main else None
    return {"shared": shared, "alone": alone}


@pytest.mark.slow
def test_two_processes_share_the_pairs_and_agree_with_one(tmp_path):
    images = torch.randn(50, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    results, expected = ranks.run(worker, tmp_path, images), both(images)
    for found in (results[0]["shared"], results[1]["shared"], results[0]["alone"]):
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


def command(rank, errors, source):
    return ranks.command(rank, ["cluster", source, "--samples", "200", "--json"], errors)


@pytest.mark.slow
@pytest.mark.parametrize(("source", "code"), [("digits", 0), ("folder:nowhere", 3)])
def test_two_processes_print_one_document_or_one_line(source, code, tmp_path):
    assert ranks.run(command, tmp_path, tmp_path, source) == [code, code]
    out, err = ranks.printed(tmp_path)
    errors = [line for line in err if line.startswith("error: ")]
    if code:
        assert out == [] and len(errors) == 1 and "nowhere" in errors[0]
    else:
        assert errors == [] and len(json.loads("\n".join(out))["edges"]) == 2


@pytest.mark.slow
def test_torchrun_prints_one_document_with_the_edges_of_one_process():
    words = ["cluster", "digits", "--samples", "1000", "--json"]
    module = [sys.executable, "-m", "multistage_diffusion", *words]
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        str(ranks.free_port()),
    ]
    alone = subprocess.run(module, capture_output=True, text=True, check=True)
    shared = subprocess.run([*launch, *module[1:]], capture_output=True, text=True, check=True)
    assert json.loads(shared.stdout)["edges"] == pytest.approx(json.loads(alone.stdout)["edges"], rel=1e-6)
