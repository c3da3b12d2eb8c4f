"""From a denoiser to images: seeds, batches, guidance, offloading and the account of what was called."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from multistage_diffusion import rng
from multistage_diffusion.denoiser import Denoiser
from multistage_diffusion.errors import ConfigError, NumericsError
from multistage_diffusion.noise import sigma_schedule
from multistage_diffusion.records import check
from multistage_diffusion.sampling.steps import Callback
from multistage_diffusion.sampling.table import Solver, find_solver, plan

# Of torch's allocator on the CPU, oneDNN, cuDNN and cuBLAS, whose errors have no class of their own.
_NO_MEMORY = ("can't allocate memory", "could not create a primitive", "could not create a memory", "ALLOC_FAILED")

Seeds = Sequence[int] | Int[Tensor, " num"]
Labels = int | Sequence[int] | Int[Tensor, " num"]
Batch = tuple[Int[Tensor, " batch"], Float[Tensor, "batch channels height width"]]


@dataclass(frozen=True)
class Samples:
    """Images and what they cost.

    Attributes:
        images: float32 on the CPU, nominally in [-1, 1], not clipped.
        seeds: The seed of each image.
        nfe: Calls of the denoiser for each image; a guided call, which evaluates the network twice, counts once.
        seconds: Wall time.
        stage_calls: How many of the `nfe` calls each stage had, stage 0 first.
    """

    images: Float[Tensor, "num channels height width"]
    seeds: tuple[int, ...]
    nfe: int
    seconds: float
    stage_calls: tuple[int, ...]


def sample(
    denoiser: Denoiser, num: int = 16, *, solver: str = "heun", steps: int = 18, spacing: str | None = None,
    seed: int = 0, seeds: Seeds | None = None, batch_size: int = 256, labels: Labels | None = None,
    guidance: float = 1.0, guidance_interval: tuple[float, float] | None = None, offload: bool = False,
    callback: Callback | None = None, stop: Callable[[], bool] | None = None, churn: float = 0.0, eta: float = 0.0,
) -> Samples:  # fmt: skip
    """Draw images. An image is a function of its seed: neither the batch nor its neighbours change it.

    Args:
        denoiser: The model; used in evaluation mode and left as it was.
        num: Number of images, unless `seeds` says it.
        solver: A key of `SOLVERS`.
        steps: Steps of the solver (its evaluations, but for `heun`).
        spacing: Spacing of the noise levels; by default the solver's own.
        seed: Seed of the first image; the others follow.
        seeds: The seed of each image, in place of `num` and `seed`.
        batch_size: Images drawn at once; fewer, with a warning, where memory does not suffice.
        labels: Class of all images, or of each; only for a conditional model, where none draws without a class.
        guidance: Scale of classifier-free guidance; 1 is none.
        guidance_interval: Lowest and highest sigma at which there is guidance; everywhere by default.
        offload: Keep only the decoder in use on the device.
        callback: Sees every step of every batch.
        stop: Asked before every call of the denoiser; once true, the images finished so far are returned.
        churn: Noise that `heun` and `euler` add in all (S_churn of Karras et al. 2022).
        eta: Share of the ancestral noise in `ddim`.

    Returns:
        The images, with their seeds and cost.

    Raises:
        ConfigError: An unknown solver or spacing, an option out of range, or labels that the model does not know.
        NumericsError: An image is not finite.
    """
    begin = time.perf_counter()
    batches = sample_batches(
        denoiser, num, solver=solver, steps=steps, spacing=spacing, seed=seed, seeds=seeds, batch_size=batch_size,
        labels=labels, guidance=guidance, guidance_interval=guidance_interval, offload=offload, callback=callback,
        stop=stop, churn=churn, eta=eta,
    )  # fmt: skip
    drawn = list(batches)
    calls = call_plan(denoiser, solver=solver, steps=steps, spacing=spacing, churn=churn, eta=eta)
    images = torch.cat([image for _, image in drawn]) if drawn else torch.zeros(0, *denoiser.shape)
    used = tuple(number for numbers, _ in drawn for number in numbers.tolist())
    counts = tuple(calls.count(stage) for stage in range(len(denoiser.stages)))
    return Samples(images, used, len(calls), time.perf_counter() - begin, counts)


def sample_batches(
    denoiser: Denoiser, num: int = 16, *, solver: str = "heun", steps: int = 18, spacing: str | None = None,
    seed: int = 0, seeds: Seeds | None = None, batch_size: int = 256, labels: Labels | None = None,
    guidance: float = 1.0, guidance_interval: tuple[float, float] | None = None, offload: bool = False,
    callback: Callback | None = None, stop: Callable[[], bool] | None = None, churn: float = 0.0, eta: float = 0.0,
) -> Iterator[Batch]:  # fmt: skip
    """Draw images batch by batch, for metrics over more images than memory holds.

    Args:
        denoiser: The model; used in evaluation mode and left as it was between the batches.
        num: Number of images, unless `seeds` says it.
        solver: A key of `SOLVERS`.
        steps: Steps of the solver (its evaluations, but for `heun`).
        spacing: Spacing of the noise levels; by default the solver's own.
        seed: Seed of the first image; the others follow.
        seeds: The seed of each image, in place of `num` and `seed`.
        batch_size: Images drawn at once; fewer, with a warning, where memory does not suffice.
        labels: Class of all images, or of each; only for a conditional model, where none draws without a class.
        guidance: Scale of classifier-free guidance; 1 is none.
        guidance_interval: Lowest and highest sigma at which there is guidance; everywhere by default.
        offload: Keep only the decoder in use on the device.
        callback: Sees every step of every batch.
        stop: Asked before every call of the denoiser; once true, the unfinished batch is dropped and the iterator ends.
        churn: Noise that `heun` and `euler` add in all (S_churn of Karras et al. 2022).
        eta: Share of the ancestral noise in `ddim`.

    Returns:
        An iterator over seeds and images (float32, on the CPU), in the order of the seeds.

    Raises:
        ConfigError: An unknown solver or spacing, an option out of range, or labels that the model does not know.
        NumericsError: An image is not finite; raised by the iterator.
    """
    check(num >= 1, "num", "at least 1", num)
    check(-(2**62) <= seed < 2**62, "seed", "in [-2^62, 2^62)", seed)
    check(batch_size >= 1, "batch-size", "at least 1", batch_size)
    chosen, sigmas = _schedule(denoiser, solver, steps, spacing, churn, eta)
    numbers = torch.arange(seed, seed + num) if seeds is None else torch.as_tensor(seeds, dtype=torch.int64).cpu()
    check(len(numbers) >= 1, "seeds", "at least one", "none")
    known = _labels(denoiser, labels, len(numbers))
    interval = (0.0, float("inf")) if guidance_interval is None else guidance_interval
    check(interval[0] <= interval[1], "guidance-interval", "a low and a high sigma", guidance_interval)
    if guidance != 1 and known is None:
        raise ConfigError(f"guidance {guidance} needs labels: it strengthens what the class says")
    call = _Call(denoiser, guidance, interval, offload, stop)
    return _batches(call, chosen, sigmas, numbers, known, batch_size, callback)


def call_plan(
    denoiser: Denoiser, *, solver: str = "heun", steps: int = 18, spacing: str | None = None, churn: float = 0.0,
    eta: float = 0.0,
) -> tuple[int, ...]:  # fmt: skip
    """The stage of every call of the denoiser that `sample` with the same options makes for an image.

    Args:
        denoiser: The model.
        solver: A key of `SOLVERS`.
        steps: Steps of the solver.
        spacing: Spacing of the noise levels; by default the solver's own.
        churn: Noise that `heun` and `euler` add in all.
        eta: Share of the ancestral noise in `ddim`.

    Returns:
        The stages, in the order of the calls.

    Raises:
        ConfigError: An unknown solver or spacing, or an option out of range.
    """
    chosen, sigmas = _schedule(denoiser, solver, steps, spacing, churn, eta)
    return plan(chosen, sigmas, denoiser.stages)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device or the host has no memory left.

    Args:
        error: Any error.

    Returns:
        True for what torch and its libraries raise on a GPU and on the CPU, and for Python's own.
    """
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)


