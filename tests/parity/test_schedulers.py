"""Our solvers beside the schedulers of diffusers: the same denoiser, levels and noise give the same x at every call."""

import math
from functools import partial

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_dpmsolver_singlestep import DPMSolverSinglestepScheduler
from diffusers.schedulers.scheduling_edm_dpmsolver_multistep import EDMDPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_edm_euler import EDMEulerScheduler
from diffusers.schedulers.scheduling_euler_ancestral_discrete import EulerAncestralDiscreteScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_heun_discrete import HeunDiscreteScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler

from multistage_diffusion.sampling import ancestral, ddim, dpm, dpmpp_2m, dpmpp_3m, euler, heun, sde_dpmpp_2m, unipc

SHAPE = (2, 1, 4, 4)
TOLERANCE = 1e-5  # a hundred roundings; ten times the largest difference seen is allowed
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*algorithm_type.*dpmsolver.*is deprecated:FutureWarning"),
]


def denoise(x, sigma):
    """The exact denoiser of an even mixture of N(-0.6, 0.2^2) and N(0.6, 0.2^2): far from linear in x."""
    total = 0.04 + sigma**2
    return (0.04 * x + sigma**2 * 0.6 * torch.tanh(0.6 * x / total)) / total


def vp(sigma):
    return 1 / math.sqrt(1 + sigma**2)


