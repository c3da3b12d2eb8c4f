"""A damaged checkpoint is noticed, named and passed over; where none is whole, nothing is begun anew or deleted."""

import json
import random
import shutil
import warnings

import pytest
import safetensors.torch
import torch

import tiny
from multistage_diffusion.errors import CheckpointError
from multistage_diffusion.files import check_directory, remove_leftovers
from multistage_diffusion.runs import load_run
from multistage_diffusion.runs.checkpoints import (
    EMA_WEIGHTS,
    OPTIMIZER,
    RAW,
    STATE,
    Checkpoint,
    list_checkpoints,
    newest,
    newest_valid,
)
from multistage_diffusion.training.checkpoint import prune, restore_checkpoint
from multistage_diffusion.training.run import build_trainer, train
from runs import same_run, train_until

FILES = (RAW, EMA_WEIGHTS, OPTIMIZER, STATE, "config.json", "manifest.json")


def cut(path, chance):
    path.write_bytes(path.read_bytes()[: chance.randrange(path.stat().st_size)])


def flip(path, chance):
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def lose(path, chance):
    path.unlink()


def zero(path, chance):
    content = path.read_bytes()
    tail = chance.randrange(1, min(len(content), 4096))
    path.write_bytes(content[:-tail] + bytes(tail))


@pytest.mark.parametrize(("damage", "times"), [(cut, 40), (flip, 40), (lose, 10), (zero, 10)])
def test_damage_is_noticed_and_the_file_named(damage, times, finished, tmp_path):
    source = list_checkpoints(finished / "checkpoints")[-1].path
    chance = random.Random(times)
    copy = shutil.copytree(source, tmp_path / source.name)
    for index in range(times):
        file = copy / FILES[index % len(FILES)]
        damage(file, chance)
        found = Checkpoint(copy, 8).damage()
        assert found is not None and "\n" not in found
        assert file.name in found or file.name == "manifest.json"  # a wrong manifest accuses another file
        shutil.copyfile(source / file.name, file)
        assert Checkpoint(copy, 8).damage() is None


def test_training_goes_back_to_the_last_whole_checkpoint_with_one_warning(finished, tmp_path):
    out = tmp_path / "run"
    train_until(7, out)
    flip(out / "checkpoints" / "step-00000006" / RAW, random.Random(0))
    with pytest.raises(CheckpointError, match=r"step-00000006/model.safetensors is damaged"):
        load_run(out)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        summary = train(tiny.run_config(), out, data=tiny.images())
    assert summary.resumed == 3
    (warning,) = caught
    assert "step-00000006/model.safetensors is damaged" in str(warning.message)
    same_run(out, finished)
    assert all(found.damage() is None for found in list_checkpoints(out / "checkpoints"))


def test_a_damaged_newest_checkpoint_does_not_drive_out_the_valid_ones(tmp_path):
    out = tmp_path / "run"
    train_until(7, out, tiny.run_config(keep=2))
    flip(out / "checkpoints" / "step-00000006" / RAW, random.Random(0))
    with pytest.warns(UserWarning, match="is damaged"):
        train_until(5, out, tiny.run_config(save_every=1, keep=1))
    assert [found.step for found in list_checkpoints(out / "checkpoints")] == [4]
    assert newest(out).step == 4


def test_a_checkpoint_without_its_manifest_gives_way_to_a_new_one(finished, tmp_path):
    out = tmp_path / "run"
    train_until(7, out)
    (out / "checkpoints" / "step-00000006" / "manifest.json").unlink()
    with pytest.warns(UserWarning, match="manifest.json"):
        train(tiny.run_config(), out, data=tiny.images())
    same_run(out, finished)


def test_when_all_are_damaged_nothing_begins_anew_and_nothing_is_deleted(tmp_path):
    out = tmp_path / "run"
    train_until(7, out)
    for found in list_checkpoints(out / "checkpoints"):
        cut(found.path / OPTIMIZER, random.Random(found.step))
    before = {path: path.read_bytes() for path in (out / "checkpoints").rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match=r"every checkpoint in .* is damaged") as caught:
        train(tiny.run_config(), out, data=tiny.images())
    assert "\n" not in str(caught.value)
    assert {path: path.read_bytes() for path in (out / "checkpoints").rglob("*") if path.is_file()} == before


def nested(depth):
    return "[" * depth + "]" * depth


