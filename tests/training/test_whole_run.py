"""A run directory is one thing: what was edited, moved or made up is noticed and named."""

import json
import shutil

import pytest

import tiny
from multistage_diffusion.cli import dispatch
from multistage_diffusion.errors import CheckpointError, ConfigError
from multistage_diffusion.files import sha256
from multistage_diffusion.runs import Run, load_run
from multistage_diffusion.runs.checkpoints import EMA_WEIGHTS, RAW, list_checkpoints
from multistage_diffusion.runs.whole import digests
from multistage_diffusion.training.run import train
from runs import train_until


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def edit(path, section, **values):
    document = json.loads(path.read_text())
    (document[section] if section else document).update(values)
    path.write_text(json.dumps(document))


EDITS = [
    ("process", {"beta_max": 19.0}, "process.beta-max"),
    ("process", {"prediction": "v"}, "process.prediction"),
    ("model", {"skip_scale": 1.0}, "model.skip-scale"),
    ("model", {"norm_eps": 1e-5}, "model.norm-eps"),
    ("model", {"filter": "fir"}, "model.filter"),
    ("stages", {"edges": [0.7, 3.0]}, "stages.edges"),
    ("sampling", {"steps": 3}, "sampling.steps"),
]


@pytest.mark.parametrize(("section", "values", "option"), EDITS)
def test_an_edited_configuration_is_refused_and_named(section, values, option, run, capsys):
    edit(run / "config.json", section, **values)
    with pytest.raises(CheckpointError, match=rf"config.json has {option} .*, and the weights were trained with"):
        load_run(run)
    assert dispatch(["verify", str(run)]) == 5
    assert f"config.json has {option}" in capsys.readouterr().err.splitlines()[-1]


def test_going_on_with_the_edited_configuration_is_refused(run):
    edit(run / "config.json", "process", beta_max=19.0)
    config = Run.open(run).config
    with pytest.raises(CheckpointError, match=r"config.json has process.beta-max 19.0"):
        train(config, run, data=tiny.images())


@pytest.mark.parametrize("name", ["stages.json", "classes.json", "latents.json", "scale.json"])
def test_other_files_that_decide_an_image_are_covered(name, run, capsys):
    (run / name).write_text('{"edges": [0.1], "names": ["a"], "images": [1], "scale": 2.0}')
    with pytest.raises((CheckpointError, ConfigError), match=name):
        load_run(run)
    assert dispatch(["verify", str(run)]) == 5
    assert name in capsys.readouterr().err.splitlines()[-1]


def test_what_decides_no_image_may_change(run, capsys):
    edit(run / "config.json", "training", steps=9, keep=7)
    edit(run / "config.json", "logging", name="another")
    edit(run / "stages.json", None, note="mine")
    assert load_run(run).step == 8
    assert dispatch(["verify", str(run)]) == 0
    assert train(tiny.run_config(steps=9), run, data=tiny.images()).step == 9


def test_a_run_without_digests_is_read(run):
    """As version 0.1 wrote them."""
    path = list_checkpoints(run / "checkpoints")[-1].path
    edit(path / "state.json", None, files=None)
    reseal(path, "state.json")
    assert load_run(run).step == 8


def reseal(checkpoint, name):
    file = checkpoint / name
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("shape", value) for value in ("8x8", [1, 8], [1, -8, 8], [1.0, 8, 8], [1_000_000, 8, 8], None, [[1], 8, 8])),
        *(("step", value) for value in ("8", -1, 1e300, None, True, [8], 2**70)),
        *(("stage_images", value) for value in ("many", [-1, 2, 3], [None], {"a": 1})),
    ],
)
def test_hostile_states_are_refused_with_a_line(key, value, run):
    path = list_checkpoints(run / "checkpoints")[-1].path
    edit(path / "state.json", None, **{key: value})
    reseal(path, "state.json")
    for action in (lambda: load_run(run), lambda: train(tiny.run_config(steps=9), run, data=tiny.images())):
        with pytest.raises(CheckpointError, match=rf"state.json: {key} is ") as caught:
            action()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["null", "[]", "7", '{"step": Infinity}', "[" * 100_000, "\\x00"])
def test_states_of_other_kinds_are_refused_with_a_line(text, run):
    path = list_checkpoints(run / "checkpoints")[-1].path
    (path / "state.json").write_text(text)
    reseal(path, "state.json")
    with pytest.raises(CheckpointError, match=r"state\.json") as caught:
        load_run(run)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_no_memory_is_taken_for_what_a_strange_configuration_asks(run, monkeypatch):
    path = list_checkpoints(run / "checkpoints")[-1].path
    for file in (run / "config.json", path / "config.json"):
        edit(file, "model", width=8192, decoder_widths=[8192] * 3)
    reseal(path, "config.json")
    with pytest.raises(CheckpointError, match="belongs to another architecture"):
        load_run(run)


@pytest.mark.parametrize(
    "line",
    ["null", "[]", "7", '{"step": 1e400}', '{"step": -1}', '{"step": true}', "[" * 100_000, '{"step": "x"}', "{"],
)
def test_strange_lines_of_metrics_are_passed_over(line, run):
    lines = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(f"{line}\n{lines}{line}\n")
    assert [record["step"] for record in Run.open(run).metrics()] == [2, 4, 6, 8]
    train(tiny.run_config(steps=10), run, data=tiny.images())
    assert [json.loads(kept)["step"] for kept in (run / "metrics.jsonl").read_text().splitlines()] == [2, 4, 6, 8, 10]


def moving(out, step, action):
    def on_step(result, steps):
        if result.step == step:
            action()

    return train(tiny.run_config(), out, data=tiny.images(), on_step=on_step)


def test_a_directory_that_is_renamed_is_saved_where_it_went(finished, tmp_path):
    out, there = tmp_path / "run", tmp_path / "elsewhere" / "run"
    there.parent.mkdir()
    with pytest.raises(CheckpointError, match=rf"was moved to {there} .* step 5 is saved there") as caught:
        moving(out, 5, lambda: out.rename(there))
    assert "\n" not in str(caught.value) and not out.exists()
    assert [found.step for found in list_checkpoints(there / "checkpoints")] == [3, 5]
    assert train(tiny.run_config(), there, data=tiny.images()).resumed == 5
    for file in (RAW, EMA_WEIGHTS):
        names = [list_checkpoints(folder / "checkpoints")[-1].path / file for folder in (there, finished)]
        assert names[0].read_bytes() == names[1].read_bytes()


def test_another_directory_in_its_place_is_not_written_in(tmp_path):
    out, there = tmp_path / "run", tmp_path / "old"

    def swap():
        out.rename(there)
        out.mkdir()

    with pytest.raises(CheckpointError, match="was moved to"):
        moving(out, 3, swap)
    assert not list(out.iterdir()) and list_checkpoints(there / "checkpoints")[-1].step == 3


def test_a_directory_that_is_deleted_ends_the_run(tmp_path):
    out = tmp_path / "run"
    with pytest.raises(CheckpointError, match="was deleted while it trained; step 4 is not saved"):
        moving(out, 4, lambda: shutil.rmtree(out))
    assert not out.exists()


def test_digests_are_of_what_decides(finished, tmp_path):
    train_until(4, tmp_path / "run")
    assert digests(tmp_path / "run") == digests(finished)
