"""Our models as folders for diffusers: its pipelines draw our images, and a folder comes back as it was."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import safetensors.torch
import torch
import yaml
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.vq_model import VQModel
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_edm_euler import EDMEulerScheduler
from diffusers.schedulers.scheduling_euler_ancestral_discrete import EulerAncestralDiscreteScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_heun_discrete import HeunDiscreteScheduler
from diffusers.schedulers.scheduling_ipndm import IPNDMScheduler
from diffusers.schedulers.scheduling_sde_ve import ScoreSdeVeScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler

import tiny
from multistage_diffusion.cli import dispatch
from multistage_diffusion.config import ModelConfig
from multistage_diffusion.data.autoencoder import Autoencoder
from multistage_diffusion.data.latents import LatentCodec
from multistage_diffusion.denoiser import Denoiser
from multistage_diffusion.errors import ConfigError
from multistage_diffusion.interop.export import _multistage, export
from multistage_diffusion.interop.multistage_pipeline import require_fit
from multistage_diffusion.interop.pipeline import MultistagePipeline, MultistageUNet
from multistage_diffusion.noise import EDM, LDM, VE, VP, Cosine, Flow, sigma_schedule
from multistage_diffusion.runs import load_run
from multistage_diffusion.sampling import dpmpp_2m, euler
from multistage_diffusion.training.run import train

pytestmark = pytest.mark.filterwarnings(  # of diffusers itself
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)
PLAIN = ModelConfig(
    architecture="unified", width=8, decoder_widths=(8,), multipliers=(1, 2), blocks=1, attention=(4,),
    decoder_attention="all", head_channels=4, resampling="conv", skip_scale=1.0, groups=2, dropout=0.0,
)  # fmt: skip
# The velocity: a random network that predicts noise paints all pixels black or white, and would hide mistakes.
PRESERVING = [VP(prediction="v"), Cosine(prediction="v"), LDM(prediction="v"),
              LDM(prediction="v", betas="linear", num_steps=200)]  # fmt: skip


def images(pipeline, steps, **options):
    pipeline.set_progress_bar_config(disable=True)
    seed = torch.Generator().manual_seed(5)
    made = pipeline(batch_size=2, generator=seed, num_inference_steps=steps, output_type="np", **options).images
    return torch.from_numpy(made).permute(0, 3, 1, 2) * 2 - 1


@torch.no_grad()
def ours(denoiser, solver, sigmas, start, labels=None):
    """Our solver from the pipeline's noise, whose deviation at the first level is `start`."""
    noise = torch.randn((2, *denoiser.shape), generator=torch.Generator().manual_seed(5))
    made = solver(lambda x, sigma: denoiser(x, sigma, labels), noise * start, sigmas)
    assert 0.05 < float((made.abs() < 1).float().mean())  # the comparison sees something
    return made.clamp(-1, 1)


def levels(denoiser, timesteps):
    """Noise levels of timesteps, by the formulas of the processes themselves."""
    process, steps = denoiser.process, timesteps.double()
    if process.kind in ("vp", "vp-cosine"):
        steps = steps / 999
    sigmas = process.sigma(steps)
    return sigmas, 1 / float(process.scale(sigmas[0]))


