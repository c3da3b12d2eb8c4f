"""Words that people try: each does what it says, or one line says what works."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import multistage_diffusion as msd
import ranks
import tiny
from multistage_diffusion.cli import dispatch
from multistage_diffusion.cli.train import parse
from multistage_diffusion.errors import ConfigError, NumericsError
from multistage_diffusion.training.run import train

CONDITIONAL = tiny.replace(tiny.SMALLEST, classes=3)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words") / "run"
    train(tiny.run_config(CONDITIONAL, steps=3, log_every=2), folder, data=tiny.images(labels=True))
    return folder


@pytest.fixture
def call(capsys):
    def call(*words):
        code = dispatch([str(word) for word in words])
        out, err = capsys.readouterr()
        return code, out, err.splitlines()[-1] if err else ""

    return call


@pytest.mark.parametrize(
    ("words", "flip", "steps"),
    [
        (["--data.flip", "true"], True, None),
        (["--data.flip", "True", "--training.steps", "1e3"], True, 1000),
        (["--data.flip=false"], False, None),
        (["--data.flip", "--training.steps=2.5e3"], True, 2500),
    ],
)
def test_switches_take_values_and_whole_numbers_exponents(words, flip, steps):
    config = parse(["digits", *words]).run
    assert config.data.flip is flip and (steps is None or config.training.steps == steps)


@pytest.mark.parametrize("word", ["1.5", "1e-3", "many", "1e99"])
def test_fractions_are_no_whole_numbers(word):
    with pytest.raises(ConfigError, match=r"--training\.steps must be a whole number, got"):
        parse(["digits", "--training.steps", word])


def test_classes_by_name_on_the_command_line(run, call, tmp_path):
    options = ["--num", 2, "--steps", 2, "--json"]
    code, out, _ = call("sample", run, "--class", "c", "a", "--out", tmp_path / "x", "--format", "npz", *options)
    assert code == 0 and json.loads(out)["classes"] == ["c", "a"]
    assert np.load(tmp_path / "x" / "samples.npz")["labels"].tolist() == ["c", "a"]
    for word, message in (("d", "no class d; the model was trained on a, b, c"), ("3", "no class 3")):
        code, _, err = call("sample", run, "--class", word, "--out", tmp_path / "y", *options)
        assert code == 2 and message in err
    for words, message in (
        (["--class", "--num", 2], "--class must be the name of a class"),
        (["--class", "a", "b", "--num", 1], "num must be at least 2, the number of classes"),
    ):
        code, _, err = call("sample", run, "--out", tmp_path / "y", *words)
        assert code == 2 and message in err


def test_an_export_is_a_model_and_a_folder_for_diffusers_is_named(run, call, tmp_path):
    file = tmp_path / "model.safetensors"
    assert call("export", run, "--out", file)[0] == 0
    options = ["--num", 2, "--steps", 2, "--format", "npz"]
    for target, out in ((run, "a"), (run / "model", "b"), (file, "c")):
        assert call("sample", target, "--out", tmp_path / out, *options)[0] == 0
    drawn = [np.load(tmp_path / name / "samples.npz")["images"] for name in "abc"]
    assert np.array_equal(drawn[0], drawn[1]) and np.array_equal(drawn[0], drawn[2])
    assert msd.load_run(file).denoiser.trained_classes == msd.load_run(run).denoiser.trained_classes
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "model_index.json").write_text("{}")
    for command in (["sample", tmp_path / "folder", "--out", tmp_path / "d"], ["evaluate", tmp_path / "folder"]):
        code, _, err = call(*command)
        assert code == 2 and "is a folder for diffusers: draw with its pipeline" in err
    (tmp_path / "other.safetensors").write_bytes(b"")
    assert "cannot read" in call("sample", tmp_path / "other.safetensors", "--out", tmp_path / "d")[2]


@pytest.mark.slow
def test_a_run_goes_on_from_its_folder_alone(tmp_path, call):
    words = ["--training.steps", 2, "--training.batch-size", 4, "--training.log-every", 3]
    network = ["--model.width", 8, "--model.decoder-widths", 8, 8, 8, "--model.blocks", 1, "--data.flip"]
    assert call("train", "digits", "--out", tmp_path / "run", *words, *network)[0] == 0
    lines = list(msd.Run.open(tmp_path / "run").metrics())
    assert [line["step"] for line in lines] == [2] and lines[0]["partial"]
    code, out, _ = call("train", "--resume", tmp_path / "run", "--training.steps", 4, "--json")
    assert code == 0 and (json.loads(out)["resumed"], json.loads(out)["step"]) == (2, 4)
    assert [line["step"] for line in msd.Run.open(tmp_path / "run").metrics()] == [3, 4]
    for more, message in (
        (["digits", "--resume", tmp_path / "run"], "leave digits out"),
        (["--resume", tmp_path / "run", "--out", "x"], "leave --out out"),
        (["--resume", tmp_path], "is not a run"),
        (["--resume", tmp_path / "run", "--data.no-flip"], "data.flip is True there and False here"),
    ):
        code, _, err = call("train", *more)
        assert code == 2 and message in err


def test_the_mnist_of_keras_is_named(tmp_path, call):
    (tmp_path / "mnist.npz").write_bytes(b"")
    code, _, err = call("data", "mnist", "--data-root", tmp_path)
    assert code == 3 and f"use npz:{tmp_path}/mnist.npz" in err


def test_data_says_how_it_was_read(tmp_path, call):
    np.savez(tmp_path / "x.npz", images=np.arange(6 * 64, dtype=np.uint8).reshape(6, 8, 8) % 50, labels=[4, 1] * 3)
    code, out, _ = call("data", f"npz:{tmp_path}/x.npz", "--split", "all")
    assert code == 0
    for line in ("classes: 1 3, 4 3", "labels: the file's", "split: held out: a tenth, by content", "pixels use 0..49"):
        assert line in out
    code, out, _ = call("data", f"npz:{tmp_path}/x.npz", "--labels", "none", "--json")
    assert json.loads(out)["classes"] == [] and json.loads(out)["notes"]["labels"].startswith("none: ")


def shared(rank, run, out, errors):
    return ranks.command(
        rank, ["sample", str(run), "--num", "5", "--steps", "2", "--out", str(out), "--device", "cpu"], errors
    )


@pytest.mark.slow
def test_processes_share_the_images(run, tmp_path, call):
    assert ranks.run(shared, tmp_path / "ranks", run, tmp_path / "together", tmp_path) == [0, 0]
    assert call("sample", run, "--num", 5, "--steps", 2, "--out", tmp_path / "alone", "--device", "cpu")[0] == 0
    for i in range(5):
        name = f"images/seed-{i:08d}.png"
        assert (tmp_path / "together" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
    out, _ = ranks.printed(tmp_path)
    assert len(out) == 2 and "wrote 5 images" in out[0] and out[1].startswith("next: ")  # said once, too


def test_python_draws_as_the_command_does(run, call, tmp_path):
    assert call("sample", run, "--num", 2, "--format", "npz", "--out", tmp_path / "x", "--class", "b")[0] == 0
    images = msd.sample(msd.load_run(run).denoiser, 2, labels="b").images
    from multistage_diffusion.data import to_uint8

    assert torch.equal(to_uint8(images), torch.from_numpy(np.load(tmp_path / "x" / "samples.npz")["images"]))


def test_evaluation_on_other_images_takes_their_size_and_labels_as_options(run, call, tmp_path):
    picture = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    for number, name in enumerate(("a/0", "a/1", "b/2", "b/3", "4")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        picture.rotate(90 * number).save(tmp_path / f"{name}.png")
    words = ["evaluate", run, "--metrics", "loss", "--data", f"folder:{tmp_path}"]
    for more, message in (
        ([], r"no label for 4.png"),
        (["--labels", "none"], "read them with the resolution 8"),
        (["--labels", "none", "--resolution", 8], "the model is conditional, and"),
    ):
        code, _, err = call(*words, *more)
        assert code in (2, 3) and message in err
    (tmp_path / "4.png").unlink()
    assert call(*words, "--resolution", 8)[0] == 0
    code, _, err = call("evaluate", run, "--reference", f"folder:{tmp_path}")
    assert code == 2 and "--data names a source of images" in err


def test_what_may_have_made_an_image_that_is_not_finite(run):
    denoiser = msd.load_run(run, device="cpu").denoiser
    with pytest.raises(NumericsError, match=r"solver heun; draw without guidance 1e\+30"):
        msd.sample(denoiser, 1, labels="a", guidance=1e30)
    with torch.no_grad():
        next(denoiser.parameters()).fill_(torch.nan)
    with pytest.raises(NumericsError, match="is the model trained"):
        msd.sample(denoiser, 1, steps=2)


@pytest.mark.parametrize(
    ("command", "mend"),
    [("train", "--engine.gradient-accumulation"), ("cluster", "--max-images"), ("data", "--convert")],
)
def test_what_needs_less_memory_is_an_option_of_the_command(call, monkeypatch, command, mend):
    def no_memory(*_):
        raise MemoryError("Unable to allocate 9 GiB")

    monkeypatch.setattr(f"multistage_diffusion.cli.{command}.run", no_memory)
    code, _, err = call(command, "digits")
    assert code == 1 and "out of memory: Unable to allocate 9 GiB; " in err and mend in err


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--training.clip-norm", "x"], "--training.clip-norm must be none or a number, got x"),
        (["--threads", "x"], "--threads must be none or a whole number, got x"),
        (["--training.quotas", "aut"], "--training.quotas must be numbers or auto, got aut"),
        (["--training.learning-rate", "y"], "--training.learning-rate must be a number, got y"),
        (["--training.steps", "1.5"], "--training.steps must be a whole number, got 1.5"),
        (["--stages.edges", "a", "b"], "--stages.edges must be values of its kind, as --help shows, got a, b"),
    ],
)
def test_a_value_of_another_kind_is_a_short_line(capsys, words, text):
    assert dispatch(["train", "digits", *words]) != 0
    error = capsys.readouterr().err
    assert text in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ("--step", "did you mean --training.steps?"),
        ("--batchsize", "did you mean --training.batch-size?"),
        ("--process", "no option --process; there are --process.beta-max, --process.beta-min, --process.kind,"),
        ("--qwertz", "no option --qwertz; see msd train --help"),
    ],
)
def test_an_option_without_its_section_is_found(capsys, option, text):
    assert dispatch(["train", "digits", option, "3"]) != 0
    assert text in capsys.readouterr().err
