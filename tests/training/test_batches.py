"""Batches are functions of the step; every image once an epoch; quotas hold; the weights restore the distribution."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tiny
from multistage_diffusion.conditioning import Conditioning
from multistage_diffusion.config import TrainingConfig
from multistage_diffusion.denoiser import Denoiser
from multistage_diffusion.errors import ConfigError
from multistage_diffusion.loss import denoising_loss
from multistage_diffusion.noise import EDM, LDM, VE, VP, Flow
from multistage_diffusion.stages import Stages
from multistage_diffusion.training.batches import Batches, stage_counts
from waits import Waits

STAGES = Stages(tiny.EDGES)
PROCESSES = [VP(), EDM(), LDM(), Flow(), VE()]


def batches(process=PROCESSES[0], stages=STAGES, data=None, **options):
    """Options of `Batches` and of the training, mixed."""
    own = {name: options.pop(name) for name in ("flip", "classes", "augment_probability", "device") if name in options}
    config = TrainingConfig(**{"batch_size": 6, **options})
    return Batches(data or tiny.images(), process, stages, config, **own)


def same(first, second):
    tensors = ("images", "noise", "sigma", "weight")
    return first.counts == second.counts and all(torch.equal(getattr(first, n), getattr(second, n)) for n in tensors)


@pytest.mark.parametrize("kind", ["mixed", "single-uniform", "single-p"])
def test_a_batch_is_a_function_of_its_step(kind):
    made = batches(batches=kind)
    in_order = [made(step) for step in range(8)]
    torch.manual_seed(7)
    for step in (5, 0, 7, 3, 3):
        assert same(made(step), in_order[step])
        assert same(batches(batches=kind)(step), in_order[step])
    assert not same(in_order[0], in_order[1])
    assert not torch.equal(batches(batches=kind, seed=1)(0).noise, in_order[0].noise)


@given(size=st.integers(3, 25), count=st.integers(1, 12))
def test_each_epoch_has_every_image_once(size, count):
    data = tiny.images(count, (1, 1, 2))
    data = replace(data, images=torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(count, 1, 1, 2))
    made = batches(data=data, batch_size=size)
    steps = -(-3 * count // size)
    seen = torch.cat([made(step).images[:, 0, 0, 0] for step in range(steps)])[: 3 * count]
    seen = ((seen + 1) * 127.5).round().long().reshape(3, count)
    assert all(epoch.sort().values.tolist() == list(range(count)) for epoch in seen)


def test_epochs_have_different_orders():
    data = tiny.images(200, (1, 1, 1))
    made = batches(data=data, batch_size=200)
    assert not torch.equal(made(0).images, made(1).images)


@given(shares=st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=8), spare=st.integers(0, 300))
def test_counts_cover_the_batch_and_starve_nobody(shares, spare):
    size = len(shares) + spare
    counts = stage_counts(shares, size)
    assert sum(counts) == size and min(counts) >= 1
    if min(share * size / sum(shares) for share in shares) >= 1:  # nobody needs to be lifted
        excess = [count - size * share / sum(shares) for count, share in zip(counts, shares, strict=True)]
        assert max(map(abs, excess)) < 2
    order = sorted(range(len(shares)), key=lambda stage: shares[stage])
    assert all(counts[low] <= counts[high] + 1 for low, high in pairwise(order))


def test_counts_are_the_proportions_where_they_can_be():
    assert stage_counts([0.5, 0.25, 0.25], 8) == (4, 2, 2)
    assert stage_counts([3.0, 1.0], 8) == (6, 2)
    assert stage_counts([0.96, 0.035, 0.005], 128)[0] >= 120
    with pytest.raises(ConfigError, match="at least 3, one image a stage, got 2"):
        stage_counts([1.0, 1.0, 1.0], 2)


@pytest.mark.parametrize("process", PROCESSES, ids=lambda config: config.kind)
@pytest.mark.parametrize("quotas", [(), (1.0, 2.0, 3.0)])
def test_every_draw_stays_in_its_stage(process, quotas):
    made = batches(process, quotas=quotas, batch_size=30)
    for step in range(20):
        batch = made(step)
        wanted = torch.arange(3).repeat_interleave(torch.tensor(batch.counts))
        assert torch.equal(STAGES.of(batch.sigma), wanted)
        assert batch.sigma.isfinite().all() and batch.sigma.dtype == torch.float64
    if quotas:
        assert batch.counts == (5, 10, 15)


@pytest.mark.parametrize("process", PROCESSES, ids=lambda config: config.kind)
@pytest.mark.parametrize("options", [{}, {"quotas": (1.0, 2.0, 3.0)}, {"batches": "single-p"}], ids=str)
def test_the_weighted_mean_estimates_the_training_distribution_without_bias(process, options):
    made = batches(process, batch_size=24, **options)
    dense = process.icdf((torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000)
    estimates = {name: [] for name in ("level", "wave", "one")}
    functions = {
        "level": lambda sigma: sigma / (1 + sigma), "wave": lambda sigma: torch.sin(3 * sigma.log()),
        "one": torch.ones_like,
    }  # fmt: skip
    for step in range(100):
        batch = made(step)
        for name, function in functions.items():
            estimates[name].append((batch.weight * function(batch.sigma)).mean())
    for name, function in functions.items():
        values = torch.stack(estimates[name])
        error = values.mean() - function(dense).mean()
        assert abs(error) < 4 * values.std() / 100**0.5 + 2e-6, name


@pytest.mark.parametrize("process", PROCESSES, ids=lambda config: config.kind)
@pytest.mark.parametrize("draw", [2.0**-53, 1 - 2.0**-53])
def test_extreme_draws_are_finite_levels(process, draw, monkeypatch):
    monkeypatch.setattr(
        "multistage_diffusion.rng.uniform", lambda *words: torch.full((len(words[2]), 1), draw, dtype=torch.float64)
    )
    sigma = batches(process, batch_size=128)(0).sigma
    assert sigma.isfinite().all() and (sigma > 0).all()


def test_mixed_weights_have_mean_one_and_starved_stages_small_ones():
    made = batches(EDM(), Stages((2.5103, 7.6577)), batch_size=16)
    batch = made(0)
    assert batch.counts == (14, 1, 1)
    assert batch.weight.mean().item() == pytest.approx(1)
    shares = Stages((2.5103, 7.6577)).shares(EDM())
    assert batch.weight[-1].item() == pytest.approx(shares[2] * 16)


def test_a_stage_is_cut_into_as_many_cells_as_rows():
    process = VP()
    batch = batches(batch_size=30)(0)
    positions = process.cdf(batch.sigma)
    for part in positions.split(batch.counts):
        assert (part.diff() > 0).all()  # one a cell
    edges = process.cdf(torch.tensor([0.0, *tiny.EDGES, torch.inf], dtype=torch.float64))
    first = positions[: batch.counts[0]] / edges[1] * batch.counts[0]
    assert first.floor().tolist() == list(range(batch.counts[0]))


@pytest.mark.parametrize(("kind", "shares"), [("single-uniform", (1 / 3,) * 3), ("single-p", None)])
def test_single_batches_have_one_stage_as_often_as_they_should(kind, shares):
    made = batches(batches=kind, batch_size=3, data=tiny.images(3, (1, 1, 1)))
    shares = shares or STAGES.shares(VP())
    stages = [made(step).counts.index(3) for step in range(300)]
    for stage, share in enumerate(shares):
        assert abs(stages.count(stage) / 300 - share) < 4 * (share * (1 - share) / 300) ** 0.5
    assert (made(0).weight == 1).all()


def test_half_of_the_images_are_mirrored_and_nothing_else_changes():
    data = tiny.images(400, (1, 2, 3))
    plain, flipped = batches(data=data, batch_size=400)(0), batches(data=data, batch_size=400, flip=True)(0)
    mirrored = (plain.images.flip(3) == flipped.images).flatten(1).all(1)
    kept = (plain.images == flipped.images).flatten(1).all(1)
    assert (mirrored | kept).all() and 150 < mirrored.sum() < 250
    assert torch.equal(plain.noise, flipped.noise) and torch.equal(plain.sigma, flipped.sigma)


def test_labels_go_with_their_images_and_some_are_hidden():
    data = tiny.images(300, (1, 1, 1), labels=True)
    data = replace(data, images=data.labels.to(torch.uint8)[:, None, None, None])
    batch = batches(data=data, batch_size=300, classes=3, label_dropout=0.2)(0)
    found = ((batch.images[:, 0, 0, 0] + 1) * 127.5).round().long()
    hidden = batch.labels == 3
    assert torch.equal(batch.labels[~hidden], found[~hidden]) and 30 < hidden.sum() < 90
    assert batches(data=data)(0).labels is None


@pytest.mark.parametrize("process", PROCESSES, ids=lambda config: config.kind)
@pytest.mark.parametrize("kind", ["mixed", "single-uniform"])
def test_making_a_batch_and_its_loss_wait_for_no_device(process, kind):
    data = tiny.images(100, labels=True)
    made = batches(
        process, data=data, batches=kind, flip=True, classes=3, augment_probability=0.5, device=torch.device("meta")
    )
    model = replace(tiny.SMALLEST, classes=3, augment_labels=9)
    denoise = Denoiser.from_backbone(model, process, tiny.SHAPE, STAGES).to("meta")

    def losses(step):
        batch = made(step)
        conditioning = Conditioning(batch.labels, batch.augment)
        return denoising_loss(denoise, batch.images, batch.noise, batch.sigma, conditioning, counts=batch.counts)

    losses(0)  # moves what every step needs
    with Waits() as waits:
        assert losses(1).device.type == "meta"
    assert waits.copies == []


def test_pixels_are_in_minus_one_to_one():
    data = replace(tiny.images(), images=torch.tensor([0, 255], dtype=torch.uint8)[:, None, None, None])
    assert batches(data=data)(0).images.unique().tolist() == [-1.0, 1.0]


def test_stages_without_probability_are_refused():
    with pytest.raises(ConfigError, match=r"stage 2 .* never occurs in training under vp"):
        batches(stages=Stages((1.0, 1e4)))


def test_labels_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match=r"model\.classes is 2"):
        batches(data=tiny.images(labels=True), classes=2)
    with pytest.raises(ConfigError, match=r"model\.classes is 2"):
        batches(classes=2)
