"""Running softmaxes over blocks of images: the posterior of a finite data set in bounded memory.

A row asks for the weights softmax_i(-|y_i - anchor|^2/(2 sigma^2) + noise.(y_i - anchor)/sigma) at one noise level.
With `noise` the anchor is an image of the set and x = anchor + sigma noise: its own logit is 0, and no level changes
the distances and inner products. Without, the anchor is x itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_CUT = 30.0  # nats below the largest logit at which an image (weight 1e-13) is left out
_FLOOR = -80.0  # smallest exponent: exp stays a normal float32 number, denormal ones are slow


@dataclass(frozen=True)
class Query:
    """Rows whose logits are -|y - anchor|^2/(2 sigma^2) + noise.(y - anchor)/sigma at several levels."""

    anchor: Tensor
    noise: Tensor | None
    sigma: Tensor
    own: Tensor | None
    labels: Tensor | None

    def start(self, rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Largest logit, sum of the weights and sum of weight times logit before the first block."""
        zeros = torch.zeros(rows, dtype=dtype, device=self.anchor.device)
        return (zeros - 1e30, zeros, zeros.clone()) if self.own is None else (zeros, zeros + 1, zeros.clone())


def _logits(half: Tensor, slope: Tensor | None, sigma: Tensor) -> Tensor:
    """Float32 logits of (query, level) rows over one block; `sigma` is (queries, levels, 1)."""
    logits = half[:, None] * (1 / sigma**2).float()
    if slope is not None:
        logits.addcmul_(slope[:, None], (1 / sigma).float())
    return logits.flatten(0, 1)


def _effective(total: Tensor, moment: Tensor, shape: torch.Size) -> Tensor:
    """exp(entropy) from the sums of weights and of weight times logit."""
    return (total.log() - moment / total).exp().reshape(shape).float()


class Dense:
    """Running softmax in float32: every image takes part by matrix products."""

    def __init__(self, query: Query, columns: Tensor, centred: Tensor, entropy: bool) -> None:
        self.sigma, self._entropy = query.sigma[:, columns, None], entropy
        self._top, self._total, self._moment = query.start(len(self), torch.float32)
        rows = centred.repeat_interleave(self.sigma.shape[1], 0)
        self._sum = torch.zeros_like(rows) if query.own is None else rows

    def __len__(self) -> int:
        return self.sigma.shape[0] * self.sigma.shape[1]

    def add(self, half: Tensor, slope: Tensor | None, images: Tensor) -> None:
        """Take a block in; rows to which it adds nothing are skipped."""
        logits = _logits(half, slope, self.sigma)
        peak = logits.amax(1)
        rows = (peak > torch.maximum(self._top, peak) - _CUT).nonzero()[:, 0]
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

    def average(self) -> Tensor:
        """Posterior mean minus the data's mean."""
        return (self._sum / self._total[:, None]).unflatten(0, self.sigma.shape[:2])

    def effective(self) -> Tensor:
        """Effective number of images."""
        return _effective(self._total, self._moment, self.sigma.shape[:2])


class Exact:
    """Running softmax in float64 over candidates that float32 logits nominate; for rows (query, level) of a mask."""

    def __init__(self, query: Query, mask: Tensor, rounding: Tensor) -> None:
        self._row, column = mask.nonzero(as_tuple=True)
        self.sigma, self._query = query.sigma[self._row, column], query
        self._top, self._total, self._moment = query.start(len(self), torch.float64)
        self._peak = self._top.float()
        self._margin = (_CUT + 2 * rounding[self._row] / self.sigma**2).float()
        self._shift = torch.zeros(len(self), query.anchor.shape[1], dtype=torch.float64, device=query.anchor.device)

    def __len__(self) -> int:
        return len(self.sigma)

    def candidates(self, half: Tensor, slope: Tensor | None) -> tuple[Tensor, Tensor]:
        """Rows and images of the block whose weight may matter."""
        logits = half[self._row] * (1 / self.sigma**2).float()[:, None]
        if slope is not None:
            logits.addcmul_(slope[self._row], (1 / self.sigma).float()[:, None])
        self._peak = torch.maximum(self._peak, logits.amax(1))
        row, column = (logits > (self._peak - self._margin)[:, None]).nonzero(as_tuple=True)
        return row, column

    def add(self, row: Tensor, images: Tensor) -> None:
        """Take candidates in, each with its row."""
        query, sigma = self._row[row], self.sigma[row]
        diff = images.double() - self._query.anchor[query].double()
        logits = diff.square().sum(1) / (-2 * sigma**2)
        if self._query.noise is not None:
            logits += torch.linalg.vecdot(self._query.noise[query].double(), diff) / sigma
        top = self._top.scatter_reduce(0, row, logits, "amax")
        drop = top - self._top
        fade, self._top = (-drop).exp(), top
        logits = logits - top[row]
        weights = logits.exp()
        self._moment = ((self._moment - drop * self._total) * fade).index_add(0, row, weights * logits)
        self._total = (self._total * fade).index_add(0, row, weights)
        self._shift = (self._shift * fade[:, None]).index_add(0, row, weights[:, None] * diff)

    def shift(self) -> Tensor:
        """Posterior mean minus the anchor."""
        return self._shift / self._total[:, None]

    def effective(self) -> Tensor:
        """Effective number of images."""
        return _effective(self._total, self._moment, self.sigma.shape)
