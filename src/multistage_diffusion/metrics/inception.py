"""Inception-v3 as published figures of FID, KID and IS use it: the graph that TensorFlow's authors froze in 2015.

It is the network of `torchvision` but for four things: average pooling leaves out the padding, one pooling of the last
block takes the maximum, there are 1008 classes, and images are resized as TensorFlow 1 did, without antialiasing and
with pixels at their corners. The weights are those that torch-fidelity and pytorch-fid publish (the same file).

Source: Szegedy et al. 2016; Heusel et al. 2017.
"""

from __future__ import annotations

from pathlib import Path
from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from multistage_diffusion.metrics.extractor import FeatureExtractor, coloured_pixels
from multistage_diffusion.metrics.weights import Published, fetch, read_weights

NAME = "inception-v3"
PUBLISHED = Published(
    "weights-inception-2015-12-05-6726825d.pth",
    "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    95_628_359,
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
)
_SIDE = 299
_ROW, _COLUMN = (1, 7), (7, 1)  # kernels


@final
class InceptionV3(FeatureExtractor):
    """The 2048 features of the last pooling, and logits without their bias, as inception scores take them."""

    name = NAME
    resize = f"{_SIDE}x{_SIDE}, linear as in TensorFlow 1, not antialiased"
    num_features = 2048
    num_classes = 1008
    block = 32

    def __init__(self, weights: Path | None = None) -> None:
        """Read the weights.

        Args:
            weights: The published file; by default it is downloaded once.

        Raises:
            ConfigError: The file cannot be downloaded, or is not the published one.
        """
        super().__init__()
        with torch.device("meta"):
            self.Conv2d_1a_3x3, self.Conv2d_2a_3x3 = _Conv(3, 32, 3, stride=2), _Conv(32, 32, 3, padded=False)
            self.Conv2d_2b_3x3 = _Conv(32, 64, 3)
            self.Conv2d_3b_1x1, self.Conv2d_4a_3x3 = _Conv(64, 80, 1), _Conv(80, 192, 3, padded=False)
            self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _MixedA(192, 32), _MixedA(256, 64), _MixedA(288, 64)
            self.Mixed_6a = _MixedB(288)
            self.Mixed_6b, self.Mixed_6c = _MixedC(768, 128), _MixedC(768, 160)
            self.Mixed_6d, self.Mixed_6e = _MixedC(768, 160), _MixedC(768, 192)
            self.Mixed_7a = _MixedD(768)
            self.Mixed_7b, self.Mixed_7c = _MixedE(1280, largest=False), _MixedE(2048, largest=True)
            self.fc = nn.Linear(2048, 1008)
        hint = "get the file elsewhere and give it as inception:PATH"
        read_weights(weights or fetch(PUBLISHED, hint), PUBLISHED, self)

    def extract(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> tuple[Float[Tensor, "batch features"], Float[Tensor, "batch classes"]]:
        """Features and logits of images in [-1, 1]."""
        x = (resize_as_tensorflow(coloured_pixels(x), _SIDE) - 128.0) / 128.0
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, 2))))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        features = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x))).mean(dim=(2, 3))
        return features, F.linear(features, self.fc.weight)


def resize_as_tensorflow(
    x: Float[Tensor, "batch channels height width"], side: int
) -> Float[Tensor, "batch channels side side"]:
    """Linear interpolation to a square as in TensorFlow 1: pixel i of the output is at i length / side of the input."""
    for axis in (3, 2):
        length = x.shape[axis]
        position = torch.arange(side, device=x.device, dtype=torch.float32) * (length / side)
        low = position.long()
        shape = [1, 1, 1, 1]
        shape[axis] = side
        weight = (position - low).reshape(shape)
        first = x.index_select(axis, low)
        x = first + (x.index_select(axis, (low + 1).clamp_max(length - 1)) - first) * weight
    return x


