"""Processes in sigma: their own time and back, the numbers of the paper, and what the network is asked for."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from multistage_diffusion.config import PROCESSES, CosineConfig, EDMConfig, FlowConfig, LDMConfig, VEConfig, VPConfig
from multistage_diffusion.errors import ConfigError
from multistage_diffusion.noise import SPACINGS, make_process, sigma_schedule

CONFIGS = [
    *(kind() for kind in PROCESSES.values()), VPConfig(prediction="v"), CosineConfig(prediction="v"),
    VPConfig(beta_min=0.5, beta_max=12.0, t_min=1e-3), VEConfig(sigma_min=0.02, sigma_max=1000.0),
    EDMConfig(p_mean=0.4, p_std=2.0, sigma_data=1.3), LDMConfig(num_steps=50), FlowConfig(logit_mean=1.0),
]  # fmt: skip
CONTINUOUS = [config for config in CONFIGS if config.kind != "ldm"]


def name(config):
    return config.kind + "".join(
        f"-{value}" for value in vars(config).values() if value in ("v", 50, 12.0, 1.3, 1000.0)
    )


every = pytest.mark.parametrize("config", CONFIGS, ids=name)
continuous = pytest.mark.parametrize("config", CONTINUOUS, ids=name)
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
def test_time_and_back(config, share):
    process = make_process(config)
    sigma = within(process, share)
    close(process.sigma(process.t(sigma)), sigma, 1e-7)


@continuous
@given(u=inside)
def test_the_distribution_and_its_inverse(config, u):
    process = make_process(config)
    sigma = process.icdf(float64(u))
    close(process.cdf(sigma), float64(u), 1e-7)
    close(process.icdf(process.cdf(sigma)), sigma, 1e-5)


@given(u=st.floats(1e-12, 1.0, exclude_min=True), steps=st.sampled_from([2, 50, 1000]))
def test_a_discrete_distribution_draws_its_own_levels_with_equal_probability(u, steps):
    process = make_process(LDMConfig(num_steps=steps))
    sigma = process.icdf(float64(u))
    step = int(process.t(sigma).round())
    close(process.sigma(float64(step)), sigma)
    assert step / steps - 1e-9 < u <= (step + 1) / steps + 1e-9
    close(process.cdf(sigma), float64((step + 1) / steps))
    assert process.cdf(sigma * 0.999999) < process.cdf(sigma)


@every
@given(first=inside, second=inside)
def test_time_and_probability_rise_with_sigma(config, first, second):
    process = make_process(config)
    low, high = within(process, min(first, second)), within(process, max(first, second))
    assert process.t(low) <= process.t(high)
    assert process.cdf(low) <= process.cdf(high)
    assert process.scale(low) >= process.scale(high)
    if first != second and high > low * (1 + 1e-9):
        assert process.t(low) < process.t(high)


@every
def test_the_ends(config):
    process = make_process(config)
    assert process.cdf(float64(0.0, math.inf)).tolist() == [0.0, 1.0]
    ends = process.icdf(float64(1e-15, 1 - 1e-15))
    assert ends.isfinite().all() and (ends > 0).all()
    if config.kind not in ("edm", "flow"):  # the others train without limit
        assert ends[0] >= process.sigma_min * (1 - 1e-6) and ends[1] <= process.sigma_max * (1 + 1e-6)


@every
def test_the_clock_keeps_the_dtype(config):
    process = make_process(config)
    for dtype in (torch.float32, torch.float64):
        sigma = torch.tensor([0.1, 1.0, 5.0], dtype=dtype)
        factors = vars(process.preconditioning(sigma)).values()
        others = (process.t(sigma), process.scale(sigma), process.cdf(sigma), process.loss_weight(sigma))
        assert all(value.dtype == dtype and value.shape == sigma.shape for value in (*factors, *others))


def test_averages_over_levels_are_taken_in_a_time_that_is_not_sigma():
    """EDM has no other time, so it borrows that of VP; all others have their own."""
    for process in map(make_process, CONFIGS):
        edm = process.config.kind == "edm"
        assert process.clock().config == (VPConfig() if edm else process.config)
        sigma = float64(process.sigma_min, 1.0, process.sigma_max)
        assert not torch.equal(process.clock().t(sigma), sigma)


def test_scales():
    sigma = float64(0.0, 0.5, 3.0)
    for kind in ("vp", "vp-cosine", "ldm"):
        process = make_process(PROCESSES[kind]())
        close(process.scale(sigma) ** 2 * (1 + sigma**2), torch.ones_like(sigma))  # variance-preserving
    close(make_process(FlowConfig()).scale(sigma), 1 / (1 + sigma))
    for kind in ("ve", "edm"):
        close(make_process(PROCESSES[kind]()).scale(sigma), torch.ones_like(sigma))


def test_the_numbers_of_the_paper():
    vp, ldm = make_process(VPConfig()), make_process(LDMConfig())
    torch.testing.assert_close(vp.sigma(float64(0.442, 0.6308)), float64(2.5103, 7.405), rtol=2e-4, atol=0)
    torch.testing.assert_close(ldm.sigma(float64(442.0, 631.0)), float64(2.153, 5.315), rtol=2e-4, atol=0)
    torch.testing.assert_close(ldm.t(float64(2.5103, 7.405)).round(), float64(478.0, 689.0), rtol=0, atol=1)
    edges = float64(0.0, 2.5103, 7.6577, math.inf)
    shares = make_process(EDMConfig()).cdf(edges).diff()
    torch.testing.assert_close(shares, float64(0.961, 0.035, 0.0035), rtol=0.03, atol=0)


def test_vp_is_the_integral_of_beta():
    config = VPConfig()
    t = torch.linspace(0, 0.6, 60_001, dtype=torch.float64)
    beta = config.beta_min + t * (config.beta_max - config.beta_min)
    scale = torch.exp(-0.5 * torch.trapezoid(beta, t))
    close(make_process(config).scale(make_process(config).sigma(t[-1:])), scale[None], 1e-8)


def test_cosine_is_the_squared_cosine_of_nichol_and_dhariwal():
    config = CosineConfig()

    def kept(t):
        return torch.cos((t + config.offset) / (1 + config.offset) * math.pi / 2) ** 2

    t = float64(0.001, 0.2, 0.5, 0.9)
    close(make_process(config).sigma(t), (kept(float64(0.0)) / kept(t) - 1).sqrt(), 1e-6)


def test_ldm_is_the_product_of_its_alphas():
    config = LDMConfig()
    betas = torch.linspace(config.beta_first**0.5, config.beta_last**0.5, 1000, dtype=torch.float64) ** 2
    kept = torch.cumprod(1 - betas, 0)
    close(make_process(config).sigma(torch.arange(1000.0, dtype=torch.float64)), ((1 - kept) / kept).sqrt())


def field_target(config, process, x0, eps, sigma):
    """What the field trains a network on, in its own words."""
    scale = process.scale(sigma)
    if config.kind == "edm":
        data = config.sigma_data
        x = x0 + sigma * eps
        c_skip = data**2 / (sigma**2 + data**2)
        return (x0 - c_skip * x) / (sigma * data / (sigma**2 + data**2).sqrt())
    if config.kind == "flow":
        return eps - x0
    if getattr(config, "prediction", "eps") == "v":
        return scale * eps - scale * sigma * x0  # alpha eps - sigma x0
    return eps


@every
def test_the_perfect_network_gives_the_perfect_image_and_its_error_the_standard_loss(config):
    process = make_process(config)
    generator = torch.Generator().manual_seed(0)
    x0, eps, wrong = torch.randn(3, 200, generator=generator, dtype=torch.float64)
    sigma = within(process, 0.5) * torch.logspace(-1.5, 1.5, 200, dtype=torch.float64)
    sigma = sigma.clamp(process.sigma_min, process.sigma_max)
    factors = process.preconditioning(sigma)
    x = x0 + sigma * eps
    target = field_target(config, process, x0, eps, sigma)
    torch.testing.assert_close(factors.c_skip * x + factors.c_out * target, x0, rtol=1e-9, atol=1e-8)
    denoised = factors.c_skip * x + factors.c_out * (target + wrong)
    loss = process.loss_weight(sigma) * (denoised - x0) ** 2
    torch.testing.assert_close(loss, wrong**2, rtol=1e-7, atol=1e-9)
    if config.kind not in ("edm", "ve"):
        torch.testing.assert_close(factors.c_in, process.scale(sigma))


def test_edm_input_and_target_have_unit_variance():
    config = EDMConfig(sigma_data=0.7)
    process = make_process(config)
    x0, eps = torch.randn(2, 400_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x0 = 0.7 * x0
    for level in (0.01, 0.7, 20.0):
        sigma = torch.full_like(x0, level)
        factors = process.preconditioning(sigma)
        assert (factors.c_in * (x0 + sigma * eps)).var() == pytest.approx(1, abs=0.02)
        assert field_target(config, process, x0, eps, sigma).var() == pytest.approx(1, abs=0.02)
        close(process.loss_weight(sigma[:1]) * factors.c_out[:1] ** 2, float64(1.0))
        close(factors.c_noise[:1], sigma[:1].log() / 4)


def test_what_the_networks_are_told():
    assert make_process(VPConfig()).preconditioning(
        within(make_process(VPConfig()), 1.0)
    ).c_noise.item() == pytest.approx(999)
    ldm = make_process(LDMConfig())
    close(ldm.preconditioning(ldm.sigma(float64(0.0, 442.0, 999.0))).c_noise, float64(0.0, 442.0, 999.0), 1e-6)
    flow = make_process(FlowConfig())
    close(flow.preconditioning(float64(1.0)).c_noise, float64(500.0))


@pytest.mark.parametrize("spacing", SPACINGS)
@every
@given(steps=st.integers(1, 60))
def test_schedules_fall_from_the_top_to_zero(config, spacing, steps):
    process = make_process(config)
    levels = sigma_schedule(process, spacing, steps)
    assert levels.dtype == torch.float64 and levels.shape == (steps + 1,)
    assert (levels.diff() < 0).all() and levels[-1] == 0
    assert levels[0].item() == pytest.approx(process.sigma_max, rel=1e-9)
    if steps > 1:
        assert levels[-2].item() == pytest.approx(process.sigma_min, rel=1e-6)


def test_karras_spacing_is_equation_5():
    process = make_process(EDMConfig())
    wanted = [(80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(18)]
    close(sigma_schedule(process, "karras", 18), float64(*wanted, 0.0))


def test_spacings_are_even_where_they_say():
    process = make_process(VPConfig())
    close(sigma_schedule(process, "log-snr", 9)[:-1].log().diff().diff(), torch.zeros(7, dtype=torch.float64))
    close(process.t(sigma_schedule(process, "uniform-t", 9)[:-1]).diff().diff(), torch.zeros(7, dtype=torch.float64))
    roots = process.t(sigma_schedule(process, "quadratic-t", 9)[:-1]).sqrt()
    torch.testing.assert_close(roots.diff().diff(), torch.zeros(7, dtype=torch.float64), rtol=0, atol=1e-8)


def test_wrong_schedules_are_refused():
    process = make_process(VPConfig())
    with pytest.raises(ConfigError, match='no spacing karas; did you mean "karras"'):
        sigma_schedule(process, "karas", 5)
    with pytest.raises(ConfigError, match="steps must be at least 1"):
        sigma_schedule(process, "karras", 0)


@pytest.mark.parametrize(
    "config", [VPConfig(beta_max=5000.0), VPConfig(t_min=1e-40), VEConfig(sigma_max=1e20), EDMConfig(sigma_min=1e-20)]
)
def test_levels_that_float32_cannot_square_are_refused(config):
    with pytest.raises(ConfigError, match="process must be"):
        make_process(config)
