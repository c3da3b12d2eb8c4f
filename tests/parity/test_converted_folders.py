"""Converted folders in a process that has diffusers alone, and with this package beside it."""

import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

import tiny
from multistage_diffusion.backbones import BACKBONES
from multistage_diffusion.errors import ConfigError
from multistage_diffusion.interop.bundle import bundle
from multistage_diffusion.interop.export import export
from multistage_diffusion.noise import EDM, LDM, VE, VP, Cosine, Flow

pytestmark = pytest.mark.filterwarnings(  # of diffusers itself
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)
DRAW = """
import sys, numpy, torch
if "alone" in sys.argv:
    sys.modules.update(dict.fromkeys(("multistage_diffusion", "jaxtyping", "beartype", "pydantic", "tyro", "rich")))
elif "beside" in sys.argv:
    import multistage_diffusion.interop.pipeline
from diffusers import DiffusionPipeline

def draw(folder):
    options = {"trust_remote_code": True} if "trust" in sys.argv else {}
    pipeline = DiffusionPipeline.from_pretrained(folder, low_cpu_mem_usage=False, **options)
    pipeline.set_progress_bar_config(disable=True)
    options = {"class_labels": 1, "guidance_scale": 2.0} if pipeline.unet.classes else {}
    return pipeline, pipeline(num_inference_steps=5, generator=torch.Generator().manual_seed(0), output_type="np",
                              **options).images

pipeline, images = draw(sys.argv[1])
numpy.save(sys.argv[2], images)
pipeline.save_pretrained(sys.argv[2] + "-again")  # what was loaded from code in a folder is saved with that code
assert (draw(sys.argv[2] + "-again")[1] == images).all()
"""


def draw(folder, out, *words):
    environment = {**os.environ, "HF_HOME": str(folder.parent / "cache"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", DRAW, str(folder), str(out), *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    home = tmp_path_factory.mktemp("converted")
    export(tiny.denoiser(replace(tiny.MODEL, classes=3), VP(prediction="v")), home / "staged")
    return home / "staged"


@pytest.mark.slow
def test_a_folder_holds_all_that_diffusers_needs(folder, tmp_path):
    done = draw(folder, tmp_path / "alone.npy", "alone", "trust")
    assert done.returncode == 0, done.stderr[-800:]
    for path in (folder, tmp_path / "alone.npy-again"):  # with the package, without trust
        pipeline = DiffusionPipeline.from_pretrained(str(path), low_cpu_mem_usage=False)
        pipeline.set_progress_bar_config(disable=True)
        seed = torch.Generator().manual_seed(0)
        images = pipeline(class_labels=1, guidance_scale=2.0, num_inference_steps=5, generator=seed, output_type="np")
        assert (images.images == np.load(tmp_path / "alone.npy")).all()


@pytest.mark.slow
def test_without_trust_and_without_the_package_diffusers_says_what_is_missing(folder):
    done = draw(folder, folder.parent / "none.npy", "alone")
    assert done.returncode == 1 and "Pass `trust_remote_code=True`" in done.stderr


@pytest.mark.slow
def test_code_of_a_folder_is_not_run_where_the_package_is(folder, tmp_path):
    export(tiny.denoiser(), tmp_path / "staged")
    for name in ("pipeline.py", "unet/multistage_unet.py"):
        (tmp_path / "staged" / name).write_text("raise SystemExit(77)")
    assert draw(tmp_path / "staged", tmp_path / "images.npy", "beside", "trust").returncode == 0
    assert draw(tmp_path / "staged", tmp_path / "images.npy", "alone", "trust").returncode == 77


@pytest.mark.parametrize("process", [VP(), Cosine(), LDM(), EDM(), Flow(), VE()])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_backbone_and_process_fits_into_one_file(backbone, process, tmp_path):
    from multistage_diffusion.interop.multistage_unet import MultistageUNet

    text = bundle(MultistageUNet, backbone, type(process))
    assert "import multistage_diffusion" not in text and "from multistage_diffusion" not in text
    assert "jaxtyping" not in text and "\0" not in text
    compile(text, "multistage_unet.py", "exec")


def test_a_class_that_no_file_can_hold_is_refused():
    class Inside:
        """Of a function, not of a module."""

    with pytest.raises(ConfigError, match="is not at the top of test_converted_folders"):
        bundle(Inside)


def test_gradient_checkpointing_is_switched_on_as_in_diffusers():
    from multistage_diffusion.config import to_dict
    from multistage_diffusion.interop.multistage_unet import MultistageUNet

    unet = MultistageUNet(
        model=to_dict(tiny.MODEL), process={"kind": "vp"}, edges=list(tiny.EDGES), shape=list(tiny.SHAPE)
    )
    tiny.randomise(unet).train()
    x, time = torch.randn(2, *tiny.SHAPE), torch.tensor([10, 900])
    gradients = []
    for enabled in (False, True, False):
        unet.enable_gradient_checkpointing() if enabled else unet.disable_gradient_checkpointing()
        assert unet.is_gradient_checkpointing == enabled
        kinds = {type(block) for blocks in unet.network.blocks() for block in blocks}
        assert all(hasattr(kind, "kept_whole") == enabled for kind in kinds)
        unet.zero_grad()
        unet(x, time).sample.square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in unet.named_parameters() if p.grad is not None})
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], atol=1e-6, rtol=1e-5)
