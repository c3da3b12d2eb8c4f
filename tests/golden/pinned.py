"""What is pinned and how it is computed: by the command line and the files that it writes, whatever lies behind it.

`make.py` wrote the numbers with version 0.1; `test_golden.py` and `test_golden_files.py` compute them again.
"""

import io
import json
import math
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path

from PIL import Image

from multistage_diffusion.cli import dispatch
from multistage_diffusion.cli.profile import count
from multistage_diffusion.recipes import preset, recipe

HERE = Path(__file__).parent
OLD = HERE / "v0.1"
THREADS = ["--threads", "1"]  # results repeat to the bit only with the same number

PROCESSES = {
    "vp-eps": {"kind": "vp", "prediction": "eps"},
    "vp-v": {"kind": "vp", "prediction": "v"},
    "vp-cosine": {"kind": "vp-cosine", "prediction": "v"},
    "ve": {"kind": "ve"},
    "edm": {"kind": "edm", "sigma_data": 0.54},
    "ldm": {"kind": "ldm"},
    "flow": {"kind": "flow"},
}
ARCHITECTURES = ("multistage", "unified", "separate")
BASE = {
    "stages": {"edges": [0.6, 3.0]},
    "model": {"width": 8, "decoder_widths": [8, 12, 4], "multipliers": [1], "blocks": 1, "attention": []},
    "training": {
        "steps": 20, "batch_size": 8, "learning_rate": 2e-3, "warmup_images": 40, "ema_half_life": 40.0,
        "ema_ramp_up": None, "save_every": 20, "log_every": 1,
    },
}  # fmt: skip
DROPOUT = {"model": {"dropout": 0.2}}
DEEPER = {"multipliers": [1, 2], "attention": [4]}
# What a process and an architecture have beside the base, so that each option is trained somewhere.
EXTRA = {
    "vp-eps-multistage": DROPOUT,
    "vp-eps-unified": {"data": {"flip": True}, "training": {"weight_decay": 0.1}},
    "vp-eps-separate": {"training": {"batches": "single-uniform"}},
    "vp-v-multistage": {"engine": {"accumulation": 2}, "model": {**DEEPER, "dropout": 0.2}},
    "vp-v-unified": DROPOUT,
    "vp-v-separate": {"model": {"classes": 10}},
    "vp-cosine-multistage": {"training": {"batches": "single-p"}},
    "vp-cosine-separate": {"model": {**DEEPER, "resampling": "conv", "head_channels": 4}},
    "ve-multistage": {"model": {"multipliers": [1, 1], "filter": "fir", "input_pyramid": True}},
    "ve-unified": {"training": {"clip_norm": None, "betas": [0.8, 0.95]}},
    "edm-multistage": {
        "data": {"augment_probability": 0.4},
        "model": {**DEEPER, "augment_labels": 9, "middle": "decoder", "dropout": 0.13},
    },
    "edm-unified": {"model": {"middle": "decoder", "classes": 10}, "training": {"label_dropout": 0.5}},
    "edm-separate": {"training": {"quotas": [0.5, 0.25, 0.25]}},
    "ldm-multistage": {
        "model": {**DEEPER, "decoder_attention": "all", "resampling": "conv", "skip_scale": 1.0, "groups": 4,
                  "norm_eps": 1e-5, "frequency_shift": 0, "classes": 10},
    },
    "ldm-unified": {"model": {"multipliers": [1, 1], "resampling": "conv-after"}, "engine": {"checkpointing": True}},
    "flow-multistage": {"data": {"resolution": 6}, "model": {"attention": [6]}},
    "flow-separate": {"training": {"seed": 7}, **DROPOUT},
}  # fmt: skip
RUNS = [f"{process}-{architecture}" for process in PROCESSES for architecture in ARCHITECTURES]

# One of each process, in all architectures, with most options: what `make test` trains. The others are slow tests.
QUICK_RUNS = (
    "vp-eps-separate", "vp-v-multistage", "vp-cosine-multistage", "ve-unified", "edm-unified", "ldm-unified",
    "flow-unified",
)  # fmt: skip

SAMPLED = "vp-v-multistage"  # the run that images are drawn from and whose held-out loss is taken
SOLVERS = (
    "heun", "euler", "ddim", "ancestral", "dpm-1", "dpm-2", "dpm-3", "dpmpp-2m", "dpmpp-3m", "sde-dpmpp-2m",
)  # fmt: skip
SAMPLES, SAMPLE_STEPS = 4, 6
LOSS_KEYS = ("loss", "loss_error", "stage_loss", "sigma_loss")

SMALL_PRESETS = ("digits",)
LARGE_PRESETS = (
    "digits-edm", "digits-flow", "digits-ldm", "vp-cifar10", "edm-cifar10",
    "edm-celeba", "ldm-celebahq", "fashion-mnist", "fashion-mnist-edm",
    "fashion-mnist-flow", "fashion-mnist-ldm", "fashion-mnist-latent",
)  # fmt: skip
CLUSTERS = {
    "vp": ["digits", "--process", "vp"],
    "edm": ["digits", "--process", "edm"],
    "edm-4-variance": ["digits", "--process", "edm", "--stages", "4", "--samples", "2000"],
    "flow-snr": ["digits", "--process", "flow", "--method", "snr"],
    "vp-timestep": ["digits", "--process", "vp", "--method", "timestep"],
}
CLUSTER_KEYS = ("edges", "edges_t", "intervals", "shares", "images")


