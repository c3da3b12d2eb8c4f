"""A run that begins as one network and branches into stages; rates by part; training beyond the edges."""

import json
from dataclasses import replace

import pytest
import safetensors.torch
import torch

import tiny
from multistage_diffusion.config import RunConfig
from multistage_diffusion.errors import ConfigError
from multistage_diffusion.metrics.cost import network_cost
from multistage_diffusion.runs import load_run
from multistage_diffusion.runs.checkpoints import RAW
from multistage_diffusion.training.batches import Batches
from multistage_diffusion.training.branch import branch_trainer
from multistage_diffusion.training.run import build_denoiser, build_trainer, train
from runs import log, same_run, tensors, train_until

BRANCH = tiny.run_config(branch_at=0.5)  # after step 4 of 8


@pytest.fixture(scope="module")
def branched(tmp_path_factory):
    out = tmp_path_factory.mktemp("branch") / "run"
    summary = train(BRANCH, out, data=tiny.images())
    return out, summary


@pytest.mark.parametrize("step", [2, 4, 5, 8])
def test_a_run_stopped_on_either_side_of_the_branch_ends_the_same(step, branched, tmp_path):
    train_until(step, tmp_path / "run", BRANCH)
    assert train(BRANCH, tmp_path / "run", data=tiny.images()).resumed == (step - 1) // 3 * 3
    same_run(tmp_path / "run", branched[0])


def test_flops_and_images_count_both_parts(branched):
    out, summary = branched
    loaded = load_run(out)
    assert loaded.trunk_images == 16 and sum(loaded.stage_images or ()) == 16 and loaded.denoiser.network.stages == 3
    trunk, staged = network_cost(BRANCH.trunk.model, tiny.SHAPE), network_cost(BRANCH.model, tiny.SHAPE)
    expected = 16 * trunk.stages[0].training_flops + staged.training_flops(loaded.stage_images or ())
    assert summary.training_flops == pytest.approx(expected)
    lines = [json.loads(line) for line in log(out)]
    assert [len(line["stage_loss"]) for line in lines] == [1, 1, 3, 3]
    assert lines[-1]["training_flops"] == pytest.approx(expected)


def test_before_the_branch_a_run_is_its_trunk(tmp_path):
    train_until(4, tmp_path / "run", BRANCH)
    loaded = load_run(tmp_path / "run")
    assert loaded.step == 3 and loaded.denoiser.network.stages == 1 and loaded.trunk_images == 0
    # The same run without a branch is equal so far, but for its name.
    plain = replace(BRANCH.trunk, training=replace(BRANCH.trunk.training, steps=8))
    train_until(4, tmp_path / "plain", plain)
    assert tiny.bits_equal(tensors(tmp_path / "run", 3), tensors(tmp_path / "plain", 3))


def test_at_the_branch_weights_and_averages_are_the_trunk_s_and_moments_its_share():
    config = tiny.run_config(branch_at=0.5, sigma_rel=(0.1,), clip_norm=None)
    config = replace(config, model=replace(config.model, decoder_widths=(8, 8, 8)))
    data = tiny.images()
    trunk = build_trainer(config.trunk, data)
    for _ in trunk.run(3):
        pass
    before = {name: tensor.clone() for name, tensor in trunk.denoiser.network.state_dict().items()}
    trainer = branch_trainer(trunk, build_denoiser(config, data.shape), config.training)
    assert trainer.step == 3 and trainer.trunk_images == 12 and trainer.stage_images == [0, 0, 0]
    shares = trainer.denoiser.stages.shares(config.process)
    old = {
        name: (parameter, trunk.optimizer.state[parameter])
        for name, parameter in trunk.denoiser.network.named_parameters()
    }
    for name, parameter in trainer.denoiser.network.named_parameters():
        part, stage, rest = name.split(".", 2)
        source = f"{part}.0.{rest}"
        assert torch.equal(parameter, before[source])
        for average, trained in ((trainer.ema, trunk.ema), (trainer.powers[0.1], trunk.powers[0.1])):
            assert torch.equal(average.average[name], trained.average[source])
        state, trained_state = trainer.optimizer.state[parameter], old[source][1]
        share = shares[int(stage)] if part == "decoders" else 1.0
        torch.testing.assert_close(state["exp_avg"], share * trained_state["exp_avg"])
        rows = {"0": 1, "1": 2, "2": 1}[stage] if part == "decoders" else 4
        assert sum(trainer.batches(0).counts) == 4
        torch.testing.assert_close(
            state["exp_avg_sq"],
            share**2 * 4 / trainer.batches(0).counts[int(stage)] * trained_state["exp_avg_sq"]
            if part == "decoders"
            else trained_state["exp_avg_sq"],
        )
        assert rows and float(state["step"]) == float(trained_state["step"])
    next(trainer.run(4))
    reset = branch_trainer(trunk, build_denoiser(config, data.shape), replace(config.training, branch_moments="reset"))
    assert not reset.optimizer.state


