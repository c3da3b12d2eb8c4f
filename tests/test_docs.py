"""The pages of docs/: commands and Python run as they stand, in a reader's order, on less (slow).

Commands get fewer steps and images. A command that cannot run here is listed in NOT_RUN with its reason, and its
options are still read. docs/finetuning.md has a test of its own; docs/extending.md shows examples/, which have one.
"""

import gzip
import importlib
import importlib.util
import struct

import pytest
import torch
from PIL import Image

import multistage_diffusion as msd
import pages
from multistage_diffusion import cli
from multistage_diffusion.files import write_json

PAGES = sorted(page.name for page in pages.DOCS.glob("*.md") if pages.blocks(page.name))
ELSEWHERE = {"extending.md", "finetuning.md"}  # tests/test_examples.py, tests/test_finetuning.py

# Later options replace earlier ones.
LESS = {
    "autoencoder": "--steps 2 --batch-size 8",
    "cluster": "--samples 2000",
    "evaluate": "--num 20 --steps 2",
    "sample": "--num 2 --steps 2",
    "train": "--training.steps 2 --training.batch-size 8 --training.warmup-images 8 --engine.precision fp32 "
    "--engine.gradient-accumulation 1 --engine.parallel ddp --logging.evaluate-images 20 --logging.grid-images 2",
}
NOT_RUN = {
    "--allocate": "trains proxy networks: tests/allocation",
    "--features efficientnet-lite0": "its weights are a package of their own",
    "--features inception": "its weights are downloaded",
    ".pt ": "a published file: tests/parity/official",
    ".pth ": "a published file: tests/parity/official",
    ".ckpt ": "a published file: tests/parity/official",
    "-XL-2.safetensors": "a published file: tests/parity",
    "DIT-PIPELINE-FOLDER": "a published folder: tests/parity",
    "dit-xl-2": "a large network",
    "vp-cifar10": "a large network",
    "edm-cifar10": "a large network",
    "msd demo": "minutes: tests/studies/test_demo.py",
    "msd serve": "until it is stopped: tests/test_serving.py",
    "msd study": "hours: tests/studies",
}
PYTHON_NOT_RUN = ("edm-cifar10-32x32-uncond-vp.pkl", "run_study(")


def words_of_msd(command):
    """The words after `msd`, of torchrun's commands, too; none of another program's."""
    program = "multistage_diffusion" if command[0] in ("torchrun", "srun") else "msd"
    return list(command[command.index(program) + 1 :]) if program in command else None


def all_commands():
    for page in PAGES:
        for block in pages.blocks(page):
            yield from ((page, words) for command in block.commands if (words := words_of_msd(command)))


def read_options(name, *words):
    """The options of a command that cannot run here; files that it would read are left out."""
    words = list(words)
    for option in ("--init", "--stages"):
        if option in words:
            del words[words.index(option) : words.index(option) + 2]
    module = importlib.import_module(f"multistage_diffusion.cli.{name}")
    assert module.parse(words) if "parse" in vars(module) else cli.parse(module.Options, name, words)


def write_fashion(folder):
    """A small set in the files of Fashion-MNIST: the digits of scikit-learn, enlarged."""
    folder.mkdir(parents=True)
    digits = msd.load_data("digits")
    for prefix, rows in (("train", slice(0, 600)), ("t10k", slice(600, 800))):
        pixels = (
            torch.nn.functional.interpolate(digits.pixels(torch.arange(len(digits))[rows]).float(), 28)
            .byte()
            .squeeze(1)
        )
        for name, array in ((f"{prefix}-images-idx3", pixels), (f"{prefix}-labels-idx1", digits.labels[rows].byte())):
            header = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
            with gzip.open(folder / f"{name}-ubyte.gz", "wb") as file:
                file.write(header + array.numpy().tobytes())


def write_photos(folder, classes=("cats", "dogs"), count=12, size=40):
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        noise = torch.randint(0, 256, (count, size, size, 3), generator=torch.Generator().manual_seed(number))
        for index, pixels in enumerate(noise.byte().numpy()):
            Image.fromarray(pixels).save(folder / name / f"{index}.png")


def write_ddpm(folder):
    diffusers = pytest.importorskip("diffusers")
    unet = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(16, 32), layers_per_block=1,
        norm_num_groups=4, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()).save_pretrained(folder)
    return {"unet": unet, "scheduler": diffusers.DDPMScheduler(), "stages": msd.Stages((0.5, 3.0))}


def small_run(folder, **changes):
    """A run of two steps, and its denoiser."""
    assert cli.dispatch(f"train digits --out {folder} {LESS['train']} --threads 1".split()) == 0
    return msd.load_run(folder).denoiser


