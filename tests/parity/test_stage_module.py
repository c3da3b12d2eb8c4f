"""Modules of diffusers in stages: the same outputs at first, then those of their experts."""

import copy
import inspect
import json
import math
from pathlib import Path

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.ddpm.pipeline_ddpm import DDPMPipeline
from diffusers.pipelines.dit.pipeline_dit import DiTPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_edm_euler import EDMEulerScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from diffusers.training_utils import EMAModel
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.checkpoint import checkpoint

import multistage_diffusion as msd
from multistage_diffusion.errors import CheckpointError, ConfigError
from multistage_diffusion.interop.diffusers import from_diffusers
from multistage_diffusion.interop.timesteps import noise_levels
from tiny import bits_equal

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")
EDGES = (0.5, 3.0)
TIMES = torch.tensor([900, 3, 400, 999, 100])  # stages 2, 0, 1, 2, 0 of the scheduler below
SCHEDULER = DDPMScheduler()


class Plain(nn.Module):
    """A module that is not of diffusers, with a list whose length is read, and a weight that may be read directly."""

    def __init__(self, reads=False):
        super().__init__()
        self.stem, self.time = nn.Linear(3, 8), nn.Linear(1, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.SiLU()) for _ in range(2))
        self.head, self.reads = nn.Linear(8, 3), reads

    def forward(self, x, t, scale=1.0):
        h = self.stem(x) + self.time(torch.as_tensor(t).to(x).reshape(-1, 1) / 1000)
        for index in range(len(self.blocks)):
            h = h + self.blocks[index](h) / len(self.blocks)
        return {"x": self.head(h) * scale * (self.head.weight.norm() if self.reads else 1)}


