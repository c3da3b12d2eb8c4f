"""Files of values in three formats, whole commands in a file, sweeps, and help that fits."""

import json
import sys
from dataclasses import replace

import pytest

from multistage_diffusion.cli import COMMANDS, dispatch
from multistage_diffusion.cli.values import combinations, read_values
from multistage_diffusion.config import RunConfig, from_dict, to_dict
from multistage_diffusion.errors import ConfigError
from multistage_diffusion.recipes import recipe

TOML = """
recipe = "digits"
out = "OUT"
device = "cpu"
threads = 1

[model]
width = 8
decoder-widths = [8, 8, 4]
blocks = 1
attention = []
multipliers = [1]

[training]
steps = 3
batch-size = 4
learning-rate = 1e-3
"""
SWEEP = """
[sweep]
"training.learning-rate" = [1e-3, 1e30]
training.warmup-images = [0]
"""
YAML = """
recipe: digits
training: {steps: 3, batch-size: 4, learning_rate: 1e-3}
model: {width: 8}
"""


def ended(words, capsys):
    capsys.readouterr()
    code = dispatch([str(word) for word in words])
    out, err = capsys.readouterr()
    return code, out, err


def written(tmp_path, text, name="values.toml"):
    path = tmp_path / name
    path.write_text(text.replace("OUT", (tmp_path / "runs").as_posix()))
    return path


def test_three_formats_say_the_same(tmp_path, capsys):
    values = {"training": {"steps": 3, "batch_size": 4, "learning_rate": 1e-3}, "model": {"width": 8}}
    toml = "[training]\nsteps = 3\nbatch-size = 4\nlearning-rate = 1e-3\n[model]\nwidth = 8\n"
    found = []
    for name, text in (("a.json", json.dumps(values)), ("a.toml", toml), ("a.yaml", YAML), ("a.yml", YAML)):
        if name.startswith("a.y"):
            pytest.importorskip("yaml")
        path = written(tmp_path, text, name)
        code, out, _ = ended(["train", "digits", "--config", path, "--dry-run", "--json"], capsys)
        assert code == 0
        found.append(json.loads(out))
    assert all(one == found[0] for one in found)
    assert found[0]["training"]["learning_rate"] == 1e-3 and found[0]["model"]["width"] == 8


