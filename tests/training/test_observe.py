"""What a run shows while it trains: the same bits are trained, nothing is lost, and nothing stops it."""

import json
import os
import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import tiny
from multistage_diffusion.config import LoggingConfig, Sampler
from multistage_diffusion.data import to_uint8
from multistage_diffusion.denoiser import Denoiser
from multistage_diffusion.errors import ConfigError, NumericsError
from multistage_diffusion.metrics.classifier import Classifier
from multistage_diffusion.runs import build_denoiser
from multistage_diffusion.runs.checkpoints import EMA_WEIGHTS, list_checkpoints
from multistage_diffusion.sampling import sample
from multistage_diffusion.training import observe
from multistage_diffusion.training import run as runs_of
from multistage_diffusion.training.guard import StoppedError
from multistage_diffusion.training.run import train
from multistage_diffusion.training.trainer import Trainer
from multistage_diffusion.weights import load_weights
from runs import PowerError, log, same_run, tensors


def config(training=None, model=tiny.SMALLEST, **logging):
    base = tiny.run_config(model, **(training or {}))
    return replace(base, sampling=Sampler(solver="dpmpp-2m", steps=2), logging=LoggingConfig(**logging))


GRIDS = {"grid_every": 2, "grid_images": 4}
LOSSES = {"evaluate_every": 4, "metrics": ("loss",)}


def grids(run):
    return {path.name: path.read_bytes() for path in (run / "samples").iterdir()}


def lines(run, key):
    return [line for text in (run / "metrics.jsonl").read_text().splitlines() if key in (line := json.loads(text))]


