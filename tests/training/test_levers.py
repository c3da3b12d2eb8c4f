"""Schedules of the learning rate and weightings of the loss, against closed forms."""

import json
import math
from dataclasses import replace

import pytest
import torch

import tiny
from multistage_diffusion.config import TrainingConfig
from multistage_diffusion.errors import CheckpointError, ConfigError
from multistage_diffusion.noise import EDM, VE, VP, Cosine, Flow
from multistage_diffusion.runs.checkpoints import STATE
from multistage_diffusion.training.checkpoint import restore_checkpoint, save_checkpoint
from multistage_diffusion.training.run import build_trainer, train
from multistage_diffusion.training.schedule import learning_rate
from multistage_diffusion.training.weighting import Uncertainty, relative_weight
from runs import same_run, train_until

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


@pytest.mark.parametrize("process", PROCESSES, ids=lambda process: process.kind)
def test_learned_uncertainty_settles_where_its_loss_is_least(process):
    """E[exp(-u) L + u] is least at u = log E[L | sigma]: each level's loss is divided by its mean."""
    learned = Uncertainty(process, half_life=200.0)
    middles = (torch.arange(learned.cells, dtype=torch.float64) + 0.5) / learned.cells
    sigma, losses = process.icdf(middles), 0.05 + middles**2
    assert torch.equal(learned.factor(sigma), torch.ones_like(sigma))
    for _ in range(100):
        learned.update(learned.figures(sigma, losses, torch.ones(learned.cells, dtype=torch.bool)), learned.cells)
    u = -torch.log(learned.factor(sigma) / losses.mean())  # the weight is exp(-u), but for its scale
    (gradient,) = torch.autograd.grad((torch.exp(-u.requires_grad_()) * losses + u).sum(), u)
    torch.testing.assert_close(gradient, torch.zeros_like(u), rtol=0, atol=1e-5)
    torch.testing.assert_close(learned.factor(sigma) * losses, losses.mean().expand(learned.cells), rtol=1e-5, atol=0)


def test_rows_that_fill_a_micro_batch_teach_no_level():
    learned = Uncertainty(EDM())
    sigma = EDM().icdf(torch.tensor([0.2, 0.2, 0.7], dtype=torch.float64))
    figures = learned.figures(sigma, torch.tensor([1.0, 2.0, 5.0]), torch.tensor([True, True, False]))
    sums, counts = figures.view(2, learned.cells)
    assert (float(sums.sum()), float(counts.sum()), float(sums.max())) == (3.0, 2.0, 3.0)


def test_a_run_with_learned_uncertainty_resumes_to_the_bit_and_trains_every_level_alike(tmp_path):
    config = tiny.run_config(weighting="uncertainty")
    train(config, tmp_path / "whole", data=tiny.images())
    train_until(5, tmp_path / "run", config)
    assert train(config, tmp_path / "run", data=tiny.images()).resumed == 3
    same_run(tmp_path / "run", tmp_path / "whole")
    trainer = build_trainer(config, tiny.images())
    assert len(list(trainer.run(4))) == 4
    assert trainer.uncertainty is not None and float(trainer.uncertainty.counts.sum()) > 64
    batch = trainer.batches(4, 0, 1)
    expected = batch.weight * trainer.uncertainty.factor(batch.sigma).float()
    losses = trainer._model(batch, None).detach()
    assert next(trainer.run(5)).loss == pytest.approx(float((expected * losses).mean()), rel=1e-5)
    assert float(expected.std()) > 0


def test_a_damaged_table_of_uncertainty_is_one_line(tmp_path):
    config = tiny.run_config(weighting="uncertainty")
    trainer = build_trainer(config, tiny.images())
    for turn, value in enumerate((None, {"sums": [1.0], "counts": [1.0]}, {"sums": [-1.0] * 64, "counts": [1.0] * 64})):
        checkpoint = save_checkpoint(tmp_path / f"run-{turn}", trainer, {"shape": tiny.SHAPE}, {})
        state = json.loads((checkpoint.path / STATE).read_text()) | {"uncertainty": value}
        (checkpoint.path / STATE).write_text(json.dumps(state))
        with pytest.raises(CheckpointError, match="cannot restore"):
            restore_checkpoint(checkpoint, trainer)


def alike(**options):
    """A run whose three decoders have one form."""
    config = tiny.run_config(clip_norm=None, **options)
    return replace(config, model=replace(config.model, decoder_widths=(8, 8, 8)))


def steps_of(config, steps=1):
    """How the weights of a run move, and where they began."""
    trainer = build_trainer(config, tiny.images())
    start = tiny.randomise(trainer.denoiser.network)
    before = {name: value.clone() for name, value in start.state_dict().items()}
    assert len(list(trainer.run(steps))) == steps
    return {name: value - before[name] for name, value in trainer.denoiser.network.state_dict().items()}


def test_coupled_decoders_move_by_their_own_step_and_the_mean_of_all():
    free, coupled = steps_of(alike()), steps_of(alike(coupling=0.25))
    for name, step in free.items():
        part, _, rest = name.split(".", 2)
        if part == "decoders":
            mean = sum(free[f"decoders.{stage}.{rest}"] for stage in range(3)) / 3
            step = 0.75 * step + 0.25 * mean
        torch.testing.assert_close(coupled[name], step, atol=1e-6, rtol=0)


def test_coupling_ends_with_its_images_and_resumes_to_the_bit(tmp_path):
    short = steps_of(alike(coupling=1.0, coupling_images=8), 3)  # two steps of 4 images are coupled
    assert not all(
        torch.equal(step, short[f"decoders.1.{name.split('.', 2)[2]}"])
        for name, step in short.items()
        if name.startswith("decoders.0.")
    )
    config = alike(coupling=0.5, coupling_images=20, branch_at=0.25)
    train(config, tmp_path / "whole", data=tiny.images())
    train_until(5, tmp_path / "run", config)
    assert train(config, tmp_path / "run", data=tiny.images()).resumed == 3
    same_run(tmp_path / "run", tmp_path / "whole")


def test_decoders_of_other_forms_are_refused():
    with pytest.raises(ConfigError, match=r"training\.coupling needs decoders of one form, and that of stage"):
        build_trainer(tiny.run_config(coupling=0.5), tiny.images())
