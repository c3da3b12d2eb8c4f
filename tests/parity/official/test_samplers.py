"""Solvers against the formulas of k-diffusion and of DPM-Solver's release, written here in their own coordinates.

With the formulas below, k-diffusion 0.1.1 itself agreed to 1e-13 on this mixture, 20 steps, float64.
"""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad

from multistage_diffusion.noise import EDM, VP, sigma_schedule
from multistage_diffusion.sampling import Sampler, dpm, dpmpp_2s_ancestral, lms, sde_dpmpp_2s, sde_dpmpp_3m

STEPS, COUNT = 20, 16
MEANS, WIDTH = torch.tensor([-0.9, -0.2, 0.5, 0.8], dtype=torch.float64), 0.05


def denoise(x, sigma):
    """The exact denoiser of an even mixture of narrow Gaussians."""
    total = WIDTH**2 + sigma**2
    share = (-((x[:, None] - MEANS) ** 2) / (2 * total)).softmax(dim=1)
    return (share * (WIDTH**2 * x[:, None] + sigma**2 * MEANS) / total).sum(dim=1)


def numbers(count, seed):
    return torch.randn(count, COUNT, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9)


@pytest.fixture(scope="module")
def setting():
    sigmas = sigma_schedule(EDM(), "karras", STEPS).tolist()
    return sigmas, numbers(1, 0)[0] * sigmas[0], numbers(2 * STEPS + 1, 1)


def toward(x, estimate, h):
    """From lambda to lambda + h with a constant estimate."""
    return math.exp(-h) * x - math.expm1(-h) * estimate


def split(sigma, sigma_next):
    """The level below and the noise added above it of an ancestral step."""
    up = sigma_next * math.sqrt(1 - (sigma_next / sigma) ** 2)
    return math.sqrt(sigma_next**2 - up**2), up


def test_dpmpp_2s_ancestral(setting):
    sigmas, start, noise = setting
    x = start
    for i in range(STEPS - 1):
        down, up = split(sigmas[i], sigmas[i + 1])
        h = math.log(sigmas[i] / down)
        middle = toward(x, denoise(x, sigmas[i]), h / 2)
        x = toward(x, denoise(middle, sigmas[i] * math.exp(-h / 2)), h) + up * noise[i]
    expected = denoise(x, sigmas[-2])
    close(dpmpp_2s_ancestral(denoise, start, sigmas, noise=lambda step: noise[step]), expected)


def test_sde_dpmpp_2s(setting):
    sigmas, start, noise = setting
    x = start
    for i in range(STEPS - 1):
        middle = math.sqrt(sigmas[i] * sigmas[i + 1])
        down_1, up_1 = split(sigmas[i], middle)
        x_middle = toward(x, denoise(x, sigmas[i]), math.log(sigmas[i] / down_1)) + up_1 * noise[i]
        # Noise of the whole step, of unit variance, that belongs to the same path as that of its first half.
        down, up = split(sigmas[i], sigmas[i + 1])
        _, up_2 = split(middle, sigmas[i + 1])
        whole = (sigmas[i + 1] / sigmas[i] * up_1 * noise[i] + up_2 * noise[i + STEPS + 1]) / up
        x = toward(x, denoise(x_middle, middle), math.log(sigmas[i] / down)) + up * whole
    expected = denoise(x, sigmas[-2])
    close(sde_dpmpp_2s(denoise, start, sigmas, noise=lambda step: noise[step]), expected)


def test_sde_dpmpp_3m(setting):
    sigmas, start, noise = setting
    lambdas = [-math.log(sigma) for sigma in sigmas[:-1]]
    x, estimates = start, []
    for i in range(STEPS - 1):
        estimates.append(denoise(x, sigmas[i]))
        h = lambdas[i + 1] - lambdas[i]
        phi_2 = math.expm1(-2 * h) / (2 * h) + 1
        phi_3 = phi_2 / (2 * h) - 0.5
        x = toward(x, estimates[i], 2 * h)
        if i > 0:
            r0 = (lambdas[i] - lambdas[i - 1]) / h
            slope, bend = (estimates[i] - estimates[i - 1]) / r0, torch.zeros(())
            if i > 1:
                r1 = (lambdas[i - 1] - lambdas[i - 2]) / h
                bend = (slope - (estimates[i - 1] - estimates[i - 2]) / r1) / (r0 + r1)
                slope = slope + bend * r0
            x = x + phi_2 * slope - phi_3 * bend
        x = x + sigmas[i + 1] * math.sqrt(-math.expm1(-2 * h)) * noise[i]
    expected = denoise(x, sigmas[-2])
    close(sde_dpmpp_3m(denoise, start, sigmas, noise=lambda step: noise[step], released=True), expected)


def test_lms(setting):
    sigmas, start, _ = setting
    sigmas = sigmas[:-1]
    x, slopes = start, []
    for i in range(STEPS - 1):
        slopes.append((x - denoise(x, sigmas[i])) / sigmas[i])
        nodes = range(max(0, i - 3), i + 1)
        for j in nodes:
            zeros = [sigmas[k] for k in nodes if k != j]
            scale = math.prod(sigmas[j] - zero for zero in zeros)
            area, _ = quad(lambda tau, z=zeros, s=scale: np.prod([tau - zero for zero in z]) / s, *sigmas[i : i + 2])
            x = x + area * slopes[j]
    close(lms(denoise, start, sigmas), x)


@pytest.mark.parametrize(("nfe", "orders"), [(20, [3] * 6 + [2]), (18, [3] * 5 + [2, 1]), (10, [3, 3, 3, 1])])
def test_the_paper_s_sampler_in_its_own_coordinates(nfe, orders):
    """DPM-Solver singlestep on the VP process: K steps of equal length in log-SNR, noise prediction, to t_min."""
    process, sampler = VP(), Sampler(solver="dpm-3", steps=nfe, spacing="singlestep")

    def at(half_log_snr):
        sigma = math.exp(-half_log_snr)
        alpha = 1 / math.hypot(1, sigma)
        return alpha, alpha * sigma, sigma

    def eps(x, half_log_snr):
        alpha, _, sigma = at(half_log_snr)
        return (x / alpha - denoise(x / alpha, sigma)) / sigma

    first, last = -math.log(process.sigma_max), -math.log(process.sigma_min)
    h = (last - first) / len(orders)
    x = start = numbers(1, 0)[0]
    visited = []
    for k, order in enumerate(orders):
        s = first + k * h
        alpha, _, _ = at(s)
        e = eps(x, s)
        visited += [s + h * part / order for part in range(order)]

        def step(x, length, e, s=s, alpha=alpha):  # of order 1
            alpha_t, std_t, _ = at(s + length)
            return alpha_t / alpha * x - std_t * math.expm1(length) * e

        if order == 1:
            x = step(x, h, e)
        elif order == 2:
            x = step(x, h, eps(step(x, h / 2, e), s + h / 2))
        else:
            change = eps(step(x, h / 3, e), s + h / 3) - e
            r2 = 2 * h / 3
            u = step(x, r2, e) - at(s + r2)[1] * 2 * (math.expm1(r2) / r2 - 1) * change
            change = eps(u, s + r2) - e
            x = step(x, h, e) - at(s + h)[1] * 1.5 * (math.expm1(h) / h - 1) * change
    levels = sampler.levels(process)
    close(levels[:-1].log(), -torch.tensor(visited, dtype=torch.float64))
    assert len(visited) == nfe == sampler.nfe and levels[-1].item() == pytest.approx(process.sigma_min)
    start = start * at(first)[0] ** -1
    close(dpm(denoise, start, levels), x / at(last)[0])
