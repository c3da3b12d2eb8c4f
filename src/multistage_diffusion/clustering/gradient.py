"""Gradient affinity: how far the training gradients of two noise levels point the same way."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from multistage_diffusion import rng
from multistage_diffusion.devices import evaluating
from multistage_diffusion.errors import ConfigError, NumericsError
from multistage_diffusion.noise import Process

_SKETCH = 1 << 20  # numbers kept of a gradient; a cosine of sketches is off by about 1/sqrt of it
_BATCH = 64  # images a backward pass


def gradient_affinity(
    denoiser: nn.Module,
    images: Float[Tensor, "count channels height width"],
    sigmas: Float[Tensor, " levels"],
    process: Process,
    *,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Float[Tensor, "levels levels"]:
    """Cosine of the gradients of the training loss at every two noise levels.

    The same images and the same noise serve every level, as functional similarity compares them.

    Args:
        denoiser: Trained module, called as `denoiser(x, sigma)` with one sigma a row; its weights do not change.
        images: Clean images.
        sigmas: Noise levels.
        process: Gives the weight of the loss.
        seed: Seed of the noise.
        progress: Called with the levels done and their number.

    Returns:
        Cosines, float64, symmetric, 1 on the diagonal. Gradients of more than 2^20 numbers are compared by a random
        sketch (signed sums in 2^20 bins), which keeps cosines to 0.001.

    Raises:
        ConfigError: The denoiser has no parameter to train.
        NumericsError: A gradient is zero or not finite.

    Source: Go et al. 2023, "Addressing Negative Transfer in Diffusion Models", section 4.
    """
    weights = [weight for weight in denoiser.parameters() if weight.requires_grad]
    if not weights:
        raise ConfigError("gradient clustering needs a denoiser with parameters to train, got one without")
    images = images.to(weights[0].device)
    noise = rng.normal(seed, "cluster/noise", torch.arange(len(images), device=images.device), images.shape[1:])
    sketches = []
    with evaluating(denoiser):
        for done, sigma in enumerate(sigmas.double().tolist()):
            sketch = _sketch(_gradient(denoiser, weights, images, noise, sigma, process), seed)
            norm = float(sketch.norm())
            if not 0 < norm < float("inf"):
                raise NumericsError(f"the gradient at sigma {sigma:.4g} has norm {norm:g}; its direction says nothing")
            sketches.append(sketch / norm)
            if progress is not None:
                progress(done + 1, len(sigmas))
    rows = torch.stack(sketches)
    return (rows @ rows.T).double().cpu()


def _gradient(
    denoiser: nn.Module, weights: list[nn.Parameter], images: Tensor, noise: Tensor, sigma: float, process: Process
) -> list[Tensor]:
    """Gradient of the loss at one level, over all images."""
    total = [torch.zeros_like(weight) for weight in weights]
    scale = float(process.loss_weight(torch.tensor(sigma, dtype=torch.float64))) / images.numel()
    for x0, eps in zip(images.split(_BATCH), noise.split(_BATCH), strict=True):
        levels = torch.full((len(x0),), sigma, device=x0.device)
        with torch.enable_grad():
            loss = scale * (denoiser(x0 + sigma * eps, levels) - x0).square().sum()
            parts = torch.autograd.grad(loss, weights, allow_unused=True)
        for so_far, part in zip(total, parts, strict=True):
            if part is not None:
                so_far += part
    return total


def _sketch(gradient: list[Tensor], seed: int) -> Tensor:
    """The gradient as one float32 vector, or its signed sums in random bins where it is long (a count sketch).

    With random signs s and bins h, sum_b (sum_{h(i)=b} s_i x_i) (sum_{h(j)=b} s_j y_j) has the mean <x, y>, since the
    signs of different entries cancel, and a standard deviation of about |x| |y| / sqrt(bins).
    """
    flat = torch.cat([part.flatten().float() for part in gradient])
    if len(flat) <= _SKETCH:
        return flat
    bins = flat.new_zeros(_SKETCH)
    for start in range(0, len(flat), _SKETCH):
        part = flat[start : start + _SKETCH]
        index = torch.arange(start, start + len(part), device=flat.device)
        word = rng.bits(seed, "cluster/sketch", index, 1)[:, 0]
        sign = ((word & 1) * 2 - 1).to(flat.dtype)
        bins.index_add_(0, (word >> 1) & (_SKETCH - 1), sign * part)
    return bins
