"""`msd train --init`: from a run, a saved model, a folder of diffusers or a plain file of weights."""

import json

import pytest
import safetensors.torch
import torch

from multistage_diffusion.cli import dispatch as main
from multistage_diffusion.runs import load_run

SMALL = [
    "--model.width", "8", "--model.multipliers", "1", "2", "--model.blocks", "1", "--training.batch-size", "8",
    "--training.log-every", "1", "--data.resolution", "8", "--threads", "1", "--training.learning-rate", "1e-12",
]  # fmt: skip


@pytest.fixture(scope="module")
def trunk(tmp_path_factory):
    out = tmp_path_factory.mktemp("init") / "trunk"
    words = ["--model.architecture", "unified", "--training.steps", "2", *SMALL]
    assert not main(["train", "digits", *words, "--out", str(out)])
    return out


@pytest.mark.slow
def test_from_a_run_every_decoder_starts_as_the_trunk(trunk, tmp_path, capsys):
    words = ["train", "digits", "--init", str(trunk), "--training.steps", "1", *SMALL[7:], "--out"]
    assert not main([*words, str(tmp_path / "run")])
    assert "starts at the loss" in capsys.readouterr().out
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])["initial"]
    assert first["loss"] == pytest.approx(first["trained_loss"], rel=1e-5)
    source, loaded = load_run(trunk).denoiser, load_run(tmp_path / "run").denoiser
    assert loaded.network.stages == 3 and loaded.backbone.capacities == (8, 8, 8)
    x, sigma = torch.randn(3, 1, 8, 8), torch.tensor([0.1, 2.0, 30.0])
    with torch.no_grad():
        torch.testing.assert_close(loaded(x, sigma), source(x, sigma), rtol=1e-3, atol=1e-4)  # one tiny step
    # The same command goes on; without --init, too, as there is a checkpoint; another start is refused.
    assert not main([*words, str(tmp_path / "run")])
    assert main(["train", "digits", "--init", str(tmp_path / "run"), *words[4:], str(tmp_path / "run")]) == 2
    assert "started from other weights" in capsys.readouterr().err


def test_what_a_run_starts_from_must_be_repeated_until_a_checkpoint(trunk, tmp_path, capsys):
    out = tmp_path / "run"
    words = [
        "train",
        "digits",
        "--training.steps",
        "1",
        *SMALL,
        "--model.decoder-widths",
        "8",
        "8",
        "8",
        "--out",
        str(out),
    ]
    assert not main([*words, "--init", str(trunk)])
    for path in sorted((out / "checkpoints").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    assert main(words) == 2
    assert "repeat --init" in capsys.readouterr().err


@pytest.mark.slow
def test_from_a_plain_file_of_weights_with_other_names(trunk, tmp_path, capsys):
    state = load_run(trunk).denoiser.network.state_dict()
    renamed = {name.replace("encoders.0.", "net.down."): tensor for name, tensor in state.items()}
    safetensors.torch.save_file(renamed, tmp_path / "weights.safetensors")
    (tmp_path / "names.json").write_text(json.dumps({"net.down.": "encoders.0."}))
    words = ["train", "digits", "--init", str(tmp_path / "weights.safetensors"), "--training.steps", "1", *SMALL]
    words += ["--model.decoder-widths", "8", "8", "4", "--out", str(tmp_path / "run")]
    assert main(words) == 5
    error = capsys.readouterr().err
    assert "does not fit the network: " in error and "missing" in error and error.count("\n") == 1
    assert not main([*words, "--init-names", str(tmp_path / "names.json")])
    loaded = load_run(tmp_path / "run").denoiser.network
    stem = "encoders.0.stem.weight"
    torch.testing.assert_close(loaded.state_dict()[stem], state[stem])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: None, "is neither a folder nor a .safetensors file"),
        (lambda folder: folder.mkdir(), "holds no config.json"),
    ],
)
def test_what_is_no_model_is_one_line(make, words, tmp_path, capsys):
    make(tmp_path / "source")
    assert main(["train", "digits", "--init", str(tmp_path / "source"), "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and not (tmp_path / "run").exists()


def test_another_shape_is_named(trunk, tmp_path, capsys):
    words = ["train", "digits", "--init", str(trunk), "--training.steps", "1", *SMALL, "--out", str(tmp_path / "run")]
    assert main([*words, "--model.width", "16", "--model.decoder-widths", "16", "16", "16"]) == 2
    assert "width 8 there and 16 here; choose the same --model options" in capsys.readouterr().err
