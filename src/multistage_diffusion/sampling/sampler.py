"""`Sampler`: how images are drawn, as one frozen record. It is also the section `sampling` of a run's configuration."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from multistage_diffusion.errors import ConfigError, suggest
from multistage_diffusion.noise.schedule import SPACINGS, Spacing, sigma_schedule
from multistage_diffusion.records import check, check_count, check_needs, check_numbers
from multistage_diffusion.sampling.solvers import SOLVERS, SolverLike, evaluations

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from jaxtyping import Float
    from torch import Tensor

    from multistage_diffusion.noise import Process
    from multistage_diffusion.sampling.editing import Start
    from multistage_diffusion.sampling.images import Labels, SampledDenoiser, Samples, Seeds, SeedsAndImages
    from multistage_diffusion.sampling.steps import Callback, SolverFunction
    from multistage_diffusion.stages import Stages

# Options of single solvers, with the values that change nothing.
_OPTIONS: dict[str, Any] = {"churn": 0.0, "eta": 0.0, "lower_order_below": 15}


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """How images are drawn from a denoiser.

    Raises:
        ConfigError: No such solver or spacing, or an option that is out of range or that the solver does not take.
    """

    solver: SolverLike = "heun"
    """Solver: docs/sampling.md. In Python also a function (denoise, x, sigmas, *, noise=None, callback=None) -> x."""
    steps: int = 18
    """Number of steps of the solver."""
    spacing: Spacing | str | None = None
    """Spacing of the noise levels; by default the solver's own."""
    churn: float = 0.0
    """Noise that heun and euler add in all (S_churn)."""
    eta: float = 0.0
    """Share of the ancestral noise in ddim."""
    lower_order_below: int = 15
    """Multistep solvers end in steps of lower order where there are fewer steps than this; 10 in the authors' code."""
    trunk_every: int = 1
    """Network evaluations to one pass of a transformer's trunk, whose features the others reuse: faster, not exact."""
    guidance: float = 1.0
    """Scale of classifier-free guidance; 1 is none."""
    guidance_interval: tuple[float, float] | None = None
    """Lowest and highest sigma at which there is guidance; by default everywhere."""

    def __post_init__(self) -> None:
        check_numbers(self, "sampling")
        if isinstance(self.solver, str) and self.solver not in SOLVERS:
            raise ConfigError(f"no solver {self.solver}{suggest(self.solver, SOLVERS)}")
        known = isinstance(self.solver, str) or callable(self.solver)
        check(known, "sampling.solver", "a name or a function", self.solver)
        check_count(self.steps, "sampling.steps")
        check(self.steps <= 10**6, "sampling.steps", "at most 10^6", self.steps)
        if self.spacing is not None and self.spacing not in SPACINGS:
            raise ConfigError(f"no spacing {self.spacing}{suggest(self.spacing, SPACINGS)}")
        option = SOLVERS[self.solver].option if isinstance(self.solver, str) else None
        for name, default in _OPTIONS.items():
            if getattr(self, name) != default and option != name:
                solvers = ", ".join(solver.name for solver in SOLVERS.values() if solver.option == name)
                word = name.replace("_", "-")
                raise ConfigError(f"{self.name} takes no {word} (got {getattr(self, name)}); it is for {solvers}")
        singlestep = self.name.startswith("dpm-") or self.spacing != "singlestep"
        check_needs(singlestep, "spacing singlestep", "solver dpm-1, dpm-2 or dpm-3", self.name)
        check(self.churn >= 0, "sampling.churn", "at least 0", self.churn)
        check(0 <= self.eta <= 1, "sampling.eta", "between 0 and 1", self.eta)
        check_count(self.trunk_every, "sampling.trunk-every")
        check_count(self.lower_order_below, "sampling.lower-order-below", 0)
        interval = self.guidance_interval or (0.0, 0.0)
        ordered = len(interval) == 2 and 0 <= interval[0] <= interval[1]
        check(ordered, "sampling.guidance-interval", "a low and a high sigma", self.guidance_interval)

    @property
    def name(self) -> str:
        """Name of the solver."""
        if isinstance(self.solver, str):
            return self.solver
        return getattr(self.solver, "__name__", type(self.solver).__name__)

    @property
    def solve(self) -> SolverFunction:
        """The solver's function (denoise, x, sigmas, *, noise, callback) -> x, with its option in it."""
        if not isinstance(self.solver, str):
            return self.solver
        solver = SOLVERS[self.solver]
        if solver.option is None or getattr(self, solver.option) == _OPTIONS[solver.option]:
            return solver.solve
        name = "s_churn" if solver.option == "churn" else solver.option
        return partial(solver.solve, **{name: getattr(self, solver.option)})

    @property
    def nfe(self) -> int:
        """Network evaluations of an image; a guided one, which evaluates the network twice, counts once."""
        return len(evaluations(self.solve, range(self.steps, -1, -1)))

    def levels(self, process: Process, start: float | None = None) -> Float[Tensor, " levels"]:
        """The schedule: `steps + 1` decreasing noise levels, float64, the last one 0 (`singlestep`: sigma_min).

        Args:
            process: Gives the range.
            start: The first level; by default the process's highest.
        """
        if not isinstance(self.solver, str):
            return sigma_schedule(process, self.spacing or "karras", self.steps, start=start)
        solver = SOLVERS[self.solver]
        spacing = self.spacing or solver.default_spacing
        return sigma_schedule(process, spacing, self.steps, order=solver.order, start=start)

    def evaluations(self, process: Process) -> tuple[float, ...]:
        """The noise level of every network evaluation, in order, known before sampling."""
        return evaluations(self.solve, self.levels(process).tolist())

    def plan(self, process: Process, stages: Stages) -> tuple[int, ...]:
        """The stage of every network evaluation, in order, known before sampling."""
        return tuple(stages.of(sigma) for sigma in self.evaluations(process))

    def stage_calls(self, process: Process, stages: Stages, *, labels: bool = False) -> tuple[int, ...]:
        """Network evaluations of an image in each stage; with `labels`, guided ones count twice, as they cost."""
        calls = [0] * len(stages)
        for sigma in self.evaluations(process):
            calls[stages.of(sigma)] += 2 if labels and self.guides(sigma) else 1
        return tuple(calls)

    def shares(self, process: Process, stages: Stages) -> tuple[float, ...]:
        """Share of each stage in the network evaluations; they sum to 1."""
        calls = self.stage_calls(process, stages)
        return tuple(count / sum(calls) for count in calls)

    def guides(self, sigma: float) -> bool:
        """Whether there is guidance at a noise level, for images that have a class."""
        low, high = self.guidance_interval or (0.0, math.inf)
        return self.guidance != 1 and low <= sigma <= high

    def draw(
        self,
        denoiser: SampledDenoiser,
        seeds: Seeds,
        *,
        labels: Labels | None = None,
        start: Start | None = None,
        batch_size: int = 256,
        offload: bool = False,
        callback: Callback | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> Samples:
        """Draw images. An image is a function of its seed: neither the batch nor its neighbours change it.

        Args:
            denoiser: The model; used in evaluation mode and left as it was.
            seeds: The seed of each image, in [0, 2^63).
            labels: Class of all images, or of each, by number or name; only for a conditional model, where none draws
                without a class.
            start: Images to begin from, in place of noise alone.
            batch_size: Images drawn at once; fewer, with a warning, where memory does not suffice.
            offload: Keep only the decoder in use on the device.
            callback: Sees every step of every batch.
            stop: Asked before every network evaluation; once true, the images finished so far are returned.

        Returns:
            The images, with their seeds and cost.

        Raises:
            ConfigError: Seeds, labels or images to start from that the model cannot take.
            NumericsError: An image is not finite.
        """
        from multistage_diffusion.sampling.images import Drawing

        return Drawing(self, denoiser, offload, callback, stop, start).samples(seeds, labels, batch_size)

    def batches(
        self,
        denoiser: SampledDenoiser,
        seeds: Seeds,
        *,
        labels: Labels | None = None,
        start: Start | None = None,
        batch_size: int = 256,
        offload: bool = False,
        callback: Callback | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> Iterator[SeedsAndImages]:
        """Draw images batch by batch, for more images than memory holds; the arguments are those of `draw`.

        Returns:
            An iterator over seeds and images (float32, on the CPU), in the order of the seeds. Wrong arguments raise
            at the call, not at the first batch.
        """
        from multistage_diffusion.sampling.images import Drawing

        return Drawing(self, denoiser, offload, callback, stop, start).batches(seeds, labels, batch_size)


@dataclass(frozen=True, kw_only=True)
class SamplerOptions:
    """Options in place of those of a sampler, such as a run's; those left out stay as they are there."""

    solver: SolverLike | None = None
    """Solver; by default the run's."""
    steps: int | None = None
    """Steps of the solver; by default the run's."""
    spacing: Spacing | str | None = None
    """Spacing of the noise levels; by default the run's, or with --solver that solver's own."""
    churn: float | None = None
    """Noise that heun and euler add in all (S_churn); by default the run's."""
    eta: float | None = None
    """Share of the ancestral noise in ddim; by default the run's."""
    lower_order_below: int | None = None
    """Multistep solvers end in steps of lower order where there are fewer steps than this; by default the run's."""
    trunk_every: int | None = None
    """Network evaluations to one pass of a transformer's trunk: above 1 faster, not exact; by default the run's."""
    guidance: float | None = None
    """Scale of classifier-free guidance, 1 is none; by default the run's."""
    guidance_interval: tuple[float, float] | None = None
    """Lowest and highest sigma at which there is guidance; by default the run's."""

    def apply(self, sampler: Sampler) -> Sampler:
        """The sampler with these options. Another solver does not keep the spacing and the option of the first.

        Raises:
            ConfigError: As `Sampler` raises it.
        """
        names = [item.name for item in fields(SamplerOptions)]
        changes: dict[str, Any] = {name: value for name in names if (value := getattr(self, name)) is not None}
        if changes.get("solver", sampler.solver) != sampler.solver:
            changes = {"spacing": None, **_OPTIONS} | changes
        return replace(sampler, **changes)
