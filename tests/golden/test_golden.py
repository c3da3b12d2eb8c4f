"""The numbers of version 0.1: losses of every process and architecture, images, costs and stages."""

import json

import pinned
import pytest


def stored(name):
    return json.loads((pinned.HERE / f"{name}.json").read_text())


LOSSES, SAMPLES, PROFILES, CLUSTERS = map(stored, ("losses", "samples", "profiles", "clusters"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return pinned.train(SAMPLES["run"], tmp_path_factory.mktemp("golden"))


def slow_but(quick, names):
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", slow_but(pinned.QUICK_RUNS, pinned.RUNS))
def test_the_losses_of_a_run(name, run, tmp_path):
    assert LOSSES[name]["config"] == pinned.config(name)
    trained = run if name == SAMPLES["run"] else pinned.train(name, tmp_path)
    pinned.near(pinned.steps(trained), LOSSES[name]["steps"])


@pytest.mark.parametrize("solver", slow_but(("heun", "dpm-3"), pinned.SOLVERS))
def test_the_pictures_of_a_solver(solver, run, tmp_path):
    words = ["--num", pinned.SAMPLES, "--steps", pinned.SAMPLE_STEPS, "--solver", solver]
    found, wanted = pinned.draw(run, tmp_path / "samples", *words), SAMPLES["solvers"][solver]
    pinned.near_pictures(found.pop("pictures"), wanted["pictures"])
    assert found == {key: wanted[key] for key in found}


@pytest.mark.parametrize("solver", pinned.SOLVERS)
def test_the_images_of_a_solver(solver, run):
    found = pinned.floats(run, solver)
    # The kernels of another processor round otherwise, and solvers of higher order multiply the difference.
    pinned.near(found, {key: SAMPLES["solvers"][solver][key] for key in found}, rel=1e-4, absolute=1e-5)


def test_the_held_out_loss(run):
    pinned.near(pinned.held_out(run), SAMPLES["held_out"])


@pytest.mark.parametrize("architecture", slow_but(("multistage",), pinned.ARCHITECTURES))
@pytest.mark.parametrize("preset", slow_but(pinned.SMALL_PRESETS, (*pinned.SMALL_PRESETS, *pinned.LARGE_PRESETS)))
def test_the_cost_of_a_preset(preset, architecture):
    pinned.near(pinned.profile(preset, architecture), PROFILES[f"{preset}-{architecture}"], rel=1e-12)


@pytest.mark.parametrize("name", pinned.CLUSTERS)
def test_the_stages_of_the_digits(name):
    pinned.near(pinned.msd("cluster", *pinned.CLUSTERS[name], *pinned.THREADS), CLUSTERS[name])
