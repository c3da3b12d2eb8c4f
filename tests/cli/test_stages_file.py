"""msd cluster --out FILE and msd train --stages FILE fit together."""

import json

import pytest

from multistage_diffusion.cli import dispatch
from multistage_diffusion.files import write_json
from multistage_diffusion.recipes import recipe


@pytest.fixture
def dry_run(capsys, tmp_path):
    def dry_run(stages, *words):
        write_json(tmp_path / "stages.json", stages)
        code = dispatch(["train", "digits", "--dry-run", "--json", "--stages", str(tmp_path / "stages.json"), *words])
        captured = capsys.readouterr()
        return code, json.loads(captured.out) if captured.out else None, captured.err

    return dry_run


def test_edges_and_widths_come_from_the_file(dry_run):
    code, config, _ = dry_run({"edges": [0.5, 2.0], "decoder_widths": [40, 20, 4], "method": "by hand"})
    assert code == 0 and config["stages"]["edges"] == [0.5, 2.0] and config["model"]["decoder_widths"] == [40, 20, 4]


def test_widths_of_the_command_line_win(dry_run):
    _, config, _ = dry_run(
        {"edges": [0.5, 2.0], "decoder_widths": [40, 20, 4]}, "--model.decoder-widths", "8", "8", "8"
    )
    assert config["model"]["decoder_widths"] == [8, 8, 8]


def test_without_widths_the_recipe_keeps_its_own_where_they_fit(dry_run):
    own = list(recipe("digits").model.decoder_widths)
    assert dry_run({"edges": [0.5, 2.0]})[1]["model"]["decoder_widths"] == own
    assert dry_run({"edges": [0.5, 1.0, 2.0]})[1]["model"]["decoder_widths"] == [32, 32, 32, 32]


@pytest.mark.parametrize(
    "stages", [{"edges": [2.0, 1.0]}, {"edges": "wide"}, {}, [1, 2], {"edges": [1.0], "decoder_widths": [8, 8, 8]}]
)
def test_a_bad_file_is_one_line(dry_run, stages):
    code, _, stderr = dry_run(stages)
    assert code == 2 and stderr.startswith("error: ") and stderr.count("\n") == 1 and "stages.json" in stderr


@pytest.mark.slow
def test_allocation_writes_widths_that_training_takes(dry_run, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("MSD_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "found.json"
    words = ["cluster", "digits", "--allocate", "1e-4", "--proxy-steps", "8", "--out", str(out), "--json"]
    assert dispatch(words) == 0
    document = json.loads(capsys.readouterr().out)
    widths = document["decoder_widths"]
    assert len(widths) == 3 and all(width % 4 == 0 for width in widths)
    assert document["allocation"]["loss"] <= document["allocation"]["equal_loss"] + 1e-9
    assert dry_run(json.loads(out.read_text()))[1]["model"]["decoder_widths"] == widths
