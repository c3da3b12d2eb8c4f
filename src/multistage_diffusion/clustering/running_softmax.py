"""Running softmaxes over blocks of images: the posterior of a finite data set in bounded memory.

The weights of the images y_i given x at a noise level are softmax_i(l_i), l_i = -|x - y_i|^2 / (2 sigma^2) up to a term
that all images share. Blocks of images pass by; what is kept of those seen so far is, with M = max l_i,

    total S = sum_i exp(l_i - M),   sum A = sum_i exp(l_i - M) y_i,   moment Q = sum_i exp(l_i - M) (l_i - M).

A block that raises the maximum by d = M' - M turns S into S exp(-d), A into A exp(-d), and Q into (Q - d S) exp(-d),
since each l_i - M' is (l_i - M) - d. In the end A/S is the posterior mean, and as log p_i = l_i - M - log S the entropy
of the weights is log S - Q/S.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

_CUT = 30.0  # nats below the largest logit at which an image (weight 1e-13) is left out
_FLOOR = -80.0  # smallest exponent: exp stays a normal float32 number, denormal ones are slow


@dataclass(frozen=True)
class NoisyImages:
    """Noisy images x = anchor + sigma noise, each on several noise levels.

    Without noise the anchor is x itself. With noise it is an image of the data set, l_i is taken relative to the
    anchor's own logit, and

        l_i = -D_i / (2 sigma^2) + g_i / sigma,   D_i = |y_i - anchor|^2,   g_i = noise . (y_i - anchor):

    no level changes D and g, so two matrix products serve them all, and the anchor's own logit is exactly 0.
    """

    anchor: Float[Tensor, "rows numbers"]
    noise: Float[Tensor, "rows numbers"] | None
    sigma: Float[Tensor, "rows levels"]
    index: Int[Tensor, " rows"] | None  # which image of the set the anchor is, where there is noise
    labels: Int[Tensor, " rows"] | None  # posteriors are over the images of these classes

    def start(self, count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """M, S and Q of `count` softmaxes before the first block: an anchor of the set is counted, with its logit 0."""
        zeros = torch.zeros(count, dtype=dtype, device=self.anchor.device)
        return (zeros - 1e30, zeros, zeros.clone()) if self.index is None else (zeros, zeros + 1, zeros.clone())


def _effective(total: Tensor, moment: Tensor, shape: torch.Size) -> Tensor:
    """exp(entropy) = exp(log S - Q/S)."""
    return (total.log() - moment / total).exp().reshape(shape).float()


class BlockSoftmax:
    """Running softmax in float32 in which every image of a block takes part, by matrix products.

    Args:
        noisy: The noisy images.
        columns: Which of their levels.
        centred: Their anchors minus the mean of the data set.
        entropy: Whether `effective` will be called.
    """

    def __init__(
        self,
        noisy: NoisyImages,
        columns: Bool[Tensor, " levels"],
        centred: Float[Tensor, "rows numbers"],
        entropy: bool,
    ) -> None:
        self.sigma, self._entropy = noisy.sigma[:, columns, None], entropy
        self._top, self._total, self._moment = noisy.start(len(self), torch.float32)
        rows = centred.repeat_interleave(self.sigma.shape[1], 0)
        self._sum = torch.zeros_like(rows) if noisy.index is None else rows

    def __len__(self) -> int:
        return self.sigma.shape[0] * self.sigma.shape[1]

    def add(
        self,
        half: Float[Tensor, "rows block"],
        slope: Float[Tensor, "rows block"] | None,
        images: Float[Tensor, "block numbers"],
    ) -> None:
        """Take a block in: logits are half / sigma^2 + slope / sigma, images are centred."""
        logits = half[:, None] * (1 / self.sigma**2).float()
        if slope is not None:
            logits.addcmul_(slope[:, None], (1 / self.sigma).float())
        logits = logits.flatten(0, 1)
        peak = logits.amax(1)
        rows = (peak > torch.maximum(self._top, peak) - _CUT).nonzero()[:, 0]  # to which the block adds something
        if not len(rows):
            return
        if len(rows) < len(logits):
            logits, peak = logits[rows], peak[rows]
        drop = (peak - self._top[rows]).clamp_(min=0)
        fade, total = (-drop).exp(), self._total[rows]
        self._top[rows] = torch.maximum(self._top[rows], peak)
        logits.sub_(self._top[rows, None]).clamp_(min=_FLOOR)
        weights = logits.exp()
        self._sum[rows] = torch.addmm(self._sum[rows] * fade[:, None], weights, images)
        self._total[rows] = total * fade + weights.sum(1)
        if self._entropy:
            self._moment[rows] = (self._moment[rows] - drop * total) * fade + torch.linalg.vecdot(weights, logits)

    def average(self) -> Float[Tensor, "rows levels numbers"]:
        """Posterior mean minus the mean of the data set."""
        return (self._sum / self._total[:, None]).unflatten(0, self.sigma.shape[:2])

    def effective(self) -> Float[Tensor, "rows levels"]:
        """Effective number of images."""
        return _effective(self._total, self._moment, self.sigma.shape[:2])


class CandidateSoftmax:
    """Running softmax in float64 over the few images that float32 logits nominate.

    At low noise a difference of a float32 logit from the true one, up to r / sigma^2 with r the rounding of a squared
    distance, would decide between near-copies. There float32 only nominates: an image whose true logit is at most 30
    nats below the true maximum has a float32 logit at most 30 + 2 r / sigma^2 below the largest float32 logit (one r /
    sigma^2 for it, one for the largest). The candidates' logits are then taken from differences in float64, which lose
    nothing, as (y - x)^2 is never expanded. At such levels the candidates are few: the softmax has all but collapsed.

    Args:
        noisy: The noisy images.
        mask: Which of their levels.
        rounding: Bound r on the error of `half` in each row.
    """

    def __init__(self, noisy: NoisyImages, mask: Bool[Tensor, "rows levels"], rounding: Float[Tensor, " rows"]) -> None:
        self._row, column = mask.nonzero(as_tuple=True)  # one softmax an entry of the mask
        self.sigma, self._noisy = noisy.sigma[self._row, column], noisy
        self._top, self._total, self._moment = noisy.start(len(self), torch.float64)
        self._peak = self._top.float()  # largest float32 logit so far
        self._margin = (_CUT + 2 * rounding[self._row] / self.sigma**2).float()
        self._shift = torch.zeros(len(self), noisy.anchor.shape[1], dtype=torch.float64, device=noisy.anchor.device)

    def __len__(self) -> int:
        return len(self.sigma)

    def candidates(
        self, half: Float[Tensor, "rows block"], slope: Float[Tensor, "rows block"] | None
    ) -> tuple[Int[Tensor, " candidates"], Int[Tensor, " candidates"]]:
        """Softmaxes, and for each an image of the block whose weight may matter."""
        logits = half[self._row] * (1 / self.sigma**2).float()[:, None]
        if slope is not None:
            logits.addcmul_(slope[self._row], (1 / self.sigma).float()[:, None])
        self._peak = torch.maximum(self._peak, logits.amax(1))
        row, column = (logits > (self._peak - self._margin)[:, None]).nonzero(as_tuple=True)
        return row, column

    def add(self, row: Int[Tensor, " candidates"], images: Float[Tensor, "candidates numbers"]) -> None:
        """Take candidates in, each into the softmax of its `row`. The sum is of y - anchor, so it does not cancel."""
        noisy, sigma = self._row[row], self.sigma[row]
        diff = images.double() - self._noisy.anchor[noisy].double()
        logits = diff.square().sum(1) / (-2 * sigma**2)
        if self._noisy.noise is not None:
            logits += torch.linalg.vecdot(self._noisy.noise[noisy].double(), diff) / sigma
        top = self._top.scatter_reduce(0, row, logits, "amax")
        drop = top - self._top
        fade, self._top = (-drop).exp(), top
        logits = logits - top[row]
        weights = logits.exp()
        self._moment = ((self._moment - drop * self._total) * fade).index_add(0, row, weights * logits)
        self._total = (self._total * fade).index_add(0, row, weights)
        self._shift = (self._shift * fade[:, None]).index_add(0, row, weights[:, None] * diff)

    def shift(self) -> Float[Tensor, "softmaxes numbers"]:
        """Posterior mean minus the anchor."""
        return self._shift / self._total[:, None]

    def effective(self) -> Float[Tensor, " softmaxes"]:
        """Effective number of images."""
        return _effective(self._total, self._moment, self.sigma.shape)
