"""Solvers against closed forms on Gaussian data; images as functions of their seeds; the plan against the run."""

import math
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from multistage_diffusion.config import ModelConfig
from multistage_diffusion.denoiser import Denoiser
from multistage_diffusion.errors import ConfigError, NumericsError
from multistage_diffusion.noise import EDM, VP, sigma_schedule
from multistage_diffusion.sampling import (
    SOLVERS,
    Sampler,
    ddim,
    dpm,
    dpmpp_3m,
    evaluations,
    heun,
    sample,
    unipc,
)
from multistage_diffusion.sampling.exponential import step_orders
from multistage_diffusion.stages import Stages

MEAN, VARIANCE = 0.3, 0.25
EDGES = (0.1, 2.0)


def gaussian(x, sigma):
    """The exact denoiser of data N(MEAN, VARIANCE)."""
    return MEAN + VARIANCE / (VARIANCE + sigma**2) * (x - MEAN)


def endpoint(x, high, low):
    """Where the probability flow of that data carries x from one level to another."""
    return MEAN + math.sqrt((VARIANCE + low**2) / (VARIANCE + high**2)) * (x - MEAN)


def karras(steps, high=80.0, low=0.002):
    """Levels without the step to 0: there the end point is exact and errors are the solver's."""
    ramp = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    return (high ** (1 / 7) * (1 - ramp) + low ** (1 / 7) * ramp) ** 7


def geometric(steps, high=80.0, low=0.002):
    ramp = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    return torch.exp(math.log(high) * (1 - ramp) + math.log(low) * ramp)


def measured_order(run, steps, levels):
    """Slope of the logarithm of the end point's error against that of the number of steps."""
    errors = []
    for count in steps:
        sigmas = levels(count)
        high, low = float(sigmas[0]), float(sigmas[-1])
        x = torch.tensor([MEAN + 1.3 * high], dtype=torch.float64)
        errors.append(float((run(gaussian, x, sigmas) - endpoint(x, high, low)).abs()))
    logs = torch.tensor([steps, errors], dtype=torch.float64).log()
    centred = logs - logs.mean(dim=1, keepdim=True)
    return -float((centred[0] * centred[1]).sum() / (centred[0] ** 2).sum())


def tiny(stages=Stages(EDGES), process="edm", architecture="multistage", classes=0):  # noqa: B008
    config = ModelConfig(
        architecture=architecture,
        width=8,
        decoder_widths=(8,) * (1 if architecture == "unified" else len(stages)),
        multipliers=(1, 2),
        blocks=1,
        attention=(),
        groups=4,
        classes=classes,
    )
    torch.manual_seed(0)
    denoiser = Denoiser.from_backbone(config, process, (1, 8, 8), stages)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.normal_(0, 0.1)
    return denoiser


@pytest.fixture(scope="module")
def denoiser():
    return tiny().eval()


@pytest.fixture(scope="module")
def conditional():
    return tiny(classes=3).eval()


def recorded(denoiser):
    """Calls of the denoiser's network: (stage, labels, images)."""
    calls = []
    hook = denoiser.network.register_forward_pre_hook(
        lambda module, given: calls.append((given[2], given[3].labels, given[0]))
    )
    return calls, hook


# Solvers on Gaussian data


@pytest.mark.parametrize("name", [name for name, solver in SOLVERS.items() if not solver.stochastic])
def test_solver_converges_with_its_order(name):
    solver = SOLVERS[name]
    levels = geometric if name == "dpm-3" else karras
    # 3 k + 2: the singlestep solver ends with order 2
    steps = {3: (50, 98, 194), 4: (96, 192, 384)}.get(solver.order, (48, 96, 192))
    assert measured_order(solver.solve, steps, levels) == pytest.approx(solver.order, abs=0.3)


