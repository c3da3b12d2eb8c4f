"""Schedules of the learning rate and weightings of the loss, against closed forms."""

import math

import pytest
import torch

import tiny
from multistage_diffusion.config import TrainingConfig
from multistage_diffusion.errors import ConfigError
from multistage_diffusion.noise import EDM, VE, VP, Cosine, Flow
from multistage_diffusion.training.run import build_trainer, train
from multistage_diffusion.training.schedule import learning_rate
from multistage_diffusion.training.weighting import relative_weight

PROCESSES = [VP(), VP(prediction="v"), Cosine(), VE(), EDM(), Flow()]


def rates(schedule, **options):
    training = TrainingConfig(
        **{"steps": 10, "batch_size": 4, "warmup_images": 8, "learning_rate": 0.5, "schedule": schedule, **options}
    )
    return [learning_rate(training, step) for step in range(training.steps)]


def test_schedules_follow_their_closed_forms():
    warm = [0.25, 0.5]
    assert rates("constant") == pytest.approx([*warm, *[0.5] * 8])
    assert rates("linear") == pytest.approx([*warm, *(0.5 * (1 - k / 8) for k in range(8))])
    assert rates("cosine") == pytest.approx([*warm, *(0.25 * (1 + math.cos(math.pi * k / 8)) for k in range(8))])
    assert rates("inverse-sqrt") == pytest.approx([*warm, *(0.5 * math.sqrt(2 / k) for k in range(3, 11))])


def test_a_schedule_never_reaches_zero_within_the_run_and_needs_no_warmup():
    for schedule in ("constant", "linear", "cosine"):
        own = rates(schedule, warmup_images=0)
        assert own[0] == 0.5 and min(own) > 0 and own == sorted(own, reverse=True)
    with pytest.raises(ConfigError, match=r"training\.warmup-images"):
        TrainingConfig(schedule="inverse-sqrt", warmup_images=0)


@pytest.mark.parametrize("process", PROCESSES, ids=lambda process: process.kind)
def test_weightings_times_the_processs_weight_are_their_formulas(process):
    sigma = torch.tensor([0.01, 0.1, 0.4, 0.5, 1.0, 3.0, 40.0], dtype=torch.float64)
    own, snr = process.loss_weight(sigma), sigma**-2
    assert torch.equal(relative_weight("process", process, sigma), torch.ones_like(sigma))
    torch.testing.assert_close(relative_weight("min-snr", process, sigma) * own, snr.clamp(max=5.0))
    torch.testing.assert_close(relative_weight("p2", process, sigma) * own, snr / (1 + snr))


def test_weightings_of_noise_and_velocity_prediction_are_the_published_ones():
    sigma = torch.tensor([0.01, 0.3, 0.5, 2.0, 30.0], dtype=torch.float64)
    snr = sigma**-2
    noise, velocity = VP(), VP(prediction="v")
    torch.testing.assert_close(relative_weight("min-snr", noise, sigma), snr.clamp(max=5.0) / snr)
    torch.testing.assert_close(relative_weight("min-snr", velocity, sigma), snr.clamp(max=5.0) / (snr + 1))
    torch.testing.assert_close(relative_weight("p2", noise, sigma), 1 / (1 + snr))


def test_a_trainer_takes_the_schedules_rates():
    config = tiny.run_config(steps=4, warmup_images=4, schedule="linear", learning_rate=0.3)
    results = list(build_trainer(config, tiny.images()).run(4))
    assert [result.learning_rate for result in results] == pytest.approx([0.3, 0.3, 0.2, 0.1])


@pytest.mark.parametrize("weighting", ["min-snr", "p2"])
def test_the_trained_loss_is_weighted_and_the_losses_by_stage_are_the_processs(weighting):
    plain, other = (
        build_trainer(tiny.run_config(batch_size=12, weighting=own), tiny.images()) for own in ("process", weighting)
    )
    results = [next(trainer.run(1)) for trainer in (plain, other)]
    assert results[0].stage_loss == results[1].stage_loss
    batch = plain.batches(0, 0, 1)
    fresh = build_trainer(tiny.run_config(batch_size=12), tiny.images())
    losses = fresh._model(batch, None).detach()
    factor = relative_weight(weighting, fresh.denoiser.process, batch.sigma)
    assert results[1].loss == pytest.approx(float((batch.weight * factor * losses).mean()), rel=1e-5)
    assert results[0].loss == pytest.approx(float((batch.weight * losses).mean()), rel=1e-5)


def test_a_falling_rate_holds_the_number_of_steps(tmp_path):
    train(tiny.run_config(steps=2, schedule="cosine"), tmp_path / "run", data=tiny.images())
    with pytest.raises(ConfigError, match=r"training\.steps"):
        train(tiny.run_config(steps=3, schedule="cosine"), tmp_path / "run", data=tiny.images())
