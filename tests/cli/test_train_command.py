"""`msd train`: recipe, options, files of values; its document; verify and export what it left."""

import json
import random
import shutil

import pytest
import safetensors.torch
import torch

import tiny
from multistage_diffusion.cli import dispatch
from multistage_diffusion.config import RunConfig, from_dict
from multistage_diffusion.recipes import RECIPES, recipe
from multistage_diffusion.runs import load_run
from multistage_diffusion.runs.checkpoints import EMA_WEIGHTS, RAW, list_checkpoints
from runs import tensors

SMALL = ["--model.width", "8", "--model.decoder-widths", "8", "8", "4", "--model.blocks", "1", "--model.attention",
         "--model.multipliers", "1", "--training.batch-size", "4", "--training.steps", "3", "--device", "cpu",
         "--threads", "1"]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "run"
    assert dispatch(["train", "digits", "--out", str(out), *SMALL, "--training.save-every", "2"]) == 0
    return out


def document(words, capsys, code=0):
    capsys.readouterr()
    assert dispatch([*words, "--json"]) == code
    out, err = capsys.readouterr()
    assert out.count("\n") == 1
    return json.loads(out), err


def test_its_document(tmp_path, capsys):
    out = tmp_path / "run"
    found, err = document(["train", "digits", "--out", str(out), *SMALL], capsys)
    assert (found["run"], found["step"], found["images"], found["resumed"]) == (str(out), 3, 12, 0)
    assert 0 < found["loss"] < 10 and found["training_pflops"] > 0
    assert "trained" in err and "images/s" in err
    again, err = document(["train", "digits", "--out", str(out), *SMALL], capsys)
    assert (again["step"], again["resumed"]) == (3, 3) and "has all 3 steps already" in err
    more, err = document(["train", "digits", "--out", str(out), *SMALL, "--training.steps", "4"], capsys)
    assert (more["step"], more["resumed"]) == (4, 3)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_dry_runs_as_itself(name, capsys, tmp_path):
    found, err = document(["train", name, "--out", str(tmp_path / "x"), "--dry-run"], capsys)
    assert from_dict(RunConfig, found) == recipe(name)
    assert err == "" and list(tmp_path.iterdir()) == []


def test_options_files_and_stages_override_the_recipe_in_this_order(tmp_path, capsys):
    (tmp_path / "values.json").write_text(json.dumps({"training": {"steps": 7, "seed": 5}, "data": {"flip": True}}))
    (tmp_path / "stages.json").write_text('{"edges": [0.7, 2.0], "method": "by hand"}')
    words = [
        "--config",
        str(tmp_path / "values.json"),
        "--stages",
        str(tmp_path / "stages.json"),
        "--training.steps",
        "9",
    ]
    found, _ = document(["train", "digits", "--out", "x", "--dry-run", *words], capsys)
    assert (found["training"]["steps"], found["training"]["seed"], found["data"]["flip"]) == (9, 5, True)
    assert found["stages"]["edges"] == [0.7, 2.0]
    assert found["training"]["batch_size"] == recipe("digits").training.batch_size


def test_a_file_may_change_the_process(tmp_path, capsys):
    (tmp_path / "values.json").write_text(json.dumps({"process": {"kind": "edm", "p_mean": -1.0}}))
    found, _ = document(
        ["train", "digits", "--out", "x", "--dry-run", "--config", str(tmp_path / "values.json")], capsys
    )
    assert found["process"]["kind"] == "edm" and found["process"]["p_mean"] == -1.0


