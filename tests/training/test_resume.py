"""The same command again goes on where the run stopped, to the bit."""

import json
from dataclasses import replace

import pytest
import torch

import tiny
from multistage_diffusion.config import DataConfig
from multistage_diffusion.errors import ConfigError
from multistage_diffusion.runs import load_run
from multistage_diffusion.runs.checkpoints import list_checkpoints
from multistage_diffusion.stages import Stages
from multistage_diffusion.training import directory
from multistage_diffusion.training.run import train
from runs import log, same_run, tensors, train_until


@pytest.mark.parametrize("step", range(1, 9))
def test_a_run_stopped_at_any_step_ends_the_same(step, finished, tmp_path):
    out = tmp_path / "run"
    train_until(step, out)
    summary = train(tiny.run_config(), out, data=tiny.images())
    assert summary.resumed == (step - 1) // 3 * 3
    assert (summary.step, summary.images) == (8, 32)
    same_run(out, finished)


def test_a_run_may_be_stopped_twice_in_an_epoch_and_across_it(finished, tmp_path):
    out = tmp_path / "run"
    for step in (4, 4, 5, 8):  # an epoch is 2.5 steps
        train_until(step, out)
    assert train(tiny.run_config(), out, data=tiny.images()).resumed == 6
    same_run(out, finished)


def test_with_dropout_flips_labels_and_separate_encoders(tmp_path):
    model = replace(tiny.SMALLEST, dropout=0.3, classes=3, architecture="separate")
    config = replace(tiny.run_config(model, batches="single-p"), data=DataConfig(source="digits", flip=True))
    data = tiny.images(labels=True)
    train(config, tmp_path / "whole", data=data)
    with torch.random.fork_rng():
        torch.manual_seed(123)  # what else draws from the global generator has no say
        train_until(5, tmp_path / "run", config, data)
        train(config, tmp_path / "run", data=data)
    same_run(tmp_path / "run", tmp_path / "whole")


def test_more_steps_go_on_from_the_end(finished, tmp_path):
    short = tiny.run_config(steps=5)
    train(short, tmp_path / "run", data=tiny.images())
    summary = train(tiny.run_config(), tmp_path / "run", data=tiny.images())
    assert summary.resumed == 5
    same_run(tmp_path / "run", finished)


def test_a_finished_run_stays_as_it_is(finished, tmp_path):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file() and path.name != ".lock"}
    summary = train(tiny.run_config(), finished, data=tiny.images())
    assert (summary.resumed, summary.step) == (8, 8)
    assert summary.loss == pytest.approx(json.loads(log(finished)[-1])["loss"])
    assert {path: path.read_bytes() for path in before} == before


def test_how_often_it_saves_and_logs_does_not_change_the_result(finished, tmp_path):
    config = tiny.run_config(save_every=1, keep=1, log_every=4)
    train(config, tmp_path / "run", data=tiny.images())
    assert tiny.bits_equal(tensors(tmp_path / "run"), tensors(finished))
    assert [item.step for item in list_checkpoints(tmp_path / "run" / "checkpoints")] == [8]


def test_the_seed_changes_everything(finished, tmp_path):
    train(tiny.run_config(seed=1), tmp_path / "run", data=tiny.images())
    first, second = tensors(tmp_path / "run"), tensors(finished)
    assert not any(torch.equal(first[name], second[name]) for name in first if "conv0.weight" in name)


def test_checkpoints_are_those_asked_for_and_as_readable_as_any_file(finished):
    found = list_checkpoints(finished / "checkpoints")
    assert [item.step for item in found] == [6, 8]
    assert all(item.damage() is None for item in found)
    modes = {file.stat().st_mode & 0o777 for file in finished.rglob("*") if file.is_file()}
    assert modes == {(finished / "config.json").stat().st_mode & 0o777}
    assert [path.name for path in finished.rglob("*") if path.name.startswith(".")] == [".lock"]


