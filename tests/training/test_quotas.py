"""Quotas after the measured noise of gradients: the estimate, the loss it leaves alone, and runs that go on."""

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import tiny
from multistage_diffusion.config import EngineConfig, TrainingConfig
from multistage_diffusion.errors import CheckpointError, ConfigError
from multistage_diffusion.runs.checkpoints import STATE
from multistage_diffusion.training.batches import stage_counts
from multistage_diffusion.training.checkpoint import restore_checkpoint, save_checkpoint
from multistage_diffusion.training.quotas import GradientNoise
from multistage_diffusion.training.run import build_trainer, train
from runs import same_run, train_until


class _Network(nn.Module):
    """Two decoders of one weight each, whose gradients the tests write."""

    stages = 2

    def __init__(self) -> None:
        super().__init__()
        self.encoders = nn.ModuleList([nn.Linear(1, 1)])
        self.decoders = nn.ModuleList([nn.Linear(1, 1, bias=False) for _ in range(2)])


def _measured(noise: GradientNoise, network: _Network, rows: torch.Tensor, counts: tuple[int, ...], scale: float = 1.0):
    """One measurement, of a batch whose rows have these gradients with their weights, by hand."""
    weights = [decoder.weight for decoder in network.decoders]
    starts = (0, *torch.tensor(counts).cumsum(0).tolist())
    sums = []
    for part in (0, 1):
        own = [rows[low:high][torch.arange(low, high) % 2 == part].sum() for low, high in itertools.pairwise(starts)]
        sums.append(own)
    for weight, first in zip(weights, sums[0], strict=True):
        weight.grad = first.reshape(1, 1) * scale
    first = noise.first_part()
    for weight, second in zip(weights, sums[1], strict=True):
        weight.grad += second * scale
    return noise.figures(first, counts, parts=2, scale=scale)


def test_the_estimate_is_unbiased_and_knows_the_variance_of_each_stage():
    network, counts, deviations, shares = _Network(), (5, 11), (3.0, 0.5), (0.25, 0.75)
    noise = GradientNoise(network)  # pyright: ignore[reportArgumentType]
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(4000):
        rows = torch.cat(
            [
                share / count * (7.0 + deviation * torch.randn(count, generator=generator))
                for share, count, deviation in zip(shares, counts, deviations, strict=True)
            ]
        )
        found.append(_measured(noise, network, rows, counts).tolist())
    mean = torch.tensor(found).mean(0)
    error = torch.tensor(found).std(0) / math.sqrt(len(found))
    exact = torch.tensor([(share * deviation) ** 2 for share, deviation in zip(shares, deviations, strict=True)])
    assert ((mean - exact).abs() < 4 * error).all()


def test_a_loss_scale_changes_nothing():
    network, counts = _Network(), (4, 4)
    noise = GradientNoise(network)  # pyright: ignore[reportArgumentType]
    rows = torch.randn(8, generator=torch.Generator().manual_seed(1))
    plain, scaled = (_measured(noise, network, rows, counts, scale) for scale in (1.0, 1024.0))
    assert torch.allclose(plain, scaled)


def test_shares_wait_for_measurements_and_then_follow_the_root_of_the_noise():
    noise = GradientNoise(_Network())  # pyright: ignore[reportArgumentType]
    assert noise.shares() is None
    for _ in range(5):
        noise.update(torch.tensor([9.0, 1.0]))
    assert noise.shares() is None
    for figures in ([9.0, 1.0], [float("nan"), 1.0], [0.0, 1.0], [9.0, float("inf")]):
        noise.update(torch.tensor(figures))
    assert noise.shares() == pytest.approx((0.75, 0.25))


def test_neyman_allocation_is_the_least_variance_among_all_of_one_batch():
    v, size = (4.0, 1.0, 0.25), 28
    counts = stage_counts([math.sqrt(value) for value in v], size, least=2)
    variance = lambda split: sum(value / count for value, count in zip(v, split, strict=True))  # noqa: E731
    every = [(a, b, size - a - b) for a in range(2, size) for b in range(2, size - a - 1)]
    assert counts == min(every, key=variance) == (16, 8, 4)


def _trainer(**changes):
    return build_trainer(tiny.run_config(**{"batch_size": 12, "quotas": "auto", **changes}), tiny.images())


@pytest.mark.parametrize("counts", [(4, 4, 4), (2, 8, 2), (7, 3, 2)])
def test_the_loss_has_the_same_mean_whatever_the_shares(counts):
    # Weights times counts are the stages' probabilities, so no shares bias the loss.
    trainer = _trainer()
    trainer.batches.set_shares([float(count) for count in counts])
    assert trainer.batches.counts == counts
    batch = trainer.batches(0)
    sums = [float(part.sum()) / 12 for part in batch.weight.split(counts)]
    assert sums == pytest.approx(trainer.batches.shares)


def test_a_step_that_measures_has_the_gradients_of_one_that_does_not():
    measuring, plain = _trainer(), _trainer(quotas=())
    start = plain.batches.counts
    assert measuring.batches.counts == start and measuring.noise is not None
    for _ in measuring.run(1):
        pass
    for _ in plain.run(1):
        pass
    assert float(measuring.noise.counts.min()) == 1.0
    for ours, theirs in zip(measuring.denoiser.network.parameters(), plain.denoiser.network.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)


def test_a_batch_is_too_small_for_two_images_a_stage():
    with pytest.raises(ConfigError, match=r"training\.batch-size must be at least 6 with training\.quotas auto, got 5"):
        _trainer(batch_size=5)


def test_single_stage_batches_have_no_quotas_to_choose():
    with pytest.raises(ConfigError, match=r"training\.quotas must be shares unless training\.batches is mixed"):
        TrainingConfig(quotas="auto", batches="single-p")


@pytest.mark.parametrize("accumulation", [1, 3])
def test_counts_follow_the_noise_and_a_run_goes_on_to_the_bit(tmp_path, accumulation, monkeypatch):
    monkeypatch.setattr(GradientNoise, "every", 1)
    monkeypatch.setattr(GradientNoise, "least", 2.5)
    config = tiny.run_config(batch_size=12, quotas="auto")
    config = replace(config, engine=EngineConfig(gradient_accumulation=accumulation))
    train(config, tmp_path / "whole", data=tiny.images())
    train_until(5, tmp_path / "run", config)
    assert train(config, tmp_path / "run", data=tiny.images()).resumed == 3
    same_run(tmp_path / "run", tmp_path / "whole")
    trainer = build_trainer(config, tiny.images())
    first = trainer.batches.counts
    assert len(list(trainer.run(8))) == 8
    assert trainer.batches.counts != first
    assert trainer.stage_images != [8 * count for count in first]


def test_a_damaged_table_of_noise_is_one_line(tmp_path):
    trainer = _trainer()
    for turn, value in enumerate((None, {"sums": [1.0], "counts": [1.0]}, {"sums": [-1.0] * 3, "counts": [1.0] * 3})):
        checkpoint = save_checkpoint(tmp_path / f"run-{turn}", trainer, {"shape": tiny.SHAPE}, {})
        state = json.loads((checkpoint.path / STATE).read_text()) | {"gradient_noise": value}
        (checkpoint.path / STATE).write_text(json.dumps(state))
        with pytest.raises(CheckpointError, match="cannot restore"):
            restore_checkpoint(checkpoint, trainer)
