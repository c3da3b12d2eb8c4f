"""The loop learns, stops before a bad update, and spends what it says."""

import json
import math
from dataclasses import replace

import pytest
import safetensors.torch
import torch

import tiny
from multistage_diffusion.data import Images
from multistage_diffusion.errors import NumericsError
from multistage_diffusion.loss import denoising_loss
from multistage_diffusion.metrics.cost import network_cost
from multistage_diffusion.noise import EDM, VP, Flow
from multistage_diffusion.runs.checkpoints import EMA_WEIGHTS, OPTIMIZER, RAW, list_checkpoints
from multistage_diffusion.training.run import build_trainer, train
from multistage_diffusion.training.trainer import Trainer
from waits import Waits


def learnable(count=64):
    """Images of one number each: their colour."""
    levels = torch.randint(0, 2, (count, 1, 1, 1), generator=torch.Generator().manual_seed(0)) * 200 + 20
    return Images("learnable", levels.to(torch.uint8).expand(count, 1, 8, 8).contiguous())


@pytest.mark.parametrize("process", [VP(), EDM(), Flow()], ids=lambda config: config.kind)
def test_it_learns(process):
    config = tiny.run_config(batch_size=16, learning_rate=5e-3, warmup_images=0)
    losses = [result.loss for result in build_trainer(replace(config, process=process), learnable()).run(30)]
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])


def test_a_fresh_network_has_the_loss_of_predicting_nothing():
    """EDM's output is then c_skip x, whose weighted error is 1 for data of its sigma_data; VP's is the noise."""
    trainer = build_trainer(replace(tiny.run_config(batch_size=300), process=VP()), tiny.images(300))
    assert next(trainer.run(1)).loss == pytest.approx(1.0, abs=0.05)


def test_warm_up_clipping_and_the_learning_rate():
    results = list(build_trainer(tiny.run_config(warmup_images=12, learning_rate=0.3), tiny.images()).run(4))
    assert [result.learning_rate for result in results] == pytest.approx([0.1, 0.2, 0.3, 0.3])
    trainer = build_trainer(tiny.run_config(clip_norm=1e-3), tiny.images())
    result = next(trainer.run(1))
    parameters = trainer.denoiser.network.parameters()
    norm = torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm()
    assert result.gradient_norm > 0.1 and norm.item() == pytest.approx(1e-3, rel=1e-3)


