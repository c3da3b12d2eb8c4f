"""The denoiser: one door to network, process and stages; what is saved comes back to the bit, or not at all."""

import json
from dataclasses import replace

import pytest
import torch

import tiny
from multistage_diffusion.denoiser import Denoiser
from multistage_diffusion.errors import CheckpointError, ConfigError
from multistage_diffusion.noise import Process
from multistage_diffusion.stages import Stages
from waits import Waits

SIGMAS = [0.05, 0.6, 0.6000001, 2.9, 3.0, 11.0]


def batch(count=6, shape=tiny.SHAPE):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("process", "architecture"),
    [*((kind, "multistage") for kind in Process.kinds()), ("vp", "separate"), ("edm", "unified")],
)
@torch.no_grad()
def test_one_level_for_all_equals_a_level_each(process, architecture):
    denoise = tiny.denoiser(tiny.architecture(architecture), process)
    x = batch()
    each = denoise(x, torch.tensor(SIGMAS, dtype=torch.float64))
    for index, sigma in enumerate(SIGMAS):
        alone = denoise(x[index : index + 1], sigma)
        torch.testing.assert_close(each[index : index + 1], alone, rtol=1e-4, atol=1e-4)
        repeated = torch.full((6,), sigma, dtype=torch.float64)
        assert torch.equal(denoise(x, sigma), denoise(x, repeated))
    assert each.dtype == torch.float32


@pytest.mark.parametrize("process", Process.kinds())
@torch.no_grad()
def test_one_level_for_all_waits_for_no_device(process):
    denoise = tiny.denoiser(process=process).to("meta")
    x = batch().to("meta")
    with Waits() as waits:
        denoise(x, 0.7)
    assert waits.copies == []


