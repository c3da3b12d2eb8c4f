"""The cache of trained models: its keys, resuming to the bit, sharing among processes, early stopping."""

import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch

import tiny
from multistage_diffusion.config import Sampler, StagesConfig
from multistage_diffusion.noise import VP
from multistage_diffusion.stages import Stages
from multistage_diffusion.studies import cells as module
from multistage_diffusion.studies.budgets import Budget
from multistage_diffusion.studies.cells import Cells, cell
from multistage_diffusion.studies.designs import Finder, unified
from multistage_diffusion.studies.tables import Lab, _assembled
from multistage_diffusion.training.guard import StoppedError

CONFIG = tiny.run_config()
TINY = 1e-9  # 10^12 FLOPs: as few steps as there are points


class PowerError(Exception):
    """The power fails."""


def cells_in(folder, data=None, say=lambda line: None):
    return Cells(folder, data or tiny.images(), tiny.images(6, seed=1), Stages(tiny.EDGES), say=say)


def with_training(config=CONFIG, **options):
    return replace(config, training=replace(config.training, **options))


def with_model(config=CONFIG, **options):
    return replace(config, model=replace(config.model, **options))


def test_two_ways_to_write_one_model_are_one_cell(tmp_path):
    cells = cells_in(tmp_path)
    path = cells.path(cell(unified(CONFIG), 1.0, 4))
    for same in (
        with_model(unified(CONFIG), decoder_widths=(12, 8, 8)),
        replace(unified(CONFIG), stages=StagesConfig(edges=(0.1, 7.0))),
        with_training(unified(CONFIG), log_every=7, save_every=9, keep=5, steps=77),
    ):
        assert cells.path(cell(same, 1.0, 4)) == path


def test_whatever_matters_makes_another_cell(tmp_path):
    cells = cells_in(tmp_path)
    others = [
        cell(CONFIG, 1.0, 4),
        cell(CONFIG, 1.1, 4),
        cell(CONFIG, 1.0, 5),
        cell(with_training(seed=1), 1.0, 4),
        cell(with_training(learning_rate=1e-3), 1.0, 4),
        cell(with_training(ema_half_life=21.0), 1.0, 4),
        cell(with_training(batches="single-p"), 1.0, 4),
        cell(with_model(decoder_widths=(8, 8, 8)), 1.0, 4),
        cell(with_model(dropout=0.1), 1.0, 4),
        cell(with_model(architecture="separate"), 1.0, 4),
        cell(unified(CONFIG), 1.0, 4),
        cell(replace(CONFIG, stages=StagesConfig(edges=(0.6, 3.1))), 1.0, 4),
        cell(replace(CONFIG, process=VP(prediction="v")), 1.0, 4),
        cell(replace(CONFIG, data=replace(CONFIG.data, flip=True)), 1.0, 4),
    ]
    assert len({cells.path(one) for one in others}) == len(others)
    assert cells_in(tmp_path, tiny.images(seed=5)).path(others[0]) != cells.path(others[0])


def weights(cells, one):
    return {
        f"{point}/{name}": tensor
        for point in range(one.points)
        for name, tensor in safetensors.torch.load_file(
            cells.path(one) / "points" / str(point) / "model.safetensors"
        ).items()
    }


def without_time(document):
    return {key: value for key, value in document.items() if key != "seconds"}


def test_a_cell_goes_on_to_the_bit_after_a_kill(tmp_path):
    one = cell(CONFIG, TINY, 3)
    whole, killed = cells_in(tmp_path / "whole"), cells_in(tmp_path / "killed")
    whole.fill([one])
    lives = []

    def watch(_):
        lives.append(0)

        def step(result, steps):
            if result.step == len(lives):  # each life dies a step later than the one before
                raise PowerError

        return step

    for _ in range(2):
        with pytest.raises(PowerError):
            killed.fill([one], watch)
        assert not killed.done(one)
    killed.fill([one])
    assert tiny.bits_equal(weights(whole, one), weights(killed, one))
    for point in range(3):
        assert without_time(whole.spent(one, point)) == without_time(killed.spent(one, point))
    assert [whole.spent(one, point)["steps"] for point in range(3)] == list(one.steps(whole.data.shape)) == [1, 2, 3]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_and_the_same_call_goes_on(tmp_path, number, code):
    one = cell(CONFIG, TINY, 2)
    cells = cells_in(tmp_path)

    def watch(_):
        return lambda result, steps: signal.raise_signal(number)

    with pytest.raises(StoppedError) as stopped:
        cells.fill([one], watch)
    assert stopped.value.exit_code == code and not cells.done(one)
    cells.fill([one])
    assert cells.spent(one)["steps"] == 2


def test_a_trained_cell_is_not_trained_again(tmp_path):
    said, one = [], cell(CONFIG, TINY, 2)
    cells = cells_in(tmp_path, say=said.append)
    cells.fill([one, one])
    cells.fill([one])
    assert len(said) == 1 and "2 steps" in said[0]


