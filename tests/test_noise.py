"""Processes in sigma: their own time and back, the numbers of the paper, and what the network is asked for."""

import math
from dataclasses import asdict, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from multistage_diffusion.clustering.levels import with_time
from multistage_diffusion.errors import ConfigError
from multistage_diffusion.noise import EDM, LDM, SPACINGS, VE, VP, Cosine, Flow, Process, sigma_schedule

PROCESSES = [
    *(kind() for kind in Process.kinds().values()), VP(prediction="v"), Cosine(prediction="v"),
    VP(beta_min=0.5, beta_max=12.0, t_min=1e-3), VE(sigma_min=0.02, sigma_max=1000.0),
    EDM(p_mean=0.4, p_std=2.0, sigma_data=1.3), LDM(num_steps=50), Flow(logit_mean=1.0),
    Flow(shift=3.0), Flow(times="uniform", time_scale=1.0),
]  # fmt: skip
CONTINUOUS = [process for process in PROCESSES if process.kind != "ldm"]


def name(process):
    return process.kind + "".join(
        f"-{value}" for value in asdict(process).values() if value in ("v", 50, 12.0, 1.3, 1000.0)
    )


every = pytest.mark.parametrize("process", PROCESSES, ids=name)
continuous = pytest.mark.parametrize("process", CONTINUOUS, ids=name)
inside = st.floats(1e-6, 1 - 1e-6)


def float64(*values):
    return torch.tensor(values, dtype=torch.float64)


def close(first, second, tolerance=1e-9):
    torch.testing.assert_close(first, second, rtol=tolerance, atol=1e-12)


def within(process, share):
    """A noise level between the ends, evenly in log sigma."""
    return process.sigma_min * (process.sigma_max / process.sigma_min) ** float64(share)


@every
@given(share=inside)
def test_time_and_back(process, share):
    sigma = within(process, share)
    close(process.sigma(process.t(sigma)), sigma, 1e-7)


@continuous
@given(u=inside)
def test_the_distribution_and_its_inverse(process, u):
    sigma = process.icdf(float64(u))
    close(process.cdf(sigma), float64(u), 1e-7)
    close(process.icdf(process.cdf(sigma)), sigma, 1e-5)


@given(u=st.floats(1e-12, 1.0, exclude_min=True), steps=st.sampled_from([2, 50, 1000]))
def test_a_discrete_distribution_draws_its_own_levels_with_equal_probability(u, steps):
    process = LDM(num_steps=steps)
    sigma = process.icdf(float64(u))
    step = int(process.t(sigma).round())
    close(process.sigma(float64(step)), sigma)
    assert step / steps - 1e-9 < u <= (step + 1) / steps + 1e-9
    close(process.cdf(sigma), float64((step + 1) / steps))
    assert process.cdf(sigma * 0.999999) < process.cdf(sigma)


@every
@given(first=inside, second=inside)
def test_time_and_probability_rise_with_sigma(process, first, second):
    low, high = within(process, min(first, second)), within(process, max(first, second))
    assert process.t(low) <= process.t(high)
    assert process.cdf(low) <= process.cdf(high)
    assert process.scale(low) >= process.scale(high)
    if first != second and high > low * (1 + 1e-9):
        assert process.t(low) < process.t(high)


@every
def test_the_ends(process):
    assert process.cdf(float64(0.0, math.inf)).tolist() == [0.0, 1.0]
    ends = process.icdf(float64(1e-15, 1 - 1e-15))
    assert ends.isfinite().all() and (ends > 0).all()
    if process.kind not in ("edm", "flow"):  # the others train without limit
        assert ends[0] >= process.sigma_min * (1 - 1e-6) and ends[1] <= process.sigma_max * (1 + 1e-6)


@every
def test_the_clock_keeps_the_dtype(process):
    for dtype in (torch.float32, torch.float64):
        sigma = torch.tensor([0.1, 1.0, 5.0], dtype=dtype)
        factors = vars(process.preconditioning(sigma)).values()
        others = (process.t(sigma), process.scale(sigma), process.cdf(sigma), process.loss_weight(sigma))
        assert all(value.dtype == dtype and value.shape == sigma.shape for value in (*factors, *others))


def test_averages_over_levels_are_taken_in_a_time_that_is_not_sigma():
    """EDM has no other time, so it borrows that of VP; all others have their own."""
    for process in PROCESSES:
        timed = with_time(process)
        assert timed == (VP() if process.kind == "edm" else process)
        sigma = float64(process.sigma_min, 1.0, process.sigma_max)
        assert not torch.equal(timed.t(sigma), sigma)