def test_the_averaged_model_and_the_checkpoint_agree(finished):
    ema, raw = load_run(finished), load_run(finished, weights="raw")
    model = load_run(finished / "model")
    assert ema.step == 8
    assert ema.stage_images == (8, 8, 16)  # batches of 1, 1, 2
    assert tiny.bits_equal(ema.denoiser.state_dict(), model.denoiser.state_dict())
    assert not tiny.bits_equal(ema.denoiser.state_dict(), raw.denoiser.state_dict())
    assert not ema.denoiser.training


def test_stages_keep_their_provenance(tmp_path):
    found = Stages(tiny.EDGES, {"method": "optimal-denoiser"})
    train(tiny.run_config(steps=1), tmp_path / "run", data=tiny.images(), stages=found)
    train(tiny.run_config(steps=2), tmp_path / "run", data=tiny.images())
    assert Stages.load(tmp_path / "run" / "stages.json").provenance == found.provenance
    assert load_run(tmp_path / "run").denoiser.stages.provenance == found.provenance
    assert load_run(tmp_path / "run" / "model").denoiser.stages.provenance == found.provenance


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("changed", "part"),
    [
        (tiny.run_config(seed=1), "training.seed is 0 there and 1 here"),
        (tiny.run_config(batch_size=5), "training.batch-size"),
        (tiny.run_config(replace(tiny.SMALLEST, blocks=2)), "model.blocks"),
        (replace(tiny.run_config(), data=DataConfig(source="digits", flip=True)), "data.flip"),
    ],
)
def test_another_run_is_refused_and_nothing_is_lost(changed, part, finished):
    before = contents(finished)
    with pytest.raises(ConfigError, match="holds another run") as caught:
        train(changed, finished, data=tiny.images())
    assert part in str(caught.value)
    assert contents(finished) == before


def test_other_images_are_refused_and_nothing_is_lost(finished):
    before = contents(finished)
    with pytest.raises(ConfigError, match="not those that"):
        train(tiny.run_config(), finished, data=tiny.images(seed=1))
    assert contents(finished) == before


def test_fewer_steps_than_taken_are_refused_and_nothing_is_lost(finished):
    before = contents(finished)
    with pytest.raises(ConfigError, match="8 steps already"):
        train(tiny.run_config(steps=7), finished, data=tiny.images())
    assert contents(finished) == before


def test_another_number_of_threads_is_said(finished, tmp_path, monkeypatch):
    train_until(5, tmp_path / "run")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    with pytest.warns(UserWarning, match="trained with 1 threads and is continued with 7"):
        train(tiny.run_config(), tmp_path / "run", data=tiny.images())


def test_another_kind_of_device_is_said(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        save = directory.save_checkpoint
        patch.setattr(directory, "save_checkpoint", lambda *a: save(*a[:2], {**a[2], "device": "cuda"}, *a[3:]))
        train(tiny.run_config(steps=3), tmp_path / "run", data=tiny.images())
    with pytest.warns(UserWarning, match="trained on cuda and is continued on cpu: equal up to rounding"):
        train(tiny.run_config(), tmp_path / "run", data=tiny.images())
    assert list_checkpoints(tmp_path / "run" / "checkpoints")[-1].state()["device"] == "cpu"


@pytest.mark.parametrize("kind", ["files", "file", "model"])
def test_a_folder_that_holds_something_else_is_refused(kind, tmp_path, finished):
    out = tmp_path / "mine"
    if kind == "file":
        out.write_text("mine")
    elif kind == "files":
        out.mkdir()
        (out / "thesis.txt").write_text("mine")
    else:
        out = finished / "model"
    with pytest.raises(ConfigError, match="--out") as caught:
        train(tiny.run_config(), out, data=tiny.images())
    assert "\n" not in str(caught.value)


def test_a_start_killed_before_its_first_file_can_be_repeated(tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / ".lock").write_text("process 1")
    (out / ".config.json.123.tmp").write_text("{")
    assert train(tiny.run_config(steps=1), out, data=tiny.images()).step == 1
    assert not (out / ".config.json.123.tmp").exists()
