"""What every feature extractor is: images in, one row of numbers and one of class scores an image out."""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, UInt8
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from multistage_diffusion.devices import full_precision
from multistage_diffusion.errors import DataError, NumericsError


@dataclass(frozen=True)
class Features:
    """What an extractor gives for a batch of images.

    Attributes:
        features: One row an image.
        logits: Scores of the classes, before the softmax; no columns where the extractor knows no classes.
    """

    features: Float[Tensor, "batch features"]
    logits: Float[Tensor, "batch classes"]


@dataclass(frozen=True)
class Description:
    """What features are, to stand beside a figure: figures compare only where the digests are equal.

    Attributes:
        name: What the features are, like `digits-classifier`.
        resize: How images are resized for the network.
        num_features: Length of a feature vector.
        accuracy: Share of held-out images whose class the network names right; none where nobody measured it.
        digest: SHA-256 of the weights, in hexadecimal digits.
    """

    name: str
    resize: str
    num_features: int
    accuracy: float | None
    digest: str


class FeatureExtractor(nn.Module, ABC):
    """Features of images; an image's result does not depend on its batch-mates beyond rounding.

    Attributes:
        name, resize, num_features, accuracy: As in `Description`.
        num_classes: Length of a row of logits; 0 for a network without classes.
        block: Images a forward pass.
    """

    name: str
    resize: str
    num_features: int
    num_classes: int
    accuracy: float | None = None
    block: int = 64

    @abstractmethod
    def extract(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> tuple[Float[Tensor, "batch features"], Float[Tensor, "batch classes"]]:
        """Features and logits of a few images in [-1, 1], on the device of the weights."""

    def forward(
        self, images: Float[Tensor, "batch channels height width"] | UInt8[Tensor, "batch channels height width"]
    ) -> Features:
        """Features and logits.

        Args:
            images: Floats in [-1, 1], or pixels in 0..255.

        Returns:
            float32, on the device of the extractor, in the order of the images.

        Raises:
            DataError: Images of a shape that the extractor does not take, or floats outside [-1, 1].
            NumericsError: A value is NaN or infinite.
        """
        device, parts = next(self.parameters()).device, []
        with torch.no_grad(), full_precision(device), _full_convolutions():
            for block in images.split(self.block):
                parts.append(self.extract(_checked(block.to(device))))
        return Features(torch.cat([features for features, _ in parts]), torch.cat([logits for _, logits in parts]))

    @property
    def digest(self) -> str:
        """SHA-256 of the weights, in hexadecimal digits."""
        return hashlib.sha256(save_tensors(self.weights())).hexdigest()

    def weights(self) -> dict[str, Tensor]:
        """The weights by name, on the CPU."""
        return {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}

    def describe(self) -> Description:
        """What stands beside a figure of these features."""
        return Description(self.name, self.resize, self.num_features, self.accuracy, self.digest)


def coloured_pixels(x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch 3 height width"]:
    """Images in [-1, 1] as networks for photographs see them: three channels of whole numbers in 0..255.

    Grey images become grey colours.

    Raises:
        DataError: Neither 1 nor 3 channels.
    """
    if x.shape[1] not in (1, 3):
        raise DataError(f"these features are of images with 1 or 3 channels, got {x.shape[1]}")
    return x.add(1.0).mul(127.5).round().expand(-1, 3, -1, -1)


@contextmanager
def _full_convolutions() -> Iterator[None]:
    """Convolutions in true float32, so that figures from a GPU are those from a CPU; TF32 is torch's default there."""
    cudnn: Any = torch.backends.cudnn
    convolution = cudnn.conv
    before = convolution.fp32_precision
    convolution.fp32_precision = "ieee"
    try:
        yield
    finally:
        convolution.fp32_precision = before


def _checked(block: Tensor) -> Tensor:
    """Images as floats in [-1, 1]."""
    if block.dtype == torch.uint8:
        return block.float().div_(127.5).sub_(1.0)
    low, high = (float(value) for value in block.aminmax())
    if not math.isfinite(low + high):
        raise NumericsError("images hold NaN or infinite values")
    if low < -1.0 or high > 1.0:
        raise DataError(f"images must lie in [-1, 1], got {low:.4g}..{high:.4g}; clip them as to_uint8 does")
    return block.float()
