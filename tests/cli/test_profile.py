"""`msd profile`: the document, the table, the runs."""

import json

import pytest

import tiny
from multistage_diffusion.cli import dispatch
from multistage_diffusion.training.run import train


def profile(capsys, *words):
    code = dispatch(["profile", *words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_preset_in_three_weightings(capsys):
    code, out, err = profile(capsys, "digits", "--json")
    document = json.loads(out)
    assert code == 0 and document["architecture"] == "multistage"
    parameters = document["parameters"]
    assert parameters["total"] == parameters["encoder"] + sum(parameters["decoders"])
    assert set(document["weighted_gflops"]) == {"time", "training", "sampling"}
    for name, weighted in document["weighted_gflops"].items():
        shares = [stage["share"][name] for stage in document["stages"]]
        assert sum(shares) == pytest.approx(1)
        terms = zip(shares, document["stages"], strict=True)
        assert weighted == pytest.approx(sum(share * stage["gflops"] for share, stage in terms))
        assert document["weighted_paper_gflops"][name] < weighted / 2  # half for the convention, less for attention
    assert document["gflops"] == document["weighted_gflops"]["training"]
    assert document["sampling"]["solver"] == "dpmpp-2m"
    assert "M parameters" in err  # people read on stderr when the document has stdout


def test_the_papers_convention_is_one_flag_away(capsys):
    _, plain, _ = profile(capsys, "digits", "--architecture", "unified")
    _, paper, _ = profile(capsys, "digits", "--architecture", "unified", "--paper")
    assert "paper" not in plain and "paper's GFLOPs an image, weighted over stages" in paper


@pytest.mark.parametrize("folder", [".", "model"])
def test_a_run_and_its_saved_model(capsys, tmp_path, folder):
    train(tiny.run_config(steps=1, save_every=1), tmp_path / "run", data=tiny.images())
    _, out, _ = profile(capsys, str(tmp_path / "run" / folder), "--json")
    document = json.loads(out)
    assert document["shape"] == [1, 8, 8] and len(document["stages"]) == 3
    _, out, _ = profile(capsys, str(tmp_path / "run" / folder), "--architecture", "unified", "--json")
    assert len(json.loads(out)["stages"]) == 1


def test_an_unknown_preset_is_one_line(capsys):
    code, _, err = profile(capsys, "digit")
    assert code == 2 and err.splitlines()[-1] == 'error: no preset digit; did you mean "digits"?'
