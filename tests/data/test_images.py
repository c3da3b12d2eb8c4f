"""`Images`, the way to and from [-1, 1], resizing."""

import pytest
import torch

from multistage_diffusion.data import Images, to_uint8
from multistage_diffusion.data.images import content_keys, fit
from multistage_diffusion.errors import DataError, NumericsError


def some_images(count=6, channels=3, side=8):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, channels, side, side), dtype=torch.uint8, generator=generator)


def test_every_byte_survives_the_way_to_floats_and_back():
    every = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    floats = Images("x", every).floats()
    assert floats.dtype == torch.float32
    assert (floats.min().item(), floats.max().item()) == (-1.0, 1.0)
    assert torch.equal(to_uint8(floats), every)


def test_to_uint8_clips_and_rounds():
    assert to_uint8(torch.tensor([-1.0, 0.0, 1.0, -7.0, 7.0])).tolist() == [0, 128, 255, 0, 255]
    dark = torch.full((2, 1, 4, 4), -0.9)
    assert to_uint8(dark).unique().tolist() == [13]  # a constant picture is not stretched


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_to_uint8_refuses_what_is_not_finite(bad):
    with pytest.raises(NumericsError, match="NaN or infinite"):
        to_uint8(torch.tensor([0.0, bad]))


def test_floats_of_an_index():
    images = Images("x", some_images())
    index = torch.tensor([4, 1])
    assert torch.equal(images.floats(index), images.floats()[index])
    assert images.shape == (3, 8, 8) and len(images) == 6


def test_digest_is_of_the_content():
    pixels, labels = some_images(), torch.tensor([0, 1, 0, 1, 0, 1])
    images = Images("x", pixels, labels, ("a", "b"))
    assert images.digest == Images("y", pixels.clone(), labels.clone(), ("a", "b")).digest
    changed = pixels.clone()
    changed[3, 0, 0, 0] ^= 1
    others = [
        Images("x", changed, labels, ("a", "b")),
        Images("x", pixels, labels.flip(0), ("a", "b")),
        Images("x", pixels, labels, ("a", "c")),
        Images("x", pixels),
        Images("x", pixels.reshape(6, 3, 4, 16), labels, ("a", "b")),
    ]
    assert len({images.digest, *(other.digest for other in others)}) == 6


def test_labels_must_match():
    with pytest.raises(DataError, match="6 images but 2 labels"):
        Images("x", some_images(), torch.tensor([0, 1]), ("a", "b"))
    with pytest.raises(DataError, match=r"labels must lie in 0\.\.1, got 0\.\.2"):
        Images("x", some_images(3), torch.tensor([0, 1, 2]), ("a", "b"))
    with pytest.raises(DataError, match="no images found"):
        Images("x", some_images(0))


def test_an_image_fits_alone_as_in_company():
    pixels = some_images(5, side=20)[:, :, 2:14]
    together = fit(pixels, 8)
    assert together.shape == (5, 3, 8, 8)
    assert torch.equal(together, torch.cat([fit(pixel[None], 8) for pixel in pixels]))


def test_fit_crops_the_centre_and_keeps_constants():
    pixels = torch.zeros(1, 1, 4, 8, dtype=torch.uint8)
    pixels[:, :, :, 2:6] = 77
    assert fit(pixels, 4).unique().tolist() == [77]
    assert fit(pixels, 2).unique().tolist() == [77]
    assert fit(pixels, 16).unique().tolist() == [77]


def test_fit_averages_a_checkerboard():  # a filter without antialiasing would keep 0 or 255
    board = (torch.arange(32)[:, None] + torch.arange(32)).remainder(2).mul(255).to(torch.uint8)[None, None]
    small = fit(board, 8).float()
    assert (small - 127.5).abs().max() < 12


def test_content_key_sees_pixels_not_channels():
    grey = some_images(1, 1)[0]
    assert content_keys(grey[None]) == content_keys(grey.expand(3, -1, -1)[None])
    assert content_keys(grey[None]) != content_keys(grey.flip(1)[None])
    assert content_keys(grey[None]) != content_keys(grey.reshape(1, 1, 4, 16))
