"""Exact denoisers with closed forms, of Gaussians and of their mixtures.

Each is called as `denoiser(x, sigma)`, x = x0 + sigma eps, and returns the posterior mean of x0, so samplers take it.
The exact denoiser of a data set is `clustering.posterior.OptimalDenoiser`.
"""

from __future__ import annotations

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

Sigma = float | Float[Tensor, ""] | Float[Tensor, " batch"]


@final
class GaussianDenoiser:
    """The exact denoiser of images from N(mean, std^2), independent pixels.

    Args:
        mean: Mean image; a single number stands for all pixels.
        std: Standard deviation, one for all pixels or one each.
    """

    def __init__(self, mean: float | Float[Tensor, "*image"], std: float | Float[Tensor, "*image"]) -> None:
        self.mean, self.std = torch.as_tensor(mean), torch.as_tensor(std)

    def __call__(
        self, x: Float[Tensor, "batch channels height width"], sigma: Sigma
    ) -> Float[Tensor, "batch channels height width"]:
        """Posterior mean of x0: mean + std^2/(std^2 + sigma^2) (x - mean)."""
        mean, variance = self.mean.to(x), self.std.to(x) ** 2
        return mean + variance / (variance + _column(sigma, x) ** 2) * (x - mean)

    def flow(self, x: Float[Tensor, "batch channels height width"], start: Sigma, end: Sigma) -> Tensor:
        """Where the probability-flow ODE dx/dsigma = (x - D(x, sigma))/sigma leads from `start` to `end`, exactly.

        With D above, d(x - mean)/dsigma = sigma/(std^2 + sigma^2) (x - mean), so x - mean grows like
        sqrt(std^2 + sigma^2). `end` 0 gives the clean image.
        """
        mean, std = self.mean.to(x), self.std.to(x)
        return mean + (x - mean) * torch.hypot(std, _column(end, x)) / torch.hypot(std, _column(start, x))


@final
class MixtureDenoiser:
    """The exact denoiser of a mixture of isotropic Gaussians.

    Args:
        means: Mean image of each component.
        stds: Standard deviation of each component.
        weights: Probability of each component; by default equal.
    """

    def __init__(
        self,
        means: Float[Tensor, "parts channels height width"],
        stds: Float[Tensor, " parts"],
        weights: Float[Tensor, " parts"] | None = None,
    ) -> None:
        self.means, self.stds = means, stds
        self.weights = torch.full_like(stds, 1 / len(stds)) if weights is None else weights

    def __call__(
        self, x: Float[Tensor, "batch channels height width"], sigma: Sigma
    ) -> Float[Tensor, "batch channels height width"]:
        """Posterior mean of x0: the components' denoisers, weighted by the components' posterior probabilities."""
        # Under component k x is N(mean_k, (std_k^2 + sigma^2) I), so its posterior probability is the softmax of these.
        diff = (x[:, None] - self.means.to(x)).flatten(2)
        variance = self.stds.to(x) ** 2
        spread = variance + _column(sigma, x).reshape(-1, 1) ** 2
        logits = self.weights.to(x).log() - diff.square().sum(2) / (2 * spread) - diff.shape[2] / 2 * spread.log()
        shrunk = self.means.to(x).flatten(1) + (variance / spread)[:, :, None] * diff
        return torch.einsum("bk,bkd->bd", logits.softmax(1), shrunk).reshape(x.shape)


def _column(sigma: Sigma, x: Tensor) -> Tensor:
    """Noise levels that broadcast against images."""
    return torch.as_tensor(sigma, dtype=x.dtype, device=x.device).reshape(-1, 1, 1, 1)