@pytest.mark.parametrize(
    "manifest",
    [
        "", "[]", "null", "{}", '{"files": []}', '{"files": {}}', '{"files": {"../../x": {"bytes": 1, "sha256": ""}}}',
        '{"files": {"model.safetensors": 7}}', '{"files": "model.safetensors"}', nested(100_000), "\xff\xfe",
        '{"files": {"": {"bytes": 0, "sha256": ""}}}', '{"files": {"a\\u0000b": {"bytes": 0, "sha256": ""}}}',
        '{"files": {"/etc/passwd": {"bytes": 0, "sha256": ""}}}', '{"files": NaN}',
    ],
)  # fmt: skip
def test_hostile_manifests_are_refused(manifest, finished, tmp_path):
    copy = shutil.copytree(list_checkpoints(finished / "checkpoints")[-1].path, tmp_path / "step-00000008")
    (copy / "manifest.json").write_text(manifest, encoding="latin-1")
    assert "manifest.json" in str(Checkpoint(copy, 8).damage())
    with pytest.raises(CheckpointError):
        newest_valid(tmp_path)


def test_a_manifest_cannot_reach_outside_its_directory(tmp_path):
    (tmp_path / "secret").write_text("mine")
    inside = tmp_path / "step-00000008"
    inside.mkdir()
    for name in ("../secret", str(tmp_path / "secret"), ".."):
        (inside / "manifest.json").write_text(json.dumps({"files": {name: {"bytes": 4, "sha256": "x"}}}))
        assert str(check_directory(inside)).endswith("is missing")


@pytest.mark.parametrize("file", [RAW, EMA_WEIGHTS, OPTIMIZER, STATE])
def test_files_of_another_network_are_refused_even_with_a_right_manifest(file, finished, tmp_path):
    copy = shutil.copytree(list_checkpoints(finished / "checkpoints")[-1].path, tmp_path / "step-00000008")
    if file == STATE:
        (copy / file).write_text('{"step": 8}')
    elif file == OPTIMIZER:
        safetensors.torch.save_file({"first": torch.zeros(1)}, copy / file)
    else:
        tensors = safetensors.torch.load_file(copy / file)
        name = next(name for name, tensor in tensors.items() if len(tensor) > 1)
        tensors[name] = tensors[name][:1].clone()  # would broadcast
        safetensors.torch.save_file(tensors, copy / file)
    with pytest.raises(CheckpointError) as caught:
        restore_checkpoint(Checkpoint(copy, 8), build_trainer(tiny.run_config(), tiny.images()))
    assert "\n" not in str(caught.value)


def hostile_safetensors(kind):
    header = {
        "endless": b"", "overlap": b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
        b'"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        "vast": b'{"a":{"dtype":"F32","shape":[1000000000,1000000000],"data_offsets":[0,4]}}',
        "pickle": b"\x80\x04cos\nsystem\n(S'true'\ntR.", "outside": b'{"a":{"dtype":"F32","shape":[1],'
        b'"data_offsets":[900,904]}}',
    }[kind]  # fmt: skip
    size = 10**12 if kind == "endless" else len(header)
    return size.to_bytes(8, "little") + header + bytes(4)


@pytest.mark.parametrize("kind", ["endless", "overlap", "vast", "pickle", "outside"])
def test_hostile_weights_are_refused(kind, finished, tmp_path):
    model = shutil.copytree(finished / "model", tmp_path / "model")
    (model / "manifest.json").unlink()
    (model / "model.safetensors").write_bytes(hostile_safetensors(kind))
    with pytest.raises(CheckpointError) as caught:
        load_run(model)
    assert "\n" not in str(caught.value) and "model.safetensors" in str(caught.value)


def test_a_run_without_checkpoints_says_so(tmp_path):
    out = tmp_path / "run"
    train_until(1, out)
    with pytest.raises(CheckpointError, match="has no checkpoint yet"):
        load_run(out)


def test_a_checkpoint_needs_its_configuration(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    found = list_checkpoints(folder / "checkpoints")[-1]
    (found.path / "config.json").unlink()
    manifest = json.loads((found.path / "manifest.json").read_text())
    del manifest["files"]["config.json"]
    (found.path / "manifest.json").write_text(json.dumps(manifest))
    assert "does not name config.json" in str(found.damage())


def test_a_kill_while_an_old_checkpoint_is_deleted_leaves_no_half_of_it(finished, tmp_path, monkeypatch):
    folder = tmp_path / "run" / "checkpoints"
    shutil.copytree(finished / "checkpoints", folder)

    def killed(path, ignore_errors):
        next(path.iterdir()).unlink()
        raise SystemExit

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(shutil, "rmtree", killed)
        prune(folder, 1, 8)
    assert [(found.step, found.damage()) for found in list_checkpoints(folder)] == [(8, None)]
    remove_leftovers(folder)
    assert [path.name for path in folder.iterdir()] == ["step-00000008"]
