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

from multistage_diffusion.sampling.steps import Callback, SolverStep, levels_on_host, require_noise, scale_noise

if TYPE_CHECKING:
    from torch import Tensor

    from multistage_diffusion.sampling.steps import Denoise, Noise, Schedule

FEW_STEPS = 15  # with fewer, the last steps are of lower order, for stability: the number that diffusers uses


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


def dpmpp_2m(
    denoise: Denoise, x: Tensor, sigmas: Schedule, *, noise: Noise | None = None, callback: Callback | None = None
) -> Tensor:
    """DPM-Solver++ 2M: second order, multistep, one evaluation a step.

    Source: Lu et al. 2023 (DPM-Solver++), Alg. 2.
    """
    return _multistep(denoise, x, levels_on_host(sigmas), callback, order=2)


def dpmpp_3m(
    denoise: Denoise,
    x: Tensor,
    sigmas: Schedule,
    *,
    noise: Noise | None = None,
    callback: Callback | None = None,
    released: bool = False,
) -> Tensor:
    """DPM-Solver++ 3M: third order, multistep, one evaluation a step; it begins with a step each of orders 1 and 2.

    Source: Lu et al. 2023 (DPM-Solver++), Sec. 4: the Taylor expansion to order 3 with differences of earlier steps.
    Deviation: the released solver gives the quadratic term half its weight (it takes the divided difference, which is
    half the second derivative, for the derivative itself), and so converges with order 2. Here the weight is whole;
    `released=True` halves it, as the authors' release and diffusers do.
    """
    return _multistep(denoise, x, levels_on_host(sigmas), callback, order=3, quadratic=1.0 if released else 2.0)


def sde_dpmpp_2m(
    denoise: Denoise, x: Tensor, sigmas: Schedule, *, noise: Noise | None = None, callback: Callback | None = None
) -> Tensor:
    """SDE-DPM-Solver++ 2M: the stochastic form, with noise added in every step, one evaluation a step.

    Source: Lu et al. 2023 (DPM-Solver++), Sec. 5: SDE-DPM-Solver++(2M).
    """
    levels = levels_on_host(sigmas)
    previous, h_previous = None, 0.0
    for index, (sigma, sigma_next) in enumerate(pairwise(levels)):
        denoised = denoise(x, sigma)
        if callback is not None:
            callback(SolverStep(index, sigma, sigma_next, x, denoised))
        estimate, ratio = denoised, sigma_next / sigma
        if previous is not None and _order(index, levels, 2) == 2:
            # D in the middle of the step, extrapolated from this estimate and the one before.
            estimate = denoised + (denoised - previous) * (-math.log(ratio) / h_previous / 2)
        # The noise in x decays by exp(-2h), and new noise brings its standard deviation to sigma' again.
        x = scale_noise(x, estimate, ratio**2)
        if sigma_next > 0:
            x = x + sigma_next * math.sqrt(1 - ratio**2) * require_noise(noise, index)
            previous, h_previous = denoised, -math.log(ratio)
    return x


def step_orders(evaluations: int, order: int, *, to_zero: bool) -> list[int]:
    """Orders of the singlestep solver's steps; they add up to the evaluations.

    Args:
        evaluations: The budget, at least 1.
        order: The order of most steps: 1, 2 or 3.
        to_zero: Whether the last step goes to sigma = 0, where only order 1 exists.

    Returns:
        The paper's orders (3, ..., 3, then 2 and 1, or 1, or 2); a last 2 that would go to 0 is split in 1 and 1.
    """
    assert order in (1, 2, 3) and evaluations >= 1, "orders 1 to 3 exist"
    full, rest = divmod(evaluations, order)
    if order == 3 and rest == 0:
        orders = [3] * (full - 1) + [2, 1]
    else:
        orders = [order] * full + [rest] * (rest > 0)
    if to_zero and orders[-1] > 1:
        orders[-1:] = [1] * orders[-1]
    return orders


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


def _order(index: int, levels: list[float], order: int) -> int:
    """Order of a multistep solver's step, as far as the end of the schedule limits it."""
    steps_left = len(levels) - 1 - index
    if levels[index + 1] == 0:
        return 1
    return min(order, steps_left) if len(levels) - 1 < FEW_STEPS else order


def _multistep(
    denoise: Denoise, x: Tensor, levels: list[float], callback: Callback | None, *, order: int, quadratic: float = 2.0
) -> Tensor:
    """DPM-Solver++ of order 2 or 3: derivatives of D in lambda from the estimates of earlier steps."""
    history: list[tuple[float, Tensor]] = []  # (lambda, estimate), the newest last
    for index, (sigma, sigma_next) in enumerate(pairwise(levels)):
        denoised = denoise(x, sigma)
        if callback is not None:
            callback(SolverStep(index, sigma, sigma_next, x, denoised))
        history = [*history[1 - order :], (-math.log(sigma), denoised)]
        step_order = min(_order(index, levels, order), len(history))
        ratio = sigma_next / sigma
        if step_order == 1:
            x = scale_noise(x, denoised, ratio)
            continue
        # With u = s/h from 0 to 1 in the step, earlier estimates lie at u = -r0 and u = -(r0 + r1).
        h = -math.log(ratio)
        (lambda_0, d0), (lambda_1, d1) = history[-1], history[-2]
        r0 = (lambda_0 - lambda_1) / h
        slope = (d0 - d1) / r0
        if step_order == 2:
            x = scale_noise(x, denoised + slope / 2, ratio)
            continue
        lambda_2, d2 = history[-3]
        r1 = (lambda_1 - lambda_2) / h
        # D(u) = d0 + slope u + curvature u^2 through the three estimates, by divided differences. The integral weighs
        # u with int_0^h exp(s - h) u ds = 1 - (1 - exp(-h))/h = weight, and u^2 with 1 - 2 weight/h.
        curvature = (slope - (d1 - d2) / r1) / (r0 + r1)
        slope = slope + r0 * curvature
        weight = 1 - (1 - ratio) / h
        x = scale_noise(x, denoised, ratio) + weight * slope - quadratic * (weight / h - 0.5) * curvature
    return x
