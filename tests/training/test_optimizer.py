"""Muon: its iteration, its update beside torch's own, and the runs that use it."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import tiny
from multistage_diffusion.config import EngineConfig, TrainingConfig
from multistage_diffusion.errors import ConfigError
from multistage_diffusion.multidecoder import MultiDecoder
from multistage_diffusion.training.branch import branch_trainer
from multistage_diffusion.training.optimizer import Muon, make_optimizer, orthogonal
from multistage_diffusion.training.run import build_denoiser, build_trainer, train
from runs import same_run, train_until

MUON = tiny.run_config(optimizer="muon", learning_rate=1e-3)


def optimizer(module, **options):
    training = TrainingConfig(optimizer="muon", learning_rate=0.1, **options)
    return make_optimizer(MultiDecoder.unified(module), (1.0, 1.0), training, EngineConfig(), torch.device("cpu"))


@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4), (1, 7)])
def test_singular_vectors_stay_and_singular_values_come_near_one(shape):
    matrix = torch.randn(3, *shape, dtype=torch.float64).float()
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    inner = u.mT @ orthogonal(matrix) @ v.mT
    values = inner.diagonal(dim1=1, dim2=2)
    assert 0.3 < float(values.min()) and float(values.max()) < 1.3  # those that were almost 0 are still on their way
    torch.testing.assert_close(inner, torch.diag_embed(values), atol=1e-4, rtol=0)


def test_a_matrix_of_zeros_stays():
    assert not orthogonal(torch.zeros(1, 3, 4)).any()


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (3, 2, 3, 3)])
def test_updates_are_torchs_own_on_flattened_kernels(shape):
    ours, theirs = nn.Parameter(torch.randn(shape)), nn.Parameter(torch.empty(0))
    theirs.data = ours.detach().flatten(1).clone()
    own = Muon([ours], set(), lr=0.02, weight_decay=0.1)
    other = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    start = theirs.detach().clone()
    for _ in range(3):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.flatten(1).clone()
        own.step()
        other.step()
    moved = theirs.detach() - start
    # torch computes in bfloat16, of 8 bits.
    torch.testing.assert_close(ours.detach().flatten(1) - start, moved, atol=0.03 * float(moved.abs().max()), rtol=0)


def test_biases_norms_and_embeddings_are_moved_by_adamw():
    torch.manual_seed(0)
    module = nn.ModuleDict({"conv": nn.Conv2d(2, 3, 3), "norm": nn.GroupNorm(1, 3), "table": nn.Embedding(4, 3)})
    twin = nn.ModuleDict({"conv": nn.Conv2d(2, 3, 3), "norm": nn.GroupNorm(1, 3), "table": nn.Embedding(4, 3)})
    twin.load_state_dict(module.state_dict())
    own = optimizer(module, weight_decay=0.01)
    adamw = torch.optim.AdamW(twin.parameters(), lr=0.1, weight_decay=0.01, fused=True)
    for _ in range(3):
        for one, other in zip(module.parameters(), twin.parameters(), strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        own.step()
        adamw.step()
    different = [name for name, value in module.state_dict().items() if not torch.equal(value, twin.state_dict()[name])]
    assert different == ["conv.weight"]


def test_a_decoder_without_images_does_not_move():
    trainer = build_trainer(replace(MUON, training=replace(MUON.training, batches="single-uniform")), tiny.images())
    before = {name: value.clone() for name, value in trainer.denoiser.network.state_dict().items()}
    result = next(trainer.run(1))
    idle = [stage for stage, loss in enumerate(result.stage_loss) if loss is None]
    for name, value in trainer.denoiser.network.state_dict().items():
        if name.startswith(tuple(f"decoders.{stage}." for stage in idle)):
            assert torch.equal(value, before[name])


def test_a_stopped_run_goes_on_to_the_bit(tmp_path):
    train(MUON, tmp_path / "whole", data=tiny.images())
    train_until(5, tmp_path / "run", MUON)
    assert train(MUON, tmp_path / "run", data=tiny.images()).resumed == 3
    same_run(tmp_path / "run", tmp_path / "whole")


def test_at_a_branch_momentum_is_carried_to_each_decoder():
    config = replace(MUON, training=replace(MUON.training, branch_at=0.5))
    config = replace(config, model=replace(config.model, decoder_widths=(8, 8, 8)))
    data = tiny.images()
    trunk = build_trainer(config.trunk, data)
    assert len(list(trunk.run(3))) == 3
    momenta = {name: trunk.optimizer.state[p] for name, p in trunk.denoiser.network.named_parameters()}
    trainer = branch_trainer(trunk, build_denoiser(config, data.shape), config.training)
    shares = trainer.denoiser.stages.shares(config.process)
    for name, parameter in trainer.denoiser.network.named_parameters():
        part, stage, rest = name.split(".", 2)
        before = momenta[f"{part}.0.{rest}"]
        assert trainer.optimizer.state[parameter].keys() == before.keys()
        if "momentum_buffer" in before:
            share = shares[int(stage)] if part == "decoders" else 1.0
            torch.testing.assert_close(
                trainer.optimizer.state[parameter]["momentum_buffer"], share * before["momentum_buffer"]
            )
    assert len(list(trainer.run(5))) == 2


def test_shards_are_refused():
    with pytest.raises(ConfigError, match=r"training\.optimizer must be adamw with engine\.parallel fsdp"):
        build_trainer(replace(MUON, engine=EngineConfig(parallel="fsdp")), tiny.images())