def test_a_step_reads_the_device_once_and_only_clips_when_asked(monkeypatch):
    scaled = []
    clip = torch.nn.utils.clip_grads_with_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grads_with_norm_", lambda *words: scaled.append(clip(*words)))
    for clip_norm in (None, 0.1):
        trainer = build_trainer(tiny.run_config(clip_norm=clip_norm), tiny.images())
        with Waits() as waits:
            next(trainer.run(1))
        assert waits.reads == ["tolist"]
        assert len(scaled) == (clip_norm is not None)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_nobody_elses_generator_is_touched(dropout, monkeypatch):
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    forks = []
    fork = torch.random.fork_rng
    monkeypatch.setattr(torch.random, "fork_rng", lambda **named: forks.append(named) or fork(**named))
    before = torch.get_rng_state()
    trainer = build_trainer(tiny.run_config(replace(tiny.SMALLEST, dropout=dropout)), tiny.images())
    made = len(forks)
    list(trainer.run(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert seeded == []
    assert len(forks) == made


def test_the_loss_is_the_weighted_mean_of_its_stages():
    trainer = build_trainer(tiny.run_config(batch_size=7), tiny.images())
    batch = trainer.batches(0)
    result = next(trainer.run(1))
    shares = trainer.batches.shares
    assert result.loss == pytest.approx(
        sum(p * loss for p, loss in zip(shares, result.stage_loss, strict=True)), rel=1e-5
    )
    assert trainer.stage_images == list(batch.counts)


def test_a_single_stage_batch_moves_no_other_decoder():
    trainer = build_trainer(tiny.run_config(batches="single-uniform", weight_decay=0.1), tiny.images())
    for _ in range(6):
        before = [
            {n: p.clone() for n, p in decoder.named_parameters()} for decoder in trainer.denoiser.network.decoders
        ]
        result = next(trainer.run(trainer.step + 1))
        stage = next(k for k, loss in enumerate(result.stage_loss) if loss is not None)
        decoders = trainer.denoiser.network.decoders
        moved = [not tiny.bits_equal(dict(d.named_parameters()), b) for d, b in zip(decoders, before, strict=True)]
        assert moved == [k == stage for k in range(3)]


def test_the_loss_of_an_image_is_its_own():
    denoise = tiny.denoiser()
    x0, noise = torch.randn(2, 5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.1, 5.0, 1.0, 0.6, 80.0], dtype=torch.float64)
    together = denoising_loss(denoise, x0, noise, sigma)
    alone = torch.cat([denoising_loss(denoise, x0[i : i + 1], noise[i : i + 1], sigma[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    rows = sigma.argsort()
    counts = denoise.stages.of(sigma).bincount(minlength=3).tolist()
    grouped = denoising_loss(denoise, x0[rows], noise[rows], sigma[rows], counts=counts)
    torch.testing.assert_close(grouped, together[rows], rtol=1e-4, atol=1e-5)


def test_for_noise_prediction_the_loss_is_the_error_of_the_noise():
    denoise = tiny.denoiser()
    x0, noise = torch.randn(2, 4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.3, 1.0, 2.0, 9.0], dtype=torch.float64)
    level = sigma.float()[:, None, None, None]
    x, scale = x0 + level * noise, denoise.process.scale(sigma).float()
    raw = denoise.network(
        x * scale[:, None, None, None], (999 * denoise.process.t(sigma)).float(), denoise.stages.of(sigma)
    )
    wanted = (raw - noise).square().mean((1, 2, 3))
    torch.testing.assert_close(denoising_loss(denoise, x0, noise, sigma), wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("rate", [1e30, 1e25])
def test_a_loss_that_is_not_finite_stops_the_run_before_the_update(rate, tmp_path):
    config = tiny.run_config(learning_rate=rate, save_every=1, keep=5, warmup_images=0)
    with pytest.raises(NumericsError, match=r"at step \d") as caught:
        train(config, tmp_path / "run", data=tiny.images())
    assert caught.value.exit_code == 4 and "\n" not in str(caught.value)
    checkpoints = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert checkpoints
    for checkpoint in checkpoints:
        assert checkpoint.damage() is None
        for file in (RAW, EMA_WEIGHTS, OPTIMIZER):
            assert all(t.isfinite().all() for t in safetensors.torch.load_file(checkpoint.path / file).values())
    assert all(
        math.isfinite(json.loads(line)["loss"])
        for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    )


def test_the_stage_of_a_bad_loss_is_named_and_nothing_moves():
    trainer = build_trainer(tiny.run_config(), tiny.images())
    list(trainer.run(2))
    with torch.no_grad():
        next(trainer.denoiser.network.decoders[1].parameters()).fill_(math.nan)
    before = {name: tensor.clone() for name, tensor in trainer.denoiser.state_dict().items()}
    average = {name: tensor.clone() for name, tensor in trainer.ema.average.items()}
    with pytest.raises(
        NumericsError, match=r"loss is nan at step 3 in stage 1 \(sigma 0.6 to 3\); the weights were not"
    ):
        list(trainer.run(8))
    after = trainer.denoiser.state_dict()
    assert all(torch.equal(after[name].nan_to_num(7), tensor.nan_to_num(7)) for name, tensor in before.items())
    assert tiny.bits_equal(trainer.ema.average, average)
    assert trainer.step == 2


def test_a_gradient_that_is_not_finite_stops_the_run(monkeypatch):
    trainer = build_trainer(tiny.run_config(), tiny.images())
    stem = trainer.denoiser.network.encoders[0].stem
    stem.weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(NumericsError, match=r"gradient norm is (nan|inf) at step 1; the weights were not updated"):
        next(trainer.run(1))


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    def poison(result, steps):
        if result.step == 3:
            next(iter(trainers[0].denoiser.network.parameters())).data.fill_(math.inf)

    trainers = []
    original = Trainer.__init__

    def remember(self, *words, **named):
        original(self, *words, **named)
        trainers.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "__init__", remember)
        with pytest.raises(NumericsError, match="is not finite after step 3; no checkpoint was written"):
            train(tiny.run_config(save_every=1), tmp_path / "run", data=tiny.images(), on_step=poison)
    assert [found.step for found in list_checkpoints(tmp_path / "run" / "checkpoints")] == [1, 2]


def test_the_flops_in_the_log_are_those_of_the_images(tmp_path):
    config = tiny.run_config()
    summary = train(config, tmp_path / "run", data=tiny.images())
    cost = network_cost(config.model, tiny.SHAPE)
    assert summary.training_flops == 8 * (
        stage_sum := sum(s.training_flops * n for s, n in zip(cost.stages, (1, 1, 2), strict=True))
    )
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["training_flops"] == 8 * stage_sum and len(last["stage_loss"]) == 3
