import json

import pytest

from multistage_diffusion.cli import dispatch
from multistage_diffusion.clustering import plots
from multistage_diffusion.stages import Stages


def test_one_json_document_with_edges_files_and_plots(tmp_path, capsys):
    names = [str(tmp_path / name) for name in ("stages.json", "curves.png", "strip.svg")]
    words = [
        "digits",
        "--process",
        "edm",
        "--samples",
        "1000",
        "--out",
        names[0],
        "--plot",
        names[1],
        "--strip",
        names[2],
    ]
    assert dispatch(["cluster", *words, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert {"edges", "edges_t", "method", "process", "seconds", "intervals"} <= document.keys()
    assert Stages.load(tmp_path / "stages.json").edges == tuple(document["edges"])
    assert all((tmp_path / name).stat().st_size > 5000 for name in ("curves.png", "strip.svg"))


def test_a_matrix_is_drawn_with_its_elbow(tmp_path, capsys):
    words = ["digits", "--stages", "4", "--samples", "1000", "--plot", str(tmp_path / "matrix.png"), "--json"]
    assert dispatch(["cluster", *words]) == 0
    document = json.loads(capsys.readouterr().out)
    assert len(document["edges"]) == 3
    assert len(document["elbow"]) == 8
    assert (tmp_path / "matrix.png").stat().st_size > 5000


def test_the_table_names_edges_and_shares(capsys):
    assert dispatch(["cluster", "digits", "--method", "snr"]) == 0
    shown = capsys.readouterr().out
    assert "1.5519" in shown
    assert "training draws in each stage" in shown


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["digits", "--alpha", "1.5"], 2, "error: alpha must be between 0 and 1, got 1.5"),
        (["digits", "--process", "edn"], 2, 'error: no process edn; did you mean "edm"?'),
        (["digits", "--method", "snr", "--by-class"], 2, "error: by-class must be used with optimal-denoiser"),
        (["digits", "--method", "snr", "--plot", "x.png"], 2, "error: the method snr measures no similarity"),
        (["digits", "--samples", "500", "--plot", "x.gif9"], 2, "error: x.gif9: a plot's name must end in"),
        (["nowhere"], 3, "error: "),
    ],
)
def test_bad_input_is_one_line(words, code, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert dispatch(["cluster", *words]) == code
    assert capsys.readouterr().err.splitlines()[-1].startswith(message)


def test_stage_colours_suffice_for_all_stages():
    assert len(set(plots.STAGE_COLOURS)) == 8