@torch.no_grad()
def test_it_is_the_preconditioned_network():
    denoise = tiny.denoiser(process="edm")
    x, sigma = batch(), 0.7
    data = 0.5
    raw = denoise.network(x / (sigma**2 + data**2) ** 0.5, torch.full((6,), torch.tensor(sigma).log() / 4), 1)
    wanted = data**2 / (sigma**2 + data**2) * x + sigma * data / (sigma**2 + data**2) ** 0.5 * raw
    torch.testing.assert_close(denoise(x, sigma), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sigma", [0.7, torch.tensor([0.7, 5.0])])
@torch.no_grad()
def test_half_precision_is_the_network_s_alone(sigma):
    denoiser, x, seen = tiny.denoiser(), batch(2), []
    exact = denoiser(x, sigma)
    denoiser.network.encoders[0].stem.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    denoiser.precision = "bf16"
    half = denoiser(x, sigma)
    assert seen == [torch.bfloat16] and half.dtype == torch.float32
    assert 0 < (half - exact).norm() / exact.norm() < 0.05


@torch.no_grad()
def test_a_level_goes_to_its_stage_and_no_other():
    denoise = tiny.denoiser()
    x = batch(1)
    before = {sigma: denoise(x, sigma) for sigma in SIGMAS}
    for parameter in denoise.network.decoders[1].parameters():
        parameter.add_(0.5)
    changed = [sigma for sigma in SIGMAS if not torch.equal(denoise(x, sigma), before[sigma])]
    assert changed == [0.6000001, 2.9, 3.0]  # an edge belongs to the stage below it


@pytest.mark.parametrize("architecture", ["multistage", "separate", "unified"])
@torch.no_grad()
def test_saved_and_loaded_it_is_the_same_to_the_bit(architecture, tmp_path):
    model = replace(tiny.architecture(architecture), classes=3)
    denoise = tiny.denoiser(model, "edm")
    denoise.save_pretrained(tmp_path / "model")
    denoise.save_pretrained(tmp_path / "model")  # again, over the first
    back = Denoiser.from_pretrained(tmp_path / "model")
    assert tiny.bits_equal(back.state_dict(), denoise.state_dict())
    assert (back.shape, back.stages, back.classes, back.training) == (denoise.shape, denoise.stages, 3, False)
    assert (back.process, back.backbone) == (denoise.process, model)
    sigma = torch.tensor(SIGMAS, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    assert torch.equal(back(batch(), sigma, labels), denoise(batch(), sigma, labels))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_the_provenance_of_the_stages_travels_along(tmp_path):
    stages = Stages(tiny.EDGES, {"method": "optimal-denoiser", "alpha": 0.9})
    Denoiser.from_backbone(tiny.MODEL, "vp", tiny.SHAPE, stages).save_pretrained(tmp_path / "model")
    assert Denoiser.from_pretrained(tmp_path / "model").stages.provenance == stages.provenance


@pytest.mark.parametrize("foreign", ["README.md", ".git"])
def test_saving_does_not_delete_what_it_did_not_write(foreign, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / foreign).write_text("mine")
    with pytest.raises(CheckpointError, match="which would be lost"):
        tiny.denoiser().save_pretrained(tmp_path / "model")
    assert (tmp_path / "model" / foreign).read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_saving_over_a_file_is_refused(tmp_path):
    (tmp_path / "model").write_text("mine")
    with pytest.raises(CheckpointError, match="it is a file"):
        tiny.denoiser().save_pretrained(tmp_path / "model")
    assert (tmp_path / "model").read_text() == "mine"


def test_a_flipped_bit_of_the_weights_is_noticed(tmp_path):
    tiny.denoiser().save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 4
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        Denoiser.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_a_missing_or_cut_file_is_named(file, tmp_path):
    tiny.denoiser().save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / file
    for manifest in (True, False):
        if not manifest:
            (tmp_path / "model" / "manifest.json").unlink()
        content = path.read_bytes()
        for change in (lambda: path.write_bytes(content[: len(content) // 2]), path.unlink):  # noqa: B023
            change()
            with pytest.raises(CheckpointError, match=file) as caught:
                Denoiser.from_pretrained(tmp_path / "model")
            assert "\n" not in str(caught.value)
            path.write_bytes(content)
    Denoiser.from_pretrained(tmp_path / "model")  # a manifest is not needed


@pytest.mark.parametrize(
    ("key", "value", "part"),
    [
        (("model", "width"), 16, "belongs to another architecture"),
        (("model", "blocks"), 2, "belongs to another architecture"),
        (("model", "width"), 10**9, "model.width"),
        (("model", "blocks"), 10**9, "model.blocks"),
        (("model", "widht"), 8, 'did you mean "width"'),
        (("model",), [], "model"),
        (("process",), {"kind": "vq"}, "no process vq"),
        (("process",), {"kind": ["vp"]}, "no process"),
        (("process", "beta_min"), "x", "beta_min"),
        (("stages", "edges"), [3.0, 1.0], "increasing"),
        (("stages", "edges"), ["x", "y"], "edges"),
        (("stages", "edges"), [1.0], "decoder-widths"),
        (("stages",), 7, "stages"),
        (("shape",), [1, 8], "shape"),
        (("shape",), [1, 8, 10**12], "shape"),
        (("shape",), [1, 8, 8.5], "shape"),
        (("shape",), "888", "shape"),
    ],
)
def test_strange_configurations_are_refused_with_one_line(key, value, part, tmp_path):
    tiny.denoiser().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "manifest.json").unlink()
    document = json.loads((tmp_path / "model" / "config.json").read_text())
    inner = document
    for name in key[:-1]:
        inner = inner[name]
    inner[key[-1]] = value
    (tmp_path / "model" / "config.json").write_text(json.dumps(document))
    with pytest.raises(CheckpointError) as caught:
        Denoiser.from_pretrained(tmp_path / "model")
    assert part in str(caught.value) and "\n" not in str(caught.value)


def test_as_many_decoders_as_stages():
    with pytest.raises(ConfigError, match="must be 2 widths"):
        Denoiser.from_backbone(tiny.MODEL, "vp", tiny.SHAPE, Stages((1.0,)))
    assert len(Denoiser.from_backbone(tiny.architecture("unified"), "vp", tiny.SHAPE, Stages(tiny.EDGES)).stages) == 1
