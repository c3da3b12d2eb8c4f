"""Two processes that train together: both measure, process 0 reports and draws, and one that fails stops neither."""

import json
import os
import signal
import threading
import time
import warnings
from dataclasses import replace

import pytest
import torch

import ranks
import tiny
from multistage_diffusion import process_group
from multistage_diffusion.config import EngineConfig, LoggingConfig, Sampler
from multistage_diffusion.denoiser import Denoiser
from multistage_diffusion.errors import NumericsError, UserError
from multistage_diffusion.metrics.classifier import Classifier
from multistage_diffusion.runs import load_run
from multistage_diffusion.runs.averages import list_snapshots
from multistage_diffusion.runs.checkpoints import list_checkpoints
from multistage_diffusion.training import observe
from multistage_diffusion.training import run as runs_of
from multistage_diffusion.training.run import train
from multistage_diffusion.training.trainer import Trainer
from runs import log, tensors

WATCHED = LoggingConfig(
    grid_every=4, grid_images=4, evaluate_every=4, metrics=("fd", "loss"), evaluate_images=16, sample_batch=8
)


def config(parallel="ddp", logging=WATCHED):
    base = tiny.run_config(sigma_rel=(0.05, 0.1), ema_snapshot_every=2, steps=8)
    return replace(
        base, logging=logging, sampling=Sampler(solver="dpmpp-2m", steps=2),
        engine=EngineConfig(parallel=parallel),
    )  # fmt: skip


def life(rank, out, parallel="ddp", faults=(), logging=WATCHED):
    """Train; the warnings, the error, its exit code, and when it ended. Faults are (process, function, its words)."""
    classifier = Classifier("untrained", tiny.SHAPE, ("a", "b", "c"), 0.5).eval()
    runs_of.load_parts = lambda config: (tiny.images(), tiny.images(6, seed=1))
    observe.load_extractor = lambda *words, **named: classifier
    os.environ["MSD_CACHE"] = f"{out}-cache"
    for process, install, *words in faults:
        if process == rank:
            install(*words)
    error, code = "", 0
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            train(config(parallel, logging), out, data=tiny.images())
        except UserError as caught:
            error, code = str(caught), caught.exit_code
        except RuntimeError as caught:
            error, code = str(caught), 1
    return [str(warning.message) for warning in said if warning.category is UserWarning], error, code, time.monotonic()


def at(first, last, act):
    """Do something at some calls of the denoiser that are no training steps: process 0 has 2 for the grid, 2 for its 8
    images and 3 for the loss; process 1 has 2 and 3."""
    calls, forward = [0], Denoiser.forward

    def run(self, x, sigma, *words, **named):
        if not self.training:
            calls[0] += 1
            if first <= calls[0] <= last:
                act()
        return forward(self, x, sigma, *words, **named)

    Denoiser.forward = run


def no_memory():
    raise torch.OutOfMemoryError("CUDA out of memory")


def not_finite():
    raise NumericsError("the image of seed 9 is not finite")


def a_mistake():
    raise RuntimeError("sizes differ")


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def impatient():
    process_group._SILENCE = 4.0


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def dawdle():
    time.sleep(1.5)


def no_memory_for_the_copy():
    copy = Trainer._copy

    def fail(self):
        Trainer._copy = copy
        no_memory()

    Trainer._copy = fail


def alarm(seconds):
    """SIGTERM, some seconds after the first look of this process begins."""
    averaged = Trainer.averaged

    def begin(self):
        Trainer.averaged = averaged
        threading.Timer(seconds, terminate).start()
        return averaged(self)

    Trainer.averaged = begin


def lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def evaluated(out):
    return [line["step"] for line in lines(out) if "evaluation" in line]


def grids(out):
    return sorted(int(path.stem[5:]) for path in out.glob("samples/*.png"))


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """A run of two processes that nothing disturbed; not to be changed."""
    folder = tmp_path_factory.mktemp("watched")
    assert [(said, error) for said, error, *_ in ranks.run(life, folder / "life", folder / "run")] == [([], "")] * 2
    assert evaluated(folder / "run") == grids(folder / "run") == [4, 8]
    return folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_report_what_one_does(parallel, tmp_path, monkeypatch):
    monkeypatch.setenv("MSD_CACHE", str(tmp_path / "cache"))
    for module, name in ((runs_of, "load_parts"), (observe, "load_extractor")):
        monkeypatch.setattr(module, name, getattr(module, name))  # put back afterwards
    both, alone = tmp_path / "both", tmp_path / "alone"
    ranks.run(life, tmp_path / "life", both, parallel)
    life(0, alone, parallel)
    assert [line.keys() for line in lines(both)] == [line.keys() for line in lines(alone)]
    for ours, theirs in zip(lines(both), lines(alone), strict=True):
        if "evaluation" in ours:
            for name in ("fd", "loss"):
                assert ours["evaluation"][name] == pytest.approx(theirs["evaluation"][name], rel=1e-3)
        else:
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    assert grids(both) == [4, 8]
    assert len(list_snapshots(both)) == 4
    ours, theirs = (load_run(run, sigma_rel=0.07).denoiser.network.state_dict() for run in (both, alone))
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-4, atol=1e-5)