@pytest.mark.parametrize("process", PRESERVING)
def test_a_unified_model_is_a_standard_pipeline_with_our_images(tmp_path, process):
    denoiser = tiny.denoiser(PLAIN, process)
    done = export(denoiser, tmp_path / "out")
    assert (done.pipeline, done.reason) == ("DDIMPipeline", None) and done.max_error < 1e-4
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(str(tmp_path / "out"), low_cpu_mem_usage=False)
    steps = 7 if process.kind == "vp-cosine" else 10
    theirs = images(pipeline, steps)
    sigmas, start = levels(denoiser, pipeline.scheduler.timesteps)
    expected = ours(denoiser, euler, [*sigmas.tolist(), 0.0], start)
    torch.testing.assert_close(theirs, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("process", [*PRESERVING, EDM(), Flow()])
def test_a_multistage_model_is_our_pipeline_with_our_images(tmp_path, process):
    denoiser = tiny.denoiser(process=process)
    done = export(denoiser, tmp_path / "out")
    assert done.pipeline == "MultistagePipeline" and done.max_error < 1e-4
    pipeline = MultistagePipeline.from_pretrained(str(tmp_path / "out"), low_cpu_mem_usage=False)
    steps = 7 if process.kind == "vp-cosine" else 10
    theirs = images(pipeline, steps)
    if process.kind == "edm":
        sigmas = sigma_schedule(denoiser.process, "karras", steps)
        expected = ours(denoiser, dpmpp_2m, sigmas, (process.sigma_max**2 + 1) ** 0.5)
    elif process.kind == "flow":
        sigmas = sigma_schedule(denoiser.process, "uniform-t", steps)
        expected = ours(denoiser, euler, sigmas, float(1 + sigmas[0]))
    else:
        sigmas, start = levels(denoiser, pipeline.scheduler.timesteps)
        expected = ours(denoiser, dpmpp_2m, [*sigmas.tolist(), 0.0], start)
    torch.testing.assert_close(theirs, expected, atol=1e-4, rtol=0)
    pipeline.save_pretrained(tmp_path / "again")
    again = MultistagePipeline.from_pretrained(str(tmp_path / "again"), low_cpu_mem_usage=False)
    assert torch.equal(images(again, steps), theirs)


@pytest.mark.slow
def test_other_schedulers_that_fit_can_be_put_in(tmp_path):
    denoiser = tiny.denoiser(process=VP(prediction="v"))
    export(denoiser, tmp_path / "out")
    pipeline = MultistagePipeline.from_pretrained(str(tmp_path / "out"), low_cpu_mem_usage=False)
    for family in (DDIMScheduler, EulerDiscreteScheduler):
        pipeline.scheduler = family.from_config(pipeline.scheduler.config)
        theirs = images(pipeline, 10)
        if family is DDIMScheduler:  # Euler's sigma has another start
            sigmas, start = levels(denoiser, pipeline.scheduler.timesteps)
            expected = ours(denoiser, euler, [*sigmas.tolist(), 0.0], start)
            torch.testing.assert_close(theirs, expected, atol=1e-4, rtol=0)
    edm = tiny.denoiser(process=EDM())
    export(edm, tmp_path / "edm")
    pipeline = MultistagePipeline.from_pretrained(str(tmp_path / "edm"), low_cpu_mem_usage=False)
    pipeline.scheduler = EDMEulerScheduler.from_config(pipeline.scheduler.config)
    expected = ours(edm, euler, sigma_schedule(edm.process, "karras", 10), (80.0**2 + 1) ** 0.5)
    torch.testing.assert_close(images(pipeline, 10), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("process", "scheduler", "message"),
    [
        (VP(prediction="v"), DDIMScheduler(), "its images have noise of"),
        (LDM(), DPMSolverMultistepScheduler(), "at timestep .* and the network expects"),
        (EDM(sigma_data=0.3), EDMEulerScheduler(), "its images have noise of"),
        (Flow(), DDIMScheduler(), "DDIMScheduler does not represent the network's process"),
        (VP(), FlowMatchEulerDiscreteScheduler(), "its images have noise of"),
        (EDM(), ScoreSdeVeScheduler(), "does not represent the network's process"),
    ],
)
def test_a_scheduler_of_another_process_is_refused(tmp_path, process, scheduler, message):
    denoiser = tiny.denoiser(process=process)
    export(denoiser, tmp_path / "out")
    pipeline = MultistagePipeline.from_pretrained(str(tmp_path / "out"), low_cpu_mem_usage=False)
    pipeline.scheduler = scheduler
    with pytest.raises(ValueError, match=message):
        pipeline()


@pytest.mark.parametrize(
    ("process", "family"),
    [(VP(), IPNDMScheduler), (VP(), EDMEulerScheduler), (LDM(), EDMEulerScheduler), (EDM(), DDIMScheduler),
     (Flow(), IPNDMScheduler)],
)  # fmt: skip
def test_schedulers_are_refused_by_what_they_compute(process, family):
    pipeline = _multistage(tiny.denoiser(process=process), None)
    pipeline.scheduler = family.from_config(pipeline.scheduler.config)
    random = torch.get_rng_state()
    with pytest.raises(ValueError, match=f"{family.__name__} does not represent the network's process"):
        pipeline()
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize(
    "family", [DDPMScheduler, EulerAncestralDiscreteScheduler, HeunDiscreteScheduler, UniPCMultistepScheduler]
)
@pytest.mark.parametrize("steps", [1, 2, 30])
def test_schedulers_that_represent_the_process_are_accepted(family, steps):
    pipeline = _multistage(tiny.denoiser(process=VP()), None)
    pipeline.scheduler = family.from_config(pipeline.scheduler.config)
    before = dict(vars(pipeline.scheduler))
    require_fit(pipeline.scheduler, pipeline.unet, steps, 1.0)
    assert vars(pipeline.scheduler).keys() == before.keys()  # a copy was run


def test_latents_of_any_range_are_not_clipped():
    pipeline = _multistage(tiny.denoiser(process=LDM()), None)
    clipping = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=True)
    require_fit(clipping, pipeline.unet, 10, 1.0)
    with pytest.raises(ValueError, match="DDIMScheduler does not represent"):
        require_fit(clipping, pipeline.unet, 10, 3.0)