def noises(count, seed=3):
    """The normal numbers that a scheduler draws one step after the other from a generator of this seed."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(SHAPE, generator=generator) for _ in range(count)]


def theirs(scheduler, x, *, predicts, scale=lambda sigma: 1.0, **options):
    """Run a scheduler; x in our coordinate before every call of the model, and at the end.

    Args:
        scheduler: With its time steps set.
        x: Start in our coordinate.
        predicts: What the scheduler expects of the model: `sample`, `epsilon` or EDM's raw output `edm`.
        scale: The scale of its coordinate at a level; 1 where it is ours.
        options: Passed to its `step`; a list of `variance_noise` gives each step its own.
    """
    levels = [float(sigma) for sigma in scheduler.sigmas]
    sample, visited = x * scale(levels[0]), []
    for index, time in enumerate(scheduler.timesteps):
        sigma = levels[index]
        x = sample / scale(sigma)
        visited.append(x)
        scheduler.scale_model_input(sample, time)
        output = denoise(x, sigma)
        if predicts == "epsilon":
            output = (x - output) / sigma
        elif predicts == "edm":
            data = scheduler.config.sigma_data
            norm = math.hypot(sigma, data)
            output = (output - (data / norm) ** 2 * x) / (sigma * data / norm)
        each = {name: value[index] if isinstance(value, list) else value for name, value in options.items()}
        sample = scheduler.step(output, time, sample, **each).prev_sample
    return [*visited, sample]


def ours(solver, x, sigmas, noise=None):
    visited = []

    def seen(x, sigma):
        visited.append(x)
        return denoise(x, sigma)

    end = solver(seen, x, sigmas, noise=None if noise is None else lambda step: noise[step])
    return [*visited, end]


def assert_same(ours, theirs, sigmas):
    """Equal at every call, in units of the standard deviation that x has at the highest level nearby."""
    assert len(ours) == len(theirs)
    levels = [*(float(sigma) for sigma in sigmas[: len(ours) - 1]), 0.0]
    for index, (left, right, sigma) in enumerate(zip(ours, theirs, levels, strict=True)):
        error = float((left - right).abs().max()) / math.hypot(1, sigma)
        assert error < TOLERANCE, f"call {index}: {error}"


def start(sigma):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)) * float(sigma)


def karras(factory, steps, **config):
    scheduler = factory(use_karras_sigmas=True, **config)
    scheduler.set_timesteps(steps)
    scheduler.set_begin_index(0)
    return scheduler


def test_euler_is_edm_euler():
    scheduler = EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0)
    scheduler.set_timesteps(18)
    x = start(80.0)
    assert_same(ours(euler, x, scheduler.sigmas), theirs(scheduler, x, predicts="edm"), scheduler.sigmas)


def test_euler_is_euler_discrete():
    scheduler = karras(EulerDiscreteScheduler, 18, prediction_type="epsilon")
    x = start(scheduler.sigmas[0])
    assert_same(ours(euler, x, scheduler.sigmas), theirs(scheduler, x, predicts="epsilon"), scheduler.sigmas)


def test_heun_is_heun_discrete():
    scheduler = karras(HeunDiscreteScheduler, 18, prediction_type="sample")
    x = start(scheduler.sigmas[0])
    sigmas = torch.cat((scheduler.sigmas[:1], scheduler.sigmas[1::2]))  # theirs repeats the levels that are met twice
    assert len(sigmas) == 19 and sigmas[-1] == 0
    assert_same(ours(heun, x, sigmas), theirs(scheduler, x, predicts="sample"), scheduler.sigmas)


def test_ancestral_is_euler_ancestral_discrete():
    scheduler = EulerAncestralDiscreteScheduler()
    scheduler.set_timesteps(20)
    x, generator = start(scheduler.sigmas[0]), torch.Generator().manual_seed(3)
    reference = theirs(scheduler, x, predicts="epsilon", generator=generator)
    assert_same(ours(ancestral, x, scheduler.sigmas, noises(20)), reference, scheduler.sigmas)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ddim_is_ddim_at_any_eta(eta):
    scheduler = DDIMScheduler(clip_sample=False, prediction_type="sample")
    scheduler.set_timesteps(20)
    kept = scheduler.alphas_cumprod[scheduler.timesteps].double()
    scheduler.sigmas = torch.cat((((1 - kept) / kept).sqrt(), torch.zeros(1)))
    x, fresh = start(scheduler.sigmas[0]), noises(20)
    reference = theirs(scheduler, x, predicts="sample", scale=vp, eta=eta, variance_noise=fresh)
    assert_same(ours(partial(ddim, eta=eta), x, scheduler.sigmas, fresh), reference, scheduler.sigmas)


MULTISTEP = [
    (dpmpp_2m, {"solver_order": 2}),
    (partial(dpmpp_3m, released=True), {"solver_order": 3}),
    (sde_dpmpp_2m, {"solver_order": 2, "algorithm_type": "sde-dpmsolver++"}),
]


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 20])  # below 15 steps the last ones are of lower order
@pytest.mark.parametrize(("solver", "config"), MULTISTEP)
def test_multistep_is_edm_dpmsolver_multistep(solver, config, steps):
    scheduler = EDMDPMSolverMultistepScheduler(**config)
    scheduler.set_timesteps(steps)
    x, generator = start(80.0), torch.Generator().manual_seed(3)
    reference = theirs(scheduler, x, predicts="edm", generator=generator)
    assert_same(ours(solver, x, scheduler.sigmas, noises(steps)), reference, scheduler.sigmas)


@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("steps", [10, 20])
@pytest.mark.parametrize(("solver", "config"), MULTISTEP)
def test_multistep_is_dpmsolver_multistep(solver, config, steps, final):
    scheduler = DPMSolverMultistepScheduler(prediction_type="sample", final_sigmas_type=final, **config)
    scheduler.set_timesteps(steps)
    x, generator = start(scheduler.sigmas[0]), torch.Generator().manual_seed(3)
    reference = theirs(scheduler, x, predicts="sample", scale=vp, generator=generator)
    reference[-1] = reference[-1] / vp(float(scheduler.sigmas[-1]))
    assert_same(ours(solver, x, scheduler.sigmas, noises(steps)), reference, scheduler.sigmas)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("steps", [5, 20])
def test_unipc_is_unipc_multistep(order, steps):
    scheduler = UniPCMultistepScheduler(prediction_type="sample", solver_order=order, final_sigmas_type="zero")
    scheduler.set_timesteps(steps)
    x = start(scheduler.sigmas[0])
    reference = theirs(scheduler, x, predicts="sample", scale=vp)
    solver = partial(unipc, order=order, lower_order_below=1000)  # there in all cases
    assert_same(ours(solver, x, scheduler.sigmas), reference, scheduler.sigmas)


@pytest.mark.parametrize(
    ("order", "solver_type", "steps"),
    [(1, "midpoint", 9), (2, "midpoint", 9), (2, "midpoint", 21), (3, "heun", 10), (3, "heun", 22)],
)
def test_singlestep_is_dpmsolver_singlestep(order, solver_type, steps):
    # Theirs evaluates on the schedule's own levels, ours evenly in ln sigma: the same on a geometric schedule. Its
    # "heun" is the Taylor form. These numbers of steps end with order 1 in both.
    scheduler = DPMSolverSinglestepScheduler(
        algorithm_type="dpmsolver", solver_order=order, solver_type=solver_type, prediction_type="sample",
        final_sigmas_type="sigma_min", lower_order_final=True,
    )  # fmt: skip
    scheduler.set_timesteps(steps)
    scheduler.sigmas = torch.logspace(math.log10(80.0), math.log10(0.01), steps + 1, dtype=torch.float64)
    x = start(80.0)
    reference = theirs(scheduler, x, predicts="sample", scale=vp)
    reference[-1] = reference[-1] / vp(0.01)
    solver = partial(dpm, order=order, taylor=order == 3)
    assert_same(ours(solver, x, scheduler.sigmas), reference, scheduler.sigmas)