@pytest.mark.parametrize("name", [name for name, solver in SOLVERS.items() if solver.stochastic])
def test_stochastic_solvers_variance_converges_with_the_order(name):
    # Every step is affine in x and its noise: unit noise one at a time gives the variance of the end exactly.
    def error(steps):
        sigmas = karras(steps, high=10.0, low=0.1)
        high, low = float(sigmas[0]), float(sigmas[-1])
        starts = torch.zeros(2 * steps + 2, dtype=torch.float64)
        starts[0] = math.sqrt(VARIANCE + high**2)
        ends = SOLVERS[name].solve(
            lambda x, sigma: VARIANCE / (VARIANCE + sigma**2) * x, starts, sigmas,
            noise=lambda step: torch.nn.functional.one_hot(torch.tensor(step + 1), 2 * steps + 2).double(),
        )  # fmt: skip
        return abs(float((ends**2).sum()) - VARIANCE - low**2)

    order = math.log(error(64) / error(256)) / math.log(4)
    assert order == pytest.approx(SOLVERS[name].order, abs=0.3)


def test_third_order_singlestep_holds_with_taylor_weights():
    assert measured_order(partial(dpm, order=3, taylor=True), (50, 98, 194), geometric) == pytest.approx(3, abs=0.3)


def test_a_corrector_adds_an_order():
    for order in (1, 2):
        assert measured_order(partial(unipc, order=order), (48, 96, 192), karras) == pytest.approx(order + 1, abs=0.3)


def test_multistep_solvers_end_in_lower_order_below_a_number_of_steps():
    sigmas, x = geometric(12), torch.tensor([40.0], dtype=torch.float64)
    ends = {few: Sampler(solver="dpmpp-2m", lower_order_below=few).solve(gaussian, x, sigmas) for few in (10, 13, 15)}
    assert torch.equal(ends[13], ends[15]) and not torch.equal(ends[10], ends[15])


def test_released_weight_of_dpmpp_3m_is_of_order_2():
    # The deviation that dpmpp_3m documents: the released solver halves the quadratic term.
    order = measured_order(partial(dpmpp_3m, released=True), (96, 192, 384), karras)
    assert order == pytest.approx(2, abs=0.3)


@pytest.mark.parametrize("name", SOLVERS)
def test_gaussian_marginal_is_right(name):
    # Fine steps from noise to 0: mean and variance of the data, to the statistical error of 20000 draws (1 %) and 3 %.
    solver = Sampler(solver=name, churn=20.0 if name == "heun" else 0.0, eta=0.5 if name == "ddim" else 0.0)
    generator = torch.Generator().manual_seed(1)
    draw = partial(torch.randn, 20_000, generator=generator, dtype=torch.float64)
    sigmas = sigma_schedule(EDM(), "log-snr", 400)
    x = solver.solve(gaussian, MEAN + 80.0 * draw(), sigmas, noise=lambda step: draw())
    assert float(x.mean()) == pytest.approx(MEAN, abs=0.012)
    assert float(x.var()) == pytest.approx(VARIANCE, rel=0.06)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 6, 7, 18])
def test_nfe_is_exact(name, steps):
    calls = []

    def denoise(x, sigma):
        calls.append(sigma)
        return gaussian(x, sigma)

    x = torch.full((3,), 80.0)
    end = SOLVERS[name].solve(denoise, x, sigma_schedule(EDM(), "karras", steps), noise=lambda step: torch.zeros(3))
    twice = name in ("heun", "dpmpp-2s-ancestral", "sde-dpmpp-2s")
    assert len(calls) == (2 * steps - 1 if twice else steps) == SOLVERS[name].nfe(steps)
    assert len(calls) == Sampler(solver=name, steps=steps).nfe
    assert all(isinstance(sigma, float) and sigma > 0 for sigma in calls)
    assert end.isfinite().all()
    assert tuple(calls) == evaluations(SOLVERS[name].solve, sigma_schedule(EDM(), "karras", steps))


