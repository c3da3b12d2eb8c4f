"""Published networks beside ours: the same weights give the same outputs, whatever their names and orders."""

import json
from functools import partial

import layouts
import pytest
import safetensors.torch
import torch

from multistage_diffusion.cli import dispatch
from multistage_diffusion.conditioning import NO_CONDITIONING, Conditioning
from multistage_diffusion.denoiser import Denoiser
from multistage_diffusion.errors import CheckpointError, ConfigError
from multistage_diffusion.interop.official import from_official, read_state, recognise
from multistage_diffusion.stages import Stages

SIZES = {"side": 16, "width": 32, "multipliers": (1, 2, 2), "blocks": 2, "attention": (8,)}
WIDTHS = (48, 32, 16)
LEVELS = (0.4, 5.0, 40.0)  # one in each of the published stages
EDM = {**SIZES, "taps": layouts.BOX}
LATENT = {**SIZES, "head_channels": 16}


def images(count=3):
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(5))


def state(network, **options):
    """Weights in a layout, made by running it once."""
    weights = layouts.Weights()
    network(weights, images(1), torch.ones(1), **options)
    return weights


def staged(network, options, home):
    """Weights of a network with three decoders, and the functions of its stages."""
    weights, functions = layouts.Weights(), []
    for stage, width in enumerate(WIDTHS):
        functions.append(partial(network, **options, **home(stage), decoder_width=width))
        functions[stage](weights, images(1), torch.ones(1))
    return weights, functions


def double(weights):
    """In float64, but for the sinusoids of a noise level, which are float32 in every one of the networks."""
    wide = layouts.Weights()
    wide.update({name: tensor.double() for name, tensor in weights.items()})
    return wide


def difference(denoiser, function, weights, stage=0, conditioning=NO_CONDITIONING, sign=1.0):
    """Largest difference of the raw networks over the largest output, in float64."""
    c_noise = torch.tensor([-0.3, 0.2, 0.9], dtype=torch.float64)
    with torch.no_grad():
        ours = denoiser.network.double()(images().double(), c_noise, stage, conditioning)
        theirs = sign * function(double(weights), images().double(), c_noise)
    assert theirs.std() > 0.1
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize(
    ("network", "options", "read", "what"),
    [
        (layouts.edm, EDM, {}, "EDM's DDPM++ for edm"),
        (layouts.edm, {**EDM, "taps": layouts.FIR, "pyramid": True}, {}, "EDM's NCSN++ for edm"),
        (layouts.score_sde, {**SIZES, "fir": False}, {"resolution": 16}, "score SDE's DDPM++"),
        (layouts.score_sde, {**SIZES, "fir": True}, {"resolution": 16}, "score SDE's NCSN++"),
        (layouts.latent_diffusion, LATENT, {"resolution": 16, "head_channels": 16}, "the U-Net of latent diffusion"),
    ],
)
def test_unified_networks_agree(network, options, read, what):
    weights = state(network, **options)
    official = recognise(dict(weights), **read)
    assert official.what == what and (official.channels, official.resolution) == (3, 16)
    assert difference(from_official(official), partial(network, **options), weights) < 1e-6


@pytest.mark.parametrize("noise", [("vp", 1.0), ("ve", -1.0)])
def test_edm_s_code_for_other_processes(noise):
    kind, sign = noise
    weights = state(layouts.edm, **EDM)
    official = recognise({f"model.{name}": tensor.clone() for name, tensor in weights.items()}, process=kind)
    assert official.process.kind == kind
    assert difference(from_official(official), partial(layouts.edm, **EDM), weights, sign=sign) < 1e-6