def randomise(module, seed=0):
    """Other weights, near those of the initialisation, which modulations of many blocks were made for."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=generator))
    return module


def unet(**options):
    return UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4, **options,
    )  # fmt: skip


def conditional():
    return UNet2DConditionModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4, cross_attention_dim=8,
    )  # fmt: skip


def dit():
    return DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=4, out_channels=8, num_layers=3, sample_size=8,
        patch_size=2, norm_num_groups=1,
    )  # fmt: skip


def noise(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


# What is staged of each, and the arguments for five rows besides the timesteps.
CASES = {
    "unet": (unet, ["up_blocks", "conv_norm_out", "conv_out"], lambda: {"sample": noise(5, 1, 8, 8)}),
    "conditional": (
        conditional,
        ["up_blocks", "down_blocks.1.attentions.0", "conv_out"],
        lambda: {"sample": noise(5, 1, 8, 8), "encoder_hidden_states": noise(5, 3, 8)},
    ),
    "dit": (
        dit,
        ["transformer_blocks", "proj_out_1", "proj_out_2"],  # forward calls transformer_blocks[0].norm1.emb by itself
        lambda: {"hidden_states": noise(5, 4, 8, 8), "class_labels": torch.arange(5)},
    ),
    "plain": (Plain, ["blocks", "head"], lambda: {"x": noise(5, 3)}),
    "plain, reads": (lambda: Plain(reads=True), ["blocks.1", "head"], lambda: {"x": noise(5, 3)}),
}


def make(name, stages=EDGES, process=SCHEDULER, **options):
    build, names, _ = CASES[name]
    torch.manual_seed(0)
    module = randomise(build()).eval()
    return module, msd.stage_module(module, names, stages, process, **options)


def inputs(name, timestep, rows=slice(None), dtype=torch.float32):
    _, _, arguments = CASES[name]
    given = {
        key: value[rows].to(dtype) if value.is_floating_point() else value[rows] for key, value in arguments().items()
    }
    if name == "dit":  # which takes vectors only
        timestep = torch.as_tensor(timestep).expand(len(given["class_labels"]))
    return given | {"t" if name.startswith("plain") else "timestep": timestep}


def tensor(output):
    return output["x"] if isinstance(output, dict) and "x" in output else output.sample


def assert_close(output, expected):
    """Equal up to rounding of float64, in units of the largest number."""
    output, expected = output.detach(), expected.detach()
    assert float((output - expected).abs().max()) <= 1e-9 * (1 + float(expected.abs().max()))


def diverge(staged):
    """Other weights in each stage, as after training."""
    for stage, part in enumerate(staged.by_stage):
        randomise(part, seed=stage + 1)


@pytest.mark.parametrize("name", CASES)
def test_at_first_the_outputs_are_the_modules(name):
    module, staged = make(name)
    assert isinstance(staged, type(module)) and inspect.signature(staged.forward) == inspect.signature(module.forward)
    for timestep in (3, 400, torch.tensor(999), torch.tensor([901, 930, 950, 970, 990])):
        output, expected = (each(**inputs(name, timestep)) for each in (staged, module))
        assert torch.equal(tensor(output), tensor(expected)) and type(output) is type(expected)
    # Stages split a batch, so that matrix products have other sizes and round otherwise.
    exact = inputs(name, TIMES, dtype=torch.float64)
    assert_close(tensor(staged.double()(**exact)), tensor(module.double()(**exact)))
    if name in ("unet", "conditional", "dit"):
        assert isinstance(staged(**exact, return_dict=False), tuple)


@pytest.mark.parametrize("mixed", ["shared", "apart"])
@pytest.mark.parametrize("name", CASES)
def test_each_row_has_the_output_and_the_gradients_of_its_expert(name, mixed):
    _, staged = make(name, mixed=mixed)
    diverge(staged.double())
    calls = []
    shared = staged.get_submodule({"dit": "pos_embed", "unet": "conv_in", "conditional": "conv_in"}.get(name, "stem"))
    shared.register_forward_hook(lambda module, given, output: calls.append(len(given[0])))
    output = tensor(staged(**inputs(name, TIMES, dtype=torch.float64)))
    apart = {"shared": [5, 2, 1, 2], "apart": [2, 1, 2]}[mixed]  # found out in the first forward pass, or said
    assert calls == ([5] if mixed == "shared" and name != "plain, reads" else apart)
    output.square().sum().backward()
    gradients = {key: value.grad for key, value in staged.named_parameters()}
    experts = [staged.expert(stage) for stage in range(3)]
    expected = [
        tensor(experts[stage](**inputs(name, TIMES[row : row + 1], slice(row, row + 1), torch.float64)))
        for row, stage in enumerate(staged.stage_of(TIMES).tolist())
    ]
    assert_close(output, torch.cat(expected))
    sum(part.square().sum() for part in expected).backward()
    for key, gradient in gradients.items():
        stage, _, plain = key.removeprefix("by_stage.").partition(".") if key.startswith("by_stage") else ("", "", key)
        of = [experts[int(stage)]] if stage else experts
        parts = [part for expert in of if (part := dict(expert.named_parameters())[plain].grad) is not None]
        assert (gradient is None) == (not parts)
        if gradient is not None:
            assert_close(gradient, sum(parts))


@pytest.mark.parametrize("name", ["unet", "dit"])
def test_a_batch_of_one_stage_gives_no_gradient_to_the_others(name):
    _, staged = make(name)
    tensor(staged(**inputs(name, 400))).sum().backward()
    assert [any(value.grad is not None for value in part.parameters()) for part in staged.by_stage] == [
        False,
        True,
        False,
    ]
    tensor(staged(**inputs(name, torch.tensor([3, 400, 3, 400, 3])))).sum().backward()
    assert all(value.grad is None for value in staged.by_stage[2].parameters())


def test_experts_and_keys():
    module, staged = make("unet")
    state, plain = staged.state_dict(), module.state_dict()
    prefixes = ("up_blocks.", "conv_norm_out.", "conv_out.")
    shared = {key for key in plain if not key.startswith(prefixes)}
    assert state.keys() == shared | {
        f"by_stage.{k}.{key}" for k in range(3) for key in plain if key.startswith(prefixes)
    }
    assert {name for name, _ in staged.named_parameters()} == state.keys()
    for stage in range(3):
        expert = staged.expert(stage)
        assert type(expert) is type(module) and bits_equal(expert.state_dict(), plain)
        assert not {id(value) for value in expert.parameters()} & {id(value) for value in staged.parameters()}
    diverge(staged)
    assert bits_equal(module.state_dict(), plain)  # the module itself stays as it was
    reference = staged.expert(2)(**inputs("unet", 999)).sample
    assert torch.equal(staged(**inputs("unet", 999)).sample, reference)
    other = copy.deepcopy(staged)
    randomise(other)
    assert torch.equal(staged(**inputs("unet", 999)).sample, reference)
    assert not torch.equal(other(**inputs("unet", 999)).sample, reference)


def test_parts_are_read_as_those_of_the_stage():
    _, staged = make("conditional")
    up = staged.up_blocks[0]
    assert up.has_cross_attention and len(up.resnets) == 2 and len(list(up.resnets)) == 2 and len(up.resnets[:1]) == 1
    assert not hasattr(up, "skip_conv") and staged.conv_out.weight is staged.by_stage[0].conv_out.weight
    assert len(list(staged.conv_out.parameters())) == 2 and bool(staged.conv_out)
    with pytest.raises(ConfigError, match="runs only inside the staged module's forward"):
        staged.conv_out(noise(1, 8, 8, 8))


def test_activation_checkpointing_recomputes_in_the_stage_of_the_first_pass():
    _, staged = make("dit")
    diverge(staged.double())

    def gradients():
        staged.zero_grad()
        first, second = (inputs("dit", timestep, dtype=torch.float64) for timestep in (TIMES, 400))
        (staged(**first).sample.square().sum() + staged(**second).sample.square().sum()).backward()  # two at once
        return {name: value.grad for name, value in staged.named_parameters() if value.grad is not None}

    expected = gradients()
    staged.enable_gradient_checkpointing()
    calls = []
    staged.by_stage[1].get_submodule("transformer_blocks.0").register_forward_pre_hook(lambda *_: calls.append(1))
    again = gradients()
    assert len(calls) == 4 and again.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(again[name], value)


def test_reentrant_checkpointing_is_refused():
    class Reentrant(Plain):
        def forward(self, x, t):
            return checkpoint(self.head, self.stem(x), use_reentrant=True)

    staged = msd.stage_module(Reentrant(), ["head"], EDGES, SCHEDULER)
    output = staged(noise(2, 3), 5)
    with pytest.raises(ConfigError, match="use_reentrant=False"):
        output.sum().backward()


# Loops and pipelines


@pytest.mark.parametrize("name", ["unet", "conditional", "dit"])
def test_a_training_loop_in_diffusers_style(name):
    _, staged = make(name)
    staged.train()
    rates = {"shared": 0.0, "stages": [1e-3, 1e-2, 0.0]}
    optimizer = torch.optim.AdamW(staged.parameter_groups(**rates), weight_decay=0.0)
    assert [group["name"] for group in optimizer.param_groups] == ["shared", "stage 0", "stage 1", "stage 2"]
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(staged.parameters()))
    before = {name: value.clone() for name, value in staged.state_dict().items()}
    average, losses, argument = (
        EMAModel(staged.parameters(), decay=0.5),
        [],
        "hidden_states" if name == "dit" else "sample",
    )
    batch = inputs(name, TIMES)
    clean, epsilon = batch[argument], noise(*batch[argument].shape).flip(0)
    batch[argument] = SCHEDULER.add_noise(clean, epsilon, TIMES)
    torch.manual_seed(0)  # the transformer drops labels
    for _ in range(12):
        loss = mse_loss(staged(**batch).sample[:, : clean.shape[1]], epsilon)
        loss.backward()
        nn.utils.clip_grad_norm_(staged.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.step(staged.parameters())
        losses.append(loss.item())
    assert sum(losses[-3:]) < sum(losses[:3])
    changed = {name[:10] for name, value in staged.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"by_stage.0", "by_stage.1"}
    average.copy_to(staged.parameters())
    changed = {name[:10] for name, value in staged.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"by_stage.0", "by_stage.1"}
    with pytest.raises(ConfigError, match="2 learning rates do not fit 3 stages"):
        staged.parameter_groups(stages=[1e-3, 1e-3])


def pictures(pipeline, **options):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        generator=torch.Generator().manual_seed(0), output_type="np", num_inference_steps=4, **options
    ).images


def test_the_pipeline_of_ddpm_and_its_folder(tmp_path):
    module, staged = make("unet")
    first, second = (pictures(DDPMPipeline(network, SCHEDULER), batch_size=2) for network in (module, staged))
    assert (first == second).all()
    diverge(staged)
    pipeline = DDPMPipeline(staged, SCHEDULER)
    pipeline.save_pretrained(tmp_path / "pipeline")
    loaded = msd.load_staged(tmp_path / "pipeline" / "unet", module)
    again = DDPMPipeline.from_pretrained(str(tmp_path / "pipeline"), unet=loaded)
    assert (pictures(again, batch_size=2) == pictures(pipeline, batch_size=2)).all()
    staged.expert(1).save_pretrained(tmp_path / "expert")
    alone = UNet2DModel.from_pretrained(str(tmp_path / "expert"), low_cpu_mem_usage=False)
    assert torch.equal(alone(**inputs("unet", 400)).sample, staged(**inputs("unet", 400)).sample)


def test_the_pipeline_of_dit():
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, layers_per_block=1).eval()
    module = randomise(dit()).eval()
    scheduler = DDIMScheduler()
    staged = msd.stage_module(module, ["transformer_blocks", "proj_out_2"], EDGES, scheduler)
    options = {"class_labels": [1, 2], "guidance_scale": 2.0}
    first, second = (pictures(DiTPipeline(network, vae, scheduler), **options) for network in (module, staged))
    assert first.shape == (2, 8, 8, 3) and (first == second).all()
    diverge(staged)
    assert (pictures(DiTPipeline(staged, vae, scheduler), **options) != first).any()


def test_two_experts_and_a_boundary():
    torch.manual_seed(0)
    module = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=8,
        freq_dim=16, ffn_dim=32, num_layers=2, rope_max_seq_len=16,
    ).eval()  # fmt: skip
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    staged = msd.stage_module(module, ["blocks", "proj_out"], [7.0], scheduler)  # t = 0.875
    diverge(staged)
    transformer, transformer_2, boundary_ratio = staged.boundary_experts()
    assert boundary_ratio == pytest.approx(0.875, abs=1e-6) and type(transformer) is WanTransformer3DModel
    scheduler.set_timesteps(8)
    edge = torch.tensor([874.9999, 875.0, 875.0001, 1000.0])
    x, text = noise(1, 4, 2, 4, 4), noise(1, 3, 8)
    for t in torch.cat((scheduler.timesteps.float(), edge)):
        expert = transformer if t >= boundary_ratio * 1000 else transformer_2  # as the pipelines choose
        timestep = t.expand(1)
        assert torch.equal(staged(x, timestep, text).sample, expert(x, timestep, text).sample)
    tokens = torch.tensor([[0.0, 0.0, 900.0, 900.0] * 2])  # a time for each token: the highest counts
    assert staged.stage_of(tokens).tolist() == [1]
    with pytest.raises(ConfigError, match="two experts need two stages; the module has 3"):
        make("unet")[1].boundary_experts()
    with pytest.raises(ConfigError, match=r"the edge 0.5 lies outside the timesteps 0\.\.1000"):
        make("plain", [0.5], msd.EDM())[1].boundary_experts()


def test_flops_are_those_of_the_layers():
    _, staged = make("plain")
    layers = 2 * (3 * 8 + 2 * 8 * 8 + 8 * 3)
    assert staged.flops(noise(5, 3), 7) == (5 * layers + 2 * 8,) * 3  # one timestep for all
    module = UNet2DModel(**{**dict(unet().config), "norm_num_groups": 2})
    staged = msd.stage_module(module, ["up_blocks"], EDGES, SCHEDULER)
    counted = msd.denoiser_cost(from_diffusers(module)).stages[0].flops  # attention included
    assert staged.flops(noise(1, 1, 8, 8), 3) == (counted,) * 3 and staged.conv_in.weight.device.type == "cpu"


def test_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs" / "staging.md").read_text()
    names = {}
    exec("".join(part.partition("```")[0] for part in page.split("```python\n")[1:]), names)
    assert names["pictures"].shape == (2, 16, 16, 1) and names["boundary_ratio"] == pytest.approx(0.875, abs=1e-6)
    assert sorted(path.name for path in (tmp_path / "pipeline" / "unet").iterdir())[1:] == [
        "staged.json",
        "staged.safetensors",
    ]
    assert (tmp_path / "expert" / "diffusion_pytorch_model.safetensors").is_file()


# Timesteps


@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler(beta_schedule="squaredcos_cap_v2"),
        DPMSolverMultistepScheduler(beta_schedule="scaled_linear"),
        EulerDiscreteScheduler(beta_start=0.001),
        EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction", use_karras_sigmas=True),
        EDMEulerScheduler(sigma_max=20.0),
        FlowMatchEulerDiscreteScheduler(shift=3.0),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_timesteps_mean_what_the_scheduler_makes_of_them(scheduler):
    levels = noise_levels(scheduler, "timestep")
    scheduler.set_timesteps(7)
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is None:
        kept = scheduler.alphas_cumprod[scheduler.timesteps]
        sigmas = ((1 - kept) / kept).sqrt()
    elif isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        sigmas = sigmas[:-1] / (1 - sigmas[:-1])
    translated = levels(scheduler.timesteps.double())
    torch.testing.assert_close(translated, sigmas[:7].double(), rtol=2e-3, atol=0)


def test_processes_functions_and_noise_levels_themselves():
    module = Plain()
    of_sigma = type("OfSigma", (Plain,), {"forward": lambda self, x, sigma: Plain.forward(self, x, sigma)})()
    assert msd.stage_module(module, ["head"], [3.0], msd.Flow()).stage_of(torch.tensor([740.0, 760.0])).tolist() == [
        0,
        1,
    ]
    assert msd.stage_module(module, ["head"], [3.0], msd.EDM()).stage_of(math.log(3.1) / 4).item() == 1
    assert msd.stage_module(module, ["head"], [3.0], lambda t: t / 10).stage_of([29, 31]).tolist() == [0, 1]
    for process in (None, msd.EDM()):
        assert msd.stage_module(of_sigma, ["head"], [3.0], process).stage_of(torch.tensor(3.0)) == 0
    assert msd.stage_module(of_sigma, ["head"], [3.0], timestep_argument="sigma")(noise(2, 3), sigma=4.0)[
        "x"
    ].shape == (2, 3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"own": ["up_block"]}, 'UNet2DModel has no submodule up_block; did you mean "up_blocks"?'),
        ({"own": ["xyz"]}, "no submodule xyz; known: conv_act, conv_in, conv_norm_out, conv_out, "),
        ({"own": ["up_blocks", "up_blocks.0.resnets"]}, "own names up_blocks.0.resnets.0 and up_blocks.0, which holds"),
        ({"own": []}, "own must be a list of submodules"),
        ({"own": "conv_out"}, "own must be a list of submodules"),
        ({"timestep_argument": "time"}, r"no argument time in UNet2DModel.forward(sample, timestep, class_labels, "),
        ({"process": None}, "process must be a process, a scheduler of diffusers or a function from timestep to sigma"),
        ({"process": msd.VP(), "stages": [300.0]}, "the edge 300 lies outside the noise levels 0.0"),
        ({"process": SCHEDULER, "stages": [0.001]}, "the edge 0.001 lies outside the noise levels 0.01"),
        ({"process": msd.VP(), "stages": msd.Stages((2.0,), {"process": {"kind": "edm"}})},
         "the stages were made for the process edm, and the timesteps are of vp"),
        ({"stages": [3.0, 0.5]}, "stage edges must be finite, positive and increasing"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(options, words):
    with pytest.raises(ConfigError) as caught:
        msd.stage_module(unet(), **{"own": ["conv_out"], "stages": EDGES, "process": SCHEDULER} | options)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_what_forward_needs():
    with pytest.raises(ConfigError, match=r"no argument is known as a timestep in Linear\.forward\(input\); give"):
        msd.stage_module(nn.Sequential(nn.Linear(3, 3))[0], ["weight"], EDGES, SCHEDULER)
    _, staged = make("dit")
    with pytest.raises(ConfigError, match=r"DiTTransformer2DModel\.forward needs timestep: it decides the stage"):
        staged(noise(1, 4, 8, 8))
    with pytest.raises(ConfigError, match="staged already"):
        msd.stage_module(staged, ["proj_out_1"], EDGES, SCHEDULER)
    with pytest.raises(ConfigError, match=r"stage must be in 0\.\.2, got 3"):
        staged.expert(3)
    module = dit()
    module.forward = lambda *given: None
    with pytest.raises(ConfigError, match="was replaced; stage the module before it is prepared"):
        msd.stage_module(module, ["proj_out_1"], EDGES, SCHEDULER)


# Files


@pytest.mark.parametrize("process", [SCHEDULER, msd.Flow(), msd.EDM(), None, math.exp], ids=repr)
def test_a_folder_comes_back_to_the_bit(tmp_path, process):
    argument = "sigma" if process is None else "t"
    module = type("Plain", (Plain,), {"forward": eval(f"lambda self, x, {argument}: Plain.forward(self, x, {argument})",
                                                      {"Plain": Plain})})()  # fmt: skip
    process = (lambda t: t / 100) if process is math.exp else process
    staged = msd.stage_module(module, ["blocks", "head"], EDGES, process, mixed="apart")
    diverge(staged)
    staged.save_pretrained(tmp_path)
    if callable(process):
        with pytest.raises(CheckpointError, match="names no process, as it was made with a function; give process"):
            msd.load_staged(tmp_path, module)
    again = msd.load_staged(tmp_path, module, process if callable(process) else None)
    assert bits_equal(again.state_dict(), staged.state_dict())
    times = torch.tensor([0.1, 1.0, 200.0, 900.0])
    assert torch.equal(again.stage_of(times), staged.stage_of(times)) and again.staging.mixed == "apart"
    staged.save_pretrained(tmp_path)  # replaces what it wrote


def test_folders_that_do_not_fit_are_one_line(tmp_path):
    module, staged = make("plain")
    staged.save_pretrained(tmp_path / "a")

    def error(words, module=module, folder="a"):
        with pytest.raises(CheckpointError) as caught:
            msd.load_staged(tmp_path / folder, module)
        assert words in str(caught.value) and "\n" not in str(caught.value)

    error("it is of a Plain, and the module is a UNet2DModel", unet())
    wider = Plain()
    wider.head = nn.Linear(8, 4)
    error("belongs to another architecture: by_stage.0.head.bias is (3,) there and (4,) here", wider)
    error("no such file", folder="none")
    for key, value, words in (
        ("own", ["nothing"], "no submodule nothing"),
        ("own", 3, "own must be a list of names"),
        ("stages", {"edges": ["x"]}, '"edges" must be a list of noise levels'),
        ("sigmas", [1], "names no process"),
        ("mixed", "so", "mixed"),
    ):
        staged.save_pretrained(tmp_path / "b")
        (tmp_path / "b" / "manifest.json").unlink()
        document = json.loads((tmp_path / "b" / "staged.json").read_text())
        (tmp_path / "b" / "staged.json").write_text(json.dumps(document | {key: value}))
        error(words, folder="b")
        (tmp_path / "b" / "staged.json").unlink(), (tmp_path / "b" / "staged.safetensors").unlink()
    (tmp_path / "a" / "staged.safetensors").write_bytes(b"damaged")
    error("bytes instead of")


def test_pickles_and_empty_batches(tmp_path):
    _, staged = make("unet")
    diverge(staged)
    torch.save(staged, tmp_path / "module.pt")
    again = torch.load(tmp_path / "module.pt", weights_only=False)
    assert type(again) is type(staged) and type(copy.deepcopy(staged)) is type(staged)
    given = inputs("unet", torch.tensor([10, 10, 400, 900, 900]))
    assert torch.equal(tensor(again(**given)), tensor(staged(**given)))
    assert type(again.expert(0)) is UNet2DModel
    _, plain = make("plain")
    assert len(tensor(plain(**inputs("plain", torch.zeros(0), rows=slice(0))))) == 0
