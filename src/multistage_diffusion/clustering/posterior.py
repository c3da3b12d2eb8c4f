"""The exact denoiser of a finite set of images, computed over blocks of them in bounded memory.

Over images y_i the posterior of x = x0 + sigma eps is a softmax of -|x - y_i|^2 / (2 sigma^2) (Zhang et al. 2024, Prop.
1). With the mean m of the images, c = x - m and z_i = y_i - m,

    -|x - y_i|^2 / 2 = c . z_i - |z_i|^2 / 2 - |c|^2 / 2,

whose last term all images share: one float32 matrix product gives the logits, and centring keeps its terms small. The
rounding of a logit, of the order of 2^-24 |z|^2 / sigma^2, matters only where sigma is small, and there only among
images that lie close together: such rows take the float32 logits as a nomination and redo the few candidates in
float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from multistage_diffusion.clustering.running_softmax import BlockSoftmax, CandidateSoftmax, NoisyImages
from multistage_diffusion.devices import full_precision
from multistage_diffusion.errors import ConfigError, DataError

Sigma = float | Float[Tensor, ""] | Float[Tensor, " batch"]
_ROUNDING = 16 * 2.0**-24  # bound on the rounding of a float32 logit, relative to |z|^2/sigma^2
_RERANK = 4e-3  # rounding of a logit, in nats, from which on candidates are redone in float64
_ROWS = 1024  # (image, noise level) pairs that share one pass over the images
_CANDIDATES = 1 << 22  # float64 numbers held at once while candidates are redone


@dataclass(frozen=True)
class Posterior:
    """What the data set says about a noisy image.

    Attributes:
        denoised: Posterior mean of the clean image.
        effective: Effective number of images in the posterior, exp(entropy): 1 when it has collapsed on one.
    """

    denoised: Float[Tensor, "batch channels height width"]
    effective: Float[Tensor, " batch"]


@dataclass(frozen=True)
class PairPosterior:
    """Posteriors of x = x0 + sigma eps for pairs (x0, eps) on several levels.

    Attributes:
        delta: Optimal noise prediction minus the noise: eps* - eps = (x0 - posterior mean) / sigma.
        effective: Effective number of images in each posterior.
    """

    delta: Float[Tensor, "pairs levels channels height width"]
    effective: Float[Tensor, "pairs levels"]


def as_floats(images: Float[Tensor, "*shape"] | UInt8[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Floats as they are, uint8 as grey values of [-1, 1] in float32."""
    return images.float().div_(127.5).sub_(1.0) if images.dtype == torch.uint8 else images