def test_a_branch_after_a_number_of_images():
    assert tiny.run_config(branch_at=13.0).branch_step == 4  # 4 images a step
    assert tiny.run_config(branch_at=0.25).branch_step == 2 and tiny.run_config().branch_step == 0
    for options, words in (({"branch_at": 0.01}, "which is step 0 of 8"),):
        with pytest.raises(ConfigError, match=words):
            tiny.run_config(**options)
    with pytest.raises(ConfigError, match="0 for a network without stages"):
        tiny.run_config(tiny.architecture("unified", tiny.SMALLEST), branch_at=0.5)


def test_a_share_of_other_steps_is_another_run(branched):
    with pytest.raises(ConfigError, match="steps is 8 there and 12"):
        train(tiny.run_config(branch_at=0.5, steps=12), branched[0], data=tiny.images())


def part_states(run):
    state = safetensors.torch.load_file(run / "checkpoints" / "step-00000008" / RAW)
    return {
        part: {k: v for k, v in state.items() if k.startswith(part)} for part in ("enc", "decoders.0", "decoders.1")
    }


def test_frozen_parts_stay_and_others_move(tmp_path):
    initial = build_denoiser(tiny.run_config(), tiny.SHAPE).network.state_dict()
    train(tiny.run_config(encoder_rate=0.0, stage_rates=(1.0, 0.0, 0.5)), tmp_path / "run", data=tiny.images())
    parts = part_states(tmp_path / "run")
    moved = {
        part: any(not torch.equal(initial[name], tensor) for name, tensor in state.items())
        for part, state in parts.items()
    }
    assert moved == {"enc": False, "decoders.0": True, "decoders.1": False}
    train_until(5, tmp_path / "other", tiny.run_config(encoder_rate=0.0, stage_rates=(1.0, 0.0, 0.5)))
    train(tiny.run_config(encoder_rate=0.0, stage_rates=(1.0, 0.0, 0.5)), tmp_path / "other", data=tiny.images())
    same_run(tmp_path / "other", tmp_path / "run")


def test_equal_rates_are_a_learning_rate(tmp_path):
    plain = build_trainer(tiny.run_config(learning_rate=1e-3), tiny.images())
    rates = build_trainer(tiny.run_config(learning_rate=2e-3, encoder_rate=0.5, stage_rates=(0.5,) * 3), tiny.images())
    for _ in zip(plain.run(3), rates.run(3), strict=True):
        pass
    for a, b in zip(plain.denoiser.parameters(), rates.denoiser.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_changed_rates_on_resume_are_said(tmp_path):
    train_until(5, tmp_path / "run")
    with pytest.warns(UserWarning, match="training.learning-rate was 0.003 and is 0.001 from step 3 on"):
        train(tiny.run_config(learning_rate=1e-3), tmp_path / "run", data=tiny.images())


@pytest.mark.parametrize("overlap", [0.0, 0.25])
def test_overlap_widens_each_stage_by_its_share_on_either_side(overlap):
    config: RunConfig = tiny.run_config(batch_size=300, overlap=overlap)
    stages = build_denoiser(config, tiny.SHAPE).stages
    batch = Batches(tiny.images(), config.process, stages, config.training)(0)
    edges = config.process.cdf(torch.tensor([0.0, *stages.edges, float("inf")], dtype=torch.float64)).tolist()
    for stage, sigma in enumerate(batch.sigma.split(batch.counts)):
        u, low, high = config.process.cdf(sigma), edges[stage], edges[stage + 1]
        beyond = overlap * (high - low)
        assert u.min() >= max(low - beyond, 0) - 1e-9 and u.max() <= min(high + beyond, 1) + 1e-9
        if stage == 1:
            assert (u.min() < low) == (overlap > 0) == bool(u.max() > high)
    with pytest.raises(ConfigError, match="overlap must be 0 unless"):
        tiny.run_config(overlap=0.1, batches="single-p")


def test_a_run_that_is_too_short_to_branch_branches_when_it_goes_on(tmp_path):
    short, longer = tiny.run_config(branch_at=24.0, steps=5), tiny.run_config(branch_at=24.0)
    train(short, tmp_path / "run", data=tiny.images())
    assert load_run(tmp_path / "run").denoiser.network.stages == 1
    assert load_run(tmp_path / "run" / "model").denoiser.network.stages == 1
    train(longer, tmp_path / "run", data=tiny.images())
    train(longer, tmp_path / "whole", data=tiny.images())
    same_run(tmp_path / "run", tmp_path / "whole")