@pytest.mark.parametrize("name", SOLVERS)
def test_the_step_to_zero_returns_the_estimate(name):
    seen = []
    sigmas = sigma_schedule(EDM(), SOLVERS[name].default_spacing, 7)
    end = SOLVERS[name].solve(
        gaussian, torch.tensor([30.0]), sigmas, noise=lambda step: torch.ones(1), callback=seen.append
    )
    assert seen[-1].sigma_next == 0
    torch.testing.assert_close(end, seen[-1].denoised, rtol=0, atol=0)
    assert [step.index for step in seen] == sorted({step.index for step in seen})


def test_ddim_is_euler_without_noise_and_ancestral_with_all_of_it():
    sigmas, x = sigma_schedule(VP(), "uniform-t", 9), torch.linspace(-150, 150, 5)
    noise = lambda step: torch.full((5,), 0.1 * step)  # noqa: E731
    torch.testing.assert_close(ddim(gaussian, x, sigmas), SOLVERS["euler"].solve(gaussian, x, sigmas))
    torch.testing.assert_close(ddim(gaussian, x, sigmas), SOLVERS["dpm-1"].solve(gaussian, x, sigmas))
    full = ddim(gaussian, x, sigmas, noise=noise, eta=1.0)
    torch.testing.assert_close(full, SOLVERS["ancestral"].solve(gaussian, x, sigmas, noise=noise))


def test_churn_follows_algorithm_2():
    # Karras et al. 2022, Algorithm 2, line by line, with noise on part of the levels.
    sigmas = sigma_schedule(EDM(), "karras", 6).tolist()
    x = torch.linspace(-80, 80, 5, dtype=torch.float64)
    noise = lambda step: torch.linspace(-1, 1, 5, dtype=torch.float64) * (step + 1)  # noqa: E731
    expected = x
    for i in range(6):
        gamma = min(4 / 6, math.sqrt(2) - 1) if 0.05 <= sigmas[i] <= 50 else 0.0
        t_hat = sigmas[i] + gamma * sigmas[i]
        x_hat = expected + math.sqrt(t_hat**2 - sigmas[i] ** 2) * 1.003 * noise(i)
        d = (x_hat - gaussian(x_hat, t_hat)) / t_hat
        expected = x_hat + (sigmas[i + 1] - t_hat) * d
        if sigmas[i + 1] != 0:
            d_next = (expected - gaussian(expected, sigmas[i + 1])) / sigmas[i + 1]
            expected = x_hat + (sigmas[i + 1] - t_hat) * (d + d_next) / 2
    ours = heun(gaussian, x, sigmas, noise=noise, s_churn=4.0, s_min=0.05, s_max=50.0, s_noise=1.003)
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_singlestep_orders_spend_the_budget(order):
    for budget in range(1, 40):
        for to_zero in (False, True):
            orders = step_orders(budget, order, to_zero=to_zero)
            assert sum(orders) == budget and max(orders) <= order and min(orders) >= 1
            assert orders[-1] == 1 or not to_zero
    assert step_orders(20, 3, to_zero=False) == [3] * 6 + [2]  # the recipe of DPM-Solver on CIFAR-10
    assert step_orders(18, 3, to_zero=False) == [3] * 5 + [2, 1]
    assert step_orders(19, 3, to_zero=True) == [3] * 6 + [1]


@pytest.mark.parametrize(
    ("sigmas", "words"), [([1.0], "2 or more"), ([1.0, 2.0], "decreasing"), ([1.0, -1.0], "end in 0 or above")]
)
def test_levels_must_decrease(sigmas, words):
    with pytest.raises(ConfigError, match=words):
        heun(gaussian, torch.zeros(1), sigmas)


@pytest.mark.parametrize("name", [name for name, solver in SOLVERS.items() if solver.stochastic])
def test_stochastic_solver_asks_for_noise(name):
    with pytest.raises(ConfigError, match="needs noise"):
        SOLVERS[name].solve(gaussian, torch.zeros(1), [2.0, 1.0, 0.0])