def test_the_config_of_a_run_repeats_it(trained, capsys):
    found, _ = document(
        ["train", "digits", "--out", "x", "--dry-run", "--config", str(trained / "config.json")], capsys
    )
    assert found == json.loads((trained / "config.json").read_text())


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ('{"training": {"stepz": 5}}', 'unknown key training.stepz; did you mean "steps"'),
        ('{"trainin": {}}', 'did you mean "training"'),
        ('{"training": {"steps": "5"}}', "training.steps"),
        ('{"training": 5}', "training must hold named values"),
        ('{"process": {"kind": "vq"}}', "no process vq"),
        ('{"training": {"learning_rate": NaN}}', "learning"),
        ("[]", "must hold named sections"),
        ("{", "not valid JSON"),
        ("", "not valid JSON"),
    ],
)
def test_wrong_files_of_values_are_named(text, part, tmp_path, capsys):
    (tmp_path / "values.json").write_text(text)
    assert dispatch(["train", "digits", "--out", "x", "--dry-run", "--config", str(tmp_path / "values.json")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith("error: ") and "values.json" in err and part in err


def test_another_run_is_refused(trained, capsys):
    capsys.readouterr()
    assert dispatch(["train", "digits", "--out", str(trained), *SMALL, "--training.seed", "1"]) == 2
    err = capsys.readouterr().err.splitlines()
    assert "holds another run: training.seed is 0 there and 1 here" in err[-1]


def test_a_loss_that_explodes_has_code_4(tmp_path, capsys):
    words = ["train", "digits", "--out", str(tmp_path / "run"), *SMALL, "--training.warmup-images", "0"]
    assert dispatch([*words, "--training.learning-rate", "1e30"]) == 4
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ") and "at step 2" in last


@pytest.mark.parametrize(
    ("rate", "init", "warned"), [("1e-3", False, False), ("1e-6", False, True), ("1e-6", True, False)]
)
def test_a_rate_far_from_what_serves_that_width_is_said(rate, init, warned, trained, tmp_path, capsys):
    words = ["train", "digits", "--out", str(tmp_path / "run"), *SMALL, "--training.steps", "1"]
    assert dispatch([*words, "--training.learning-rate", rate, *(["--init", str(trained)] if init else [])]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert ("is far from what serves U-Nets of width 8, 0.0025 to 0.016" in shown) == warned


def test_verify_says_what_is_whole_and_what_is_not(trained, tmp_path, capsys):
    found, _ = document(["verify", str(trained)], capsys)
    assert found["checkpoints"] == [{"step": step, "valid": True, "damage": None} for step in (2, 3)]
    assert found["snapshots"] == []
    assert found["model"] == {"valid": True, "damage": None}
    copy = shutil.copytree(trained, tmp_path / "run")
    file = copy / "checkpoints" / "step-00000002" / RAW
    content = bytearray(file.read_bytes())
    content[random.Random(0).randrange(len(content))] ^= 1
    file.write_bytes(content)
    found, err = document(["verify", str(copy)], capsys, code=5)
    assert [row["valid"] for row in found["checkpoints"]] == [False, True]
    assert str(file) in err.splitlines()[-1] and err.splitlines()[-1].startswith("error: ")


def test_verify_checks_a_saved_model_by_itself(trained, tmp_path, capsys):
    copy = shutil.copytree(trained / "model", tmp_path / "model")
    assert document(["verify", str(copy)], capsys)[0]["model"] == {"valid": True, "damage": None}
    (copy / "model.safetensors").write_bytes(b"x")
    found, err = document(["verify", str(copy)], capsys, code=5)
    assert found["model"]["valid"] is False and "model.safetensors" in err


def test_export_writes_the_weights_asked_for(trained, tmp_path, capsys):
    files = {}
    for weights in ("default", "ema", "raw"):
        files[weights] = tmp_path / f"{weights}.safetensors"
        chosen = [] if weights == "default" else ["--weights", weights]
        found, _ = document(["export", str(trained), "--out", str(files[weights]), *chosen], capsys)
        assert found["file"] == str(files[weights]) and len(found["sha256"]) == 64 and found["step"] == 3
    assert files["default"].read_bytes() == files["ema"].read_bytes() != files["raw"].read_bytes()
    newest = list_checkpoints(trained / "checkpoints")[-1].path
    for weights, name in (("ema", EMA_WEIGHTS), ("raw", RAW)):
        exported = safetensors.torch.load_file(files[weights])
        assert tiny.bits_equal(exported, safetensors.torch.load_file(newest / name))


@pytest.mark.parametrize("out", [".", "/", "file/below"])
def test_export_to_nowhere_is_one_line(out, trained, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    capsys.readouterr()
    assert dispatch(["export", str(trained), "--out", out]) == 5
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1 and err[0].startswith("error: cannot write")


def test_profile_of_a_run_and_of_another_architecture(trained, capsys):
    found, _ = document(["profile", str(trained)], capsys)
    denoise = load_run(trained).denoiser
    assert found["parameters"]["total"] == sum(p.numel() for p in denoise.parameters())
    assert [row["stage"] for row in found["stages"]] == [0, 1, 2]
    unified, _ = document(["profile", str(trained), "--architecture", "unified"], capsys)
    assert len(unified["stages"]) == 1 and unified["gflops"] == unified["stages"][0]["gflops"]


def test_profile_of_a_unified_run_as_one_with_stages(tmp_path, capsys):
    out = tmp_path / "run"
    words = ["train", "digits", "--out", str(out), *SMALL, "--model.architecture", "unified", "--stages.edges"]
    assert dispatch(words) == 0
    capsys.readouterr()
    assert dispatch(["profile", str(out), "--architecture", "multistage"]) == 2
    assert "decoder-widths" in capsys.readouterr().err.splitlines()[-1]


def test_the_same_command_twice_gives_the_same_bits(trained, tmp_path):
    out = tmp_path / "run"
    torch.manual_seed(1)
    assert dispatch(["train", "digits", "--out", str(out), *SMALL, "--training.save-every", "2"]) == 0
    assert tiny.bits_equal(tensors(out), tensors(trained))


def test_an_average_of_another_length_is_exported_and_drawn_from(tmp_path, capsys):
    out = tmp_path / "run"
    averages = ["--training.sigma-rel", "0.05", "0.1", "--training.ema-snapshot-every", "1"]
    assert dispatch(["train", "digits", "--out", str(out), *SMALL, *averages]) == 0
    found, err = document(["export", str(out), "--sigma-rel", "0.07", "--out", str(tmp_path / "w.safetensors")], capsys)
    assert found["ema_length"] == 0.07 and 0 < found["ema_error"] < 0.1 and "of length 0.07" in err
    stored = safetensors.torch.load_file(list_checkpoints(out / "checkpoints")[-1].path / EMA_WEIGHTS)
    exported = safetensors.torch.load_file(tmp_path / "w.safetensors")
    assert exported.keys() == stored.keys() and not tiny.bits_equal(exported, stored)
    drawn = [document(["sample", str(out), "--num", "1", "--steps", "2", "--out", str(tmp_path / name), *more], capsys)
             for name, more in (("a", []), ("b", ["--sigma-rel", "0.07"]))]  # fmt: skip
    assert drawn[1][0]["ema_length"] == 0.07 and drawn[0][0]["ema_length"] is None
    found, _ = document(["evaluate", str(out), "--metrics", "loss", "--sigma-rel", "0.07"], capsys)
    assert found["loss"] > 0
    (out / "ema" / "step-00000002" / "ema-0.1.safetensors").write_bytes(b"x")
    found, err = document(["verify", str(out)], capsys, code=5)
    assert [row["valid"] for row in found["snapshots"]] == [True, False, True]
    assert "step-00000002/ema-0.1.safetensors" in err.splitlines()[-1]


@pytest.mark.parametrize(("kind", "warned"), [("vp", False), ("edm", True)])
def test_stages_of_another_process_are_said(kind, warned, tmp_path, capsys):
    file = tmp_path / "stages.json"
    file.write_text(json.dumps({"edges": [0.7, 5.0], "process": {"kind": kind}}))
    found, said = document(["train", "digits", "--out", "x", "--dry-run", "--stages", str(file)], capsys)
    assert found["stages"]["edges"] == [0.7, 5.0]
    assert ("was made for the process edm; the run's is vp" in " ".join(said.split())) == warned


def test_another_process_is_chosen_with_its_own_options(capsys):
    words = ["train", "digits", "--dry-run", "--process.kind", "edm", "--process.sigma-data", "0.6"]
    found, _ = document(words, capsys)
    assert found["process"]["kind"] == "edm" and found["process"]["sigma_data"] == 0.6
    assert document(["train", "digits", "--dry-run", "--process.kind=vp"], capsys)[0]["process"]["prediction"] == "v"
