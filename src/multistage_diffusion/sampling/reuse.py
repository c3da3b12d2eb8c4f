"""The encoder's features at one noise level, reused at the next ones: fewer passes of a trunk while images are drawn.

An encoder that allows it has a method `refresh(features, change, c_noise, conditioning)`, which makes the features of
an earlier call those of a call with `x + change` and another noise level, nearly and at almost no cost.

Source: Wang et al. 2025 (DDT), who share the encoder's output among adjacent steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from multistage_diffusion.conditioning import Conditioning
from multistage_diffusion.errors import ConfigError


class ReusingEncoder(nn.Module):
    """An encoder that is asked at every n-th call only, or where the batch has another size, and refreshed else.

    Attributes:
        passes: Calls that the encoder itself had.
    """

    def __init__(self, encoder: nn.Module, every: int) -> None:
        super().__init__()
        self.encoder, self.every, self.passes = encoder, every, 0
        self._kept: tuple[Tensor, Any] | None = None
        self._age = 0

    def forward(self, x: Tensor, c_noise: Tensor, conditioning: Conditioning) -> Any:
        """The features, or those of an earlier call for this one's noise level."""
        self._age += 1
        if self._kept is not None and self._age < self.every and self._kept[0].shape == x.shape:
            before, features = self._kept
            refresh: Any = self.encoder.refresh
            return refresh(features, x - before, c_noise, conditioning)
        features = self.encoder(x, c_noise, conditioning)
        self._kept, self._age, self.passes = (x, features), 0, self.passes + 1
        return features


@contextmanager
def reusing(denoiser: Any, every: int) -> Iterator[list[ReusingEncoder]]:
    """Reuse the features of a denoiser's encoders; they are what they were afterwards.

    Args:
        denoiser: A denoiser whose `network` is a `MultiDecoder`.
        every: Calls of an encoder to one pass; 1 changes nothing.

    Returns:
        The encoders that count their passes; none with `every` 1.

    Raises:
        ConfigError: An encoder has no method `refresh`.
    """
    if every == 1:
        yield []
        return
    encoders = getattr(getattr(denoiser, "network", None), "encoders", None)
    if encoders is None or not all(hasattr(encoder, "refresh") for encoder in encoders):
        raise ConfigError(
            f"sampling.trunk-every {every} needs a network whose encoder can be refreshed, like the transformer's "
            "(--model.backbone dit); sample with 1"
        )
    originals = list(encoders)
    wrapped = [ReusingEncoder(encoder, every) for encoder in originals]
    try:
        for index, encoder in enumerate(wrapped):
            encoders[index] = encoder
        yield wrapped
    finally:
        for index, encoder in enumerate(originals):
            encoders[index] = encoder
