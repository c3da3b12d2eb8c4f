"""A solver of your own: any function (denoise, x, sigmas, *, noise, callback) -> x.

python examples/own_solver.py
"""

from itertools import pairwise

import torch

import multistage_diffusion as msd
from multistage_diffusion.sampling import Sampler


def midpoint(denoise, x, sigmas, *, noise=None, callback=None):
    """The midpoint method of dx/dsigma = (x - D(x, sigma))/sigma: two evaluations a step, but one for the step to 0."""
    for sigma, sigma_next in pairwise(sigmas):
        slope = (x - denoise(x, sigma)) / sigma
        if sigma_next > 0:
            middle = (sigma * sigma_next) ** 0.5  # in ln sigma
            x_middle = x + (middle - sigma) * slope
            slope = (x_middle - denoise(x_middle, middle)) / middle
        x = x + (sigma_next - sigma) * slope
    return x


def main(run: str = "runs/digits") -> None:
    """Draw from a run with it; the stage of each evaluation is known before."""
    denoiser = msd.load_run(run).denoiser
    sampler = Sampler(solver=midpoint, steps=10)
    print(f"{sampler.nfe} evaluations in the stages {sampler.plan(denoiser.process, denoiser.stages)}")
    samples = sampler.draw(denoiser, range(8))
    reference = msd.sample(denoiser, 8, solver="heun", steps=100)
    error = (samples.images - reference.images).pow(2).mean().sqrt()
    print(f"root mean square difference from 100 steps of heun: {torch.as_tensor(error):.3f}")


if __name__ == "__main__":
    main()