# What later versions changed in the presets: the networks published for each architecture, edges to the step, samplers.
OLD_PRESETS = {
    "vp-cifar10": {
        "model": {"filter": "box", "input_pyramid": False, "groups": 16},
        "sampling": {"spacing": "log-snr"},
    },
    "ldm-celebahq": {"edges": (2.1531271, 5.3151631)},
}


def profile(name: str, architecture: str) -> dict:
    """Parameters and FLOPs of a preset as version 0.1 had it."""
    if name not in OLD_PRESETS:
        return msd("profile", name, "--architecture", architecture)
    changes, now, sampling = OLD_PRESETS[name], preset(name, architecture), recipe(name).sampling
    model = replace(now.model, **changes.get("model", {}))
    old = replace(now, model=model, edges=changes.get("edges", now.edges))
    return json.loads(json.dumps(count(name, old, replace(sampling, **changes.get("sampling", {})))))


def config(run: str) -> dict:
    """The whole difference from the recipe `digits`, as `msd train --config` reads it."""
    process, architecture = run.rsplit("-", 1)
    document = json.loads(json.dumps(BASE)) | {"process": PROCESSES[process]}
    document["model"]["architecture"] = architecture
    for section, values in EXTRA.get(run, {}).items():
        document[section] = {**document.get(section, {}), **values}
    return document


def msd(*words) -> dict:
    """The document that a command prints; it must succeed, and warn of nothing."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = dispatch([*map(str, words), "--json"])
    assert code == 0, f"msd {' '.join(map(str, words))}: {err.getvalue()}"
    assert "warning" not in err.getvalue(), err.getvalue()
    return json.loads(out.getvalue())


def train(run: str, folder: Path) -> Path:
    """Train a run of the table in a new folder under one that exists."""
    (folder / f"{run}.json").write_text(json.dumps(config(run)))
    msd("train", "digits", "--config", folder / f"{run}.json", "--out", folder / run, *THREADS)
    return folder / run


def steps(run: Path) -> list[dict]:
    """Loss and gradient norm of every step, in full precision, of a run with `training.log_every` 1."""
    return steps_of(run / "metrics.jsonl")


def steps_of(file: Path) -> list[dict]:
    """The same of a file of such lines."""
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    names = ("step", "loss", "stage_loss", "gradient_norm", "learning_rate", "training_flops")
    return [{name: line[name] for name in names} for line in lines if "loss" in line]


def picture(path: Path) -> list[list[int]]:
    """The rows of a grey picture."""
    with Image.open(path) as image:
        grey = image.convert("L")
        data, wide = list(grey.tobytes()), grey.width
    return [data[start : start + wide] for start in range(0, len(data), wide)]


def draw(run: Path, out: Path, *words) -> dict:
    """What `msd sample` counts, and the pictures that it writes."""
    document = msd("sample", run, "--out", out, *THREADS, *words)
    return {
        **{name: document[name] for name in ("nfe", "stage_calls", "solver", "steps")},
        "pictures": [picture(file) for file in sorted((out / "images").glob("*.png"))],
    }


def floats(run: Path, solver: str) -> dict:
    """Mean, standard deviation and first values of the images before they are rounded for a file."""
    import multistage_diffusion as ours

    images = ours.sample(ours.load_run(run).denoiser, SAMPLES, solver=solver, steps=SAMPLE_STEPS, seed=0).images
    images = images.double()
    return {"mean": float(images.mean()), "std": float(images.std()), "first": images.flatten()[:8].tolist()}


def held_out(run: Path, *words) -> dict:
    """The held-out loss in all its parts."""
    document = msd("evaluate", run, "--metrics", "loss", *THREADS, *words)
    return {name: document[name] for name in LOSS_KEYS}


def near(found, wanted, rel: float = 1e-6, where: str = "", absolute: float = 1e-12) -> None:
    """Compare documents: numbers within `rel` or `absolute`, everything else equal."""
    if isinstance(wanted, dict):
        missing = wanted.keys() - found.keys()
        assert not missing, f"{where} lacks {missing}"
        for key, value in wanted.items():
            near(found[key], value, rel, f"{where}.{key}", absolute)
    elif isinstance(wanted, list):
        assert len(found) == len(wanted), f"{where}: {len(found)} for {len(wanted)}"
        for index, (one, other) in enumerate(zip(found, wanted, strict=True)):
            near(one, other, rel, f"{where}[{index}]", absolute)
    elif isinstance(wanted, float):
        close = found is not None and math.isclose(found, wanted, rel_tol=rel, abs_tol=absolute)
        assert close, f"{where}: {found!r} for {wanted!r}"
    else:
        assert found == wanted, f"{where}: {found!r} for {wanted!r}"


def near_pictures(found: list, wanted: list) -> None:
    """Equal, but for one level of 255 where rounding falls the other way."""
    flat, other = ([pixel for image in images for row in image for pixel in row] for images in (found, wanted))
    assert len(flat) == len(other) and max(abs(a - b) for a, b in zip(flat, other, strict=True)) <= 1