def test_scales():
    sigma = float64(0.0, 0.5, 3.0)
    for kind in ("vp", "vp-cosine", "ldm"):
        process = Process.kinds()[kind]()
        close(process.scale(sigma) ** 2 * (1 + sigma**2), torch.ones_like(sigma))  # variance-preserving
    close(Flow().scale(sigma), 1 / (1 + sigma))
    for kind in ("ve", "edm"):
        close(Process.kinds()[kind]().scale(sigma), torch.ones_like(sigma))


def test_the_numbers_of_the_paper():
    vp, ldm = VP(), LDM()
    torch.testing.assert_close(vp.sigma(float64(0.442, 0.6308)), float64(2.5103, 7.405), rtol=2e-4, atol=0)
    torch.testing.assert_close(ldm.sigma(float64(442.0, 631.0)), float64(2.153, 5.315), rtol=2e-4, atol=0)
    torch.testing.assert_close(ldm.t(float64(2.5103, 7.405)).round(), float64(478.0, 689.0), rtol=0, atol=1)
    edges = float64(0.0, 2.5103, 7.6577, math.inf)
    shares = EDM().cdf(edges).diff()
    torch.testing.assert_close(shares, float64(0.961, 0.035, 0.0035), rtol=0.03, atol=0)


def test_vp_is_the_integral_of_beta():
    process = VP()
    t = torch.linspace(0, 0.6, 60_001, dtype=torch.float64)
    beta = process.beta_min + t * (process.beta_max - process.beta_min)
    scale = torch.exp(-0.5 * torch.trapezoid(beta, t))
    close(process.scale(process.sigma(t[-1:])), scale[None], 1e-8)


def test_cosine_is_the_squared_cosine_of_nichol_and_dhariwal():
    process = Cosine()

    def kept(t):
        return torch.cos((t + process.offset) / (1 + process.offset) * math.pi / 2) ** 2

    t = float64(0.001, 0.2, 0.5, 0.9)
    close(process.sigma(t), (kept(float64(0.0)) / kept(t) - 1).sqrt(), 1e-6)


def test_ldm_is_the_product_of_its_alphas():
    process = LDM()
    betas = torch.linspace(process.beta_first**0.5, process.beta_last**0.5, 1000, dtype=torch.float64) ** 2
    kept = torch.cumprod(1 - betas, 0)
    close(process.sigma(torch.arange(1000.0, dtype=torch.float64)), ((1 - kept) / kept).sqrt())


def field_target(process, x0, eps, sigma):
    """What the field trains a network on, in its own words."""
    scale = process.scale(sigma)
    if process.kind == "edm":
        data = process.sigma_data
        x = x0 + sigma * eps
        c_skip = data**2 / (sigma**2 + data**2)
        return (x0 - c_skip * x) / (sigma * data / (sigma**2 + data**2).sqrt())
    if process.kind == "flow":
        return eps - x0
    if getattr(process, "prediction", "eps") == "v":
        return scale * eps - scale * sigma * x0  # alpha eps - sigma x0
    return eps


@every
def test_the_perfect_network_gives_the_perfect_image_and_its_error_the_standard_loss(process):
    generator = torch.Generator().manual_seed(0)
    x0, eps, wrong = torch.randn(3, 200, generator=generator, dtype=torch.float64)
    sigma = within(process, 0.5) * torch.logspace(-1.5, 1.5, 200, dtype=torch.float64)
    sigma = sigma.clamp(process.sigma_min, process.sigma_max)
    factors = process.preconditioning(sigma)
    x = x0 + sigma * eps
    target = field_target(process, x0, eps, sigma)
    torch.testing.assert_close(factors.c_skip * x + factors.c_out * target, x0, rtol=1e-9, atol=1e-8)
    denoised = factors.c_skip * x + factors.c_out * (target + wrong)
    loss = process.loss_weight(sigma) * (denoised - x0) ** 2
    torch.testing.assert_close(loss, wrong**2, rtol=1e-7, atol=1e-9)
    if process.kind not in ("edm", "ve"):
        torch.testing.assert_close(factors.c_in, process.scale(sigma))


