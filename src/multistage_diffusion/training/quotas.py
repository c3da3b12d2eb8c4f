"""Shares of a batch after the noise of each stage's gradient, measured while training."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from multistage_diffusion.config import TrainingConfig
from multistage_diffusion.multidecoder import MultiDecoder
from multistage_diffusion.records import check
from multistage_diffusion.training.distributed import local


@final
class GradientNoise:
    """The noise of each stage's gradient, and the shares of a batch that make their sum least.

    Stage k has n_k of a batch's B images, weighted so that no n_k biases the gradient. The variance of the gradient is
    then sum_k v_k / n_k, where v_k is the variance of one image's gradient within the stage, times the square of the
    stage's probability. For a given B it is least at n_k proportional to sqrt(v_k) (Neyman 1934).

    v_k is measured on the parameters that stage k alone has. Every 16th step cuts its batch into two parts, which it
    does at no further cost. With a_k and b_k images of stage k in the parts, whose gradients sum up to g_a and g_b,

        v_k = |n_k g_a / a_k - n_k g_b / b_k|^2 / (1 / a_k + 1 / b_k)

    is an estimate without bias. Running means are taken of it.

    Args:
        network: Whose gradients.
        processes: How many processes share a batch; all hold the same gradients, or shards of them.

    Attributes:
        sums: (stages,) decayed sums of v_k, float64, on the CPU.
        counts: (stages,) decayed numbers of measurements.
    """

    every = 16  # steps from one measurement to the next
    least = 5.0  # decayed measurements of each stage before shares follow them
    keep = 0.95  # of sums and counts, with each measurement

    def __init__(self, network: MultiDecoder, processes: int = 1) -> None:
        self._weights = [list(decoder.parameters()) for decoder in network.decoders]
        if len(network.encoders) > 1:
            for weights, encoder in zip(self._weights, network.encoders, strict=True):
                weights += encoder.parameters()
        self._processes = processes
        self.sums = torch.zeros(len(self._weights), dtype=torch.float64)
        self.counts = torch.zeros(len(self._weights), dtype=torch.float64)

    @classmethod
    def of(cls, network: MultiDecoder, training: TrainingConfig, processes: int = 1) -> GradientNoise | None:
        """What `training.quotas auto` needs; none without it, or without stages.

        Raises:
            ConfigError: A batch is too small for two parts with each stage in both.
        """
        if training.quotas != "auto" or network.stages == 1:
            return None
        size, least = training.batch_size, 2 * max(network.stages, processes)
        check(size >= least, "training.batch-size", f"at least {least} with training.quotas auto", size)
        return cls(network, processes)

    def due(self, step: int) -> bool:
        """Whether a step measures."""
        return step % self.every == 0

    def first_part(self) -> list[list[Tensor]]:
        """Copies of the gradients as they are after the first part of a batch."""
        return [[local(gradient).clone() for gradient in self._gradients(stage)] for stage in range(len(self._weights))]

    def figures(self, first: list[list[Tensor]], counts: Sequence[int], parts: int, scale: float = 1.0) -> Tensor:
        """v_k of each stage, (stages,), to be summed over processes; 0 for a stage that is not in both parts.

        Args:
            first: The gradients after the first part; those of the whole batch lie in the parameters.
            counts: Images of each stage in the batch.
            parts: Micro-batches of each process, which takes its rows in turn with the others; the first part is the
                first of them.
            scale: What the gradients are multiplied by.
        """
        figures = torch.zeros(len(counts), device=self._weights[0][0].device)
        ends = itertools.accumulate(counts)
        for stage, (gradients, n, end) in enumerate(zip(first, counts, ends, strict=True)):
            a = sum(row % (parts * self._processes) < self._processes for row in range(end - n, end))
            b = n - a
            if not a or not b:
                continue
            for before, gradient in zip(gradients, self._gradients(stage), strict=True):
                whole = local(gradient)
                norm = (n / (a * scale) * before - n / (b * scale) * (whole - before)).square().sum()
                figures[stage] += norm / ((1 / a + 1 / b) * (self._processes if whole is gradient else 1))
        return figures

    def update(self, figures: Tensor) -> None:
        """Take in a measurement; a stage's 0 is none."""
        measured = figures.isfinite() & (figures > 0)
        self.sums = torch.where(measured, self.keep * self.sums + figures.double(), self.sums)
        self.counts = torch.where(measured, self.keep * self.counts + 1, self.counts)

    def shares(self) -> tuple[float, ...] | None:
        """Shares of a batch, in proportion to sqrt(v_k); none while a stage was measured too seldom."""
        if bool((self.counts < self.least).any()):
            return None
        noise = (self.sums / self.counts).sqrt()
        return tuple((noise / noise.sum()).tolist())

    def _gradients(self, stage: int) -> list[Tensor]:
        return [weight.grad for weight in self._weights[stage] if weight.grad is not None]
