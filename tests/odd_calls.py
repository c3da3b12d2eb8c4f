"""Calls from Python with odd arguments, in a process that checks no types: prints those that are not answered.

Each function is called with good arguments but one; the answer must be a result, or one line of our own errors.
"""

import os
import sys
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

import multistage_diffusion as msd
import tiny
from multistage_diffusion.errors import UserError

NUMBERS = [
    0,
    -1,
    1.5,
    2.0,
    True,
    float("nan"),
    float("inf"),
    2**63,
    -(2**70),
    "3",
    "many",
    None,
    [1],
    (),
    np.int64(2),
    b"x",
    torch.tensor(2),
    torch.tensor([1, 2]),
    {},
]
PICTURES = tiny.images(labels=True)
DATA = [
    None,
    "digits",
    3,
    [],
    [[1]],
    np.zeros((4, 8, 8)),
    np.zeros((3, 8, 8), np.uint8),
    np.array(["a"]),
    PICTURES.images[:0],
    torch.zeros(2, 3),
    torch.zeros(5, 1, 8, 8),
    torch.randn(5, 2, 8, 8),
    torch.full((5, 1, 8, 8), torch.nan),
    torch.zeros(5, 1, 8, 8, dtype=torch.int64),
    torch.zeros(5, 4, 8, 8, dtype=torch.uint8),
    DataLoader(TensorDataset(PICTURES.images)),
    TensorDataset(PICTURES.images),
    TensorDataset(PICTURES.images, PICTURES.labels),
    PICTURES.images,
    PICTURES.images.numpy(),
    tiny.images(),
    tiny.images(1),
    tiny.images(shape=(3, 8, 8)),
    PICTURES,
]
LABELS = [
    0,
    2,
    3,
    -1,
    1.5,
    "a",
    "d",
    "0",
    ["a", "b"],
    [0, 1],
    [0],
    [0, 9],
    [0.5, 1],
    [None, 1],
    [],
    True,
    [[0, 1]],
    {},
    b"a",
    torch.tensor([0, 1]),
    torch.tensor(1),
    torch.tensor([0.5, 1]),
    np.array([1, 2]),
    np.array(["a", "b"]),
    2**70,
]
WORDS = ["", "nothing", 3, None, [], b"x", ("ema",), "../x\0", "x" * 5000]


def odd(function, values, **good):
    """Call with each odd value, and print what is no answer; how many calls there were."""
    for name, pool in values.items():
        for value in pool:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    function(**{**good, name: value})
            except UserError as error:
                if "\n" in str(error):
                    print(f"{function.__name__}({name}={value!r:.60}): more than one line: {str(error)!r:.200}")
            except Exception as error:
                print(f"{function.__name__}({name}={value!r:.60}): {type(error).__name__}: {str(error)!r:.160}")
    return sum(map(len, values.values()))


def train(folder):
    """Of `msd.train`: data, configuration and where to."""

    def call(data=PICTURES, out=None, device="cpu", **training):
        out = Path(tempfile.mkdtemp(dir=folder)) / "run" if out is None else out
        config = tiny.run_config(replace(tiny.SMALLEST, classes=3), **{"steps": 1, "save_every": 1, **training})
        return msd.train(config, out, data=data, device=device)

    call.__name__ = "train"
    counts = {name: NUMBERS for name in ("steps", "batch_size", "learning_rate", "seed", "label_dropout")}
    return odd(call, {"data": DATA, "device": [*WORDS, "meta", "cuda:99"], **counts}) + odd(
        call, {"out": [3, [], b"x", "x\0y", "/proc/nothing", __file__]}
    )