class _Stopped(Exception):  # noqa: N818  (no error)
    """The caller asked to stop within a batch."""


@dataclass(frozen=True)
class _Call:
    """How the denoiser is called: with guidance, from which device, until when."""

    denoiser: Denoiser
    guidance: float
    interval: tuple[float, float]
    offload: bool
    stop: Callable[[], bool] | None

    def denoise(self, labels: Tensor | None) -> Callable[[Tensor, float], Tensor]:
        """The function that a solver gets, for one batch."""
        held: list[int] = []

        def call(x: Tensor, sigma: float) -> Tensor:
            if self.stop is not None and self.stop():
                raise _Stopped
            stage = self.denoiser.stages.of(sigma)
            if self.offload and held != [stage]:
                self.denoiser.offload(stage)
                held[:] = [stage]
            if labels is None or self.guidance == 1 or not self.interval[0] <= sigma <= self.interval[1]:
                return self.denoiser(x, sigma, labels)
            # Ho and Salimans 2022, Eq. 6, in D; the interval is that of Kynkäänniemi et al. 2024.
            both = torch.cat((torch.full_like(labels, self.denoiser.classes), labels))
            without, given = self.denoiser(torch.cat((x, x)), sigma, both).chunk(2)
            return torch.lerp(without, given, self.guidance)

        return call


