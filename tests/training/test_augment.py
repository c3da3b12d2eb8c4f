"""EDM's geometric augmentation: what it does to images, what it tells the network."""

import math
from dataclasses import replace

import pytest
import torch

import tiny
from multistage_diffusion.conditioning import Conditioning
from multistage_diffusion.config import DataConfig, RunConfig, from_dict
from multistage_diffusion.denoiser import Denoiser
from multistage_diffusion.errors import ConfigError
from multistage_diffusion.training.augment import LABELS, _draw, _inverse, _resample, augment, warp
from multistage_diffusion.training.run import build_trainer

INDEX = torch.arange(400)


def smooth(count=1, side=16):
    """Images without detail near the pixel size, which any good resampling keeps."""
    ramp = (torch.arange(side) + 0.5) / side * math.pi
    waves = torch.stack([torch.outer((a * ramp).cos(), (b * ramp).cos()) for a, b in ((1, 2), (2, 1), (3, 0))])
    return waves[None].repeat(count, 1, 1, 1) + torch.arange(float(count))[:, None, None, None] / 10


def moved(images, matrix=((1.0, 0.0), (0.0, 1.0)), shift=(0.0, 0.0)):
    count = len(images)
    return warp(images, torch.tensor(matrix).repeat(count, 1, 1), torch.tensor(shift).repeat(count, 1))


def test_doing_nothing_changes_little():
    images = smooth()
    torch.testing.assert_close(moved(images), images, atol=0.02, rtol=0)


def test_a_shift_is_in_pixels_right_and_down_and_reflects_at_the_border():
    images = smooth()
    right = torch.cat((images[..., :3].flip(3), images[..., :-3]), dim=3)
    down = torch.cat((images[:, :, :3].flip(2), images[:, :, :-3]), dim=2)
    torch.testing.assert_close(moved(images, shift=(3.0, 0.0)), right, atol=0.03, rtol=0)
    torch.testing.assert_close(moved(images, shift=(0.0, 3.0)), down, atol=0.03, rtol=0)


def test_a_quarter_turn_and_a_doubling():
    images = smooth()
    # The output at p shows the input at matrix p: with (x, y) -> (y, -x), y pointing down, the picture turns clockwise.
    torch.testing.assert_close(moved(images, ((0.0, 1.0), (-1.0, 0.0))), images.rot90(-1, (2, 3)), atol=0.02, rtol=0)
    twice = moved(images, ((0.5, 0.0), (0.0, 0.5)))
    torch.testing.assert_close(
        twice[..., ::2, ::2][..., 1:7, 1:7].mean(), images[..., 5:11, 5:11].mean(), atol=0.1, rtol=0
    )


def test_brightness_is_kept():
    grey = torch.full((400, 1, 8, 12), 0.25)
    out, _ = augment(grey, 0, INDEX, 1.0)
    torch.testing.assert_close(out, grey, atol=1e-5, rtol=0)


def test_an_image_ignores_its_neighbours_and_the_seed_decides():
    images = smooth(400, side=8)
    out, labels = augment(images, 0, INDEX, 0.5)
    for row in (0, 7, 123):
        alone, told = augment(images[row : row + 1], 0, INDEX[row : row + 1], 0.5)
        torch.testing.assert_close(alone[0], out[row], atol=1e-6, rtol=0)
        assert torch.equal(told[0], labels[row])
    assert not torch.equal(augment(images, 1, INDEX, 0.5)[1], labels)


def test_warping_all_and_then_choosing_is_the_same():
    images = smooth(100, side=8)
    draw = _draw(0, INDEX[:100], 0.2)
    chosen, all_warped = (_resample(images, draw, choose=choose) for choose in (True, False))
    assert 0 < int(draw.warps().sum()) < 100
    torch.testing.assert_close(chosen, all_warped, atol=1e-6, rtol=0)
    assert torch.equal(all_warped[~draw.warps()], images[~draw.warps()])


def test_without_probability_images_are_mirrored_at_most():
    images = smooth(400, side=8)
    out, labels = augment(images, 0, INDEX, 0.0)
    mirrored = labels[:, 0] == 1
    assert 150 < int(mirrored.sum()) < 250 and not labels[:, 1:].any()
    assert torch.equal(out[mirrored], images[mirrored].flip(3)) and torch.equal(out[~mirrored], images[~mirrored])


