"""Our transformer beside `DiTTransformer2DModel` of diffusers, and beside the releases of DiT and SiT: both ways."""

import json
import math
from dataclasses import replace

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from diffusers.pipelines.dit.pipeline_dit import DiTPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler

import tiny
from multistage_diffusion.backbones import Transformer
from multistage_diffusion.cli import dispatch
from multistage_diffusion.conditioning import Conditioning
from multistage_diffusion.data.autoencoder import Autoencoder
from multistage_diffusion.data.latents import LatentCodec
from multistage_diffusion.denoiser import Denoiser
from multistage_diffusion.errors import CheckpointError, ConfigError
from multistage_diffusion.interop.diffusers import from_diffusers, load_diffusers
from multistage_diffusion.interop.export import export
from multistage_diffusion.interop.transformers import dit_options, dit_weights, from_released
from multistage_diffusion.noise import LDM, Flow
from multistage_diffusion.stages import Stages

pytestmark = pytest.mark.filterwarnings(  # of diffusers itself
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)
OPTIONS = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 3, "sample_size": 8, "in_channels": 4,
           "out_channels": 8, "num_embeds_ada_norm": 10}  # fmt: skip


def randomise(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.7 / max(parameter[0].numel(), 1) ** 0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
    return model.eval()


def dit(**options):
    """With random weights, and one embedding for all blocks, as every published one has."""
    model = randomise(DiTTransformer2DModel(**{**OPTIONS, **options}))
    first = model.transformer_blocks[0].norm1.emb.state_dict()
    for block in model.transformer_blocks:
        block.norm1.emb.load_state_dict(first)
    return model


def batch(channels=4, size=8):
    x = torch.randn(3, channels, size, size, generator=torch.Generator().manual_seed(1))
    return x, torch.tensor([0, 371, 999]), torch.tensor([0, 7, 10])


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"patch_size": 4, "norm_eps": 1e-6}, {"out_channels": None, "in_channels": 3}])
def test_the_same_weights_give_the_same_output(options):
    theirs = dit(**options)
    ours = from_diffusers(theirs)
    x, steps, labels = batch(theirs.config.in_channels)
    expected = theirs(x, steps, labels).sample[:, : len(x[0])]
    assert expected.std() > 0.1  # the weights are alive
    raw = ours.network(x, steps.float(), 0, Conditioning(labels))
    torch.testing.assert_close(raw, expected, atol=1e-5, rtol=1e-5)
    assert ours.process == LDM(beta_first=1e-4, beta_last=0.02, betas="linear")


@torch.no_grad()
def test_and_back():
    theirs = dit(out_channels=4, num_embeds_ada_norm=1000)
    ours = from_diffusers(theirs)
    again = DiTTransformer2DModel(**dit_options(ours))
    again.load_state_dict(dit_weights(ours))
    assert tiny.bits_equal(theirs.state_dict(), again.state_dict())
    small = from_diffusers(dit(out_channels=4))  # labels beyond its own stand for none
    again = DiTTransformer2DModel(**dit_options(small)).eval()
    again.load_state_dict(dit_weights(small))
    x, steps, labels = batch()
    for number in (10, 11, 1000):
        assert torch.equal(
            again(x, steps, labels.new_full((3,), number)).sample, again(x, steps, labels * 0 + 10).sample
        )


@torch.no_grad()
def test_with_stages_every_head_starts_as_the_last_blocks():
    theirs = dit()
    ours, staged = from_diffusers(theirs), from_diffusers(theirs, stages=Stages((1.0, 4.0)))
    assert (staged.network.stages, len(staged.network.encoders)) == (3, 1)
    assert staged.backbone == replace(ours.backbone, architecture="multistage", decoder_widths=(16,) * 3,
                                      decoder_blocks=(1,) * 3)  # fmt: skip
    x, sigma, labels = torch.randn(3, 4, 8, 8), torch.tensor([0.5, 2.0, 9.0]), torch.tensor([3, 10, 0])
    torch.testing.assert_close(staged(x, sigma, labels), ours(x, sigma, labels), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation_fn": "geglu"}, 'the transformer\'s activation_fn must be "gelu-approximate", got "geglu"'),
        ({"out_channels": 5}, "the transformer maps 4 channels to 5, not as many or twice"),
    ],
)
def test_parts_that_ours_has_not_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        from_diffusers(dit(**options))


def test_blocks_with_embeddings_of_their_own_are_refused():
    with pytest.raises(ConfigError, match="the transformer's blocks have different embeddings"):
        from_diffusers(randomise(DiTTransformer2DModel(**OPTIONS)))


