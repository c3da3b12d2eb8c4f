"""EDM's geometric augmentation: mirror, scale, turn, stretch and shift images, and tell the network of it.

The network sees how an image was augmented, so what it draws without augmentation (all labels zero) is not augmented.
Written from the description in Karras et al. 2022, Appendix F.2, Table 6; as there, all transformations of an image are
one resampling at twice the resolution with reflection at the borders. The low-pass filter is a Lanczos window where
theirs is a wavelet.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from multistage_diffusion import rng
from multistage_diffusion.config import AugmentSigns

LABELS = 9  # numbers that say how an image was augmented
SCALE, STRETCH, SHIFT = 2**0.2, 2**0.2, 1 / 8  # A_scale, A_aniso and A_trans of the table
_LOBES = 3  # of the Lanczos window
_MARGIN = 2 * _LOBES - 1  # pixels of twice the resolution that the filter reaches over the border


@dataclass(frozen=True)
class _Draw:
    """What happens to each image; 0 where it does not."""

    mirror: Tensor
    upside_down: Tensor
    scale: Tensor
    angle: Tensor
    axis: Tensor
    stretch: Tensor
    shift: Tensor
    sign: int  # of the turn and of the axis, as the image shows them; the labels have them as they are

    def labels(self) -> Tensor:
        columns = (
            self.mirror, self.upside_down, self.scale, self.angle.cos() - 1, self.angle.sin(),
            self.stretch * self.axis.cos(), self.stretch * self.axis.sin(), self.shift[:, 0], self.shift[:, 1],
        )  # fmt: skip
        return torch.stack(columns, dim=1)

    def warps(self) -> Tensor:
        """Whether an image must be resampled; mirroring alone is exact."""
        return (self.scale != 0) | (self.angle != 0) | (self.stretch != 0) | (self.shift != 0).any(dim=1)


def augment(
    images: Float[Tensor, "batch channels height width"],
    seed: int,
    index: Int[Tensor, " batch"],
    probability: float,
    signs: AugmentSigns = "edm",
) -> tuple[Float[Tensor, "batch channels height width"], Float[Tensor, "batch labels"]]:
    """Augment images; a pure function of (seed, index) for each of them.

    Args:
        images: Images in [-1, 1].
        seed: The run's seed.
        index: Global sample index of each image.
        probability: Of each transformation by itself; mirroring left to right always has half of the images.
        signs: As the released pipe has them, with the stretch's axis turned in half of the cases; or, as in version
            0.1, reversed turns and axes, and the axis always turned.

    Returns:
        The augmented images (those that are only mirrored, or untouched, to the bit), and `LABELS` numbers for each.

    Source: Karras et al. 2022, Appendix F.2, Table 6.
    """
    draw = _draw(seed, index, probability, signs)
    flipped = torch.where(draw.mirror.bool()[:, None, None, None], images.flip(3), images)
    flipped = torch.where(draw.upside_down.bool()[:, None, None, None], flipped.flip(2), flipped)
    return _resample(flipped, draw, choose=images.device.type == "cpu"), draw.labels()


def warp(
    images: Float[Tensor, "batch channels height width"],
    matrix: Float[Tensor, "batch 2 2"],
    shift: Float[Tensor, "batch 2"],
) -> Float[Tensor, "batch channels height width"]:
    """Resample images so that the output at p shows the input at matrix (p - shift), p in pixels from the centre.

    Args:
        images: Images.
        matrix: Inverse of each linear transformation, in (x, y).
        shift: Displacement (x, y) of each image in pixels.

    Returns:
        Images of the same shape; beyond the border the images are reflected.
    """
    high, wide = images.shape[2:]
    taps = _lanczos(images)
    fine = _double(_double(images, taps, 2), taps, 3)
    across = (torch.arange(-_MARGIN, 2 * wide + _MARGIN, device=images.device) + 0.5) / 2 - wide / 2
    down = (torch.arange(-_MARGIN, 2 * high + _MARGIN, device=images.device) + 0.5) / 2 - high / 2
    places = torch.stack(torch.meshgrid(across, down, indexing="xy"), dim=-1)  # (H', W', 2)
    sources = torch.einsum("bij,bhwj->bhwi", matrix, places - shift[:, None, None, :])
    grid = torch.stack((sources[..., 0] / (wide / 2), sources[..., 1] / (high / 2)), dim=-1)
    moved = F.grid_sample(fine, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    return _halve(_halve(moved, taps, 2), taps, 3)


def _resample(images: Tensor, draw: _Draw, *, choose: bool) -> Tensor:
    """Warp the images that are to be; `choose` them first, or warp all, as a GPU would wait for the choice."""
    matrix, share = _inverse(draw), SHIFT * draw.shift
    shift = torch.stack((share[:, 0] * images.shape[3], share[:, 1] * images.shape[2]), dim=1)
    if not choose:
        return torch.where(draw.warps()[:, None, None, None], warp(images, matrix, shift), images)
    rows = draw.warps().nonzero()[:, 0]
    return images.index_copy(0, rows, warp(images[rows], matrix[rows], shift[rows])) if len(rows) > 0 else images


def _draw(seed: int, index: Tensor, probability: float, signs: AugmentSigns = "edm") -> _Draw:
    """Random transformations of each image, in float32."""
    happens = rng.uniform(seed, "augment/happens", index, 5) < probability
    even = rng.uniform(seed, "augment/even", index, 4).float()
    normal = rng.normal(seed, "augment/normal", index, (4,))
    zero = torch.zeros_like(even[:, 0])
    turn = (2 * even - 1) * math.pi
    turned = happens[:, 3]
    if signs == "edm":
        turned = turned & (rng.uniform(seed, "augment/axis", index, 1)[:, 0] < 0.5)
    return _Draw(
        mirror=(even[:, 0] < 0.5).float(),
        upside_down=((even[:, 1] < 0.5) & happens[:, 0]).float(),
        scale=torch.where(happens[:, 1], normal[:, 0], zero),
        angle=torch.where(happens[:, 2], turn[:, 2], zero),
        axis=torch.where(turned, turn[:, 3], zero),
        stretch=torch.where(happens[:, 3], normal[:, 1], zero),
        shift=torch.where(happens[:, 4, None], normal[:, 2:], zero[:, None]),
        sign=1 if signs == "edm" else -1,
    )


def _inverse(draw: _Draw) -> Tensor:
    """From output to input, after the shift: undo stretch, turn and scale, in this order."""
    factor = STRETCH**draw.stretch
    shrink = torch.diag_embed(torch.stack((1 / factor, factor), dim=1))
    axis, angle = draw.sign * draw.axis, draw.sign * draw.angle
    stretch = _rotation(-axis) @ shrink @ _rotation(axis)
    return _rotation(angle) @ stretch / (SCALE**draw.scale)[:, None, None]


def _rotation(angle: Tensor) -> Tensor:
    rows = (angle.cos(), -angle.sin(), angle.sin(), angle.cos())
    return torch.stack(rows, dim=1).reshape(-1, 2, 2)


def _lanczos(like: Tensor) -> Tensor:
    """Low-pass filter of a doubled resolution: 12 taps, a quarter of a pixel beside the centre and so on; sum 1."""
    places = (torch.arange(4 * _LOBES, device=like.device, dtype=like.dtype) + 0.5) / 2 - _LOBES
    taps = torch.sinc(places) * torch.sinc(places / _LOBES)
    return taps / taps.sum()


def _double(x: Tensor, taps: Tensor, dim: int) -> Tensor:
    """Twice the resolution along one side, the image reflected at its borders."""
    size = x.shape[dim]
    places = torch.arange(-_LOBES, size + _LOBES, device=x.device) % (2 * size)
    x = x.index_select(dim, torch.minimum(places, 2 * size - 1 - places))
    kernel = (2 * taps).reshape(1, 1, *((-1, 1) if dim == 2 else (1, -1))).expand(x.shape[1], -1, -1, -1)
    fine = F.conv_transpose2d(x, kernel, stride=(2, 1) if dim == 2 else (1, 2), groups=x.shape[1])
    return fine.narrow(dim, 2 * _LOBES + _MARGIN, 2 * size)


def _halve(x: Tensor, taps: Tensor, dim: int) -> Tensor:
    """Half the resolution along one side; uses up the margins."""
    kernel = taps.reshape(1, 1, *((-1, 1) if dim == 2 else (1, -1))).expand(x.shape[1], -1, -1, -1)
    return F.conv2d(x, kernel, stride=(2, 1) if dim == 2 else (1, 2), groups=x.shape[1])