def test_labels_say_how_often_and_how_much():
    _, labels = augment(torch.zeros(4000, 1, 4, 4), 0, torch.arange(4000), 0.12)
    assert labels.shape == (4000, LABELS)
    shares = (labels != 0).double().mean(dim=0).tolist()
    assert shares == pytest.approx([0.5, 0.06, *[0.12] * 4, 0.06, 0.12, 0.12], abs=0.02)
    for column in (2, 7, 8):  # scale and shift are standard normal where they happen
        drawn = labels[:, column][labels[:, column] != 0]
        assert float(drawn.std()) == pytest.approx(1, abs=0.1)
    torch.testing.assert_close((labels[:, 3] + 1) ** 2 + labels[:, 4] ** 2, torch.ones(4000))


def rotation(angle):
    """Anticlockwise by an angle in a picture whose y points up; clockwise where it points down."""
    c, s = angle.cos(), angle.sin()
    return torch.stack((c, -s, s, c), dim=1).reshape(-1, 2, 2)


def test_labels_have_the_signs_of_the_released_pipe():
    """From output to input: undo the scale, turn by +w where the labels are cos w - 1 and sin w; stretch along -r."""
    draw = _draw(0, torch.arange(2000), 0.5)
    labels = draw.labels()
    angle, stretch = torch.atan2(labels[:, 4], labels[:, 3] + 1), torch.hypot(labels[:, 5], labels[:, 6])
    axis = torch.atan2(labels[:, 6], labels[:, 5])  # of the larger side; half a turn is the same
    shrink = torch.diag_embed(torch.stack((2 ** (-0.2 * stretch), 2 ** (0.2 * stretch)), dim=1))
    stretches = rotation(-axis) @ shrink @ rotation(axis)
    expected = rotation(angle) @ stretches * 2 ** (-0.2 * labels[:, 2])[:, None, None]
    rows = draw.stretch >= 0  # a negative number is read from the labels as its opposite along the other axis
    torch.testing.assert_close(_inverse(draw)[rows], expected[rows], atol=1e-5, rtol=1e-4)
    straight = draw.axis[draw.stretch != 0] == 0
    assert float(straight.double().mean()) == pytest.approx(0.5, abs=0.05)


def test_old_files_keep_the_signs_that_they_were_trained_with():
    old, new = ({"data": {"augment_probability": 0.1, **more}} for more in ({}, {"augment_signs": "edm"}))
    assert from_dict(RunConfig, {**old, "model": {"augment_labels": 9}}).data.augment_signs == "reversed"
    assert from_dict(RunConfig, {**new, "model": {"augment_labels": 9}}).data.augment_signs == "edm"
    assert from_dict(RunConfig, {}).data.augment_signs == DataConfig(augment_probability=0.1).augment_signs == "edm"
    images = smooth(1)
    draw = replace(_draw(0, INDEX[:1], 0.0), angle=torch.tensor([math.pi / 2]))
    reversed_ = replace(draw, sign=-1)
    turned, other = (_resample(images, each, choose=True) for each in (draw, reversed_))
    torch.testing.assert_close(turned, images.rot90(1, (2, 3)), atol=0.02, rtol=0)
    torch.testing.assert_close(other, images.rot90(-1, (2, 3)), atol=0.02, rtol=0)


def test_a_run_trains_with_it_and_zeros_are_no_augmentation():
    data = DataConfig(source="digits", augment_probability=0.5)
    config = replace(tiny.run_config(), data=data, model=replace(tiny.SMALLEST, augment_labels=LABELS))
    trainer = build_trainer(config, tiny.images())
    for _ in trainer.run(3):
        pass
    denoiser = trainer.denoiser.eval()
    assert isinstance(denoiser, Denoiser)
    x = torch.randn(2, *tiny.SHAPE)
    with torch.no_grad():
        plain = denoiser(x, 1.0)
        assert torch.equal(denoiser(x, 1.0, Conditioning(augment=torch.zeros(2, LABELS))), plain)
        assert not torch.equal(denoiser(x, 1.0, Conditioning(augment=torch.ones(2, LABELS))), plain)


def test_the_network_must_be_told():
    with pytest.raises(ConfigError, match="augment-labels must be 9 with"):
        replace(tiny.run_config(), data=DataConfig(augment_probability=0.12))
