"""Coupled updates: for a while, decoders of one form also move as all of them do on average."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import final

import torch
from torch import Tensor

from multistage_diffusion.errors import ConfigError
from multistage_diffusion.multidecoder import MultiDecoder


@final
class Coupling:
    """Mixes the update of each decoder with the mean of all decoders' updates.

    A decoder whose optimiser's step is d_k moves by (1 - c) d_k + c mean_j d_j. What the stages have in common is then
    learned from the images of all of them, and at c = 1 equal decoders stay equal.

    Args:
        network: Whose decoders; all have weights of the same names and shapes.
        share: c, in (0, 1].

    Raises:
        ConfigError: The decoders differ in form.
    """

    def __init__(self, network: MultiDecoder, share: float) -> None:
        self.share = share
        decoders = [dict(decoder.named_parameters()) for decoder in network.decoders]
        first = {name: weight.shape for name, weight in decoders[0].items()}
        for stage, weights in enumerate(decoders):
            if {name: weight.shape for name, weight in weights.items()} != first:
                raise ConfigError(
                    f"training.coupling needs decoders of one form, and that of stage {stage} differs from that of "
                    "stage 0; give all the same width (and no entry levels of their own)"
                )
        self._weights = [[weights[name] for name in first] for weights in decoders]

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """Around the optimiser's step."""
        before = [[weight.detach().clone() for weight in weights] for weights in self._weights]
        yield
        with torch.no_grad():
            for alike, starts in zip(zip(*self._weights, strict=True), zip(*before, strict=True), strict=True):
                steps = [weight - start for weight, start in zip(alike, starts, strict=True)]
                mean = sum(steps[1:], steps[0]) / len(steps)
                for weight, step in zip(alike, steps, strict=True):
                    _shift(weight, self.share * (mean - step))


def _shift(weight: Tensor, change: Tensor) -> None:
    """Move a weight; one that is frozen stays."""
    if weight.requires_grad:
        weight.add_(change)