def slowly(*cases):
    return [pytest.param(*case, marks=pytest.mark.slow) for case in cases]


LEFT_OUT = [
    (1, (at, 1, 4, no_memory), "process 1: memory does not suffice"),  # 8, 4, 2, 1 images at once
    *slowly(
        (1, (at, 4, 4, no_memory), "process 1: memory does not suffice"),  # in its share of the loss
        (0, (at, 3, 6, no_memory), "process 0: memory does not suffice"),
        (1, (at, 2, 2, not_finite), "process 1: the image of seed 9 is not finite"),
        (1, (no_memory_for_the_copy,), "process 1: memory does not suffice"),
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(("process", "fault", "reason"), LEFT_OUT)
def test_what_one_process_cannot_do_is_left_out_by_all_and_said_once(process, fault, reason, watched, tmp_path):
    (said, *first), (silent, *second) = ranks.run(life, tmp_path / "life", tmp_path / "run", "ddp", [(process, *fault)])
    assert first[:2] == second[:2] == ["", 0]
    told = [text for text in said + silent if "images at once" not in text]
    assert told == [f"samples or figures of step 4 are left out (1 so far), training goes on: {reason}"]
    assert evaluated(tmp_path / "run") == [8]
    assert tiny.bits_equal(tensors(tmp_path / "run"), tensors(watched))
    assert [line for line in log(tmp_path / "run") if "evaluation" not in line] == [
        line for line in log(watched) if "evaluation" not in line
    ]


@pytest.mark.slow
def test_memory_for_fewer_images_suffices(watched, tmp_path):
    found = ranks.run(life, tmp_path / "life", tmp_path / "run", "ddp", [(1, at, 1, 1, no_memory)])
    assert [(error, code) for _, error, code, _ in found] == [("", 0)] * 2
    assert found[1][0] == ["memory does not suffice for 8 images at once: going on with 4"]
    assert evaluated(tmp_path / "run") == [4, 8]
    for ours, theirs in zip(lines(tmp_path / "run"), lines(watched), strict=True):
        if "evaluation" in ours:
            assert ours["evaluation"]["fd"] == pytest.approx(theirs["evaluation"]["fd"], rel=1e-3)


@pytest.mark.slow
def test_another_error_in_one_process_ends_both(tmp_path):
    found = ranks.run(life, tmp_path / "life", tmp_path / "run", "ddp", [(1, at, 1, 1, a_mistake)])
    assert [(error, code) for _, error, code, _ in found] == [
        ("process 1 failed: sizes differ", 1), ("sizes differ", 1)
    ]  # fmt: skip


@pytest.mark.slow
def test_a_process_killed_while_it_measures_is_named_and_the_run_goes_on(watched, tmp_path):
    out = tmp_path / "run"
    found = ranks.run(life, tmp_path / "life", out, "ddp", [(0, impatient), (1, at, 2, 2, kill)])
    assert found[1] is None and found[0][2] == 1
    assert found[0][1].startswith("no word from process 1 of 2: killed")
    assert [code for _, _, code, _ in ranks.run(life, tmp_path / "again", out)] == [0, 0]
    assert evaluated(out) == grids(out) == [4, 8]
    assert tiny.bits_equal(tensors(out), tensors(watched)) and log(out) == log(watched)


LONG = replace(WATCHED, evaluate_images=400)  # a process draws its share in 50 calls


@pytest.mark.slow
@pytest.mark.parametrize(
    ("process", "call"), [(1, 4), *slowly((0, 1), (0, 3), (0, 53), (1, 1), (1, 51))]
)  # 2 calls for the grid, 50 for each share
def test_a_signal_to_one_process_stops_both_there_and_loses_nothing(process, call, tmp_path):
    out = tmp_path / "run"
    found = ranks.run(life, tmp_path / "life", out, "ddp", [(process, at, call, call, terminate)], LONG)
    for said, error, code, _ in found:
        assert said == [] and code == 143
        assert "stopped by SIGTERM after step 4;" in error
    assert [item.step for item in list_checkpoints(out / "checkpoints")] == [3, 4]
    assert evaluated(out) == []
    assert [code for _, _, code, _ in ranks.run(life, tmp_path / "again", out, "ddp", [], LONG)] == [0, 0]
    assert evaluated(out) == grids(out) == [4, 8]


@pytest.mark.slow
def test_a_signal_reaches_a_process_that_waits_for_one_that_is_slow(tmp_path):
    """Process 0 draws its grid, for 100 times 1.5 seconds, while process 1 has nothing to do and hears the signal."""
    slow = replace(WATCHED, evaluate_every=0, grid_images=800)
    faults = [(0, at, 1, 1000, dawdle), (1, alarm, 8), (1, impatient)]
    began = time.monotonic()
    found = ranks.run(life, tmp_path / "life", tmp_path / "run", "ddp", faults, slow)
    assert [code for _, _, code, _ in found] == [143, 143]
    assert max(ended for *_, ended in found) - began < 30
    assert grids(tmp_path / "run") == [] and list_checkpoints(tmp_path / "run" / "checkpoints")[-1].step == 4
