"""docs/finetuning.md: its commands and its Python run, from a folder of diffusers to one for diffusers."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from multistage_diffusion.cli import dispatch
from multistage_diffusion.runs import load_run

PAGE = (Path(__file__).parents[1] / "docs" / "finetuning.md").read_text()
COMMANDS = [line for block in re.findall(r"```console\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]
PYTHON = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)
FEWER = {"--training.steps 2000": "--training.steps 4", "--num 16": "--num 2"}
EXTRA = {
    "train": "--training.batch-size 8 --threads 1",
    "merge": "--max-images 16 --steps 10 --threads 1",
    "sample": "--threads 1",
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:__array__")  # of diffusers, with numpy 2
def test_the_page_runs(tmp_path, monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(16, 32), layers_per_block=1,
        norm_num_groups=4, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()).save_pretrained(tmp_path / "ddpm")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MSD_CACHE", str(tmp_path / "cache"))
    for command in COMMANDS:
        for words, fewer in FEWER.items():
            command = command.replace(words, fewer)
        name = command.split()[1]
        assert dispatch([*shlex.split(command)[1:], *EXTRA.get(name, "").split()]) == 0, command
    staged, branched = load_run("runs/staged"), load_run("runs/branched")
    assert staged.denoiser.network.stages == 3 and branched.trunk_images == 8
    assert diffusers.DDPMPipeline.from_pretrained("models/merged-diffusers").unet.config.sample_size == 8
    assert PYTHON is not None
    exec(PYTHON[1], {})
    assert load_run("runs/from-python").step == 2