def _schedule(
    denoiser: Denoiser, solver: str, steps: int, spacing: str | None, churn: float, eta: float
) -> tuple[Solver, list[float]]:
    """The solver and its levels, on the host."""
    chosen = find_solver(solver, churn=churn, eta=eta)
    return chosen, sigma_schedule(denoiser.process, spacing or chosen.default_spacing, steps).tolist()


def _labels(denoiser: Denoiser, labels: Labels | None, num: int) -> Tensor | None:
    """One label for each image; none if the model is unconditional or no class is asked for."""
    if labels is None:
        return None
    if denoiser.classes == 0:
        raise ConfigError("labels were given, but the model is unconditional (model.classes is 0)")
    tensor = torch.as_tensor(labels, dtype=torch.int64)
    tensor = tensor.expand(num) if tensor.ndim == 0 else tensor
    check(len(tensor) == num, "labels", f"one class for each of {num} images", f"{len(tensor)} classes")
    low, high = int(tensor.min()), int(tensor.max())
    check(low >= 0 and high <= denoiser.classes, "labels", f"between 0 and {denoiser.classes - 1} "
          f"({denoiser.classes} for none)", low if low < 0 else high)  # fmt: skip
    return tensor


def _batches(
    call: _Call, solver: Solver, sigmas: list[float], seeds: Tensor, labels: Tensor | None, batch_size: int,
    callback: Callback | None,
) -> Iterator[Batch]:  # fmt: skip
    """Draw the images, one batch after the other; in smaller ones where memory does not suffice."""
    device, start = call.denoiser.device, 0
    try:
        while start < len(seeds):
            part, images = slice(start, start + batch_size), None
            tried = len(seeds[part])
            known = None if labels is None else labels[part].to(device)
            try:
                with _evaluation(call.denoiser):
                    images = _draw(call, solver, sigmas, seeds[part].to(device), known, callback)
            except _Stopped:
                return
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error) or tried == 1 or callback is not None:  # a callback saw half of it
                    raise
            if images is None:  # only here, as the error holds on to the memory of what failed
                batch_size = (tried + 1) // 2
                if device.type == "cuda":
                    torch.cuda.empty_cache()
                warnings.warn(
                    f"memory does not suffice for {tried} images at once: going on with {batch_size}", stacklevel=2
                )
                continue
            # A copy made outside inference mode is an ordinary tensor, which callers may change or differentiate.
            yield seeds[part].clone(), images.clone()
            start += batch_size
    finally:
        if call.offload:
            call.denoiser.offload(None)


def _draw(
    call: _Call, solver: Solver, sigmas: list[float], seeds: Tensor, labels: Tensor | None, callback: Callback | None
) -> Tensor:
    """One batch, from its seeds to images on the CPU."""
    shape = call.denoiser.shape

    def noise(step: int) -> Tensor:
        return rng.normal(0, f"step-{step}", seeds, shape)

    x = rng.normal(0, "prior", seeds, shape) * sigmas[0]
    x = solver.run(call.denoise(labels), x, sigmas, noise=noise, callback=callback)
    images = x.float().cpu()
    finite = images.isfinite().flatten(1).all(dim=1)
    if not finite.all():
        seed = int(seeds.cpu()[~finite][0])
        raise NumericsError(f"the image of seed {seed} is not finite with solver {solver.name}; is the model trained?")
    return images


@contextmanager
def _evaluation(denoiser: Denoiser) -> Iterator[None]:
    """Evaluation and inference mode; every module's own mode is restored."""
    training = [module for module in denoiser.modules() if module.training]
    denoiser.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module in training:
            module.training = True