def test_a_file_is_a_whole_command_and_words_come_before_it(tmp_path, capsys):
    path = written(tmp_path, TOML)
    code, out, err = ended(["train", "--config", path, "--training.steps", "2", "--json"], capsys)
    assert code == 0, err
    assert (json.loads(out)["run"], json.loads(out)["step"]) == ((tmp_path / "runs").as_posix(), 2)
    config = json.loads((tmp_path / "runs" / "config.json").read_text())
    assert (config["model"]["width"], config["training"]["batch_size"], config["data"]["source"]) == (8, 4, "digits")
    code, out, _ = ended(["train", "--config", tmp_path / "runs" / "config.json", "--dry-run", "--json"], capsys)
    assert code == 0 and json.loads(out) == config  # a run's own file needs no recipe
    words = ["train", "--config", path, "--training.steps", "2", "--out", tmp_path / "other", "--json"]
    assert json.loads(ended(words, capsys)[1])["run"] == str(tmp_path / "other")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.toml", "[training\nsteps = 3", "a.toml is not valid TOML"),
        ("a.yaml", "training: [1", "a.yaml is not valid YAML"),
        ("a.yaml", "- 1", "must hold named sections"),
        ("a.toml", 'recipe = "digits"\n[training]\nstepz = 3', 'unknown key training.stepz; did you mean "steps"'),
        ("a.toml", "[training]\nsteps = 3", "holds no data, so it needs a recipe"),
        ("a.toml", 'recipe = "digit"', "no recipe digit"),
        ("a.toml", 'recipe = "digits"\nthreads = "many"', "threads must be a whole number, got 'many'"),
        ("a.toml", 'recipe = "digits"\n[sweep]\n"training.steps" = 3', "training.steps a list of values, got 3"),
        ("a.toml", 'recipe = "digits"\n[sweep]\n"trainin.steps" = [3]', 'did you mean "training"'),
        ("a.toml", 'recipe = "digits"\n[sweep]\n"training.stepz" = [3]', "unknown key training.stepz"),
        ("a.toml", 'recipe = "digits"\n[sweep]\n"training.steps" = [3, -1]', "training.steps must be at least 1"),
        ("a.toml", 'recipe = "digits"\n[sweep]\n"training.steps" = [3, 3]', "two runs of the sweep are alike: steps=3"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path, capsys, name, text, message):
    if name.endswith("yaml"):
        pytest.importorskip("yaml")
    code, out, err = ended(["train", "--config", written(tmp_path, text, name), "--dry-run"], capsys)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ") and message in err


def test_yaml_without_its_package_names_the_other_formats(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "yaml", None)
    code, _, err = ended(["train", "--config", written(tmp_path, YAML, "a.yaml"), "--dry-run"], capsys)
    assert code == 2 and "write the file as TOML or JSON" in err


def test_a_sweep_trains_every_combination_and_ends_with_one_table(tmp_path, capsys):
    path = written(tmp_path, TOML + SWEEP)
    code, out, err = ended(["train", "--config", path, "--dry-run", "--json"], capsys)
    assert code == 0 and [row["run"] for row in json.loads(out)["sweep"]] == [
        "learning-rate=0.001,warmup-images=0", "learning-rate=1e+30,warmup-images=0"
    ]  # fmt: skip
    code, out, err = ended(["train", "--config", path, "--json"], capsys)
    assert code == 0, err
    first, last = json.loads(out)["sweep"]
    assert first["run"] == json.loads(out)["best"] == str(tmp_path / "runs" / "learning-rate=0.001,warmup-images=0")
    assert 0 < first["held_out_loss"] < 5 and first["held_out_error"] > 0 and first["step"] == 3
    assert last["held_out_loss"] is None and "loss is inf at step 2" in last["failed"]  # it does not end the sweep
    table = err[err.rindex("Held-out loss") :]
    assert f"{first['held_out_loss']:.4f}" in table and "ended early" in table and "msd sample" in table
    assert json.loads((tmp_path / "runs" / "sweep.json").read_text()) == json.loads(out)
    code, again, err = ended(["train", "--config", path, "--json"], capsys)
    assert code == 0 and json.loads(again)["sweep"][0]["held_out_loss"] == first["held_out_loss"]
    assert "has all 3 steps already" in err


def test_what_is_swept_is_not_given_too(tmp_path, capsys):
    path = written(tmp_path, TOML + SWEEP)
    code, _, err = ended(["train", "--config", path, "--training.learning-rate", "1"], capsys)
    assert code == 2 and "--training.learning-rate is swept by" in err
    code, _, err = ended(["train", "--config", path, "--profile"], capsys)
    assert code == 2 and "--profile measures one run" in err


def test_combinations_change_what_they_name_and_nothing_else(tmp_path):
    path = written(tmp_path, '[sweep.process]\nkind = ["edm", "flow"]\n[sweep]\n"model.decoder-widths" = [[8, 8, 8]]\n')
    base = recipe("digits")
    runs = combinations(base, read_values(str(path)).sweep, "file")
    assert [name for name, _, _ in runs] == [f"kind={kind},decoder-widths=8-8-8" for kind in ("edm", "flow")]
    for (_, values, config), kind in zip(runs, ("edm", "flow"), strict=True):
        assert config.process.kind == values["process.kind"] == kind
        same = replace(
            config, process=base.process, model=replace(config.model, decoder_widths=base.model.decoder_widths)
        )
        assert same == base and from_dict(RunConfig, to_dict(config)) == config
    with pytest.raises(ConfigError, match="1728 runs"):
        combinations(base, {f"training.{name}": range(12) for name in ("seed", "steps", "keep")}, "file")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_80_columns(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for option in ("--help", "--help-all"):
        with pytest.raises(SystemExit):
            dispatch([command, option])
        out = capsys.readouterr().out
        assert max(map(len, out.splitlines())) <= 80 and "--json" in out


def test_help_shows_what_is_used_most_and_help_all_the_rest(capsys):
    with pytest.raises(SystemExit):
        dispatch(["train", "--help"])
    short = capsys.readouterr().out
    with pytest.raises(SystemExit):
        dispatch(["train", "fashion-mnist", "--help-all"])
    full = capsys.readouterr().out
    assert len(short.splitlines()) < 60 < 200 < len(full.splitlines())
    assert "--out" in short and "--training.steps INT" in short and "--help-all" in short
    assert "--training.betas" in full and "--training.betas" not in short
    with pytest.raises(SystemExit):
        dispatch(["sample", "--help"])
    out = capsys.readouterr().out
    assert "--from STR" in out and "--class" in out and "--start" not in out