def use(folder):
    """Of a trained run: `sample`, `evaluate`, `load_run`."""
    run = folder / "run"
    msd.train(
        tiny.run_config(replace(tiny.SMALLEST, classes=3), steps=1, save_every=1), run, data=PICTURES, device="cpu"
    )
    denoiser = msd.load_run(run, device="cpu").denoiser
    numbers = {name: NUMBERS for name in ("num", "seed", "steps", "guidance", "batch_size", "churn", "eta")}
    count = odd(
        msd.sample,
        {"labels": LABELS, "seeds": LABELS, "solver": WORDS, "spacing": WORDS, **numbers},
        denoiser=denoiser,
        num=2,
        steps=2,
        labels="a",
    )
    count += odd(msd.sample, {"denoiser": [None, 3, "run"]}, num=2)
    numbers = {name: NUMBERS for name in ("num", "seed", "batch_size")}
    count += odd(
        msd.evaluate,
        {"reference": DATA, "metrics": [*WORDS, ["loss"], ["fd"], "loss"], "features": WORDS, **numbers},
        denoiser=denoiser,
        reference=PICTURES,
    )
    count += odd(
        msd.load_run,
        {"path": [*WORDS, folder, 3.5], "weights": WORDS, "sigma_rel": NUMBERS, "device": [*WORDS, "cuda:99"]},
        path=run,
        device="cpu",
    )
    return count


def cluster():
    """Of `msd.cluster` and the data."""
    numbers = {name: NUMBERS for name in ("stages", "samples", "seed", "max_images", "alpha", "resamples")}
    count = odd(
        msd.cluster,
        {"data": DATA, "process": [None, 3, "nothing", "vp"], "labels": LABELS, "method": WORDS, **numbers},
        data=PICTURES,
        process=msd.VP(),
        samples=100,
    )
    return (
        count
        + odd(
            msd.as_data, {"x": DATA, "labels": LABELS, "classes": [("a",), 3, "abc"], "scale": WORDS}, x=PICTURES.images
        )
        + odd(
            msd.load_data,
            {"source": WORDS, "split": WORDS, "root": [*WORDS, "/"], "resolution": NUMBERS, "max_bad": NUMBERS},
            source="digits",
        )
    )


def several(folder, examples):
    """Of all four entries, several odd arguments at once; how many calls there were."""
    run = folder / "several"
    config = tiny.run_config(replace(tiny.SMALLEST, classes=3), steps=1, save_every=1)
    msd.train(config, run, data=PICTURES, device="cpu")
    denoiser, count = msd.load_run(run, device="cpu").denoiser, 0

    def train(data=PICTURES, **training):
        changed = tiny.run_config(replace(tiny.SMALLEST, classes=3), **{"steps": 1, "save_every": 1, **training})
        return msd.train(changed, Path(tempfile.mkdtemp(dir=folder)) / "run", data=data, device="cpu")

    pools = {
        train: {"data": DATA, **{name: NUMBERS for name in ("batch_size", "learning_rate", "seed", "label_dropout")}},
        msd.sample: {"labels": LABELS, "seeds": LABELS, "num": NUMBERS, "guidance": NUMBERS, "solver": WORDS},
        msd.evaluate: {"reference": DATA, "metrics": [*WORDS, ["fd"]], "features": WORDS, "seed": NUMBERS},
        msd.cluster: {"data": DATA, "process": [None, 3, "vp"], "labels": LABELS, "stages": NUMBERS, "seed": NUMBERS},
    }
    good = {
        train: {},
        msd.sample: {"denoiser": denoiser, "num": 2, "steps": 1},
        msd.evaluate: {"denoiser": denoiser, "reference": PICTURES},
        msd.cluster: {"data": PICTURES, "process": msd.VP(), "samples": 50},
    }

    @settings(max_examples=examples, deadline=None, derandomize=True, database=None)
    @given(st.data())
    def fuzz(data):
        nonlocal count
        function = data.draw(st.sampled_from(list(pools)))
        names = data.draw(st.sets(st.sampled_from(list(pools[function])), min_size=2))
        first, *others = sorted(names)
        pick = {name: data.draw(st.integers(0, len(pools[function][name]) - 1)) for name in sorted(names)}
        chosen = {name: pools[function][name][pick[name]] for name in others}
        count += odd(function, {first: [pools[function][first][pick[first]]]}, **{**good[function], **chosen})

    fuzz()
    return count


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        calls = {"train": lambda: train(Path(place)), "use": lambda: use(Path(place)), "cluster": cluster}
        calls["several"] = lambda: several(Path(place), int(os.environ.get("ODD_EXAMPLES", "60")))
        print(sum(calls[name]() for name in sys.argv[1:] or calls), "calls")
