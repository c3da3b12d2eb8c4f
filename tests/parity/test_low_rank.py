"""Deltas of low rank by stage beside layers of modules of diffusers."""

import json
from pathlib import Path

import pytest
import torch
from test_stage_module import (
    EDGES,
    SCHEDULER,
    TIMES,
    Plain,
    assert_close,
    conditional,
    diverge,
    inputs,
    randomise,
    tensor,
    unet,
)
from torch import nn

import multistage_diffusion as msd
from multistage_diffusion.errors import CheckpointError, ConfigError
from multistage_diffusion.interop.low_rank import LowRank
from tiny import bits_equal

MODULES = {
    "unet": (unet, ["up_blocks"]),
    "conditional": (conditional, ["down_blocks", "conv_out"]),
    "plain": (Plain, ["blocks", "head"]),
}


def make(name, own=(), **options):
    build, low_rank = MODULES[name]
    torch.manual_seed(0)
    module = randomise(build()).eval()
    options = {"low_rank": low_rank, "rank": 2} | options
    return module, msd.stage_module(module, own, EDGES, SCHEDULER, **options)


@pytest.mark.parametrize("name", MODULES)
def test_at_first_the_outputs_are_the_modules_and_names_stay(name):
    module, staged = make(name)
    for timestep in (3, 400, 999):
        assert torch.equal(*(tensor(each(**inputs(name, timestep))) for each in (staged, module)))
    exact = inputs(name, TIMES, dtype=torch.float64)
    assert_close(tensor(staged.double()(**exact)), tensor(module.double()(**exact)))
    assert set(module.state_dict()) == {key for key in staged.state_dict() if not key.startswith("by_stage.")}
    deltas = [part for part in staged.modules() if isinstance(part, LowRank)]
    assert len(deltas) % 3 == 0 and deltas


@pytest.mark.parametrize("mixed", ["shared", "apart"])
@pytest.mark.parametrize("name", MODULES)
def test_each_row_has_the_output_of_its_expert(name, mixed):
    module, staged = make(name, mixed=mixed)
    staged.double()
    diverge(staged)
    output = tensor(staged(**inputs(name, TIMES, dtype=torch.float64)))
    for row, stage in enumerate(staged.stage_of(TIMES).tolist()):
        expert = staged.expert(stage)
        assert type(expert) is type(module) and expert.state_dict().keys() == module.state_dict().keys()
        rows = slice(row, row + 1)
        assert_close(tensor(expert(**inputs(name, TIMES[rows], rows, torch.float64))), output[rows])
        assert not any(layer._forward_hooks for layer in expert.modules())
    assert not torch.equal(output, tensor(module.double()(**inputs(name, TIMES, dtype=torch.float64))))


def test_only_the_deltas_of_a_stage_learn_from_it():
    _, staged = make("unet")
    staged.requires_grad_(False)
    for part in staged.by_stage:
        part.requires_grad_(True)
    groups = staged.parameter_groups(shared=0.0, stages=1e-4)
    assert [group["name"] for group in groups] == ["shared", "stage 0", "stage 1", "stage 2"]
    tensor(staged(**inputs("unet", 3))).sum().backward()
    for stage, part in enumerate(staged.by_stage):
        assert all((weight.grad is not None) == (stage == 0) for weight in part.parameters())
    trainable = sum(weight.numel() for weight in staged.by_stage.parameters())
    assert trainable < 0.9 * sum(weight.numel() for weight in unet().parameters())


@pytest.mark.parametrize(
    "layer",
    [nn.Linear(5, 3), nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(4, 6, 3, stride=2), nn.Conv2d(4, 2, (3, 1), dilation=2)],
    ids=str,
)
def test_a_merged_delta_is_the_delta(layer):
    delta = LowRank(layer, 2).double()
    layer = layer.double()
    x = torch.randn(2, 5, dtype=torch.float64) if isinstance(layer, nn.Linear) else torch.randn(2, 4, 8, 8).double()
    assert torch.equal(layer(x) + delta(x), layer(x))
    nn.init.normal_(delta.up.weight)
    expected = layer(x) + delta(x)
    with torch.no_grad():
        layer.weight += delta.weight()
    torch.testing.assert_close(layer(x), expected)


def test_copies_and_deltas_stand_together_and_a_folder_comes_back(tmp_path: Path):
    module, staged = make("unet", own=["conv_out"], rank=3)
    diverge(staged)
    staged.save_pretrained(tmp_path / "a")
    document = json.loads((tmp_path / "a" / "staged.json").read_text())
    assert (document["own"], document["low_rank"], document["rank"]) == (["conv_out"], ["up_blocks"], 3)
    again = msd.load_staged(tmp_path / "a", module)
    assert bits_equal(again.state_dict(), staged.state_dict())
    given = inputs("unet", TIMES)
    assert torch.equal(tensor(again(**given)), tensor(staged(**given)))
    (tmp_path / "a" / "manifest.json").unlink()
    for key, value, words in (
        ("rank", 0, "rank must be"),
        ("rank", "2", "rank must be"),
        ("low_rank", 2, "low_rank must be a list"),
    ):
        (tmp_path / "a" / "staged.json").write_text(json.dumps(document | {key: value}))
        with pytest.raises(CheckpointError, match=words):
            msd.load_staged(tmp_path / "a", module)


def test_activation_checkpointing_recomputes_the_delta_of_the_first_pass():
    _, staged = make("unet")
    diverge(staged)
    given = inputs("unet", TIMES)
    gradients = []
    for _ in range(2):
        staged.train().zero_grad()
        tensor(staged(**given)).square().sum().backward()
        gradients.append(
            {name: weight.grad.clone() for name, weight in staged.named_parameters() if weight.grad is not None}
        )
        staged.enable_gradient_checkpointing()
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"low_rank": ["up_block"]}, 'no submodule up_block; did you mean "up_blocks"?'),
        ({"low_rank": ["conv_norm_out"]}, "low_rank names conv_norm_out, which has no linear layer and no convolution"),
        ({"own": ["up_blocks.1"], "low_rank": ["up_blocks"]}, "of which each stage has a copy already"),
        ({"low_rank": "conv_out"}, "low_rank must be a list of submodules"),
        ({"rank": 0}, "rank must be at least 1"),
    ],
)
def test_mistakes_are_one_line(options, words):
    with pytest.raises(ConfigError) as caught:
        msd.stage_module(
            unet(), **{"own": [], "stages": EDGES, "process": SCHEDULER, "low_rank": ["conv_out"]} | options
        )
    assert words in str(caught.value) and "\n" not in str(caught.value)
