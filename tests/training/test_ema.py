"""The average of the weights: right to 1e-6 of a float64 recomputation, in float32, apart from the trained weights."""

from dataclasses import replace

import pytest
import safetensors.torch
import torch
from torch import nn

import tiny
from multistage_diffusion.config import EngineConfig
from multistage_diffusion.runs.checkpoints import EMA_WEIGHTS, RAW, list_checkpoints
from multistage_diffusion.training.ema import EMA, HalfLife, Power
from multistage_diffusion.training.run import build_trainer, train


@pytest.mark.slow
@pytest.mark.parametrize(("half_life", "ramp_up"), [(20.0, None), (1000.0, 0.05)])
def test_it_equals_a_recomputation_from_the_checkpoints(half_life, ramp_up, tmp_path):
    config = tiny.run_config(steps=20, save_every=1, keep=20, ema_half_life=half_life, ema_ramp_up=ramp_up)
    start = build_trainer(config, tiny.images()).denoiser.network.state_dict()
    average = {name: tensor.double() for name, tensor in start.items()}
    train(config, tmp_path / "run", data=tiny.images())
    checkpoints = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert len(checkpoints) == 20
    for checkpoint in checkpoints:
        images = checkpoint.step * 4
        kept = 0.5 ** (4 / (half_life if ramp_up is None else min(half_life, ramp_up * images)))
        weights = safetensors.torch.load_file(checkpoint.path / RAW)
        saved = safetensors.torch.load_file(checkpoint.path / EMA_WEIGHTS)
        for name, tensor in weights.items():
            average[name] = kept * average[name] + (1 - kept) * tensor.double()
            scale = tensor.abs().max().item() + 1e-3
            assert (saved[name].double() - average[name]).abs().max().item() <= 1e-6 * scale
            assert saved[name].dtype == torch.float32


def test_it_shares_no_storage_and_leaves_the_module_alone():
    module = nn.Linear(3, 3)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    average = EMA(module, HalfLife(10.0, None))
    assert not {t.data_ptr() for t in average.average.values()} & {p.data_ptr() for p in module.parameters()}
    average.update(1, 1)
    assert tiny.bits_equal(module.state_dict(), before)
    with torch.no_grad():
        module.weight.add_(1.0)
    assert torch.equal(average.average["weight"], before["weight"])


def test_half_of_it_is_left_after_a_half_life():
    module = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(module.weight)
    average = EMA(module, HalfLife(50.0, None))
    nn.init.ones_(module.weight)
    for _ in range(10):
        average.update(0, 5)
    assert average.average["weight"].item() == pytest.approx(0.5)


def test_it_moves_where_half_precision_would_stand_still():
    module = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    nn.init.ones_(module.weight)
    average = EMA(module, HalfLife(10_000.0, None))
    nn.init.constant_(module.weight, 1.01)
    for _ in range(500):
        average.update(0, 1)
    assert average.average["weight"].dtype == torch.float32
    moved = average.average["weight"].item() - 1
    assert moved == pytest.approx(
        (module.weight.item() - 1) * (1 - 0.5**0.05), rel=0.1
    )  # float32 rounds each small move


def test_copies_and_restores_are_exact_and_strict():
    module, other = nn.Linear(3, 2), nn.Linear(3, 2)
    average = EMA(module, HalfLife(10.0, None))
    average.copy_to(other)
    assert tiny.bits_equal(other.state_dict(), module.state_dict())
    restored = EMA(other, HalfLife(10.0, None))
    restored.load({name: tensor + 1 for name, tensor in average.average.items()})
    assert torch.equal(restored.average["bias"], average.average["bias"] + 1)
    with pytest.raises(ValueError, match="other names: bias"):
        average.load({"weight": torch.zeros(2, 3)})
    with pytest.raises(ValueError, match="shape"):
        average.load({"weight": torch.zeros(1, 3), "bias": torch.zeros(2)})


def test_saving_and_averaging_leave_the_trained_weights_alone(tmp_path):
    trainer = build_trainer(tiny.run_config(), tiny.images())
    list(trainer.run(3))
    before = {name: tensor.clone() for name, tensor in trainer.denoiser.state_dict().items()}
    averaged = trainer.averaged()
    averaged.save_pretrained(tmp_path / "model")
    assert tiny.bits_equal(trainer.denoiser.state_dict(), before)
    assert trainer.denoiser.training and not averaged.training
    pointers = {p.data_ptr() for p in trainer.denoiser.parameters()} | {
        t.data_ptr() for t in trainer.ema.average.values()
    }
    assert not pointers & {p.data_ptr() for p in averaged.parameters()}


def test_averages_are_float32_and_exact_in_a_half_precision_run():
    config = replace(tiny.run_config(sigma_rel=(0.1,)), engine=EngineConfig(precision="bf16"))
    trainer, power = build_trainer(config, tiny.images()), Power(0.1)
    average = {}
    for result in trainer.run(8):
        kept = power.decay(result.images, 4)
        for name, parameter in trainer.denoiser.network.named_parameters():
            average[name] = kept * average.get(name, 0.0) + (1 - kept) * parameter.detach().double()
    for name, tensor in trainer.powers[0.1].average.items():
        assert tensor.dtype == trainer.ema.average[name].dtype == torch.float32
        scale = average[name].abs().max().item() + 1e-3
        assert (tensor.double() - average[name]).abs().max().item() <= 1e-6 * scale
