"""What is measured on the files of v0.1/, by the command line alone."""

import os
import shutil
from pathlib import Path

import pinned
import safetensors
import safetensors.torch

RUNS = ("multistage", "edm", "classes", "latent")
MODELS = {  # folders that hold a model, and how to draw from them
    **dict.fromkeys(RUNS, ()),
    "classes": ("--class", "3", "7", "--guidance", "2"),
    "multistage/model": (),
    "saved": (),
}
LENGTHS = (0.07, 0.1)  # averages of the run multistage, put together from its snapshots
LENGTH_RUN = "multistage"
HALF = [
    "train", "digits", "--out", "half-done", "--threads", "1", "--model.width", "4", "--model.multipliers", "1",
    "--model.attention", "--model.blocks", "1", "--training.batch-size", "8", "--training.learning-rate", "2e-3",
    "--training.warmup-images", "40", "--training.ema-half-life", "40", "--training.log-every", "1",
    "--stages.edges", "2.0", "--model.decoder-widths", "4", "4", "--model.dropout", "0.2", "--data.flip",
    "--training.steps", "20", "--training.save-every", "10",
]  # fmt: skip
STANDARD = "diffusers-standard"


def drawn(model: str, out: Path) -> dict:
    return pinned.draw(Path(model), out, "--num", 2, "--steps", 4, *MODELS[model])


def loss(model: str, *words) -> dict:
    data = () if model in RUNS or model == LENGTH_RUN else ("--data", "digits")
    return pinned.held_out(Path(model), *data, *words)


def tensors(path: str | Path) -> tuple[dict, dict]:
    """Metadata and tensors of an exported file, the values as lists."""
    with safetensors.safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
    return metadata, {name: value.flatten().tolist() for name, value in safetensors.torch.load_file(path).items()}


def copy(to: Path) -> Path:
    """A copy that may be written to; the paths in its files are relative to it."""
    shutil.copytree(pinned.OLD, to)
    return to


def expected(folder: Path) -> dict:
    """All that the tests compare with; the working directory becomes a copy of v0.1/."""
    os.chdir(copy(folder / "files"))
    converted = folder / "converted"
    pinned.msd("convert", STANDARD, converted, "--resolution", 8)
    MODELS[str(converted)] = ()
    return {
        "verify": {run: pinned.msd("verify", run) for run in (*RUNS, "half-done", "saved")},
        "draw": {model: drawn(model, folder / model.replace("/", "-")) for model in MODELS if model != str(converted)},
        "loss": {model: loss(model) for model in MODELS if model != str(converted)},
        "loss_of_length": {str(length): loss(LENGTH_RUN, "--ema-length", length) for length in LENGTHS},
        "loss_raw": loss(LENGTH_RUN, "--weights", "raw"),
        "half_done": pinned.steps_of(Path("half-done.jsonl")),
        "shards": pinned.msd("data", "shards:shards"),
        "digits": pinned.msd("data", "digits"),
        "converted": loss(str(converted)),
        "profile": pinned.msd("profile", "multistage"),
    }
