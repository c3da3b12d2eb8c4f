"""Our U-Net beside `UNet2DModel` of diffusers: the same random weights give the same output."""

import json
from dataclasses import replace

import pytest
import safetensors.torch
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

import tiny
from multistage_diffusion.cli import dispatch
from multistage_diffusion.denoiser import Denoiser
from multistage_diffusion.errors import CheckpointError, ConfigError
from multistage_diffusion.interop.diffusers import from_diffusers, load_diffusers, process_from_scheduler
from multistage_diffusion.recipes import preset
from multistage_diffusion.stages import Stages

DOWN, ATTENDING, UP, UP_ATTENDING = "DownBlock2D", "AttnDownBlock2D", "UpBlock2D", "AttnUpBlock2D"
# google/ddpm-cifar10-32, with a quarter of its channels.
DDPM = {
    "sample_size": 32, "block_out_channels": (32, 64, 64, 64), "layers_per_block": 2, "norm_num_groups": 8,
    "down_block_types": (DOWN, ATTENDING, DOWN, DOWN), "up_block_types": (UP, UP, UP_ATTENDING, UP),
    "attention_head_dim": None, "downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1, "norm_eps": 1e-6,
}  # fmt: skip
# CompVis/ldm-celebahq-256, with a seventh of its channels.
LDM = {
    "sample_size": 16, "block_out_channels": (32, 64, 96, 128), "layers_per_block": 2, "norm_num_groups": 8,
    "down_block_types": (DOWN, ATTENDING, ATTENDING, ATTENDING),
    "up_block_types": (UP_ATTENDING, UP_ATTENDING, UP_ATTENDING, UP), "attention_head_dim": 16,
    "downsample_padding": 1, "flip_sin_to_cos": True, "freq_shift": 0, "norm_eps": 1e-5,
}  # fmt: skip
SMALL = {**LDM, "sample_size": 8, "block_out_channels": (32, 64), "layers_per_block": 1,
         "down_block_types": (DOWN, ATTENDING), "up_block_types": (UP_ATTENDING, UP)}  # fmt: skip


def unet(**options):
    return tiny.randomise(UNet2DModel(**options)).eval()


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [DDPM, LDM, {**SMALL, "in_channels": 1, "out_channels": 1}, {**SMALL, "norm_num_groups": 32},
     {**SMALL, "sample_size": (8, 16)}],
)  # fmt: skip
def test_the_same_weights_give_the_same_output(options):
    theirs = unet(**options)
    ours = from_diffusers(theirs)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    x = torch.randn(3, *ours.shape, generator=torch.Generator().manual_seed(1))
    steps = torch.tensor([0, 371, 999])
    expected = theirs(x, steps).sample
    assert expected.std() > 0.1  # the weights are alive
    torch.testing.assert_close(ours.network(x, steps.float(), 0), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "parameters"),
    [
        ({**DDPM, "block_out_channels": (128, 256, 256, 256), "norm_num_groups": 32}, 35_746_307),
        ({**LDM, "block_out_channels": (224, 448, 672, 896), "norm_num_groups": 32, "attention_head_dim": 32,
          "sample_size": 64}, 274_056_163),
    ],
)  # fmt: skip
def test_the_published_sizes(options, parameters):
    theirs = unet(**options)
    ours = from_diffusers(theirs)
    assert sum(p.numel() for p in ours.parameters()) == parameters
    x, step = torch.randn(1, *ours.shape, generator=torch.Generator().manual_seed(1)), torch.tensor([371])
    torch.testing.assert_close(ours.network(x, step.float(), 0), theirs(x, step).sample, atol=1e-5, rtol=1e-5)


def test_the_latent_diffusion_preset_is_the_published_network():
    names = preset("ldm-celebahq", "unified").model
    theirs = UNet2DModel(**SMALL).config
    assert from_diffusers(unet(**SMALL)).backbone == replace(
        names, width=32, decoder_widths=(32,), multipliers=(1, 2), blocks=1, attention=(4,), head_channels=16,
        groups=theirs["norm_num_groups"],
    )  # fmt: skip