@pytest.fixture(scope="module", autouse=True)
def held_out():
    """A few images in place of the source's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs_of, "load_parts", lambda config: (tiny.images(), tiny.images(6, seed=1)))
        yield


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """A run of 8 steps with grids and evaluations; not to be changed."""
    folder = tmp_path_factory.mktemp("watched") / "run"
    train(config(**GRIDS, **LOSSES), folder, data=tiny.images())
    return folder


def test_training_is_the_same_to_the_bit(watched, finished):
    assert tiny.bits_equal(tensors(watched), tensors(finished))
    trained = [line for line in log(watched) if "evaluation" not in line]
    assert trained == log(finished)
    assert list(grids(watched)) and set(grids(watched)) == {f"step-0000000{step}.png" for step in (2, 4, 6, 8)}


def test_a_grid_shows_the_averaged_weights_with_fixed_seeds(watched, tmp_path):
    run = tiny.run_config()
    denoiser = build_denoiser(run, tiny.SHAPE)
    checkpoint = list_checkpoints(watched / "checkpoints")[0]
    assert checkpoint.step == 6
    load_weights(denoiser.network, checkpoint.path / EMA_WEIGHTS)
    drawn = to_uint8(sample(denoiser.eval(), 4, solver="dpmpp-2m", steps=2).images)
    shown = np.asarray(Image.open(watched / "samples" / "step-00000006.png"))
    assert shown.shape == (2 * (64 + 4), 2 * (64 + 4))
    for index, image in enumerate(drawn):
        top, left = (index // 2) * 68 + 2, (index % 2) * 68 + 2
        assert np.array_equal(shown[top : top + 64 : 8, left : left + 64 : 8], image[0].numpy())


def test_classes_take_turns(tmp_path, monkeypatch):
    asked = []
    draw = Sampler.draw
    monkeypatch.setattr(Sampler, "draw", lambda *w, **named: asked.append(named["labels"]) or draw(*w, **named))
    model = replace(tiny.SMALLEST, classes=3)
    train(config(model=model, grid_every=8, grid_images=5), tmp_path / "run", data=tiny.images(labels=True))
    assert asked[0].tolist() == [0, 1, 2, 0, 1]


def test_held_out_losses_are_reported_by_stage(watched):
    found = lines(watched, "evaluation")
    assert [line["step"] for line in found] == [4, 8]
    for line in found:
        assert line["images"] == 4 * line["step"]
        assert line["evaluation"]["loss"] > 0 and len(line["evaluation"]["stage_loss"]) == 3
    assert found[0]["evaluation"] != found[1]["evaluation"]


def test_a_distance_is_measured_with_the_features_of_the_source(tmp_path, monkeypatch):
    classifier = Classifier("untrained", tiny.SHAPE, ("a", "b", "c"), 0.5).eval()
    monkeypatch.setattr(observe, "load_extractor", lambda *words, **named: classifier)
    options = {"evaluate_every": 8, "metrics": ("fd", "prdc"), "evaluate_images": 20}
    train(config(**options), tmp_path / "run", data=tiny.images())
    (line,) = lines(tmp_path / "run", "evaluation")
    found = line["evaluation"]
    assert found["fd"] > 0 and 0 <= found["prdc"]["recall"] <= 1
    assert (found["features"], found["samples"]) == ("untrained", 20)


@pytest.mark.parametrize(
    ("options", "part"),
    [({"metrics": ("fdd",)}, 'no metric fdd; did you mean "fd"'), ({"features": "inceptoin"}, "no features inceptoin")],
)
def test_what_cannot_be_measured_is_said_before_training(options, part, tmp_path):
    with pytest.raises(ConfigError, match=part):
        train(config(evaluate_every=4, **options), tmp_path / "run", data=tiny.images())
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def dies_at(monkeypatch, times, act):
    """Do something at the n-th call of the denoiser that is no training step."""
    calls, forward = [0], Denoiser.forward

    def run(self, x, sigma, *words, **named):
        if not self.training:
            calls[0] += 1
            if calls[0] == times:
                act()
        return forward(self, x, sigma, *words, **named)

    monkeypatch.setattr(Denoiser, "forward", run)


def fall():
    raise PowerError


@pytest.mark.parametrize("times", [1, 2, 3, 5, 7])
def test_a_kill_while_it_draws_or_measures_loses_nothing(times, watched, tmp_path, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(PowerError):
        dies_at(patch, times, fall)
        train(config(**GRIDS, **LOSSES), out, data=tiny.images())
    train(config(**GRIDS, **LOSSES), out, data=tiny.images())
    same_run(out, watched)
    assert grids(out) == grids(watched)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(("times", "step"), [(1, 2), (5, 4)])
def test_a_signal_while_it_draws_or_measures_stops_at_once_and_loses_nothing(
    number, times, step, watched, tmp_path, monkeypatch
):
    out = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(StoppedError) as stopped:
        dies_at(patch, times, lambda: os.kill(os.getpid(), number))
        train(config(**GRIDS, **LOSSES), out, data=tiny.images())
    assert stopped.value.exit_code == 128 + number
    assert list_checkpoints(out / "checkpoints")[-1].step == step
    train(config(**GRIDS, **LOSSES), out, data=tiny.images())
    same_run(out, watched)
    assert grids(out) == grids(watched)


@pytest.mark.parametrize(
    ("error", "reason"),
    [(torch.OutOfMemoryError("CUDA out of memory"), "memory does not suffice"), (MemoryError(), "memory"),
     (NumericsError("the image of seed 3 is not finite"), "the image of seed 3 is not finite")],
)  # fmt: skip
def test_what_fails_for_memory_or_numerics_is_left_out_with_a_count(error, reason, finished, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(Sampler, "draw", fail)
    with pytest.warns(UserWarning) as caught:
        train(config(**GRIDS), tmp_path / "run", data=tiny.images())
    said = [str(warning.message) for warning in caught]
    assert len(said) == 4 and all(reason in text for text in said)
    assert said[3].startswith("samples or figures of step 8 are left out (4 so far), training goes on: ")
    assert tiny.bits_equal(tensors(tmp_path / "run"), tensors(finished))


def test_memory_for_the_copy_of_the_weights_may_be_missing_too(finished, tmp_path, monkeypatch):
    def fail(self):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch, pytest.warns(UserWarning, match="memory does not suffice"):
        patch.setattr(Trainer, "averaged", fail)
        with pytest.raises(torch.OutOfMemoryError):  # at the end, where the model is written
            train(config(**GRIDS), tmp_path / "run", data=tiny.images())
    assert tiny.bits_equal(tensors(tmp_path / "run"), tensors(finished))


def test_other_errors_are_not_hidden(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("sizes differ")

    monkeypatch.setattr(Sampler, "draw", fail)
    with pytest.raises(RuntimeError, match="sizes differ"):
        train(config(**GRIDS), tmp_path / "run", data=tiny.images())


def test_logging_may_change_when_a_run_is_resumed(watched, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(watched, out)
    options = {"steps": 10}
    train(config(options, grid_every=5, grid_images=1), out, data=tiny.images())
    assert "step-00000010.png" in grids(out) and len(grids(out)) == 5


def test_grids_beyond_the_checkpoint_are_drawn_again(watched, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(watched, out)
    shutil.rmtree(out / "checkpoints" / "step-00000008")
    (out / "samples" / "step-00000008.png").write_bytes(b"of another future")
    train(config(**GRIDS, **LOSSES), out, data=tiny.images())
    assert grids(out) == grids(watched)
    same_run(out, watched)


def test_lines_say_how_fast_it_goes(watched):
    for line in lines(watched, "learning_rate"):
        assert line["images_per_second"] > 0 and "gpu_memory_gib" not in line