def test_labels_and_augmentation_of_edm():
    options = {**EDM, "classes": 4}
    weights = layouts.Weights()
    augment = torch.randn(3, 9, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([3, 0, 2])
    network = partial(layouts.edm, **options)
    network(weights, images(), torch.ones(3), labels=labels, augment=augment)
    official = recognise(dict(weights))
    assert (official.model.classes, official.model.augment_labels) == (4, 9)
    denoiser, with_both = from_official(official), partial(network, labels=labels, augment=augment.double())
    assert difference(denoiser, with_both, weights, conditioning=Conditioning(labels, augment=augment)) < 1e-6
    assert difference(denoiser, network, weights) < 1e-6  # no class, not augmented


@pytest.mark.parametrize(
    ("network", "options", "home", "read"),
    [
        (layouts.edm, {**EDM, "groups": 16}, lambda stage: {"decoder": f"decs.{stage}"}, {}),
        (layouts.score_sde, {**SIZES, "fir": True, "groups": 16}, lambda stage: {"stage": stage}, {"resolution": 16}),
        (layouts.latent_diffusion, LATENT, lambda stage: {"stage": stage}, {"resolution": 16, "head_channels": 16}),
        (
            layouts.latent_diffusion,
            LATENT,
            lambda stage: {"stage": stage, "decoder_attends": stage == 0},
            {"resolution": 16, "head_channels": 16},
        ),
    ],
    ids=["edm", "vp", "ldm", "ldm-as-released"],
)
def test_the_paper_s_networks_agree_in_every_stage(network, options, home, read):
    weights, functions = staged(network, options, home)
    official = recognise(dict(weights), **read)
    assert official.what.startswith("the paper's") and official.model.decoder_widths == WIDTHS
    denoiser = from_official(official)
    assert [denoiser.stages.of(sigma) for sigma in LEVELS] == [0, 1, 2]
    for stage, function in enumerate(functions):
        assert difference(denoiser, function, weights, stage) < 1e-6


def test_stages_of_a_unified_network_start_as_copies():
    weights = state(layouts.score_sde, **SIZES, fir=False)
    denoiser = from_official(recognise(dict(weights), resolution=16), Stages((0.5, 2.0)))
    for stage in range(3):
        assert difference(denoiser, partial(layouts.score_sde, **SIZES, fir=False), weights, stage) < 1e-6


# Files


def convert(capsys, *words):
    code = dispatch(["convert", *map(str, words), "--json"])
    out, err = capsys.readouterr()
    return (json.loads(out) if code == 0 else None), err


@pytest.mark.parametrize("form", ["safetensors", "ckpt", "average"])
def test_the_command_reads_files_and_says_what_they_are(form, tmp_path, capsys):
    weights = state(layouts.latent_diffusion, **LATENT)
    trained = {f"model.diffusion_model.{name}": tensor for name, tensor in weights.items()}
    if form == "safetensors":
        safetensors.torch.save_file(trained, file := tmp_path / "model.safetensors")
    else:
        document = {"state_dict": {**trained, "first_stage_model.quantize.weight": torch.zeros(2)}, "global_step": 7}
        if form == "average":
            for name, tensor in trained.items():
                document["state_dict"]["model_ema." + name.removeprefix("model.").replace(".", "")] = 2 * tensor
        torch.save(document, file := tmp_path / "model.ckpt")
    words = (file, tmp_path / "out", "--resolution", 16, "--head-channels", 16)
    document, err = convert(capsys, *words)
    assert document["what"] == "the U-Net of latent diffusion" in err
    denoiser = Denoiser.from_pretrained(tmp_path / "out")
    factor = 2 if form == "average" else 1
    stem = denoiser.network.state_dict()["encoders.0.stem.weight"]
    torch.testing.assert_close(stem, factor * weights["input_blocks.0.0.weight"])
    raw, _ = convert(capsys, *words, "--weights", "raw")
    assert raw["parameters"] == document["parameters"]
    stem = Denoiser.from_pretrained(tmp_path / "out").network.state_dict()["encoders.0.stem.weight"]
    torch.testing.assert_close(stem, weights["input_blocks.0.0.weight"])


def test_a_checkpoint_of_score_sde_has_its_average_in_a_list(tmp_path, capsys):
    weights = state(layouts.score_sde, **SIZES, fir=False)
    shadow = [3 * tensor for name, tensor in weights.items() if name != "sigmas"]
    model = {f"module.{name}": tensor for name, tensor in weights.items()}
    folder = tmp_path / "downloaded"
    folder.mkdir()
    torch.save({"model": model, "ema": {"decay": 0.9999, "shadow_params": shadow}, "step": 5}, folder / "c.pth")
    document, _ = convert(capsys, folder, tmp_path / "out", "--resolution", 16)  # a folder with one such file
    assert document["what"] == "score SDE's DDPM++"
    stem = Denoiser.from_pretrained(tmp_path / "out").network.state_dict()["encoders.0.stem.weight"]
    torch.testing.assert_close(stem, 3 * weights["all_modules.2.weight"])
    with pytest.raises(CheckpointError, match="average of other weights"):
        torch.save({"model": model, "ema": {"shadow_params": shadow[1:]}}, folder / "c.pth")
        read_state(folder / "c.pth")


class Code:
    """What pickles of code hold."""


def test_files_of_code_are_refused_with_a_recipe(tmp_path, capsys):
    (tmp_path / "net.pkl").write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    torch.save({"net": Code()}, tmp_path / "net.pt")
    for name in ("net.pkl", "net.pt"):
        document, err = convert(capsys, tmp_path / name, tmp_path / "out")
        assert document is None and "code" in err and "torch.save(net.state_dict(), 'net.pt')" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.pop("enc.8x8_block1.conv1.weight"), "not whole: .*levels.1.1.conv1.weight"),
        (lambda w: w.update({"enc.extra.weight": torch.zeros(1)}), "enc.extra.weight, which this network has no place"),
        (lambda w: w.update({"map_noise.freqs": torch.zeros(1)}), "Fourier features"),
    ],
)
def test_wrong_weights_are_named(change, words):
    weights = dict(state(layouts.edm, **EDM))
    change(weights)
    with pytest.raises((CheckpointError, ConfigError), match=words):
        from_official(recognise(weights))


def test_unknown_names_are_said():
    with pytest.raises(ConfigError, match=r"the names \(conv.weight, ...\) are not those of EDM"):
        recognise({"conv.weight": torch.zeros(1)})
    with pytest.raises(ConfigError, match="heads of 24 channels do not divide"):
        recognise(dict(state(layouts.latent_diffusion, **LATENT)), resolution=16, head_channels=24)