@torch.no_grad()
def test_with_stages_every_decoder_starts_as_the_unets():
    theirs = unet(**SMALL)
    ours, staged = from_diffusers(theirs), from_diffusers(theirs, stages=Stages((1.0, 4.0)))
    assert len(staged.network.decoders) == 3 and len(staged.network.encoders) == 1
    x, sigma = torch.randn(3, *ours.shape), torch.tensor([0.5, 2.0, 9.0])
    torch.testing.assert_close(staged(x, sigma), ours(x, sigma), atol=1e-4, rtol=0)
    first, last = (next(staged.network.decoders[stage].parameters()) for stage in (0, 2))
    assert first.data_ptr() != last.data_ptr()  # copies, which training will part


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_process_is_the_schedulers(schedule, prediction):
    scheduler = DDPMScheduler(
        beta_schedule=schedule, beta_start=0.0015, beta_end=0.0195, prediction_type=prediction, num_train_timesteps=200
    )
    process = process_from_scheduler(dict(scheduler.config))
    kept = scheduler.alphas_cumprod.double()
    steps = torch.arange(200, dtype=torch.float64)
    torch.testing.assert_close(process.sigma(steps), ((1 - kept) / kept).sqrt(), atol=0, rtol=1e-4)
    x, output, level = torch.randn(1, 3, 8, 8), torch.randn(1, 3, 8, 8), process.sigma(steps[137:138])
    factors = process.preconditioning(level)
    scale = float(process.scale(level))
    ours = float(factors.c_skip) * x / scale + float(factors.c_out) * output
    kept_137 = float(kept[137])
    noise_share, signal_share = (1 - kept_137) ** 0.5, kept_137**0.5
    theirs = (
        (x - noise_share * output) / signal_share
        if prediction == "epsilon"
        else signal_share * x - noise_share * output
    )
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resnet_time_scale_shift": "scale_shift"}, 'resnet_time_scale_shift must be "default", got "scale_shift"'),
        ({"mid_block_scale_factor": 2}, "mid_block_scale_factor must be 1, got 2"),
        ({"out_channels": 6}, "maps 3 channels to 6"),
        ({"up_block_types": (UP, UP)}, "mirrored on the way up"),
        ({"block_out_channels": (32, 48)}, "must be multiples of the first, which must be one of 4 and of norm_num"),
        ({"sample_size": None}, "give the resolution"),
    ],
)
def test_what_ours_has_not_is_named(change, message):
    with pytest.raises(ConfigError, match=message):
        from_diffusers(UNet2DModel(**{**SMALL, **change}))


def save(folder, theirs, scheduler=None):
    """What `save_pretrained` writes, without its progress bars."""
    home = folder / "unet" if scheduler else folder
    theirs.save_pretrained(home)
    if scheduler is not None:
        scheduler.save_pretrained(folder / "scheduler")
    return folder


def test_convert_writes_a_model_that_samples(tmp_path, capsys):
    scheduler = DDPMScheduler(beta_schedule="linear")
    source = save(tmp_path / "pipeline", unet(**SMALL), scheduler)
    (tmp_path / "stages.json").write_text('{"edges": [1.0, 4.0]}')
    out = tmp_path / "ours"
    words = ["convert", str(source), str(out), "--stages", str(tmp_path / "stages.json"), "--json"]
    assert dispatch(words) == 0
    document = json.loads(capsys.readouterr().out)
    denoiser = Denoiser.from_pretrained(out)
    assert document["parameters"] == sum(parameter.numel() for parameter in denoiser.parameters())
    assert document["max_error"] < 1e-5 and document["stages"] == 3
    assert denoiser.process.betas == "linear" and denoiser.stages.edges == (1.0, 4.0)
    assert dispatch(["sample", str(out), "--num", "2", "--steps", "3", "--out", str(tmp_path / "images")]) == 0


def test_a_folder_that_is_none_and_weights_that_do_not_fit(tmp_path, capsys):
    assert dispatch(["convert", str(tmp_path), str(tmp_path / "out")]) == 2
    assert "no such file" in capsys.readouterr().err.splitlines()[-1]
    source = save(tmp_path / "unet", unet(**SMALL))
    path = source / "diffusion_pytorch_model.safetensors"
    weights = safetensors.torch.load_file(path)
    for name, message in (
        ("conv_in.weight", "has no weight conv_in.weight"),
        (None, "weights that ours has not, like"),
    ):
        changed = {key: tensor for key, tensor in weights.items() if key != name}
        safetensors.torch.save_file(changed if name else {**weights, "extra": torch.zeros(1)}, path)
        with pytest.raises(CheckpointError, match=message):
            load_diffusers(source)
    path.write_bytes(b"no weights")
    assert dispatch(["convert", str(source), str(tmp_path / "out")]) == 5
