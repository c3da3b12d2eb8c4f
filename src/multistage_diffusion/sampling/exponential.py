"""Exponential integrators in lambda = -ln sigma: DPM-Solver (noise prediction) and DPM-Solver++ (data prediction).

In the coordinate x = x0 + sigma eps the scale alpha of the papers is 1, so the log-SNR is 2 lambda for every process,
and a step from sigma to sigma' has h = lambda' - lambda = ln(sigma/sigma'). With the noise estimate e = (x - D)/sigma
the flow dx/dsigma = e has the exact solutions

    x' = x - sigma' int_0^h exp(h - s) e(s) ds                DPM-Solver expands e in s
    x' = sigma'/sigma x + int_0^h exp(s - h) D(s) ds          DPM-Solver++ expands D in s

Arguments and result are those of `SolverFunction`. A solver raises `ConfigError` where the noise levels do not
decrease, or where it needs noise and has none.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING

from multistage_diffusion.noise.schedule import step_orders
from multistage_diffusion.sampling.steps import Callback, SolverStep, levels_on_host, require_noise, scale_noise

if TYPE_CHECKING:
    from torch import Tensor

    from multistage_diffusion.sampling.steps import Denoise, Noise, Schedule


def dpm(
    denoise: Denoise,
    x: Tensor,
    sigmas: Schedule,
    *,
    noise: Noise | None = None,
    callback: Callback | None = None,
    order: int = 3,
    taylor: bool = False,
) -> Tensor:
    """DPM-Solver, singlestep: as many evaluations as the schedule has intervals, spent in steps of up to `order` each.

    A step of order k replaces k intervals and evaluates at its beginning and, evenly in lambda, k - 1 times inside. The
    orders are the paper's for a budget of K evaluations; where the schedule ends in 0, the step to 0 takes one and
    returns the estimate.

    Args:
        denoise: Estimates x0 from (x, sigma).
        x: Images at the first noise level.
        sigmas: Decreasing noise levels.
        noise: Not used.
        callback: Sees every step, at its beginning.
        order: 1, 2 or 3.
        taylor: End a step of order 3 with the full quadratic of the Taylor expansion and not with the last
            difference alone (Alg. 2); the order is the same.

    Source: Lu et al. 2022 (DPM-Solver), Eq. 3.6 and 3.7, Alg. 1 and 2; the orders are those of Sec. 3.4.
    """
    levels = levels_on_host(sigmas)
    start = 0
    for size in step_orders(len(levels) - 1, order, to_zero=levels[-1] == 0):
        sigma, sigma_next = levels[start], levels[start + size]
        denoised = denoise(x, sigma)
        if callback is not None:
            callback(SolverStep(start, sigma, sigma_next, x, denoised))
        if size == 1:
            x = scale_noise(x, denoised, sigma_next / sigma)
        elif size == 2:
            x = _second_order(denoise, x, (x - denoised) / sigma, sigma, sigma_next)
        else:
            x = _third_order(denoise, x, (x - denoised) / sigma, sigma, sigma_next, taylor)
        start += size
    return x


def dpmpp_2s_ancestral(
    denoise: Denoise, x: Tensor, sigmas: Schedule, *, noise: Noise | None = None, callback: Callback | None = None
) -> Tensor:
    """DPM-Solver++ 2S with ancestral noise: second order, singlestep, two evaluations a step but one for that to 0.

    Source: Lu et al. 2023 (DPM-Solver++), Alg. 1 with r = 1/2, to the level below sigma' from which the noise of
    ancestral sampling leads to sigma'; so k-diffusion has it.
    """
    for index, (sigma, sigma_next) in enumerate(pairwise(levels_on_host(sigmas))):
        denoised = denoise(x, sigma)
        if callback is not None:
            callback(SolverStep(index, sigma, sigma_next, x, denoised))
        if sigma_next == 0:
            return denoised
        # Down to sigma'^2/sigma, and sigma' is the middle in lambda. Noise of variance sigma'^2 - (sigma'^2/sigma)^2.
        ratio = sigma_next / sigma
        denoised = denoise(scale_noise(x, denoised, ratio), sigma_next)
        x = scale_noise(x, denoised, ratio**2)
        x = x + sigma_next * math.sqrt(1 - ratio**2) * require_noise(noise, index)
    return x


def sde_dpmpp_2s(
    denoise: Denoise, x: Tensor, sigmas: Schedule, *, noise: Noise | None = None, callback: Callback | None = None
) -> Tensor:
    """SDE-DPM-Solver++ 2S (DPM++ SDE): stochastic, singlestep, two evaluations a step but one for that to 0.

    Source: Lu et al. 2023 (DPM-Solver++), Sec. 5, with a step of the SDE to the middle in lambda, as k-diffusion has
    it; the noise of both is that of one Brownian path.
    """
    levels = levels_on_host(sigmas)
    for index, (sigma, sigma_next) in enumerate(pairwise(levels)):
        denoised = denoise(x, sigma)
        if callback is not None:
            callback(SolverStep(index, sigma, sigma_next, x, denoised))
        if sigma_next == 0:
            return denoised
        # To the middle, where noise of variance sigma_m^2 (1 - ratio) is added. By sigma' it has decayed by ratio, and
        # the second half adds sigma'^2 (1 - ratio): in all sigma'^2 (1 - ratio^2).
        ratio, middle = sigma_next / sigma, math.sqrt(sigma * sigma_next)
        first = middle * math.sqrt(1 - ratio) * require_noise(noise, index)
        second = sigma_next * math.sqrt(1 - ratio) * require_noise(noise, index + len(levels))
        x_middle = scale_noise(x, denoised, ratio) + first
        x = scale_noise(x, denoise(x_middle, middle), ratio**2) + ratio * first + second
    return x


def _second_order(denoise: Denoise, x: Tensor, e: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """DPM-Solver-2 (Alg. 1, r1 = 1/2): the noise estimate of the middle in lambda stands for the whole step."""
    middle = math.sqrt(sigma * sigma_next)
    x_middle = x + (middle - sigma) * e
    return x + (sigma_next - sigma) / middle * (x_middle - denoise(x_middle, middle))


def _third_order(denoise: Denoise, x: Tensor, e: Tensor, sigma: float, sigma_next: float, taylor: bool) -> Tensor:
    """DPM-Solver-3 (Alg. 2, r1 = 1/3, r2 = 2/3): changes of the noise estimate e from the beginning of the step."""
    h = math.log(sigma / sigma_next)
    sigma_1, sigma_2 = sigma * math.exp(-h / 3), sigma * math.exp(-2 * h / 3)
    u = x + (sigma_1 - sigma) * e
    change_1 = (u - denoise(u, sigma_1)) / sigma_1 - e
    # To 2/3 with e linear through the values at 0 and 1/3, which by 2/3 has changed by twice change_1.
    u = x + (sigma_2 - sigma) * e - 2 * _linear_weight(sigma, sigma_2) * change_1
    change_2 = (u - denoise(u, sigma_2)) / sigma_2 - e
    x = x + (sigma_next - sigma) * e
    if not taylor:
        return x - 1.5 * _linear_weight(sigma, sigma_next) * change_2
    # e(s) = e + e1 s/h + e2 (s/h)^2/2 through the values at 0, 1/3 and 2/3. The integral weighs (s/h)^2/2 with
    # sigma' int_0^h exp(h - s) (s/h)^2/2 ds = sigma' (exp(h) - 1 - h - h^2/2)/h^2.
    e1, e2 = 6 * change_1 - 1.5 * change_2, 9 * change_2 - 18 * change_1
    quadratic_weight = ((sigma - sigma_next) / h - sigma_next) / h - sigma_next / 2
    return x - _linear_weight(sigma, sigma_next) * e1 - quadratic_weight * e2


def _linear_weight(sigma: float, sigma_next: float) -> float:
    """sigma' int_0^h exp(h - s) s/h ds = sigma' (exp(h) - 1 - h)/h, where e grows linearly in lambda by 1."""
    return (sigma - sigma_next) / math.log(sigma / sigma_next) - sigma_next
