"""msd sample and msd evaluate, on a run of a few steps."""

import json
import zipfile

import numpy as np
import pytest
from PIL import Image

import tiny
from multistage_diffusion.cli import dispatch
from multistage_diffusion.data import load_data
from multistage_diffusion.metrics.extractors import load_extractor
from multistage_diffusion.training.run import train


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(
        tiny.run_config(steps=6, learning_rate=0.1, ema_half_life=100.0, ema_ramp_up=None), folder, data=tiny.images()
    )
    return folder


@pytest.fixture
def call(capsys):
    def call(*words):
        code = dispatch([str(word) for word in words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_a_trace_is_that_of_the_first_batch_whatever_the_solver(run, tmp_path, call):
    for solver, columns in (("dpm-3", 3), ("heun", 4)):  # a singlestep solver reports fewer steps than calls
        words = ("--num", 5, "--batch-size", 3, "--solver", solver, "--steps", 4 if solver == "heun" else 7)
        assert call("sample", run, "--out", tmp_path / solver, "--denoise-trace", *words)[0] == 0
        with Image.open(tmp_path / solver / "trace.png") as strip:
            wide, _ = strip.size
        assert wide == columns * (8 * 8 + 6)


def test_samples_are_measured_as_they_were_written(run, tmp_path, call):
    assert call("sample", run, "--num", 30, "--steps", 2, "--out", tmp_path / "samples")[0] == 0
    code, stdout, _ = call("evaluate", tmp_path / "samples", "--data", "digits", "--metrics", "fd", "--json")
    assert code == 0 and json.loads(stdout)["samples"] == 30


def pixels(path):
    with Image.open(path) as picture:
        return np.asarray(picture, dtype=int)


def test_sample_writes_images_grid_trace_and_cost(run, tmp_path, call):
    out = tmp_path / "samples"
    code, stdout, _ = call("sample", run, "--num", 3, "--solver", "heun", "--steps", 2, "--seed", 7, "--out", out,
                           "--denoise-trace", "--json")  # fmt: skip
    document = json.loads(stdout)
    assert code == 0 and document["images"] == 3 and document["nfe"] == 3 and sum(document["stage_calls"]) == 3
    assert [file.rpartition("/")[2] for file in document["files"]] == [f"seed-{seed:08d}.png" for seed in (7, 8, 9)]
    assert pixels(document["files"][0]).shape == (8, 8)
    assert (out / "grid.png").is_file() and (out / "trace.png").is_file()


def test_a_seed_is_the_same_image_in_any_batch(run, tmp_path, call):
    for name, words in {"a": ("--num", 4, "--seed", 0), "b": ("--num", 1, "--seed", 2)}.items():
        assert call("sample", run, "--steps", 3, "--out", tmp_path / name, *words)[0] == 0
    one, other = (pixels(tmp_path / name / "images" / "seed-00000002.png") for name in "ab")
    assert np.abs(one - other).max() <= 1


def test_ema_is_the_default(run, tmp_path, call):
    ways = {"default": (), "ema": ("--weights", "ema", "--precision", "fp32"), "raw": ("--weights", "raw")}
    for name, words in ways.items():
        assert call("sample", run, "--num", 1, "--steps", 2, "--out", tmp_path / name, *words)[0] == 0
    default, ema, raw = (
        (tmp_path / name / "images" / "seed-00000000.png").read_bytes() for name in ("default", "ema", "raw")
    )
    assert default == ema != raw


def test_samples_replace_samples_and_nothing_else(run, tmp_path, call):
    out = tmp_path / "samples"
    assert call("sample", run, "--num", 2, "--steps", 1, "--out", out)[0] == 0
    assert call("sample", run, "--num", 1, "--steps", 1, "--out", out)[0] == 0
    assert len(list(out.glob("images/seed-*.png"))) == 1
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    code, _, stderr = call("sample", run, "--num", 1, "--out", tmp_path / "mine")
    assert code == 2 and "holds other files" in stderr
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--solver", "huen"), "got huen; did you mean heun?"),
        (("--steps", "0"), "steps must be at least 1"),
        (
            ("--spacing", "log-sn"),
            "karras, log-snr, quadratic-t, singlestep, uniform-t, got log-sn; did you mean log-snr?",
        ),
        (("--class", "3"), "unconditional"),
        (("--num", "0"), "num must be at least 1"),
        (("--device", "quantum"), "--device 'quantum' is not available"),
        (("--device", "meta"), "--device 'meta' is not supported"),
        (("--seed", "99999999999999999999"), "seed must be a whole number in [0, 2^63)"),
        (("--seed", "-1"), "seed must be a whole number in [0, 2^63), got -1"),
    ],
)
def test_wrong_options_are_one_line(run, tmp_path, call, words, message):
    code, stdout, stderr = call("sample", run, "--out", tmp_path / "out", *words)
    assert code == 2 and stdout == "" and not (tmp_path / "out").exists()
    assert message in stderr and stderr.startswith("error: ") and stderr.count("\n") == 1