# Images from a denoiser


@pytest.mark.parametrize(
    ("solver", "options"), [("heun", {"churn": 10.0}), ("dpmpp-2m", {}), ("ddim", {"eta": 0.7}), ("sde-dpmpp-2m", {})]
)
def test_batch_size_never_changes_an_image(denoiser, solver, options):
    whole = sample(denoiser, 8, solver=solver, steps=4, seed=5, batch_size=8, **options)
    assert whole.images.shape == (8, 1, 8, 8) and whole.images.dtype == torch.float32
    for size in (1, 3):
        parts = sample(denoiser, 8, solver=solver, steps=4, seed=5, batch_size=size, **options)
        torch.testing.assert_close(parts.images, whole.images, rtol=1e-4, atol=1e-4)


def test_a_seed_is_the_same_image_in_any_order(denoiser):
    first = sample(denoiser, 4, solver="ancestral", steps=3, seed=10)
    again = sample(denoiser, 4, solver="ancestral", steps=3, seed=10)
    turned = sample(denoiser, seeds=[13, 11, 10, 12], solver="ancestral", steps=3)
    torch.testing.assert_close(first.images, again.images, rtol=0, atol=0)
    torch.testing.assert_close(turned.images, first.images[[3, 1, 0, 2]], rtol=1e-4, atol=1e-4)
    assert first.seeds == (10, 11, 12, 13) and turned.seeds == (13, 11, 10, 12)
    assert not torch.allclose(first.images[0], first.images[1])


def test_batches_stream_seeds_and_ordinary_tensors(denoiser):
    batches = list(Sampler(steps=2).batches(denoiser, range(5), batch_size=2))
    assert [seeds.tolist() for seeds, _ in batches] == [[0, 1], [2, 3], [4]]
    images = batches[0][1]
    assert not images.is_inference() and not torch.is_inference_mode_enabled()
    images.clamp_(-1, 1)


@pytest.mark.parametrize("name", SOLVERS)
def test_plan_is_what_the_run_does(denoiser, name):
    calls, hook = recorded(denoiser)
    result = sample(denoiser, 2, solver=name, steps=7)
    hook.remove()
    stages = tuple(stage for stage, *_ in calls)
    sampler = Sampler(solver=name, steps=7)
    assert stages == sampler.plan(denoiser.process, denoiser.stages)
    sigmas = sigma_schedule(denoiser.process, SOLVERS[name].default_spacing, 7)
    assert torch.equal(sampler.levels(denoiser.process), sigmas)
    assert stages == tuple(denoiser.stages.of(sigma) for sigma in evaluations(SOLVERS[name].solve, sigmas))
    shares = sampler.shares(denoiser.process, denoiser.stages)
    assert shares == pytest.approx([stages.count(k) / len(stages) for k in range(3)]) and sum(shares) == 1
    assert set(stages) == {0, 1, 2} and list(stages) == sorted(stages, reverse=True)
    assert result.stage_calls == tuple(stages.count(k) for k in range(3))
    assert result.nfe == len(stages) == SOLVERS[name].nfe(7) and result.seconds > 0


def test_plan_follows_churn_across_an_edge():
    # Noise added before a step lifts it over an edge just above the level: the plan must know.
    top, stages = EDM().sigma_max, Stages((1.1 * EDM().sigma_max,))
    assert Sampler(solver="euler", steps=1).plan(EDM(), stages) == (0,)
    assert Sampler(solver="euler", steps=1, churn=1.0).plan(EDM(), stages) == (1,)
    assert evaluations(Sampler(solver="euler", churn=1.0).solve, [top, 0.0]) == (pytest.approx(2**0.5 * top),)


def test_modes_are_restored_and_dropout_is_off():
    denoiser = tiny()
    denoiser.train()
    denoiser.network.decoders[1].eval()
    first, second = sample(denoiser, 2, steps=2), sample(denoiser, 2, steps=2)
    torch.testing.assert_close(first.images, second.images, rtol=0, atol=0)
    assert denoiser.training and not denoiser.network.decoders[1].training


