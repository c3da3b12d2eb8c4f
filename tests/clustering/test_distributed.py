import json
import os
import socket
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import ranks
from multistage_diffusion.clustering.posterior import OptimalDenoiser
from multistage_diffusion.clustering.similarity import compare_levels, compare_to_ends, draw_grid, draw_random
from multistage_diffusion.noise import VP


def both(images):
    denoiser, process = OptimalDenoiser(images), VP()
    ends = compare_to_ends(denoiser, draw_random(process, "time", len(images), 200, 0), 0.05, "data-mean", 150.0)
    grid = compare_levels(denoiser, draw_grid(process, "time", len(images), 55, 5, 0), 0.05)
    return [ends.low, ends.high, ends.effective, grid.similar, grid.gram, grid.effective]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def worker(rank, port, images, folder):
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    torch.save(both(images), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_share_the_pairs_and_agree_with_one(tmp_path):
    images = torch.randn(50, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    mp.spawn(worker, args=(free_port(), images, str(tmp_path)), nprocs=2)
    for rank in range(2):
        for shared, alone in zip(torch.load(tmp_path / f"{rank}.pt"), both(images), strict=True):
            torch.testing.assert_close(shared, alone, atol=1e-5, rtol=1e-5)


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
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    alone = subprocess.run(module, capture_output=True, text=True, check=True)
    shared = subprocess.run([*launch, *module[1:]], capture_output=True, text=True, check=True)
    assert json.loads(shared.stdout)["edges"] == pytest.approx(json.loads(alone.stdout)["edges"], rel=1e-6)
