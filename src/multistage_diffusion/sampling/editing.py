"""From given images: image to image, inpainting, and paths between two seeds.

In x = x0 + sigma eps an image is noised to a level by adding noise, and drawing begins there (SDEdit,
Meng et al. 2022).
Inpainting puts the image's kept pixels into every estimate of x0: then the flow carries them along y + sigma eps, the
noised image itself, whatever the solver. What is repainted sees too little of them; repeating each step, after noise
brought x back to where it begins, mends that (RePaint, Lugmayr et al. 2022).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from multistage_diffusion import rng
from multistage_diffusion.errors import ConfigError
from multistage_diffusion.records import check, check_count, check_seed
from multistage_diffusion.sampling.solvers import evaluations
from multistage_diffusion.sampling.steps import Callback, SolverFunction, SolverStep, levels_on_host

if TYPE_CHECKING:
    from multistage_diffusion.noise import Process
    from multistage_diffusion.sampling.images import Labels, SampledDenoiser, Samples
    from multistage_diffusion.sampling.sampler import Sampler
    from multistage_diffusion.sampling.steps import Denoise, Noise, Schedule
else:
    Denoise = Labels = Noise = Process = SampledDenoiser = Sampler = Samples = Schedule = Any

Fresh = Callable[[str], Tensor]  # name of a stream -> standard normal numbers of a batch
NoiseSource = Callable[[str, Tensor, Sequence[int]], Tensor]  # stream, seeds, shape of an image -> numbers


@dataclass(frozen=True, eq=False, kw_only=True)
class Start:
    """Images that drawing begins from.

    Attributes:
        images: (N, C, H, W), one for each image that is drawn or one for all; floats in the unit of the data
            (pictures in [-1, 1]).
        sigma: Noise level that they are noised to; the lower, the more of them stays. By default the process's highest.
        mask: True, or above 0, where an image is repainted; the rest of it comes out as it is. (H, W) for all images,
            or (N, C, H, W) with 1 for N or C. By default all is repainted.
        resample: How often each step is made: more than 1 needs a mask, and fits what is repainted to the rest.
    """

    images: Shaped[Tensor, "*shape"]
    sigma: float | None = None
    mask: Shaped[Tensor, "*mask"] | None = None
    resample: int = 1

    def check(self, sampler: Sampler, process: Process, shape: tuple[int, int, int], num: int) -> None:
        """Refuse what does not fit.

        Args:
            sampler: Draws.
            process: Gives the noise levels.
            shape: (C, H, W) of an image.
            num: Number of images that are drawn.

        Raises:
            ConfigError: Another shape or number of images, a mask of another shape, or a noise level out of range.
        """
        size = tuple(self.images.shape)
        unit = "floats in the unit of the data (pictures in [-1, 1])"
        check(self.images.is_floating_point(), "the images to start from", unit, self.images.dtype)
        fits = len(size) == 4 and size[1:] == shape
        check(fits, "the images to start from", f"of shape (N, {', '.join(map(str, shape))})", size)
        check(size[0] in (1, num), "the images to start from", f"1 or {num}, one for each drawn", size[0])
        low, high = process.sigma_min, process.sigma_max
        inside = self.sigma is None or low < self.sigma <= high
        check(inside, "from-sigma", f"above {low:g} and at most {high:g}, as the process's noise levels", self.sigma)
        check_count(self.resample, "resample")
        if self.mask is None:
            check(self.resample == 1, "resample", "1 without a mask", self.resample)
            return
        of = tuple(self.mask.shape)
        fits = of == shape[1:] or (
            len(of) == 4 and of[0] in (1, num) and of[1] in (1, shape[0]) and of[2:] == shape[1:]
        )
        check(fits, "the mask", f"{shape[1]} x {shape[2]}, as the images", " x ".join(map(str, of)))
        if self.resample > 1 and sampler.churn > 0:
            raise ConfigError(f"resample {self.resample} adds noise before each step, as churn does; leave churn out")

    def evaluations(self, sampler: Sampler, process: Process) -> tuple[float, ...]:
        """The noise level of every network evaluation, in order."""
        solve = resampling(sampler.solve, self.resample, lambda stream: torch.zeros(()))
        return evaluations(solve, sampler.levels(process, self.sigma).tolist())

    def draw(
        self,
        rows: slice,
        solve: SolverFunction,
        denoise: Denoise,
        levels: Sequence[float],
        fresh: Fresh,
        **options: Any,
    ) -> Tensor:
        """Draw some of the images.

        Args:
            rows: Which.
            solve: The solver.
            denoise: Estimates x0.
            levels: The schedule.
            fresh: The images' noise.
            **options: Further arguments of the solver.
        """
        prior = fresh("prior")
        images = self.images.to(prior)
        images = images[rows] if len(images) > 1 else images.expand_as(prior)
        x, solve = images + levels[0] * prior, resampling(solve, self.resample, fresh)
        if self.mask is None:
            return solve(denoise, x, levels, **options)
        mask = self.mask.to(prior.device) > 0
        if mask.ndim == 4 and len(mask) > 1:
            mask = mask[rows]
        x = solve(lambda x, sigma: denoise(x, sigma).where(mask, images), x, levels, **options)
        return x.where(mask, images)


def interpolate(
    denoiser: SampledDenoiser,
    first: int,
    last: int,
    num: int = 8,
    *,
    sampler: Sampler | None = None,
    labels: Labels | None = None,
    start: Start | None = None,
    batch_size: int = 256,
    offload: bool = False,
    callback: Callback | None = None,
    **options: Any,
) -> Samples:
    """Draw images on the way from one seed to another: all their noise lies on great circles between the two seeds'.

    Args:
        denoiser: The model.
        first: Seed of the first image.
        last: Seed of the last image.
        num: Number of images, those of the two seeds included.
        sampler: As in `sample`.
        labels: As in `sample`.
        start: As in `sample`.
        batch_size: As in `sample`.
        offload: As in `sample`.
        callback: As in `sample`.
        **options: As in `sample`.

    Returns:
        The images; their `seeds` are positions, 0 to num - 1.

    Raises:
        ConfigError: As `sample`, or the seeds are equal, or there are fewer than 2 images.
        NumericsError: An image is not finite.
    """
    from multistage_diffusion.sampling.images import Drawing
    from multistage_diffusion.sampling.sampler import Sampler, SamplerOptions

    sampler = SamplerOptions(**options).apply(sampler or denoiser.sampler or Sampler())
    drawing = Drawing(sampler, denoiser, offload, callback, start=start, noise=between(first, last, num))
    return drawing.samples(range(num), labels, batch_size)


def resampling(solve: SolverFunction, times: int, fresh: Fresh) -> SolverFunction:
    """A solver that makes each step several times, going back to its beginning by noise in between.

    Each step is a call of the solver by itself, so a multistep solver is of order 1. The step to 0 is made once.

    Args:
        solve: The solver.
        times: How often.
        fresh: Gives the noise.

    Source: Lugmayr et al. 2022 (RePaint), Alg. 1, with a jump length of 1.
    """
    if times == 1:
        return solve

    def repeated(
        denoise: Denoise, x: Tensor, sigmas: Schedule, *, noise: Noise | None = None, callback: Callback | None = None
    ) -> Tensor:
        for index, (sigma, sigma_next) in enumerate(pairwise(levels_on_host(sigmas))):
            turns = times if sigma_next > 0 else 1
            for turn in range(turns):
                if turn > 0:
                    x = x + math.sqrt(sigma**2 - sigma_next**2) * fresh(f"resample-{index}-{turn}")

                def of_turn(part: int, stream: str = f"step-{index}-{turn}") -> Tensor:
                    return fresh(f"{stream}-{part}")

                def report(step: SolverStep, index: int = index) -> None:
                    if callback is not None:
                        callback(replace(step, index=index))

                last = report if turn == turns - 1 else None
                x = solve(denoise, x, [sigma, sigma_next], noise=of_turn, callback=last)
        return x

    return repeated


def seeded(stream: str, seeds: Int[Tensor, " batch"], shape: Sequence[int]) -> Float[Tensor, "batch ..."]:
    """The noise of images by their seeds."""
    return rng.normal(0, stream, seeds, shape)


def between(first: int, last: int, num: int) -> NoiseSource:
    """The noise of images on the great circle from one seed's to another's, so that each has the norm of noise.

    Args:
        first: Seed of the image at position 0.
        last: Seed of the image at position num - 1.
        num: Number of images.

    Returns:
        A source whose "seeds" are the positions.

    Raises:
        ConfigError: The seeds are equal or out of range, or there are fewer than 2 images.

    Source: Song et al. 2021 (DDIM), Eq. 67.
    """
    for seed in (first, last):
        check_seed(seed)
    check(first != last, "interpolate", "two different seeds", f"{first} twice")
    check(num >= 2, "num", "at least 2 for images between two seeds", num)

    def noise(stream: str, positions: Int[Tensor, " batch"], shape: Sequence[int]) -> Float[Tensor, "batch ..."]:
        ends = seeded(stream, torch.tensor([first, last], device=positions.device), shape).double()
        directions = ends.flatten(1) / ends.flatten(1).norm(dim=1, keepdim=True)
        angle = (directions[0] @ directions[1]).clamp(-1, 1).arccos()
        share = (positions.double() / (num - 1)).reshape(-1, *[1] * len(shape))
        return ((((1 - share) * angle).sin() * ends[0] + (share * angle).sin() * ends[1]) / angle.sin()).float()

    return noise
