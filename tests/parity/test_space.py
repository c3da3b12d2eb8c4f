"""A converted run as a Space: the app that lies in the folder draws with it."""

import runpy
import sys
from dataclasses import replace
from types import ModuleType
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import yaml
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

import tiny
from multistage_diffusion.cli import dispatch
from multistage_diffusion.training.run import train

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")


class Gradio(ModuleType):
    """Stands for gradio, which draws a page: remembers what the button calls, and with which controls."""

    def __init__(self):
        super().__init__("gradio")
        self.button = MagicMock()
        self.choices = []

    def __getattr__(self, name):
        return MagicMock()

    def Button(self, *words, **options):  # noqa: N802  (gradio's name)
        return self.button

    def Dropdown(self, choices, **options):  # noqa: N802
        self.choices = choices
        return MagicMock()


@pytest.fixture(scope="module", params=[3, 0], ids=["classes", "no classes"])
def space(request, tmp_path_factory):
    home = tmp_path_factory.mktemp("space")
    model = replace(tiny.SMALLEST, classes=request.param)
    if not request.param:
        model = replace(model, architecture="unified")
    data = tiny.images(labels=bool(request.param))
    train(tiny.run_config(model, steps=2), home / "run", data=data)
    assert dispatch(["convert", str(home / "run"), str(home / "digits drawn"), "--space", "--license", "mit"]) == 0
    return home / "digits drawn", request.param


def test_the_app_draws_what_the_pipeline_draws(space, monkeypatch):
    folder, classes = space
    gradio = Gradio()
    monkeypatch.setitem(sys.modules, "gradio", gradio)
    monkeypatch.setenv("HF_HOME", str(folder.parent / "cache"))
    app = runpy.run_path(str(folder / "app.py"))
    function, controls, _ = gradio.button.click.call_args.args
    assert function is app["draw"] and len(controls) == 5 and len(gradio.choices) == classes
    drawn = app["draw"](gradio.choices[1] if classes else None, 2.0, 3, 2, 7)
    assert [image.size for image in drawn] == [(256, 256)] * 2
    pipeline = DiffusionPipeline.from_pretrained(str(folder), low_cpu_mem_usage=False)
    options = {"class_labels": 1, "guidance_scale": 2.0} if classes else {}
    seeds = [torch.Generator().manual_seed(seed) for seed in (7, 8)]
    expected = pipeline(batch_size=2, num_inference_steps=3, generator=seeds, output_type="pil", **options).images
    for image, other in zip(drawn, expected, strict=True):
        assert (np.asarray(image) == np.asarray(other.resize((256, 256), 0))).all()


def test_the_folder_has_the_hubs_front_matter_and_the_card(space):
    folder, _ = space
    front, text = (folder / "README.md").read_text().split("---\n", 2)[1:]
    assert yaml.safe_load(front) == {"title": "digits drawn", "sdk": "gradio", "app_file": "app.py", "pinned": False}
    assert text.lstrip().startswith("# digits drawn") and "## Stages" in text
    assert "diffusers>=" in (folder / "requirements.txt").read_text()


def test_it_is_for_runs(tmp_path, capsys):
    (tmp_path / "x.safetensors").write_bytes(b"")
    assert dispatch(["convert", str(tmp_path / "x.safetensors"), str(tmp_path / "out"), "--space"]) == 2
    assert "space" in capsys.readouterr().err
