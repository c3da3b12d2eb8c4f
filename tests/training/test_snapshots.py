"""Power-function averages: the closed form of their profile, and any length put together from snapshots."""

import itertools
import math
import shutil

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import tiny
from multistage_diffusion.errors import ConfigError
from multistage_diffusion.runs import load_run
from multistage_diffusion.runs.averages import (
    Profile,
    combine,
    file_name,
    list_snapshots,
    power_exponent,
    relative_width,
)
from multistage_diffusion.runs.checkpoints import RAW, list_checkpoints
from multistage_diffusion.training.ema import EMA, Power
from multistage_diffusion.training.run import build_trainer, train
from runs import PowerError, same_run, tensors
from waits import Waits

LENGTHS = (0.05, 0.1)


@pytest.mark.parametrize(("length", "exponent"), [(0.05, 16.97), (0.10, 6.94)])
def test_the_exponents_of_the_paper(length, exponent):
    assert power_exponent(length) == pytest.approx(exponent, abs=0.005)


@given(st.floats(0.001, 0.28))
def test_the_profile_has_the_width_asked_for(length):
    exponent = power_exponent(length)
    assert relative_width(exponent) == pytest.approx(length, rel=1e-12)
    tau = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    density = (exponent + 1) * tau**exponent / 200_000
    mean = (density * tau).sum()
    spread = (density * (tau - mean) ** 2).sum().sqrt()
    assert float(density.sum()) == pytest.approx(1, abs=1e-5)
    assert float(spread) == pytest.approx(length, rel=1e-4)


@pytest.mark.parametrize("length", [0.0, -0.1, 0.281, math.nan])
def test_lengths_that_no_power_function_has_are_refused(length):
    with pytest.raises(ConfigError, match=r"must lie in \(0, 0.28\]"):
        power_exponent(length)
    with pytest.raises(ConfigError, match=r"training.sigma-rel"):
        tiny.run_config(sigma_rel=(length,))


@pytest.mark.parametrize("length", [0.03, 0.1, 0.25])
def test_an_update_counts_each_batch_as_the_integral_of_the_profile_over_it(length):
    """So the discrete average is the continuous one of weights that rest during a batch."""
    profile, steps = Power(length), 50
    shares = []
    for step in range(1, steps + 1):
        kept = profile.decay(step * 4, 4)
        shares = [share * kept for share in shares] + [1 - kept]
    ends = (torch.arange(steps + 1, dtype=torch.float64) / steps) ** (profile.exponent + 1)
    torch.testing.assert_close(torch.tensor(shares, dtype=torch.float64), ends.diff(), rtol=1e-12, atol=0)


def test_the_random_start_is_forgotten_at_the_first_update():
    module = nn.Linear(2, 2)
    average = EMA(module, Power(0.1))
    with torch.no_grad():
        module.weight.add_(1.0)
    average.update(4, 4)
    assert torch.equal(average.average["weight"], module.weight)