def test_edm_input_and_target_have_unit_variance():
    process = EDM(sigma_data=0.7)
    x0, eps = torch.randn(2, 400_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x0 = 0.7 * x0
    for level in (0.01, 0.7, 20.0):
        sigma = torch.full_like(x0, level)
        factors = process.preconditioning(sigma)
        assert (factors.c_in * (x0 + sigma * eps)).var() == pytest.approx(1, abs=0.02)
        assert field_target(process, x0, eps, sigma).var() == pytest.approx(1, abs=0.02)
        close(process.loss_weight(sigma[:1]) * factors.c_out[:1] ** 2, float64(1.0))
        close(factors.c_noise[:1], sigma[:1].log() / 4)


def test_what_the_networks_are_told():
    assert VP().preconditioning(within(VP(), 1.0)).c_noise.item() == pytest.approx(999)
    ldm = LDM()
    close(ldm.preconditioning(ldm.sigma(float64(0.0, 442.0, 999.0))).c_noise, float64(0.0, 442.0, 999.0), 1e-6)
    flow = Flow()
    close(flow.preconditioning(float64(1.0)).c_noise, float64(500.0))


def test_a_shift_moves_times_of_training_and_sampling_to_higher_noise():
    t = float64(0.1, 0.5, 0.9)
    plain, shifted = Flow(), Flow(shift=3.0)
    close(shifted.sigma(t) / (1 + shifted.sigma(t)), 3 * t / (1 + 2 * t))  # Esser et al. 2024, Eq. 23
    for flow, same in ((shifted, plain), (replace(shifted, times="uniform"), replace(plain, times="uniform"))):
        close(flow.icdf(t), 3 * same.icdf(t))
        close(flow.cdf(3 * plain.sigma(t)), same.cdf(plain.sigma(t)))
    sigma = float64(0.2, 5.0)
    assert shifted.preconditioning(sigma).c_noise.tolist() == plain.preconditioning(sigma).c_noise.tolist()
    close(Flow(times="uniform").icdf(t), plain.sigma(1e-3 + t * 0.998))


@pytest.mark.parametrize("spacing", SPACINGS)
@every
@given(steps=st.integers(1, 60))
def test_schedules_fall_from_the_top_to_zero(process, spacing, steps):
    levels = sigma_schedule(process, spacing, steps)
    assert levels.dtype == torch.float64 and levels.shape == (steps + 1,)
    to_zero = spacing != "singlestep"
    assert (levels.diff() < 0).all() and (levels[-1] == 0) == to_zero
    assert levels[0].item() == pytest.approx(process.sigma_max, rel=1e-9)
    if steps > 1 or not to_zero:
        assert levels[-1 - to_zero].item() == pytest.approx(process.sigma_min, rel=1e-6)


def test_karras_spacing_is_equation_5():
    process = EDM()
    wanted = [(80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(18)]
    close(sigma_schedule(process, "karras", 18), float64(*wanted, 0.0))


def test_spacings_are_even_where_they_say():
    process = VP()
    close(sigma_schedule(process, "log-snr", 9)[:-1].log().diff().diff(), torch.zeros(7, dtype=torch.float64))
    close(process.t(sigma_schedule(process, "uniform-t", 9)[:-1]).diff().diff(), torch.zeros(7, dtype=torch.float64))
    roots = process.t(sigma_schedule(process, "quadratic-t", 9)[:-1]).sqrt()
    torch.testing.assert_close(roots.diff().diff(), torch.zeros(7, dtype=torch.float64), rtol=0, atol=1e-8)


def test_wrong_schedules_are_refused():
    process = VP()
    with pytest.raises(ConfigError, match='no spacing karas; did you mean "karras"'):
        sigma_schedule(process, "karas", 5)
    with pytest.raises(ConfigError, match="steps must be at least 1"):
        sigma_schedule(process, "karras", 0)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (VP, {"beta_max": 5000.0}),
        (VP, {"t_min": 1e-40}),
        (VE, {"sigma_max": 1e20}),
        (EDM, {"sigma_min": 1e-20}),
        (Cosine, {"t_min": 0.0}),
        (LDM, {"beta_first": 1e-40}),
        (LDM, {"beta_last": 1 - 1e-12}),
        (Flow, {"t_min": 1e-16}),
    ],
)
def test_levels_that_float32_cannot_square_are_refused(kind, options):
    with pytest.raises(ConfigError, match="process must be"):
        kind(**options)


@every
def test_the_ends_are_known_without_torch(process):
    assert process.ends() == pytest.approx((process.sigma_min, process.sigma_max), rel=1e-9)