def test_guidance_is_the_formula_in_its_interval(conditional):
    labels, sigma = torch.tensor([2, 0]), 0.5
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        without = conditional(x, sigma, torch.tensor([3, 3]))
        given = conditional(x, sigma, labels)
    expected = without + 2.5 * (given - without)
    assert not torch.allclose(given, without)
    from multistage_diffusion.sampling.images import Drawing

    for interval, wanted in (((0.1, 1.0), expected), ((0.6, 1.0), given), ((0.1, 0.4), given)):
        call = Drawing(Sampler(guidance=2.5, guidance_interval=interval), conditional).denoise(labels)
        with torch.inference_mode():
            torch.testing.assert_close(call(x, sigma), wanted, rtol=1e-4, atol=1e-5)


def test_guidance_uses_one_doubled_batch_and_counts_once(conditional):
    calls, hook = recorded(conditional)
    result = sample(conditional, 3, solver="euler", steps=6, labels=1, guidance=2.0, guidance_interval=EDGES)
    hook.remove()
    inside = [EDGES[0] <= sigma <= EDGES[1] for sigma in sigma_schedule(EDM(), "karras", 6)[:-1].tolist()]
    assert [len(x) for *_, x in calls] == [6 if guided else 3 for guided in inside]
    assert result.nfe == 6 and any(inside) and not all(inside)
    doubled = next(labels for _, labels, x in calls if len(x) == 6)
    assert doubled.tolist() == [3, 3, 3, 1, 1, 1]


def test_labels_belong_to_images_not_to_batches(conditional):
    labels = [0, 1, 2, 0, 1]
    whole = sample(conditional, 5, steps=3, labels=labels, guidance=1.5)
    parts = sample(conditional, 5, steps=3, labels=torch.tensor(labels), guidance=1.5, batch_size=2)
    torch.testing.assert_close(parts.images, whole.images, rtol=1e-4, atol=1e-4)


def test_offload_holds_each_stage_once_a_batch_and_changes_nothing(denoiser, monkeypatch):
    held = []
    original = Denoiser.offload
    monkeypatch.setattr(Denoiser, "offload", lambda self, stage: (held.append(stage), original(self, stage))[1])
    offloaded = sample(denoiser, 4, steps=7, batch_size=2, offload=True)
    assert held == [2, 1, 0, 2, 1, 0, None]
    torch.testing.assert_close(offloaded.images, sample(denoiser, 4, steps=7, batch_size=2).images, rtol=0, atol=0)


def test_stop_keeps_the_finished_batches(denoiser):
    asked = []
    result = sample(
        denoiser, 6, solver="euler", steps=3, batch_size=2, stop=lambda: asked.append(0) is None and len(asked) > 4
    )
    assert result.seeds == (0, 1) and len(result.images) == 2 and len(asked) == 5
    nothing = sample(denoiser, 2, steps=2, stop=lambda: True)
    assert nothing.images.shape == (0, 1, 8, 8)


def test_callback_sees_every_step_of_every_batch(denoiser):
    seen = []
    sample(denoiser, 3, solver="dpmpp-2m", steps=4, batch_size=2, callback=seen.append)
    assert [(step.index, len(step.x)) for step in seen] == [(i, size) for size in (2, 1) for i in range(4)]


