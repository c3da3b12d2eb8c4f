"""Multistep solvers: one evaluation a step, with those of earlier steps used again.

In lambda = -ln sigma, as in `exponential`, a step of length h with u = s/h in [0, 1] has the exact solution

    x' = exp(-H) x + int_0^1 H exp(H (u - 1)) D(u) du         H = h for the flow, 2h for the SDE, which adds noise

and a solver takes for D the polynomial through the estimates that it has. Arguments and result are those of
`SolverFunction`. A solver raises `ConfigError` where the noise levels do not decrease, or where it needs noise and has
none.
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


def dpmpp_2m(
    denoise: Denoise,
    x: Tensor,
    sigmas: Schedule,
    *,
    noise: Noise | None = None,
    callback: Callback | None = None,
    lower_order_below: int = FEW_STEPS,
) -> Tensor:
    """DPM-Solver++ 2M: second order.

    With fewer than `lower_order_below` steps the last one is of order 1 (15: diffusers; 10: the authors' release).

    Source: Lu et al. 2023 (DPM-Solver++), Alg. 2.
    """
    return _multistep(denoise, x, levels_on_host(sigmas), callback, order=2, few=lower_order_below)


def dpmpp_3m(
    denoise: Denoise,
    x: Tensor,
    sigmas: Schedule,
    *,
    noise: Noise | None = None,
    callback: Callback | None = None,
    lower_order_below: int = FEW_STEPS,
    released: bool = False,
) -> Tensor:
    """DPM-Solver++ 3M: third order; it begins with a step each of orders 1 and 2.

    Source: Lu et al. 2023 (DPM-Solver++), Sec. 4: the Taylor expansion to order 3 with differences of earlier steps.
    Deviation: the released solver gives the quadratic term half its weight (it takes the divided difference, which is
    half the second derivative, for the derivative itself), and so converges with order 2. Here the weight is whole;
    `released=True` halves it, as the authors' release and diffusers do.
    """
    levels = levels_on_host(sigmas)
    return _multistep(denoise, x, levels, callback, order=3, few=lower_order_below, released=released)


def sde_dpmpp_2m(
    denoise: Denoise,
    x: Tensor,
    sigmas: Schedule,
    *,
    noise: Noise | None = None,
    callback: Callback | None = None,
    lower_order_below: int = FEW_STEPS,
) -> Tensor:
    """SDE-DPM-Solver++ 2M: the stochastic form, with noise added in every step.

    Source: Lu et al. 2023 (DPM-Solver++), Sec. 5: SDE-DPM-Solver++(2M).
    """
    levels = levels_on_host(sigmas)
    return _multistep(denoise, x, levels, callback, noise, order=2, few=lower_order_below, stochastic=True)


def sde_dpmpp_3m(
    denoise: Denoise,
    x: Tensor,
    sigmas: Schedule,
    *,
    noise: Noise | None = None,
    callback: Callback | None = None,
    lower_order_below: int = FEW_STEPS,
    released: bool = False,
) -> Tensor:
    """SDE-DPM-Solver++ 3M (DPM++ 3M SDE): of the quadratic term as `dpmpp_3m`; k-diffusion halves it (`released`)."""
    levels = levels_on_host(sigmas)
    return _multistep(
        denoise, x, levels, callback, noise, order=3, few=lower_order_below, released=released, stochastic=True
    )


def unipc(
    denoise: Denoise,
    x: Tensor,
    sigmas: Schedule,
    *,
    noise: Noise | None = None,
    callback: Callback | None = None,
    order: int = 3,
    lower_order_below: int = FEW_STEPS,
) -> Tensor:
    """UniPC: a step of DPM-Solver++ of up to `order` predicts x, and the estimate there corrects it by one order more.

    Source: Zhao et al. 2023 (UniPC), Alg. 1 and 2 with B(h) = exp(h) - 1 and prediction of the data.
    """
    levels = levels_on_host(sigmas)
    history: list[tuple[float, Tensor]] = []  # (lambda, estimate), the newest first
    nodes: list[tuple[float, Tensor]] = []
    x_before = x
    for index, (sigma, sigma_next) in enumerate(pairwise(levels)):
        denoised = denoise(x, sigma)
        if index > 0:
            x = _advance(x_before, sigma / levels[index - 1], [*nodes, (1.0, denoised)])
        if callback is not None:
            callback(SolverStep(index, sigma, sigma_next, x, denoised))
        history = [(-math.log(sigma), denoised), *history[: order - 1]]
        nodes = _nodes(history[: _order(index, levels, order, lower_order_below)], sigma_next)
        x_before, x = x, _advance(x, sigma_next / sigma, nodes)
    return x


def lms(
    denoise: Denoise,
    x: Tensor,
    sigmas: Schedule,
    *,
    noise: Noise | None = None,
    callback: Callback | None = None,
    order: int = 4,
) -> Tensor:
    """Linear multistep (Adams-Bashforth) in sigma, of up to `order`: the slope is the polynomial through the last ones.

    Source: Hairer, Norsett and Wanner 1993, Sec. III.1 for unequal steps; so k-diffusion has it.
    """
    history: list[tuple[float, Tensor]] = []  # (sigma, slope), the newest first
    for index, (sigma, sigma_next) in enumerate(pairwise(levels_on_host(sigmas))):
        denoised = denoise(x, sigma)
        if callback is not None:
            callback(SolverStep(index, sigma, sigma_next, x, denoised))
        if sigma_next == 0:
            return denoised
        history = [(sigma, (x - denoised) / sigma), *history[: order - 1]]
        # Gauss's rule of two nodes is exact for the cubics of order 4.
        middle, half = (sigma + sigma_next) / 2, (sigma_next - sigma) / 2
        for node, slope in history:
            others = [other for other, _ in history if other != node]
            weight = sum(
                math.prod((place - other) / (node - other) for other in others)
                for place in (middle - half / math.sqrt(3), middle + half / math.sqrt(3))
            )
            x = x + half * weight * slope
    return x


def _multistep(
    denoise: Denoise,
    x: Tensor,
    levels: list[float],
    callback: Callback | None,
    noise: Noise | None = None,
    *,
    order: int,
    few: int,
    released: bool = False,
    stochastic: bool = False,
) -> Tensor:
    """DPM-Solver++ of order 2 or 3, of the flow or of the SDE."""
    history: list[tuple[float, Tensor]] = []  # (lambda, estimate), the newest first
    for index, (sigma, sigma_next) in enumerate(pairwise(levels)):
        denoised = denoise(x, sigma)
        if callback is not None:
            callback(SolverStep(index, sigma, sigma_next, x, denoised))
        history = [(-math.log(sigma), denoised), *history[: order - 1]]
        nodes = _nodes(history[: _order(index, levels, order, few)], sigma_next)
        ratio = sigma_next / sigma
        if not stochastic:
            x = _advance(x, ratio, nodes, halve=released)
            continue
        # The noise in x decays by exp(-2h), and new noise brings its standard deviation to sigma' again.
        x = _advance(x, ratio**2, nodes, halve=released, exact=order == 3)
        if sigma_next > 0:
            x = x + sigma_next * math.sqrt(1 - ratio**2) * require_noise(noise, index)
    return x


def _order(index: int, levels: list[float], order: int, few: int) -> int:
    """Order of a multistep solver's step, as far as the end of the schedule limits it."""
    steps_left = len(levels) - 1 - index
    if levels[index + 1] == 0:
        return 1
    return min(order, steps_left) if len(levels) - 1 < few else order


def _nodes(history: list[tuple[float, Tensor]], sigma_next: float) -> list[tuple[float, Tensor]]:
    """Estimates with their places u = s/h in the step to sigma_next, in which the newest lies at 0."""
    start = history[0][0]
    if len(history) == 1:
        return [(0.0, history[0][1])]
    h = -math.log(sigma_next) - start
    return [((place - start) / h, estimate) for place, estimate in history]


def _advance(
    x: Tensor, decay: float, nodes: list[tuple[float, Tensor]], *, halve: bool = False, exact: bool = False
) -> Tensor:
    """The end of a step: decay x + int_0^1 H exp(H (u - 1)) D(u) du with H = -ln decay.

    Args:
        x: Images at its beginning.
        decay: exp(-H).
        nodes: (u, D(u)) for up to four u, the first one 0; D is the polynomial through them.
        halve: Give the quadratic term half its weight.
        exact: Give the linear term of a polynomial of degree 1 its own weight, and not that of the middle (u = 1/2).
    """
    first = nodes[0][1]
    if len(nodes) == 1:
        return scale_noise(x, first, decay)
    # Newton's form: D(u) = D(0) + c_1 u + c_2 u (u - u_1) + c_3 u (u - u_1) (u - u_2), by divided differences.
    places, differences = [place for place, _ in nodes], [estimate for _, estimate in nodes]
    for degree in range(1, len(nodes)):
        for k in range(len(nodes) - 1, degree - 1, -1):
            differences[k] = (differences[k] - differences[k - 1]) / (places[k] - places[k - degree])
    if len(nodes) == 2 and not exact:
        return scale_noise(x, first + differences[1] / 2, decay)
    # The integral weighs u^k with m_k = 1 - k m_{k-1}/H, m_0 = 1 - exp(-H).
    moments, length = [1 - decay], -math.log(decay)
    for k in range(1, len(nodes)):
        moments.append(1 - k * moments[-1] / length)
    if halve and len(nodes) > 2:
        moments[2] /= 2
    x = scale_noise(x, first, decay)
    coefficients = [1.0]  # of prod_j (u - u_j), lowest power first
    for k in range(1, len(nodes)):
        shifted = [0.0, *coefficients]
        coefficients = [a - places[k - 1] * b for a, b in zip(shifted, [*coefficients, 0.0], strict=True)]
        weight = sum(a * m for a, m in zip(coefficients, moments, strict=False))
        x = x + weight * differences[k]
    return x