def shares(length, images, batch_size=4, total=None):
    """How much each step's weights count in an average taken after so many images."""
    power = power_exponent(length) + 1
    ends = (torch.arange(images // batch_size + 1, dtype=torch.float64) / (images // batch_size)) ** power
    padding = torch.zeros(((total or images) - images) // batch_size, dtype=torch.float64)
    return torch.cat((ends.diff(), padding))


@pytest.mark.parametrize(
    ("length", "error"),
    [(0.05, 1e-6), (0.06, 3e-3), (0.075, 3e-3), (0.1, 1e-6), (0.13, 3e-3), (0.2, 1e-2), (0.03, 3e-2)],
)
def test_a_length_put_together_has_nearly_the_profile_of_one_tracked(length, error):
    """32 snapshots of two lengths; the difference in total variation bounds that of any average."""
    total, count = 12_800, 32
    known = [Profile(own, total * (i + 1) // count) for own in LENGTHS for i in range(count)]
    found = combine(known, Profile(length, total))
    assert float(found.weights.sum()) == pytest.approx(1, abs=1e-9)
    had = sum(
        weight * shares(profile.length, profile.images, total=total)
        for weight, profile in zip(found.weights, known, strict=True)
    )
    assert float((had - shares(length, total)).abs().sum()) / 2 < error
    assert found.error < error


def test_more_snapshots_come_nearer():
    errors = []
    for count in (2, 4, 8, 16, 32):
        known = [Profile(own, (i + 1) * 100) for own in LENGTHS for i in range(count)]
        errors.append(combine(known, Profile(0.15, 100 * count)).error)
    assert all(later < earlier / 1.5 for earlier, later in itertools.pairwise(errors))


def test_a_few_snapshots_far_from_the_length_do_not_shrink_the_weights():
    known = [Profile(own, images) for own in LENGTHS for images in (100, 200)]
    found = combine(known, Profile(0.2, 200))
    assert float(found.weights.sum()) == pytest.approx(1, abs=1e-12)
    assert found.error > 0.3


@pytest.fixture(scope="module")
def tracked_run(tmp_path_factory):
    """80 steps with snapshots at every fifth, and the average of length 0.075 of all its weights, in float64."""
    folder = tmp_path_factory.mktemp("averages") / "run"
    config = tiny.run_config(steps=80, save_every=80, sigma_rel=LENGTHS, ema_snapshot_every=5)
    train(config, folder, data=tiny.images())
    trainer, power = build_trainer(config, tiny.images()), Power(0.075)
    average = {name: tensor.detach().double() for name, tensor in trainer.denoiser.network.named_parameters()}
    for result in trainer.run(80):  # the same steps to the bit
        kept = power.decay(result.images, 4)
        for name, parameter in trainer.denoiser.network.named_parameters():
            average[name] = kept * average[name] + (1 - kept) * parameter.detach().double()
    return folder, average


@pytest.mark.slow
def test_the_average_put_together_is_the_one_that_would_have_been_tracked(tracked_run):
    folder, expected = tracked_run
    assert len(list_snapshots(folder)) == 16
    loaded = load_run(folder, sigma_rel=0.075)
    assert loaded.rebuilt.error < 5e-3
    raw = safetensors.torch.load_file(list_checkpoints(folder / "checkpoints")[-1].path / RAW)
    worst = moved = 0.0
    for name, parameter in loaded.denoiser.network.named_parameters():
        worst = max(worst, float((parameter.detach().double() - expected[name]).abs().max()))
        moved = max(moved, float((raw[name].double() - expected[name]).abs().max()))
    assert moved > 1e-2
    assert worst < 2e-3 * moved


@pytest.mark.slow
@pytest.mark.parametrize("length", LENGTHS)
def test_a_tracked_length_is_itself(length, tracked_run):
    folder, _ = tracked_run
    (checkpoint,) = list_checkpoints(folder / "checkpoints")
    stored = safetensors.torch.load_file(checkpoint.path / file_name(length))
    found = load_run(folder, sigma_rel=length).denoiser.network
    for name, parameter in found.named_parameters():
        torch.testing.assert_close(parameter.detach(), stored[name], rtol=0, atol=1e-6)


@pytest.mark.slow
def test_a_damaged_snapshot_is_left_out_with_a_warning(tracked_run, tmp_path):
    folder = shutil.copytree(tracked_run[0], tmp_path / "run")
    file = list_snapshots(folder)[3] / file_name(0.1)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.warns(UserWarning, match=r"ema-0.1.safetensors is damaged.*left out"):
        loaded = load_run(folder, sigma_rel=0.075)
    assert len(loaded.rebuilt.weights) == 30


@pytest.mark.slow
def test_snapshots_after_the_checkpoint_belong_to_another_future(tracked_run, tmp_path):
    folder = shutil.copytree(tracked_run[0], tmp_path / "run")
    later = folder / "ema" / "step-00000085"
    shutil.copytree(list_snapshots(folder)[-1], later)
    (later / "state.json").write_text('{"step": 85, "images": 340}\n')
    (later / "manifest.json").write_text('{"files": {"state.json": {"bytes": 0, "sha256": ""}}}')
    with pytest.warns(UserWarning, match="left out"):
        assert len(load_run(folder, sigma_rel=0.075).rebuilt.weights) == 32


def test_a_length_far_from_what_was_stored_is_said(tmp_path):
    config = tiny.run_config(steps=4, save_every=4, sigma_rel=LENGTHS, ema_snapshot_every=2)
    train(config, tmp_path / "run", data=tiny.images())
    with pytest.warns(UserWarning, match=r"4 averages .* only within \d+% of the profile of length 0.25"):
        load_run(tmp_path / "run", sigma_rel=0.25)


def test_what_cannot_be_put_together_is_refused(finished, tmp_path):
    with pytest.raises(ConfigError, match=r"train with --training.sigma-rel"):
        load_run(finished, sigma_rel=0.1)
    with pytest.raises(ConfigError, match=r"must lie in \(0, 0.28\]"):
        load_run(finished, sigma_rel=0.4)
    with pytest.raises(ConfigError, match="--weights raw none; drop one of the two"):
        load_run(finished, weights="raw", sigma_rel=0.1)
    with pytest.raises(ConfigError, match="is a saved model"):
        load_run(finished / "model", sigma_rel=0.1)


def test_resume_is_exact_and_leaves_the_same_snapshots(tmp_path):
    config = tiny.run_config(sigma_rel=LENGTHS, ema_snapshot_every=2)

    def fail(result, steps):
        if result.step == 5:
            raise PowerError

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(config, whole, data=tiny.images())
    with pytest.raises(PowerError):
        train(config, parts, data=tiny.images(), on_step=fail)
    train(config, parts, data=tiny.images())
    same_run(parts, whole)
    assert [path.name for path in list_snapshots(parts)] == [f"step-0000000{n}" for n in (2, 4, 6, 8)]
    files = {
        path.relative_to(whole) for name in ("ema", "checkpoints") for path in (whole / name).rglob("*.safetensors")
    }
    assert len(files) == 4 * 2 + 2 * 5
    for file in files:
        assert (parts / file).read_bytes() == (whole / file).read_bytes(), file


def test_tracking_changes_nothing_else(finished, tmp_path):
    train(tiny.run_config(sigma_rel=LENGTHS, ema_snapshot_every=2), tmp_path / "run", data=tiny.images())
    assert tiny.bits_equal(tensors(tmp_path / "run"), tensors(finished))


def test_lengths_cannot_be_added_to_a_run(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"training.sigma-rel is"):
        train(tiny.run_config(sigma_rel=LENGTHS), folder, data=tiny.images())


def test_tracking_waits_for_no_device():
    trainer = build_trainer(tiny.run_config(sigma_rel=LENGTHS), tiny.images())
    with Waits() as waits:
        next(trainer.run(1))
    assert waits.reads == ["tolist"] and waits.copies == []
