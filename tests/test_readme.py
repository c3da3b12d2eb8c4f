"""The README: its links exist, its commands parse, and (slow) run from a clean folder."""

import ast
import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import multistage_diffusion as msd
from multistage_diffusion import cli
from multistage_diffusion.files import write_json

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = re.findall(r"^msd .*?(?=\s+#|$)", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
PYTHON, STAGING = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)


def save_ddpm(folder):
    """What the README calls `ddpm`: a folder that diffusers saved; its network and scheduler."""
    diffusers = pytest.importorskip("diffusers")
    unet = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(16, 32), layers_per_block=1,
        norm_num_groups=4, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    scheduler = diffusers.DDPMScheduler()
    diffusers.DDPMPipeline(unet, scheduler).save_pretrained(folder)
    return unet, scheduler


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    targets = [target for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()) if "://" not in target]
    assert not [target for target in targets if not (page.parent / target).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_hold_no_placeholders(page):
    assert not re.search(r"DEMO_[A-Z]+|@[A-Z]+@|TODO|TBD", page.read_text())


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in re.findall(r"\S*stages\.json", command):
        write_json(tmp_path / name, {"edges": [0.69, 5.7]})  # what the command before leaves
    if "--init ddpm" in command:
        save_ddpm(tmp_path / "ddpm")
    name, *words = shlex.split(command)[1:]
    module = importlib.import_module(f"multistage_diffusion.cli.{name}")
    options = module.parse(words) if "parse" in vars(module) else cli.parse(module.Options, name, words)
    assert options is not None


def test_every_command_of_the_program_is_shown():
    shown = {name for page in PAGES for name in re.findall(r"^msd (\w+)", page.read_text(), flags=re.MULTILINE)}
    assert shown | {"demo"} == set(cli.COMMANDS)


@pytest.mark.slow
def test_commands_run_one_after_the_other(tmp_path):
    environment = {**os.environ, "MSD_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "2"}
    save_ddpm(tmp_path / "ddpm")
    for command in COMMANDS:
        words = shlex.split(command)[1:]
        if words[0] == "serve":  # until it is stopped: tests/test_serving.py
            continue
        if words[0] == "train":
            words += ["--training.steps", "30"]
        done = subprocess.run([sys.executable, "-m", "multistage_diffusion", *words], cwd=tmp_path, env=environment,
                              capture_output=True, text=True)  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stderr}"


@pytest.mark.slow
def test_five_lines_of_python_run(tmp_path):
    code = PYTHON.replace('msd.recipe("digits")', 'short(msd.recipe("digits"))')
    assert code != PYTHON
    code = (
        "from dataclasses import replace\n"
        "def short(config):\n    return replace(config, training=replace(config.training, steps=5))\n" + code
    )
    environment = {**os.environ, "MSD_CACHE": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    levels = ast.literal_eval(done.stdout)
    assert len(levels) > 5 and all(0 < level["loss"] < 10 and level["error"] > 0 for level in levels)


@pytest.mark.filterwarnings("ignore:__array__")  # of diffusers, with numpy 2
def test_a_network_of_diffusers_is_staged(tmp_path):
    unet, scheduler = save_ddpm(tmp_path / "ddpm")
    names = {"torch": torch, "msd": msd, "unet": unet, "scheduler": scheduler}
    exec(STAGING, names)
    assert isinstance(names["staged"], type(unet))
    assert [group["lr"] for group in names["optimizer"].param_groups] == [1e-5, 1e-4, 1e-4, 5e-5]