def released(depth=3, width=16, patch=2, channels=4, classes=10, tokens=16):
    """Random weights under the names of DiT's release; SiT has the same."""
    shapes = {
        "x_embedder.proj.weight": (width, channels, patch, patch), "x_embedder.proj.bias": (width,),
        "t_embedder.mlp.0.weight": (width, 256), "t_embedder.mlp.0.bias": (width,),
        "t_embedder.mlp.2.weight": (width, width), "t_embedder.mlp.2.bias": (width,),
        "y_embedder.embedding_table.weight": (classes + 1, width), "pos_embed": (1, tokens, width),
        "final_layer.linear.weight": (patch**2 * 2 * channels, width),
        "final_layer.linear.bias": (patch**2 * 2 * channels,),
        "final_layer.adaLN_modulation.1.weight": (2 * width, width),
        "final_layer.adaLN_modulation.1.bias": (2 * width,),
    }  # fmt: skip
    layers = {
        "attn.qkv": (3, 1),
        "attn.proj": (1, 1),
        "mlp.fc1": (4, 1),
        "mlp.fc2": (1, 4),
        "adaLN_modulation.1": (6, 1),
    }
    for block in range(depth):
        for name, (out, into) in layers.items():
            shapes[f"blocks.{block}.{name}.weight"] = (out * width, into * width)
            shapes[f"blocks.{block}.{name}.bias"] = (out * width,)
    generator = torch.Generator().manual_seed(2)
    return {
        name: torch.randn(shape, generator=generator) / math.prod(shape[1:]) ** 0.5 / 2
        for name, shape in shapes.items()
    }


