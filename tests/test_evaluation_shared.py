"""Evaluation by several processes, and in bounded memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ranks
import tiny
from multistage_diffusion.config import Sampler
from multistage_diffusion.evaluation import evaluate, evaluate_images
from multistage_diffusion.metrics.classifier import Classifier
from multistage_diffusion.process_group import SINGLE, join
from multistage_diffusion.training.run import train

METRICS = ["fd", "kid", "is", "prdc", "loss"]
FIGURES = ("fd", "kid", "is", "is_std", "loss")


def measure(num, processes=SINGLE):
    """Of a model, and of a set of images; in batches of 8."""
    data, features = tiny.images(40), Classifier("untrained", tiny.SHAPE, ("a", "b", "c"), 0.5).eval()
    sampling = Sampler(solver="ddim", steps=2)
    model = evaluate(
        tiny.denoiser(), data, METRICS, features=features, num=num, sampler=sampling, batch_size=8, processes=processes
    )
    images = evaluate_images(tiny.images(num, seed=1), data, METRICS[:-1], features=features, processes=processes)
    return model.to_dict(), images.to_dict()


def measured(rank, num, cache):
    os.environ["MSD_CACHE"] = str(cache)
    with join(torch.device("cpu"), 1.0) as processes:
        return list(measure(num, processes))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "num", "tolerance"), [(2, 32, 1e-9), pytest.param(3, 31, 2e-3, marks=pytest.mark.slow)]
)
def test_figures_do_not_depend_on_the_number_of_processes(size, num, tolerance, tmp_path, monkeypatch):
    monkeypatch.setenv("MSD_CACHE", str(tmp_path / "alone"))
    documents = ranks.run(measured, tmp_path, num, tmp_path / "cache", size=size)
    assert documents[1:] == documents[:1] * (size - 1)
    for shared, alone in zip(documents[0], measure(num), strict=True):
        assert shared.keys() == alone.keys() and shared["samples"] == num
        assert "loss" not in alone or shared["loss"] == alone["loss"]  # the same batches
        for name in set(FIGURES) & alone.keys():  # with batches cut elsewhere a pixel may be rounded the other way
            assert shared[name] == pytest.approx(alone[name], rel=tolerance, abs=1e-6)
        assert shared["prdc"] == pytest.approx(alone["prdc"], abs=0.0 if tolerance < 1e-6 else 0.1)


@pytest.mark.slow
def test_torchrun_prints_one_document_with_the_figures_of_one_process(tmp_path):
    train(tiny.run_config(steps=2), tmp_path / "run", data=tiny.images())
    words = ["evaluate", str(tmp_path / "run"), "--metrics", "fd,loss", "--num", "64", "--batch-size", "16", "--json"]
    module = ["multistage_diffusion", *words, "--data", "digits", "--steps", "2", "--device", "cpu"]
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(ranks.free_port())]
    environment = {**os.environ, "MSD_CACHE": str(tmp_path / "cache")}
    shared, alone = (
        subprocess.run([sys.executable, *start, *module], capture_output=True, text=True, check=True, env=environment)
        for start in ([*launch, "-m", "--"], ["-m"])
    )
    shared, alone = json.loads(shared.stdout), json.loads(alone.stdout)
    assert shared["features"] == alone["features"]
    for name in ("fd", "loss"):
        assert shared[name] == pytest.approx(alone[name], rel=1e-6)


CODE = """
import resource, sys
import tiny
from multistage_diffusion.config import Sampler
from multistage_diffusion.evaluation import evaluate
from multistage_diffusion.metrics.classifier import Classifier
features = Classifier("untrained", tiny.SHAPE, ("a", "b")).eval()
evaluate(tiny.denoiser(tiny.SMALLEST), tiny.images(300), ["fd", "is"], features=features,
         num=int(sys.argv[1]), sampler=Sampler(solver="ddim", steps=1))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_many_images_need_no_more_memory_than_few(tmp_path):
    environment = {**os.environ, "MSD_CACHE": str(tmp_path), "PYTHONPATH": str(Path(tiny.__file__).parent)}
    command = [sys.executable, "-c", CODE]
    few, many = (
        int(subprocess.run([*command, num], capture_output=True, text=True, check=True, env=environment).stdout)
        for num in ("1000", "20000")
    )
    assert many < 1.1 * few  # the 5 MB of features behind fd_infinity are all that grows