@final
class _Conv(nn.Module):
    """Convolution, normalisation, ReLU; only with a stride of 1 can it be padded, to the size of its input."""

    def __init__(
        self, before: int, after: int, kernel: int | tuple[int, int], stride: int = 1, *, padded: bool = True
    ) -> None:
        super().__init__()
        height, width = kernel if isinstance(kernel, tuple) else (kernel, kernel)
        padding = (height // 2, width // 2) if padded and stride == 1 else 0
        self.conv = nn.Conv2d(before, after, (height, width), stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(after, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


def _average(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


@final
class _MixedA(nn.Module):
    def __init__(self, before: int, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = _Conv(before, 64, 1)
        self.branch5x5_1, self.branch5x5_2 = _Conv(before, 48, 1), _Conv(48, 64, 5)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = _Conv(before, 64, 1), _Conv(64, 96, 3)
        self.branch3x3dbl_3 = _Conv(96, 96, 3)
        self.branch_pool = _Conv(before, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        twice = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        once = self.branch5x5_2(self.branch5x5_1(x))
        return torch.cat((self.branch1x1(x), once, twice, self.branch_pool(_average(x))), dim=1)


@final
class _MixedB(nn.Module):
    def __init__(self, before: int) -> None:
        super().__init__()
        self.branch3x3 = _Conv(before, 384, 3, stride=2)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = _Conv(before, 64, 1), _Conv(64, 96, 3)
        self.branch3x3dbl_3 = _Conv(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        twice = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat((self.branch3x3(x), twice, F.max_pool2d(x, 3, 2)), dim=1)


@final
class _MixedC(nn.Module):
    def __init__(self, before: int, middle: int) -> None:
        super().__init__()
        self.branch1x1 = _Conv(before, 192, 1)
        self.branch7x7_1, self.branch7x7_2 = _Conv(before, middle, 1), _Conv(middle, middle, _ROW)
        self.branch7x7_3 = _Conv(middle, 192, _COLUMN)
        self.branch7x7dbl_1, self.branch7x7dbl_2 = _Conv(before, middle, 1), _Conv(middle, middle, _COLUMN)
        self.branch7x7dbl_3, self.branch7x7dbl_4 = _Conv(middle, middle, _ROW), _Conv(middle, middle, _COLUMN)
        self.branch7x7dbl_5 = _Conv(middle, 192, _ROW)
        self.branch_pool = _Conv(before, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        once = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        twice = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        twice = self.branch7x7dbl_5(self.branch7x7dbl_4(twice))
        return torch.cat((self.branch1x1(x), once, twice, self.branch_pool(_average(x))), dim=1)


@final
class _MixedD(nn.Module):
    def __init__(self, before: int) -> None:
        super().__init__()
        self.branch3x3_1, self.branch3x3_2 = _Conv(before, 192, 1), _Conv(192, 320, 3, stride=2)
        self.branch7x7x3_1, self.branch7x7x3_2 = _Conv(before, 192, 1), _Conv(192, 192, _ROW)
        self.branch7x7x3_3, self.branch7x7x3_4 = _Conv(192, 192, _COLUMN), _Conv(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        long = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat((self.branch3x3_2(self.branch3x3_1(x)), long, F.max_pool2d(x, 3, 2)), dim=1)


@final
class _MixedE(nn.Module):
    """The two last blocks differ in their pooling alone: the first takes the average, the last the maximum."""

    def __init__(self, before: int, *, largest: bool) -> None:
        super().__init__()
        self.largest = largest
        self.branch1x1 = _Conv(before, 320, 1)
        self.branch3x3_1 = _Conv(before, 384, 1)
        self.branch3x3_2a, self.branch3x3_2b = _Conv(384, 384, (1, 3)), _Conv(384, 384, (3, 1))
        self.branch3x3dbl_1, self.branch3x3dbl_2 = _Conv(before, 448, 1), _Conv(448, 384, 3)
        self.branch3x3dbl_3a, self.branch3x3dbl_3b = _Conv(384, 384, (1, 3)), _Conv(384, 384, (3, 1))
        self.branch_pool = _Conv(before, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        once, twice = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = F.max_pool2d(x, 3, 1, 1) if self.largest else _average(x)
        once, twice = (
            torch.cat((self.branch3x3_2a(once), self.branch3x3_2b(once)), dim=1),
            torch.cat((self.branch3x3dbl_3a(twice), self.branch3x3dbl_3b(twice)), dim=1),
        )
        return torch.cat((self.branch1x1(x), once, twice, self.branch_pool(pooled)), dim=1)