def test_guidance_and_classes_are_ours(tmp_path):
    denoiser = tiny.denoiser(replace(tiny.MODEL, classes=3), EDM())
    export(denoiser, tmp_path / "out")
    pipeline = MultistagePipeline.from_pretrained(str(tmp_path / "out"), low_cpu_mem_usage=False)
    theirs = images(pipeline, 6, class_labels=[2, 0], guidance_scale=2.5, guidance_interval=(0.1, 20.0))
    labels = torch.tensor([2, 0])

    def guided(x, sigma):
        given = denoiser(x, sigma, labels)
        return torch.lerp(denoiser(x, sigma), given, 2.5) if 0.1 <= sigma <= 20 else given

    sigmas = sigma_schedule(denoiser.process, "karras", 6)
    noise = torch.randn((2, *denoiser.shape), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = dpmpp_2m(guided, noise * (80.0**2 + 1) ** 0.5, sigmas).clamp(-1, 1)
    torch.testing.assert_close(theirs, expected, atol=1e-4, rtol=0)
    for options, message in (({"class_labels": 4}, "has 3 classes"), ({"guidance_scale": 2.0}, "needs class_labels")):
        with pytest.raises(ValueError, match=message):
            images(pipeline, 2, **options)


@pytest.mark.parametrize("process", [*PRESERVING, EDM(), Flow()])
def test_a_timesteps_level_is_what_the_network_is_told(process):
    made = process
    sigma = torch.logspace(-1, 1, 9, dtype=torch.float64)
    torch.testing.assert_close(made.level(made.preconditioning(sigma).c_noise), sigma, rtol=1e-9, atol=0)


def test_the_network_takes_one_timestep_or_one_an_image():
    denoiser = tiny.denoiser(process=EDM())
    unet = MultistageUNet(model=json.loads(json.dumps(vars(tiny.MODEL))), process={"kind": "edm"},
                          edges=list(tiny.EDGES), shape=list(tiny.SHAPE))  # fmt: skip
    unet.network.load_state_dict(denoiser.network.state_dict())
    unet.eval()
    x, times = torch.randn(3, *tiny.SHAPE), torch.tensor([0.1, 1.0, 40.0]).log() / 4
    with torch.no_grad():
        together = unet(x, times).sample
        apart = torch.cat([unet(x[i : i + 1], time, return_dict=False)[0] for i, time in enumerate(times)])
        number = unet(x[:1], float(times[0])).sample
    torch.testing.assert_close(together, apart)
    torch.testing.assert_close(number, apart[:1])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"resampling": "block"}, "resamples inside residual blocks"),
        ({"skip_scale": 0.7}, "scales its skips"),
        ({"classes": 3}, "has 3 classes"),
        ({"groups": 4}, "not one number"),
        ({"head_channels": 16, "attention": (8, 4)}, "attention heads are wider than 8 channels and not than 16"),
    ],
)
def test_why_a_network_is_no_unet2dmodel_is_said(tmp_path, change, reason):
    done = export(tiny.denoiser(replace(PLAIN, **change), LDM(prediction="v")), tmp_path / "out")
    assert done.pipeline == "MultistagePipeline" and reason in done.reason


