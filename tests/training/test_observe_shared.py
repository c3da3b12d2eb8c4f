"""Two processes that train together: process 0 reports and draws, both measure, and nobody waits for ever."""

import json
import os
import socket
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import tiny
from multistage_diffusion.config import EngineConfig, LoggingConfig, SamplingConfig
from multistage_diffusion.metrics.features import SourceClassifier
from multistage_diffusion.training import observe
from multistage_diffusion.training.run import load_run, train
from multistage_diffusion.training.snapshots import list_snapshots


def config(parallel):
    logging = LoggingConfig(
        grid_every=4, grid_images=4, evaluate_every=4, metrics=("fd", "loss"), evaluate_images=16, trackers=()
    )
    base = tiny.run_config(ema_lengths=(0.05, 0.1), ema_snapshot_every=2, steps=8)
    return replace(
        base, logging=logging, sampling=SamplingConfig(solver="dpmpp-2m", steps=2),
        engine=EngineConfig(parallel=parallel),
    )  # fmt: skip


def life(out, parallel):
    classifier = SourceClassifier("untrained", tiny.SHAPE, ("a", "b", "c"), 0.5).eval()
    observe.load_data = lambda *words, **named: tiny.images(6, seed=1)
    observe.load_extractor = lambda *words, **named: classifier
    train(config(parallel), out, data=tiny.images())


def worker(rank, port, out, parallel):
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), MSD_CACHE=f"{out}-cache")
    dist.init_process_group("gloo", rank=rank, world_size=2)
    life(out, parallel)
    dist.destroy_process_group()


def lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_report_what_one_does(parallel, tmp_path, monkeypatch):
    monkeypatch.setenv("MSD_CACHE", str(tmp_path / "cache"))
    for name in ("load_data", "load_extractor"):
        monkeypatch.setattr(observe, name, getattr(observe, name))  # put back afterwards
    both, alone = tmp_path / "both", tmp_path / "alone"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(worker, args=(port, str(both), parallel), nprocs=2)
    life(alone, parallel)
    assert [line.keys() for line in lines(both)] == [line.keys() for line in lines(alone)]
    for ours, theirs in zip(lines(both), lines(alone), strict=True):
        if "evaluation" in ours:
            for name in ("fd", "loss"):
                assert ours["evaluation"][name] == pytest.approx(theirs["evaluation"][name], rel=1e-3)
        else:
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    assert {path.name for path in (both / "samples").iterdir()} == {"step-00000004.png", "step-00000008.png"}
    assert len(list_snapshots(both)) == 4
    ours, theirs = (load_run(run, ema_length=0.07).denoiser.network.state_dict() for run in (both, alone))
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-4, atol=1e-5)