def test_sampling_a_damaged_run_is_refused(run, tmp_path, call):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    weights = max((copy / "checkpoints").glob("step-*/ema.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-5] ^= 4
    weights.write_bytes(content)
    code, _, stderr = call("sample", copy, "--out", tmp_path / "out")
    assert code == 5 and str(weights) in stderr and not (tmp_path / "out").exists()


def test_evaluate_reads_the_held_out_loss_of_a_run(run, tmp_path, call):
    out = tmp_path / "figures.json"
    code, stdout, _ = call("evaluate", run, "--metrics", "loss", "--json", "--out", out)
    document = json.loads(stdout)
    assert code == 0 and document == json.loads(out.read_text())
    assert document["loss"] > 0 and len(document["stage_loss"]) == 3 and document["reference"]["images"] == 500


def test_evaluate_names_mistakes(run, tmp_path, call):
    assert "neither a run directory nor a folder" in call("evaluate", tmp_path / "none")[2]
    assert 'did you mean "fd"' in call("evaluate", run, "--metrics", "fdd")[2]
    assert "add --features inception" in call("evaluate", run, "--metrics", "fid")[2]
    assert 'did you mean "inception"' in call("evaluate", run, "--features", "inceptoin")[2]
    assert "one or more names" in call("evaluate", run, "--metrics", ",")[2]
    (tmp_path / "pictures").mkdir()
    assert "--data is needed" in call("evaluate", tmp_path / "pictures")[2]


def test_evaluate_takes_what_data_takes(run, tmp_path, call):
    """Images as guided-diffusion (arr_0 and arr_1, channels last) and EDM (zip) write them, and sources by name."""
    call("sample", run, "--num", 24, "--steps", 2, "--out", tmp_path / "samples")
    files = sorted((tmp_path / "samples" / "images").glob("*.png"))
    pictures = np.stack([pixels(file) for file in files]).astype(np.uint8)
    np.savez(tmp_path / "batch.npz", arr_0=pictures[..., None], arr_1=np.zeros(24, dtype=np.int64))
    with zipfile.ZipFile(tmp_path / "pictures.zip", "w") as archive:
        for file in files:
            archive.write(file, f"00000/{file.name}")
    paths = [tmp_path / name for name in ("samples", "batch.npz", "pictures.zip")]
    targets = [*paths, f"npz:{paths[1]}", f"folder:{files[0].parent}"]
    words = ("--data", "digits", "--metrics", "fd,is", "--json")
    figures = [json.loads(call("evaluate", target, *words)[1]) for target in targets]
    assert all(figure["fd"] == pytest.approx(figures[0]["fd"], rel=1e-6) for figure in figures)
    assert "is is of one split of 24 images; from 10000 on it is a mean over 10, as published" in figures[0]["cautions"]
    assert "no data source" in call("evaluate", f"npx:{tmp_path}", "--data", "digits")[2]


def test_evaluate_measures_a_folder_to_published_statistics(run, tmp_path, call):
    test, train = (load_data("digits", split=split) for split in ("test", "train"))
    features = load_extractor("classifier", train, test)(test.floats()).features.double().numpy()
    np.savez(tmp_path / "digits.npz", mu=features.mean(0), sigma=np.cov(features, rowvar=False))
    reference = ("--reference", tmp_path / "digits.npz")
    call("sample", run, "--num", 20, "--steps", 2, "--out", tmp_path / "samples")
    figures = [
        json.loads(call("evaluate", tmp_path / "samples", "--data", "digits", *words, "--json")[1])
        for words in ((), reference)
    ]
    assert figures[0]["fd"] == pytest.approx(figures[1]["fd"], rel=1e-6)
    assert figures[1]["statistics"]["source"] == str(tmp_path / "digits.npz")
    assert "is not a file" in call("evaluate", run, "--reference", tmp_path / "none.npz")[2]
    assert "test, train or FILE.npz" in call("evaluate", run, "--reference", "tset")[2]
    np.savez(tmp_path / "other.npz", mu=np.zeros(8), sigma=np.eye(8))
    words = ("--data", "digits", "--reference", tmp_path / "other.npz")
    assert "is of 8 features, and digits-classifier gives 64" in call("evaluate", tmp_path / "samples", *words)[2]
