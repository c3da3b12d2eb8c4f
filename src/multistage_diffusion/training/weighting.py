"""Weights of noise levels in training, beside the process's own.

All are weights w(sigma) of the squared error of the denoised image; SNR = 1 / sigma^2, as x = x0 + sigma eps. What a
weight does to the training distribution of sigma, and to the held-out loss, is nothing: levels are drawn as before, and
losses are reported with the process's weight.
"""

from __future__ import annotations

from typing import Literal, final

import torch
from jaxtyping import Float
from torch import Tensor

from multistage_diffusion.noise import Process

MIN_SNR = 5.0  # gamma of Hang et al. 2023
P2_OFFSET, P2_POWER = 1.0, 1.0  # k and gamma of Choi et al. 2022
FixedWeighting = Literal["process", "min-snr", "p2"]


def relative_weight(
    weighting: FixedWeighting, process: Process, sigma: Float[Tensor, " batch"]
) -> Float[Tensor, " batch"]:
    """What a weighting makes of the process's weight, as a factor.

    - `process`: 1.
    - `min-snr`: w = min(SNR, 5), so that no low noise level outweighs the rest (Hang et al. 2023: for noise
      prediction min(SNR, 5) / SNR times the process's weight, for velocity min(SNR, 5) / (SNR + 1)).
    - `p2`: w = SNR / (1 + SNR): the weight of noise prediction, SNR, less where SNR is high (Choi et al. 2022).

    Args:
        weighting: Which.
        process: The process.
        sigma: Noise levels above 0.

    Returns:
        The factors.
    """
    snr = sigma.square().reciprocal()
    match weighting:
        case "process":
            return sigma.new_ones(sigma.shape)
        case "min-snr":
            weight = snr.clamp(max=MIN_SNR)
        case "p2":
            weight = snr / (P2_OFFSET + snr) ** P2_POWER
    return weight / process.loss_weight(sigma)


@final
class Uncertainty:
    """The mean loss at each noise level, learned while training, and the weight of a level that is its inverse.

    The learned uncertainty u(sigma) of Karras et al. 2024 minimises E[exp(-u) L + u], whose minimum is
    u = log E[L | sigma]: each level's loss is divided by its mean. Here that mean is a table over cells of equal
    probability of the training distribution, each a running mean of the losses drawn in it; no network is trained
    beside the denoiser, and the table is a pure function of the losses. Weights are scaled to a mean weighted loss as
    the process's weight has it, so that clipping and learning rates mean what they meant.

    Args:
        process: Gives the training distribution.
        half_life: In images, of the running means.

    Attributes:
        sums: (cells,) decayed sums of losses, float64, on the CPU.
        counts: (cells,) decayed numbers of losses. Both begin at 1, a mean loss of 1 at each level.
    """

    cells = 64

    def __init__(self, process: Process, half_life: float = 10_000.0) -> None:
        self.process, self.half_life = process, half_life
        self.sums = torch.ones(self.cells, dtype=torch.float64)
        self.counts = torch.ones(self.cells, dtype=torch.float64)

    def factor(self, sigma: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """What the weight of each noise level is multiplied by: the mean loss over that at the level.

        Between the middles of cells the mean is interpolated, in its logarithm.
        """
        means = self.sums / self.counts
        logs = means.clamp(min=1e-12).log().to(sigma)
        place = (self._positions(sigma) * self.cells - 0.5).clamp(0, self.cells - 1)
        low = place.floor().long().clamp(max=self.cells - 2)
        return means.mean().to(sigma) * torch.exp(-torch.lerp(logs[low], logs[low + 1], place - low))

    def figures(self, sigma: Float[Tensor, " batch"], losses: Float[Tensor, " batch"], counted: Tensor) -> Tensor:
        """What `update` needs of some images: sums of their losses by cell, then their numbers, (2 cells,).

        Args:
            sigma: Their noise levels.
            losses: Their losses, with the process's weight.
            counted: (B,) whether each counts.
        """
        cell = (self._positions(sigma) * self.cells).long().clamp(max=self.cells - 1)
        rows = torch.stack((losses * counted, counted.to(losses)))
        return losses.new_zeros(2, self.cells).index_add_(1, cell, rows).flatten()

    def update(self, figures: Tensor, images: int) -> None:
        """Take in the figures of a batch, of so many images."""
        sums, counts = figures.double().view(2, self.cells)
        keep = 0.5 ** (images / self.half_life)
        self.sums, self.counts = keep * self.sums + sums, keep * self.counts + counts

    def _positions(self, sigma: Tensor) -> Tensor:
        return self.process.cdf(sigma.double()).to(sigma)