@pytest.mark.parametrize(
    ("change", "shape"),
    [
        ({"decoder_attention": "last", "blocks": 2}, tiny.SHAPE),
        ({"head_channels": 32}, tiny.SHAPE),
        ({"augment_labels": 9}, tiny.SHAPE),
        ({}, (2, 8, 16)),
        ({"groups": 8, "group_channels": 1}, tiny.SHAPE),
    ],
)
def test_what_a_unet2dmodel_can_express_is_a_standard_pipeline(tmp_path, change, shape):
    done = export(tiny.denoiser(replace(PLAIN, **change), LDM(prediction="v"), shape), tmp_path / "out")
    assert (done.pipeline, done.reason) == ("DDIMPipeline", None) and done.max_error < 1e-4


def test_the_middle_block_may_be_the_decoders(tmp_path):
    done = export(tiny.denoiser(replace(PLAIN, middle="decoder"), LDM(prediction="v")), tmp_path / "out")
    assert done.pipeline == "DDIMPipeline" and done.max_error < 1e-4


def test_a_process_without_scheduler_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="diffusers has no scheduler that fits the process ve"):
        export(tiny.denoiser(process=VE()), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def codec(family=AutoencoderKL):
    kind, scale = family.__name__, 0.8
    module = tiny.randomise(
        family(in_channels=1, out_channels=1, latent_channels=3, block_out_channels=(8, 8), norm_num_groups=4,
               down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    )  # fmt: skip
    return LatentCodec(Autoencoder(module, kind, "tiny"), scale, 1)


@pytest.mark.parametrize("family", [AutoencoderKL, VQModel])
@pytest.mark.parametrize("model", [PLAIN, tiny.MODEL])
def test_latents_are_decoded(tmp_path, model, family):
    denoiser = tiny.denoiser(model, LDM(prediction="v"), (3, 8, 8))
    done = export(denoiser, tmp_path / "out", codec=codec(family))
    assert done.pipeline == ("LDMPipeline" if model is PLAIN else "MultistagePipeline") and done.max_error < 1e-4
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["vqvae" if model is PLAIN else "vae"] == ["diffusers", family.__name__]


def test_a_folder_of_diffusers_comes_back_as_it_was(tmp_path, capsys):
    theirs = tiny.randomise(
        UNet2DModel(
            sample_size=8, in_channels=3, out_channels=3, block_out_channels=(16, 32), layers_per_block=1,
            norm_num_groups=4, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"), downsample_padding=0, flip_sin_to_cos=False, freq_shift=1,
        )
    ).eval()  # fmt: skip
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", beta_start=1e-3, prediction_type="v_prediction")
    theirs.save_pretrained(tmp_path / "source" / "unet")
    scheduler.save_pretrained(tmp_path / "source" / "scheduler")
    module = codec(VQModel).autoencoder.module
    module.save_pretrained(tmp_path / "source" / "vqvae")
    assert dispatch(["convert", str(tmp_path / "source"), str(tmp_path / "ours")]) == 0
    assert dispatch(["convert", str(tmp_path / "source"), str(tmp_path / "ours")]) == 0  # again, over the first
    assert dispatch(["convert", str(tmp_path / "ours"), str(tmp_path / "back"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["pipeline"] == "LDMPipeline"
    back = UNet2DModel.from_pretrained(str(tmp_path / "back" / "unet"), low_cpu_mem_usage=False).eval()
    expected, name = dict(theirs.state_dict()), "time_embedding.linear_1.weight"
    expected[name] = torch.cat(expected[name].chunk(2, dim=1)[::-1], dim=1)  # cosines first: a sum in another order
    assert tiny.bits_equal(dict(back.state_dict()), expected)
    x, steps = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 371, 999])
    with torch.no_grad():
        ours, output = back(x, steps).sample, theirs(x, steps).sample
    assert float((ours - output).abs().max() / output.abs().max()) < 5e-6
    returned = DDIMScheduler.from_pretrained(str(tmp_path / "back" / "scheduler"))
    assert torch.equal(returned.alphas_cumprod, scheduler.alphas_cumprod)
    assert returned.config.prediction_type == "v_prediction"
    vqvae = VQModel.from_pretrained(str(tmp_path / "back" / "vqvae"), low_cpu_mem_usage=False)
    assert tiny.bits_equal(dict(vqvae.state_dict()), dict(module.state_dict()))
    assert vqvae.config.scaling_factor == module.config.scaling_factor


def test_the_names_of_early_folders_are_read(tmp_path):
    from multistage_diffusion.interop.diffusers import load_diffusers

    theirs = tiny.randomise(
        UNet2DModel(sample_size=8, block_out_channels=(16,), layers_per_block=1, norm_num_groups=4,
                    down_block_types=("AttnDownBlock2D",), up_block_types=("AttnUpBlock2D",))
    )  # fmt: skip
    theirs.save_pretrained(tmp_path)
    new = load_diffusers(tmp_path).network.state_dict()
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    names = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    early = safetensors.torch.load_file(path)
    for name, old in names.items():
        early = {key.replace(name, old): tensor for key, tensor in early.items()}
    safetensors.torch.save_file(early, path)
    assert tiny.bits_equal(load_diffusers(tmp_path).network.state_dict(), new)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(tiny.run_config(steps=3), folder, data=tiny.images())
    figures = {"fd": 1.5, "prdc": {"precision": 0.5}, "samples": 30, "features": {"name": "small"}, "kid": None}
    (folder / "results.json").write_text(json.dumps(figures))
    return folder


def test_a_run_with_its_model_card(run, tmp_path, capsys):
    out = tmp_path / "card"
    assert dispatch(["convert", str(run), str(out), "--license", "apache-2.0", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["max_error"] < 1e-4 and document["step"] == 3
    assert document["parameters"] == sum(p.numel() for p in load_run(run).denoiser.parameters())
    _, front, text = (out / "README.md").read_text().split("---\n", 2)
    about = yaml.safe_load(front)
    assert about["library_name"] == "diffusers" and about["license"] == "apache-2.0"
    assert "MultistagePipeline" in about["tags"] and "datasets" not in about
    metrics = about["model-index"][0]["results"][0]["metrics"]
    assert [(item["type"], item["value"]) for item in metrics] == [("fd", 1.5), ("precision", 0.5)]
    assert 'DiffusionPipeline.from_pretrained("card", trust_remote_code=True)' in text
    assert "| 2 | 3 to inf |" in text and "PFLOPs" in text
    assert str(tmp_path) not in text


@pytest.mark.slow
def test_the_cards_code_runs_as_it_stands_and_without_this_package(tmp_path):
    for model, name in ((PLAIN, "plain"), (tiny.MODEL, "staged")):
        tiny.denoiser(model, LDM(prediction="v")).save_pretrained(tmp_path / f"{name}-model")
        assert dispatch(["convert", str(tmp_path / f"{name}-model"), str(tmp_path / name)]) == 0
        code = (tmp_path / name / "README.md").read_text().split("```python\n")[1].split("```")[0]
        code += "\nimport sys\nassert len(images) == 4 and images[0].size == (8, 8)\n"
        code = "import sys\nsys.modules['multistage_diffusion'] = sys.modules['jaxtyping'] = None\n" + code
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
                              env={**os.environ, "HF_HOME": str(tmp_path / "cache")})  # fmt: skip
        assert done.returncode == 0, done.stderr[-800:]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["RUN", "--stages", "x.json"], "stages must be used with a network of diffusers"),
        (["RUN", "--weights", "best"], "best"),
        (["/missing"], "neither a run directory nor a folder that diffusers saved"),
    ],
)
def test_mistakes_are_one_line(run, tmp_path, capsys, words, message):
    words = [str(run) if word == "RUN" else word for word in words]
    assert dispatch(["convert", words[0], str(tmp_path / "out"), *words[1:]]) == 2
    err = capsys.readouterr().err
    assert message in err and err.startswith("error: ") and err.count("\n") == 1


@pytest.mark.slow
def test_a_saved_model_has_no_training_to_tell_of(tmp_path):
    tiny.denoiser().save_pretrained(tmp_path / "model")
    assert isinstance(Denoiser.from_pretrained(tmp_path / "model"), Denoiser)
    assert dispatch(["convert", str(tmp_path / "model"), str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "README.md").read_text()
    assert "## Training" not in text and "## Results" not in text and "## Stages" in text
