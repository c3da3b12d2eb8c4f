"""Solvers that look at one step at a time: Euler and Heun (EDM), DDIM, ancestral sampling.

All in the coordinate x = x0 + sigma eps, where the probability flow is dx/dsigma = (x - D(x, sigma))/sigma for every
process (Karras et al. 2022, Eq. 3 with s = 1). Arguments and result are those of `SolverFunction`. A solver raises
`ConfigError` where the noise levels do not decrease, or where it needs noise and has none.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING

from multistage_diffusion.records import check
from multistage_diffusion.sampling.steps import Callback, SolverStep, levels_on_host, require_noise, scale_noise

if TYPE_CHECKING:
    from torch import Tensor

    from multistage_diffusion.sampling.steps import Denoise, Noise, Schedule

MAX_CHURN = math.sqrt(2) - 1  # at most doubles the variance of the noise (Karras et al. 2022, Alg. 2)


def euler(
    denoise: Denoise,
    x: Tensor,
    sigmas: Schedule,
    *,
    noise: Noise | None = None,
    callback: Callback | None = None,
    s_churn: float = 0.0,
    s_min: float = 0.0,
    s_max: float = math.inf,
    s_noise: float = 1.0,
) -> Tensor:
    """Euler's method, first order, one evaluation a step; with churn the stochastic sampler of EDM without correction.

    Args:
        denoise: Estimates x0 from (x, sigma).
        x: Images at the first noise level.
        sigmas: Decreasing noise levels.
        noise: Noise of each step; needed with churn only.
        callback: Sees every step.
        s_churn: Noise added before the steps, in all; 0 is deterministic.
        s_min: Lowest noise level at which noise is added.
        s_max: Highest noise level at which noise is added.
        s_noise: Standard deviation of the added noise.

    Source: Karras et al. 2022, Alg. 2, lines 1-7.
    """
    return _edm(denoise, x, levels_on_host(sigmas), noise, callback, (s_churn, s_min, s_max, s_noise), corrected=False)


def heun(
    denoise: Denoise,
    x: Tensor,
    sigmas: Schedule,
    *,
    noise: Noise | None = None,
    callback: Callback | None = None,
    s_churn: float = 0.0,
    s_min: float = 0.0,
    s_max: float = math.inf,
    s_noise: float = 1.0,
) -> Tensor:
    """Heun's method, second order, two evaluations a step but one for the step to 0: the sampler of EDM.

    The arguments are those of `euler`.

    Source: Karras et al. 2022, Alg. 1 and (with churn) Alg. 2.
    """
    return _edm(denoise, x, levels_on_host(sigmas), noise, callback, (s_churn, s_min, s_max, s_noise), corrected=True)


def ddim(
    denoise: Denoise,
    x: Tensor,
    sigmas: Schedule,
    *,
    noise: Noise | None = None,
    callback: Callback | None = None,
    eta: float = 0.0,
) -> Tensor:
    """DDIM, first order, one evaluation a step: from Euler's method (eta = 0) to ancestral sampling (eta = 1).

    `eta`, in [0, 1], is the share of the ancestral noise: a step keeps part of the noise in x and replaces the rest.

    Source: Song et al. 2021 (DDIM), Eq. 12 and 16, with sigma^2 = (1 - alpha)/alpha and x divided by sqrt(alpha).
    """
    check(0 <= eta <= 1, "eta", "between 0 and 1", eta)
    for index, (sigma, sigma_next) in enumerate(pairwise(levels_on_host(sigmas))):
        denoised = denoise(x, sigma)
        if callback is not None:
            callback(SolverStep(index, sigma, sigma_next, x, denoised))
        # x' = D + sqrt(sigma'^2 - a^2) (x - D)/sigma + a z, with a = eta sigma' sqrt(1 - sigma'^2/sigma^2): old and new
        # noise together have the standard deviation sigma'.
        added = eta * sigma_next * math.sqrt(1 - (sigma_next / sigma) ** 2)
        x = scale_noise(x, denoised, math.sqrt(sigma_next**2 - added**2) / sigma)
        if added > 0:
            x = x + added * require_noise(noise, index)
    return x


def ancestral(
    denoise: Denoise, x: Tensor, sigmas: Schedule, *, noise: Noise | None = None, callback: Callback | None = None
) -> Tensor:
    """Ancestral sampling, the stochastic sampler of DDPM: DDIM with eta = 1, one evaluation a step.

    Source: Ho et al. 2020, Alg. 2 with the posterior's variance (Eq. 7).
    """
    return ddim(denoise, x, sigmas, noise=noise, callback=callback, eta=1.0)


def _edm(
    denoise: Denoise,
    x: Tensor,
    levels: list[float],
    noise: Noise | None,
    callback: Callback | None,
    churn: tuple[float, float, float, float],
    *,
    corrected: bool,
) -> Tensor:
    """Algorithm 2 of Karras et al. 2022, with or without the second-order correction (lines 9-11)."""
    s_churn, s_min, s_max, s_noise = churn
    gamma = min(s_churn / (len(levels) - 1), MAX_CHURN)
    for index, (sigma, sigma_next) in enumerate(pairwise(levels)):
        if gamma > 0 and s_min <= sigma <= s_max:
            # Churn: noise of variance sigma_hat^2 - sigma^2 lifts x to the higher level sigma_hat (lines 5-6).
            sigma_hat = sigma * (1 + gamma)
            x = x + s_noise * math.sqrt(sigma_hat**2 - sigma**2) * require_noise(noise, index)
            sigma = sigma_hat
        denoised = denoise(x, sigma)
        if callback is not None:
            callback(SolverStep(index, sigma, sigma_next, x, denoised))
        x_next = scale_noise(x, denoised, sigma_next / sigma)
        if corrected and sigma_next > 0:
            # The trapezoidal rule: the mean of the slopes at both ends stands for the whole step.
            slopes = (x - denoised) / sigma + (x_next - denoise(x_next, sigma_next)) / sigma_next
            x_next = x + (sigma_next - sigma) / 2 * slopes
        x = x_next
    return x