@pytest.mark.slow
def test_two_workers_share_the_cells(tmp_path, monkeypatch):
    """Locks belong to open files, so two threads stand for two processes; a slow test has real ones."""
    monkeypatch.setattr(module, "_POLL", 0.02)
    wanted = [cell(with_training(seed=seed), TINY, 2) for seed in range(3)]
    said, meet = ([], []), threading.Barrier(2, timeout=60)

    def work(number):
        def watch(one):
            if not said[number]:
                meet.wait()  # both hold a cell at the same time
            return lambda result, steps: None

        cells_in(tmp_path, say=said[number].append).fill(wanted, watch)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    cells = cells_in(tmp_path)
    assert all(cells.done(one) for one in wanted)
    assert said[0] and said[1] and len(said[0]) + len(said[1]) == len(wanted)


@pytest.mark.slow
def test_two_processes_train_each_cell_once_and_to_the_bit(tmp_path):
    code = f"""
import sys
import torch
torch.set_num_threads(1)
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_cells as own
own.module._POLL = 0.05
wanted = [own.cell(own.with_training(seed=seed), 1e-9, 3) for seed in range(6)]
own.cells_in(own.Path({str(tmp_path / "shared")!r}), say=print).fill(wanted)
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(tiny.__file__).parent)}
    workers = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(2)
    ]
    said = [line for worker in workers for line in worker.communicate()[0].splitlines()]
    assert [worker.returncode for worker in workers] == [0, 0]
    assert len(said) == len(set(said)) == 6
    wanted = [cell(with_training(seed=seed), TINY, 3) for seed in range(6)]
    alone, shared = cells_in(tmp_path / "alone"), cells_in(tmp_path / "shared")
    alone.fill(wanted)
    for one in wanted:
        assert tiny.bits_equal(weights(alone, one), weights(shared, one))


def test_steps_spend_the_budget():
    for config in (CONFIG, unified(CONFIG), with_training(batches="single-uniform"), with_training(batches="single-p")):
        own = cell(config, 1.0, 5)
        steps = own.steps(tiny.SHAPE)
        assert abs(steps[-1] * own.step_flops(tiny.SHAPE) / 1e12 - 1.0) < own.step_flops(tiny.SHAPE) / 1e12
        assert [round(step / steps[-1], 2) for step in steps] == [0.2, 0.4, 0.6, 0.8, 1.0]


def test_what_was_measured_is_remembered(tmp_path):
    cells, one, calls = cells_in(tmp_path), cell(CONFIG, 1.0, 4), []

    def measure():
        calls.append(0)
        return {"fd": 1.5}

    assert [cells.cached(one, point, "x", measure) for point in (-1, 3, 3, 0)] == [{"fd": 1.5}] * 4
    assert len(calls) == 2  # the last point is point 3


@pytest.mark.slow
def test_early_stopping_takes_each_stage_where_its_loss_was_least(tmp_path):
    one = cell(with_model(architecture="separate"), TINY, 3)
    cells = cells_in(tmp_path)
    cells.fill([one])
    for point, losses in enumerate(([3.0, 1.0, 2.0], [1.0, 2.0, 2.5], [2.0, 3.0, 1.0])):
        cells.cached(one, point, "validation", lambda losses=losses: {"stage_loss": losses})
    budget = Budget(base=replace(CONFIG, sampling=Sampler(steps=2)), tflops=TINY)
    finder = Finder(tmp_path, cells.data, budget, lambda: cells, print)
    denoiser, chosen = _assembled(Lab(budget, cells.data, cells.test, cells, finder), one)
    assert chosen == [1, 0, 2]
    for stage, point in enumerate(chosen):
        then = cells.denoiser(one, point).network
        for part in ("encoders", "decoders"):
            own, theirs = (getattr(network, part)[stage].state_dict() for network in (denoiser.network, then))
            assert tiny.bits_equal(own, theirs)


def test_no_image_both_measures_and_stops(tmp_path):
    cells = cells_in(tmp_path)
    assert (
        len(cells.validation) + len(cells.measured) == len(cells.test)
        and cells.validation.digest != cells.measured.digest
    )


def test_found_edges_are_kept_for_what_they_answer(tmp_path):
    data = tiny.images()
    budget = Budget(base=CONFIG, tflops=TINY)
    said = []
    finder = Finder(tmp_path, data, budget, lambda: cells_in(tmp_path), said.append)
    edges = finder.edges()
    assert Finder(tmp_path, data, budget, lambda: cells_in(tmp_path), said.append).edges() == edges
    assert len(said) == 1
    other = replace(budget, base=replace(CONFIG, process=VP(beta_max=15.0)))
    Finder(tmp_path, data, other, lambda: cells_in(tmp_path), said.append).edges()
    assert len(said) == 2


def test_a_guess_trains_and_writes_nothing(tmp_path):
    budget = Budget(base=CONFIG, tflops=TINY)
    finder = Finder(
        tmp_path / "found", tiny.images(), budget, lambda: pytest.fail("trains"), str, guess=True, keep=False
    )
    assert finder.edges("gradient") == finder.edges()
    assert len(finder.allocated().model.decoder_widths) == 4
    assert list(tmp_path.iterdir()) == []