def by_hand(state, x, t, labels, head_channels=8):
    """The released network, written from the paper: Fourier features of t, adaLN-Zero blocks, patches of 2."""

    def linear(h, name):
        return F.linear(h, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(h, shift, scale):
        return F.layer_norm(h, h.shape[2:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    angle = t[:, None] * torch.exp(-math.log(10_000) * torch.arange(128) / 128)
    c = linear(F.silu(linear(torch.cat((angle.cos(), angle.sin()), 1), "t_embedder.mlp.0")), "t_embedder.mlp.2")
    c = F.silu(c + state["y_embedder.embedding_table.weight"][labels])
    patches = F.conv2d(x, state["x_embedder.proj.weight"], state["x_embedder.proj.bias"], stride=2)
    rates = 10_000.0 ** -(torch.arange(4) / 4)
    row, column = (
        index.flatten()[:, None] * rates for index in torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")
    )
    h = patches.flatten(2).transpose(1, 2) + torch.cat((column.sin(), column.cos(), row.sin(), row.cos()), 1)
    for block in range(3):
        parts = linear(c, f"blocks.{block}.adaLN_modulation.1").chunk(6, dim=1)
        q, k, v = linear(norm(h, *parts[:2]), f"blocks.{block}.attn.qkv").unflatten(2, (3, 2, head_channels)).unbind(2)
        weights = (torch.einsum("bnhc,bmhc->bhnm", q, k) / head_channels**0.5).softmax(3)
        mixed = torch.einsum("bhnm,bmhc->bnhc", weights, v).flatten(2)
        h = h + parts[2][:, None] * linear(mixed, f"blocks.{block}.attn.proj")
        hidden = F.gelu(linear(norm(h, *parts[3:5]), f"blocks.{block}.mlp.fc1"), approximate="tanh")
        h = h + parts[5][:, None] * linear(hidden, f"blocks.{block}.mlp.fc2")
    out = linear(norm(h, *linear(c, "final_layer.adaLN_modulation.1").chunk(2, dim=1)), "final_layer.linear")
    return (
        torch.einsum("bhwpqc->bchpwq", out.unflatten(2, (2, 2, 8)).unflatten(1, (4, 4))).flatten(4).flatten(2, 3)[:, :4]
    )


@torch.no_grad()
def test_dit_as_it_was_released():
    state, (x, steps, labels) = released(), batch()
    ours = from_released(state, head_channels=8)
    expected = by_hand(state, x, steps.float(), labels)
    assert expected.std() > 0.1
    raw = ours.network(x, steps.float(), 0, Conditioning(labels))
    torch.testing.assert_close(raw, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_sit_as_it_was_released():
    """SiT draws data at time 1, from noise at time 0, and predicts data minus noise at its own time."""
    state, (x, _, labels) = released(), batch()
    process = Flow(time_scale=1.0, times="uniform")
    ours = from_released(state, process, head_channels=8, stages=Stages((1.0,)))
    time = torch.tensor([0.1, 0.5, 0.9])
    velocity = by_hand(state, x, time, labels)
    clean = x + (1 - time)[:, None, None, None] * velocity  # data = x + (1 - time) (data - noise)
    sigma = (1 - time) / time
    estimate = ours(x / time[:, None, None, None], sigma, labels)
    torch.testing.assert_close(estimate, clean, atol=1e-4, rtol=1e-4)
    with pytest.raises(ConfigError, match=r"SiT needs process\.time-scale 1, got 1000"):
        from_released(state, Flow())


def test_released_weights_that_do_not_fit_are_named():
    state = released()
    with pytest.raises(CheckpointError, match=r"has weights that ours has not, like projectors\.0\.weight"):
        from_released({**state, "projectors.0.weight": torch.zeros(1)}, head_channels=8)
    del state["blocks.1.mlp.fc1.bias"]
    with pytest.raises(CheckpointError, match=r"has no weight blocks\.1\.mlp\.fc1\.bias"):
        from_released(state, head_channels=8)
    with pytest.raises(CheckpointError, match="are not those of a DiT or SiT"):
        from_released({"conv.weight": torch.zeros(1)})


def autoencoder():
    return AutoencoderKL(block_out_channels=(4,), norm_num_groups=1, latent_channels=4, sample_size=8)


@torch.no_grad()
def test_a_unified_model_of_latents_is_a_dit_pipeline_with_our_images(tmp_path):
    model = Transformer(
        architecture="unified", width=16, depth=2, trunk=1, decoder_widths=(16,), head_channels=8, classes=3
    )
    denoiser = tiny.randomise(Denoiser.from_backbone(model, LDM(prediction="v"), (4, 8, 8))).eval()
    codec = LatentCodec(Autoencoder(tiny.randomise(autoencoder()).eval(), "AutoencoderKL", "test"), 0.7, 3)
    done = export(denoiser, tmp_path / "out", codec=codec)
    assert (done.pipeline, done.reason) == ("DiTPipeline", None) and done.max_error < 1e-4
    pipeline = DiTPipeline.from_pretrained(str(tmp_path / "out"), low_cpu_mem_usage=False)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(class_labels=[0, 2], num_inference_steps=2, output_type="np").images.shape == (2, 8, 8, 3)  # guided
    back = load_diffusers(tmp_path / "out")
    x, steps = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 500.0])
    for ours, theirs in ((None, 1000), (0, 0), (2, 2)):
        label = None if ours is None else torch.full((2,), ours)
        torch.testing.assert_close(
            denoiser.network(x, steps, 0, Conditioning(label)),
            back.network(x, steps, 0, Conditioning(torch.full((2,), theirs))),
        )


def test_a_staged_model_is_our_pipeline(tmp_path):
    model = Transformer(width=16, depth=2, trunk=1, decoder_widths=(16, 8), head_channels=8)
    denoiser = tiny.randomise(Denoiser.from_backbone(model, LDM(prediction="v"), (1, 8, 8), Stages((1.0,)))).eval()
    done = export(denoiser, tmp_path / "out")
    assert (done.pipeline, done.reason) == ("MultistagePipeline", "it has 2 stages") and done.max_error < 1e-4


def test_msd_convert_compares_with_diffusers(tmp_path, capsys):
    folder = tmp_path / "pipeline"
    dit().save_pretrained(folder / "transformer")
    DDIMScheduler(beta_schedule="linear", beta_start=1e-4, beta_end=0.02).save_pretrained(folder / "scheduler")
    (tmp_path / "stages.json").write_text('{"edges": [1.0, 4.0], "method": "by hand"}')
    words = ["convert", str(folder), str(tmp_path / "out"), "--stages", str(tmp_path / "stages.json"), "--json"]
    assert dispatch(words) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["stages"] == 3 and document["max_error"] < 1e-5
    assert Denoiser.from_pretrained(tmp_path / "out").backbone.architecture == "multistage"


def test_msd_convert_reads_a_release(tmp_path, capsys):
    state = released(width=64, depth=2)
    safetensors.torch.save_file(state, tmp_path / "sit.safetensors")
    assert dispatch(["convert", str(tmp_path / "sit.safetensors"), str(tmp_path / "out"), "--released", "sit"]) == 0
    loaded = Denoiser.from_pretrained(tmp_path / "out")
    assert loaded.process == Flow(time_scale=1.0, times="uniform")
    assert (loaded.backbone.width, loaded.backbone.depth, loaded.shape) == (64, 2, (4, 8, 8))