def before_evaluation():
    denoiser = small_run("runs/before")
    return {"denoiser": denoiser, "images": msd.load_data("digits", split="test")}


def before_sampling():
    Image.new("L", (8, 8), 128).save("cat.png")
    Image.new("L", (8, 8), 255).save("hole.png")
    write_photos(pages.Path("cats"), ("cats",), 2, 8)
    for path in pages.Path("cats/cats").iterdir():
        Image.open(path).convert("L").save(path.parents[1] / path.name)
        path.unlink()
    pages.Path("cats/cats").rmdir()
    denoiser = small_run("RUN")
    return {"denoiser": denoiser, "pictures": msd.load_data("digits").floats()[:8], "torch": torch, "msd": msd}


def before_families():
    """A U-Net of diffusers, stages for it, and a unified model that becomes a pipeline of diffusers."""
    write_json(pages.Path("stages.json"), {"edges": [0.5, 3.0]})
    unified = "--model.architecture unified --model.groups 8 --out runs/unified --threads 1"
    assert cli.dispatch(f"train digits-ldm {unified} {LESS['train']}".split()) == 0
    assert cli.dispatch(["convert", "runs/unified", "models/unified"]) == 0
    return write_ddpm(pages.Path("ddpm-cifar10-32"))


def before_data():
    write_photos(pages.Path("photos"))
    return {}


def before_allocation():
    write_json(pages.Path("stages.json"), {"edges": [0.7, 5.7], "decoder_widths": [28, 20, 12]})
    return {}


BEFORE = {
    "allocation.md": before_allocation,
    "data.md": before_data,
    "evaluation.md": before_evaluation,
    "families.md": before_families,
    "sampling.md": before_sampling,
}
CHANGED = {  # in Python's text: what is long, or far away
    'features="inception", num=10_000': 'features="classifier", num=20',
    'features="classifier")  # fd and loss': 'features="classifier", num=20)',
    'msd.recipe("digits")': 'short(msd.recipe("digits"))',
    "torch.zeros(32, 32": "torch.zeros(8, 8",
    "mask[8:24, 8:24]": "mask[2:6, 2:6]",
    "resample=10": "resample=2",
    "variations = msd.sample(denoiser, 8": "variations = msd.sample(denoiser, 8, steps=4",
    "filled = msd.sample(denoiser, 8": "filled = msd.sample(denoiser, 8, steps=4",
    "(denoiser, 64, ": "(denoiser, 2, ",
    "(batch_size=4)": "(batch_size=1, num_inference_steps=2)",
    "batch_size=4, num_inference_steps=20": "batch_size=1, num_inference_steps=4",
}


def short(config):
    from dataclasses import replace

    return replace(config, training=replace(config.training, steps=2, batch_size=8))


def run_command(words):
    name, text = words[0], " ".join(["msd", *words, ""])
    if "tensorboard" in words and importlib.util.find_spec("tensorboard") is None:
        words = [word for word in words if word not in ("--logging.trackers", "tensorboard")]
    if any(part in text for part in NOT_RUN):
        return read_options(*words)
    less = f"{LESS.get(name, '')} --threads 1" if name not in ("convert", "export", "verify", "data") else ""
    if "--class" in words:
        less = less.replace("--num 2", "--num 10")
    assert cli.dispatch([*words, *less.split()]) == 0, text


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:__array__")  # of diffusers, with numpy 2
@pytest.mark.filterwarnings("ignore:the .* averages that .* stored come only within")  # of runs this short
@pytest.mark.parametrize("page", [page for page in PAGES if page not in ELSEWHERE])
def test_the_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.setenv("MSD_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    write_fashion(tmp_path / "cache/fashion-mnist")
    names = {"short": short, **BEFORE.get(page, dict)()}
    for block in pages.blocks(page):
        for command in block.commands:
            if (words := words_of_msd(command)) is not None:
                run_command(words)
        if block.python and not any(part in block.python for part in PYTHON_NOT_RUN):
            text = block.python
            for part, less in CHANGED.items():
                text = text.replace(part, less)
            exec(text, names)


def test_what_is_left_out_is_still_in_the_pages():
    texts = [" ".join(["msd", *words, ""]) for _, words in all_commands()]
    assert [part for part in NOT_RUN if not any(part in text for text in texts)] == []
    python = [block.python for page in PAGES for block in pages.blocks(page)]
    assert [part for part in PYTHON_NOT_RUN if not any(part in text for text in python)] == []
    assert ELSEWHERE < set(PAGES)