def test_an_image_that_is_not_finite_names_its_seed():
    denoiser = tiny()
    with torch.no_grad():
        next(denoiser.parameters()).fill_(math.nan)
    with pytest.raises(NumericsError, match="seed 7 is not finite"):
        sample(denoiser, 2, steps=2, seed=7)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"solver": "huen"}, 'no solver huen; did you mean "heun"'),
        ({"spacing": "karas"}, 'no spacing karas; did you mean "karras"'),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"num": 0}, "num must be at least 1"),
        ({"seeds": []}, "seeds must be at least one"),
        ({"batch_size": 0}, "batch-size must be at least 1"),
        ({"labels": 1}, "model is unconditional"),
        ({"guidance": 2.0}, "needs a class for each image"),
        ({"guidance_interval": (2.0, 1.0)}, "guidance-interval must be"),
        ({"seed": -1}, r"seed must be a whole number in \[0, 2\^63\), got -1"),
        ({"seed": 2**63}, "seed must be a whole number"),
        ({"seed": 2**63 - 1}, "seed must be a whole number"),
        ({"seeds": [0, -1]}, "seed must be a whole number"),
        ({"solver": "dpmpp-2m", "churn": 1.0}, "dpmpp-2m takes no churn .* heun, euler"),
        ({"solver": "ancestral", "eta": 0.5}, "ancestral takes no eta .* ddim"),
        ({"solver": "ddim", "eta": 1.5}, "eta must be between 0 and 1"),
        ({"churn": -1.0}, "churn must be at least 0"),
        ({"solver": "lms", "lower_order_below": 10}, "lms takes no lower-order-below .* dpmpp-2m, dpmpp-3m"),
        ({"spacing": "singlestep"}, "--spacing singlestep needs --solver dpm-1, dpm-2 or dpm-3; it is heun"),
    ],
)
def test_bad_options_are_one_line(denoiser, options, words):
    with pytest.raises(ConfigError, match=words) as caught:
        sample(denoiser, **options)
    assert "\n" not in str(caught.value)


def test_fractions_are_refused():
    # In a process without the tests' own check of types.
    code = """
import torch, tiny
from multistage_diffusion.errors import ConfigError
from multistage_diffusion.sampling import Sampler, sample
denoiser, conditional = tiny.denoiser(), tiny.denoiser(tiny.replace(tiny.MODEL, classes=3))
for draw in (
    lambda: Sampler(steps=2.5), lambda: sample(denoiser, seed=0.5), lambda: sample(denoiser, seed="0"),
    lambda: sample(denoiser, 1.5), lambda: sample(denoiser, seeds=[0, 1.5]), lambda: sample(denoiser, seeds=[True]),
    lambda: sample(denoiser, seeds=torch.tensor([0.0])), lambda: sample(denoiser, seeds=torch.tensor([[0]])),
    lambda: sample(conditional, 2, labels=[0, 0.5]), lambda: sample(conditional, 1, labels=torch.tensor([1.0])),
):
    try:
        draw()
    except ConfigError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent)
    assert done.stdout.count("whole number") == 10, done.stdout + done.stderr


def test_wrong_arguments_are_refused_at_the_call_and_not_at_the_first_batch(denoiser):
    for seeds, options in (([], {}), ([0], {"batch_size": 0}), ([0], {"labels": 1})):
        with pytest.raises(ConfigError):
            Sampler().batches(denoiser, seeds, **options)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([0, 4], "got 4"),
        ([2, 3], "between 0 and 2, or none, got 3"),
        ([-1, 0], "got -1"),
        ([0], "each of 2 images"),
        ("cat", "does not record the names"),
    ],
)
def test_bad_labels_are_one_line(conditional, labels, words):
    with pytest.raises(ConfigError, match=words):
        sample(conditional, 2, labels=labels)


@pytest.mark.parametrize("process", ["vp", "vp-cosine", "ve", "edm", "ldm", "flow"])
def test_every_process_samples_with_no_special_case(process):
    denoiser = tiny(process=process)
    result = sample(denoiser, 2, solver="dpmpp-2m", steps=3)
    assert result.images.isfinite().all() and result.nfe == 3


@pytest.mark.parametrize("architecture", ["unified", "separate"])
def test_every_architecture_samples(architecture):
    denoiser = tiny(architecture=architecture)
    result = sample(denoiser, 2, steps=4, offload=True)
    assert sum(result.stage_calls) == result.nfe == 7