@final
class OptimalDenoiser:
    """The exact denoiser of a finite set of images (of all of them, or of one class), streamed in blocks.

    Args:
        images: Tensor or array (a memory map, too), any float type, or uint8 which is read as grey values of
            [-1, 1].
        labels: Class of each image, for posteriors within a class.
        device: Where to compute; by default where the images are.
        block: Images a matrix product takes at once; memory grows with it, not with the number of images.
        resident: Hold a centred float32 copy, too; by default of tensors only, so that arrays stay on disk.
            Float64 rows need the images as they were given: as uint8 they take a quarter of the copy's memory.

    Raises:
        DataError: No images, not four dimensions, or values that are not finite.
    """

    def __init__(
        self,
        images: Float[Tensor, "count channels height width"]
        | UInt8[Tensor, "count channels height width"]
        | np.ndarray,
        *,
        labels: Int[Tensor, " count"] | None = None,
        device: torch.device | str | None = None,
        block: int = 8192,
        resident: bool | None = None,
    ) -> None:
        if images.ndim != 4 or min(images.shape) < 1:
            raise DataError(
                f"an optimal denoiser needs images (count, channels, height, width), got {tuple(images.shape)}"
            )
        in_memory = isinstance(images, Tensor)
        self.device = torch.device(device or (images.device if in_memory else "cpu"))
        self.shape = tuple(int(size) for size in images.shape[1:])
        resident = in_memory if resident is None else resident
        self._images = images.to(self.device) if in_memory and resident else images
        self._block = block
        self._labels = None if labels is None else labels.to(self.device)
        self._centred: Tensor | None = None
        total = sum(self._raw(slice(start, stop)).sum(0, dtype=torch.float64) for start, stop in self._spans())
        self._mean = (torch.as_tensor(total) / len(images)).float()
        if resident:
            centred = torch.empty(len(images), self._mean.numel(), device=self.device)
            for start, stop in self._spans():
                centred[start:stop] = self._rows(start, stop)
            self._centred = centred
        self._bias = torch.cat([self._rows(*span).square().sum(1).mul_(-0.5) for span in self._spans()])
        self._radius = float((-2 * self._bias.min()).sqrt())
        if not np.isfinite(self._radius):
            raise DataError("the images hold values that are not finite")

    def __len__(self) -> int:
        return len(self._images)

    @property
    def mean(self) -> Float[Tensor, "channels height width"]:
        """Mean of the images."""
        return self._mean.reshape(self.shape)

    def images(self, index: Int[Tensor, " batch"]) -> Float[Tensor, "batch channels height width"]:
        """Some of the images, float32 on the denoiser's device."""
        return self._raw(index).float().unflatten(1, self.shape)

    def class_mean(self, index: Int[Tensor, " batch"]) -> Float[Tensor, "batch channels height width"]:
        """Mean of the images of the class of each of some images."""
        labels = self._require_labels()
        classes, inverse = labels.unique(return_inverse=True)
        total = torch.zeros(len(classes), self._mean.numel(), dtype=torch.float64, device=self.device)
        for start, stop in self._spans():
            total.index_add_(0, inverse[start:stop], self._raw(slice(start, stop)).double())
        mean = (total / inverse.bincount()[:, None]).float()
        return mean[inverse[index.to(self.device)]].unflatten(1, self.shape)

    def __call__(
        self, x: Float[Tensor, "batch channels height width"], sigma: Sigma, labels: Int[Tensor, " batch"] | None = None
    ) -> Float[Tensor, "batch channels height width"]:
        """Posterior mean of the clean image.

        Args:
            x: Noisy images x0 + sigma eps.
            sigma: Noise level, one for all or one a row; positive.
            labels: Class of each row; the posterior is over the images of that class. By default over all.

        Returns:
            Denoised images, of the type and on the device of `x`.

        Raises:
            ConfigError: `sigma` is not positive, or no image has one of the labels.
        """
        return self._direct(x, sigma, labels, False).denoised

    def posterior(
        self, x: Float[Tensor, "batch channels height width"], sigma: Sigma, labels: Int[Tensor, " batch"] | None = None
    ) -> Posterior:
        """Posterior mean and effective number of images; arguments as for a call."""
        return self._direct(x, sigma, labels, True)

    @torch.no_grad()
    def pairs(
        self,
        index: Int[Tensor, " pairs"],
        noise: Float[Tensor, "pairs channels height width"],
        sigma: Float[Tensor, "pairs levels"],
        *,
        within_class: bool = False,
    ) -> PairPosterior:
        """Posteriors of images of the set with noise added, whose distances are taken once for all noise levels.

        Args:
            index: Which image each pair begins with.
            noise: Standard normal noise.
            sigma: Noise levels of each pair, positive.
            within_class: Take the posterior over the images of the same class.

        Returns:
            The posterior of each pair at each of its levels.

        Raises:
            ConfigError: `sigma` is not positive, or the classes are not known.
        """
        index, sigma = index.to(self.device), sigma.to(self.device, torch.float64)
        _check_sigma(sigma)
        labels = self._require_labels()[index] if within_class else None
        sharp = _ROUNDING * self._radius**2 / sigma**2 > _RERANK
        delta = torch.empty(*sigma.shape, self._mean.numel(), device=self.device)
        effective = torch.empty(sigma.shape, device=self.device)
        step = max(1, _ROWS // sigma.shape[1])
        with full_precision(self.device):
            for start in range(0, len(index), step):
                part = slice(start, start + step)
                noisy = NoisyImages(
                    anchor=self._raw(index[part]),
                    noise=noise[part].flatten(1).to(self.device),
                    sigma=sigma[part],
                    index=index[part],
                    labels=None if labels is None else labels[part],
                )
                mask = sharp[part]
                columns = ~mask.all(0)
                candidates, blocks = self._pass(noisy, mask, columns, True)
                # eps* - eps = (anchor - posterior mean) / sigma. Columns are whole; sharp entries are then overwritten.
                anchor = (noisy.anchor - self._mean)[:, None]
                delta[part, columns] = ((anchor - blocks.average()) / blocks.sigma.float()).float()
                effective[part, columns] = blocks.effective()
                delta[part][mask] = (-candidates.shift() / candidates.sigma[:, None]).float()
                effective[part][mask] = candidates.effective()
        return PairPosterior(delta.reshape(*sigma.shape, *self.shape), effective)

    @torch.no_grad()
    def _direct(self, x: Tensor, sigma: Sigma, labels: Tensor | None, entropy: bool) -> Posterior:
        """Posteriors of any x, row by row: sharp rows through float64 candidates, the others through whole blocks."""
        levels = torch.as_tensor(sigma, dtype=torch.float64).to(self.device).expand(len(x))
        _check_sigma(levels)
        if labels is not None:
            labels = labels.to(self.device)
            missing = labels[~torch.isin(labels, self._require_labels())]
            if len(missing):
                raise ConfigError(f"no image of class {int(missing[0])} in the data set")
        flat = x.flatten(1).to(self.device)
        reach = (flat - self._mean).norm(dim=1).clamp(min=self._radius).double()
        sharp = _ROUNDING * self._radius * reach / levels**2 > _RERANK
        denoised, effective = torch.empty_like(flat), torch.ones(len(x), device=self.device)
        with full_precision(self.device):
            for kind in (True, False):
                for rows in (sharp == kind).nonzero()[:, 0].split(_ROWS):
                    noisy = NoisyImages(
                        anchor=flat[rows],
                        noise=None,
                        sigma=levels[rows, None],
                        index=None,
                        labels=None if labels is None else labels[rows],
                    )
                    columns = torch.tensor([not kind], device=self.device)
                    candidates, blocks = self._pass(noisy, sharp[rows, None], columns, entropy)
                    result = flat[rows] + candidates.shift() if kind else self._mean + blocks.average()[:, 0]
                    denoised[rows] = result.to(flat.dtype)
                    effective[rows] = candidates.effective() if kind else blocks.effective()[:, 0]
        return Posterior(denoised.reshape(x.shape).to(x.device), effective.to(x.device))

    def _pass(
        self, noisy: NoisyImages, mask: Tensor, columns: Tensor, entropy: bool
    ) -> tuple[CandidateSoftmax, BlockSoftmax]:
        """One pass over the images for a few noisy ones: levels of `mask` in float64, those of `columns` in float32."""
        centred = noisy.anchor.float() - self._mean
        rounding = _ROUNDING * self._radius * centred.norm(dim=1).clamp(min=self._radius)
        softmax, blocks = CandidateSoftmax(noisy, mask, rounding), BlockSoftmax(noisy, columns, centred, entropy)
        for start, stop in self._spans():
            images = self._rows(start, stop)
            half = torch.addmm(self._bias[start:stop], centred, images.T)  # c . z_i - |z_i|^2/2
            slope = None
            if noisy.noise is not None:
                half -= centred.square().sum(1, keepdim=True) / 2  # now -D_i/2
                slope = torch.addmm(-(noisy.noise * centred).sum(1, keepdim=True), noisy.noise, images.T)  # g_i
            if noisy.index is not None:  # the anchor itself has logit 0 and is counted from the start
                rows = ((noisy.index >= start) & (noisy.index < stop)).nonzero()[:, 0]
                half[rows, noisy.index[rows] - start] = -torch.inf
            if noisy.labels is not None:
                half.masked_fill_(self._require_labels()[start:stop] != noisy.labels[:, None], -torch.inf)
            if len(blocks):
                blocks.add(half, slope, images)
            if len(softmax):
                row, column = softmax.candidates(half, slope)
                size = max(1, _CANDIDATES // images.shape[1])
                for row_part, column_part in zip(row.split(size), column.split(size), strict=True):
                    softmax.add(row_part, self._raw(start + column_part))
        return softmax, blocks

    def _spans(self) -> Iterator[tuple[int, int]]:
        count = len(self._images)
        return ((start, min(start + self._block, count)) for start in range(0, count, self._block))

    def _rows(self, start: int, stop: int) -> Tensor:
        """Images as centred float32 rows."""
        if self._centred is not None:
            return self._centred[start:stop]
        return (self._raw(slice(start, stop)) - self._mean).float()

    def _raw(self, rows: slice | Tensor) -> Tensor:
        """Images as they were given, as float rows on the device."""
        if isinstance(self._images, Tensor):
            values = self._images[rows if isinstance(rows, slice) else rows.to(self._images.device)]
        else:
            values = torch.from_numpy(np.array(self._images[rows if isinstance(rows, slice) else rows.cpu().numpy()]))
        values = as_floats(values.flatten(1).to(self.device))
        return values if values.dtype == torch.float64 else values.float()

    def _require_labels(self) -> Tensor:
        if self._labels is None:
            raise ConfigError("a posterior within a class needs labels, and this data set has none")
        return self._labels


def _check_sigma(sigma: Tensor) -> None:
    if not bool((sigma > 0).all()):
        raise ConfigError("an optimal denoiser needs noise levels sigma > 0")
