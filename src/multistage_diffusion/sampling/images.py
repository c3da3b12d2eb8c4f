"""From a denoiser to images: seeds, batches, guidance, offloading and the account of what was called."""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from multistage_diffusion.classes import TrainedClasses
from multistage_diffusion.conditioning import Conditioning
from multistage_diffusion.devices import evaluating
from multistage_diffusion.errors import ConfigError, NumericsError, is_out_of_memory, suggest
from multistage_diffusion.noise import Process
from multistage_diffusion.records import check, check_count, check_seed
from multistage_diffusion.sampling.editing import NoiseSource, Start, seeded
from multistage_diffusion.sampling.reuse import reusing
from multistage_diffusion.sampling.sampler import Sampler, SamplerOptions
from multistage_diffusion.sampling.steps import Callback
from multistage_diffusion.stages import Stages

Seeds = Sequence[int] | Int[Tensor, " num"]
Labels = int | str | Sequence[int] | Sequence[str] | Int[Tensor, " num"]
_MOST = 10**9  # images of one call
SeedsAndImages = tuple[Int[Tensor, " batch"], Float[Tensor, "batch channels height width"]]


@runtime_checkable
class SampledDenoiser(Protocol):
    """What sampling needs of a denoiser: a `Denoiser`, or a module of one's own that has the same attributes."""

    @property
    def process(self) -> Process:
        """Gives the schedule."""
        ...

    @property
    def stages(self) -> Stages:
        """The partition of the noise levels."""
        ...

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        ...

    @property
    def classes(self) -> int:
        """Number of class labels; 0 if unconditional."""
        ...

    @property
    def device(self) -> torch.device:
        """Where images are drawn."""
        ...

    @property
    def label_optional(self) -> bool:
        """Whether a conditional model draws images without a class."""
        ...

    @property
    def sampler(self) -> Sampler | None:
        """How images are drawn by default."""
        ...

    def __call__(self, x: Tensor, sigma: float, conditioning: Conditioning, /) -> Tensor:
        """Estimate the clean images in x = x0 + sigma eps."""
        ...

    def offload(self, stage: int | None) -> None:
        """Keep one stage's weights on the device, or, for none, all."""
        ...

    def modules(self) -> Iterator[nn.Module]:
        """All modules, whose modes are restored."""
        ...

    def eval(self) -> Any:
        """Evaluation mode."""
        ...


@dataclass(frozen=True)
class Samples:
    """Images and what they cost.

    Attributes:
        images: float32 on the CPU, nominally in [-1, 1], not clipped.
        seeds: The seed of each image.
        nfe: Network evaluations of each image; a guided one, which evaluates the network twice, counts once.
        seconds: Wall time.
        stage_calls: How many of the `nfe` evaluations each stage had, stage 0 first.
        encoder_passes: How many of the `nfe` evaluations the encoder ran in; fewer where its features are reused.
    """

    images: Float[Tensor, "num channels height width"]
    seeds: tuple[int, ...]
    nfe: int
    seconds: float
    stage_calls: tuple[int, ...]
    encoder_passes: int


def sample(
    denoiser: SampledDenoiser,
    num: int = 16,
    *,
    sampler: Sampler | None = None,
    seed: int = 0,
    seeds: Seeds | None = None,
    labels: Labels | None = None,
    start: Start | None = None,
    batch_size: int = 256,
    offload: bool = False,
    callback: Callback | None = None,
    stop: Callable[[], bool] | None = None,
    **options: Any,
) -> Samples:
    """Draw images: `Sampler.draw` with the sampler that the denoiser's run was configured with, or changes of it.

    Args:
        denoiser: The model.
        num: Number of images, unless `seeds` says it.
        sampler: How to draw; by default as `denoiser.sampler` says, or as `Sampler()`.
        seed: Seed of the first image; the others follow.
        seeds: The seed of each image, in place of `num` and `seed`.
        labels: Class of all images, or of each, by number or name; only for a conditional model, where none draws
            without a class.
        start: Images to begin from, in place of noise alone: image to image, inpainting.
        batch_size: Images drawn at once; fewer, with a warning, where memory does not suffice.
        offload: Keep only the decoder in use on the device.
        callback: Sees every step of every batch.
        stop: Asked before every network evaluation; once true, the images finished so far are returned.
        **options: Options of `Sampler` in place of the sampler's: solver, steps, spacing, churn, eta, guidance,
            guidance_interval.

    Returns:
        The images, with their seeds and cost.

    Raises:
        ConfigError: An option out of range, or seeds, labels or images to start from that the model cannot take.
        NumericsError: An image is not finite.
    """
    check(isinstance(denoiser, SampledDenoiser), "denoiser", "a denoiser, as load_run(RUN).denoiser is", denoiser)
    names = [option.name for option in fields(Sampler)]
    for name in options:
        if name not in names:
            raise ConfigError(f"sample has no option {name}{suggest(name, names)}")
    sampler = SamplerOptions(**options).apply(sampler or denoiser.sampler or Sampler())
    if seeds is None:
        seeds = consecutive_seeds(seed, num)
    return Drawing(sampler, denoiser, offload, callback, stop, start).samples(seeds, labels, batch_size)


def consecutive_seeds(seed: int, num: int) -> Int[Tensor, " num"]:
    """The seeds of `num` images, from the first one's.

    Raises:
        ConfigError: There are none, or they are no whole numbers in [0, 2^63).
    """
    check_count(num, "num")
    check(num <= _MOST, "num", f"at most {_MOST:,}", num)
    check_seed(seed, num)
    return torch.arange(num) + seed


class _Stopped(Exception):  # noqa: N818  (no error)
    """The caller asked to stop within a batch."""


@dataclass(frozen=True)
class Drawing:
    """What `Sampler.draw` and `Sampler.batches` do, with their arguments."""

    sampler: Sampler
    denoiser: SampledDenoiser
    offload: bool = False
    callback: Callback | None = None
    stop: Callable[[], bool] | None = None
    start: Start | None = None
    noise: NoiseSource = seeded
    _passes: list[int] = field(default_factory=list)  # of the encoder in each batch, where its features are reused

    def samples(self, seeds: Seeds, labels: Labels | None, batch_size: int) -> Samples:
        """All images, and the account of them."""
        begin, denoiser = time.perf_counter(), self.denoiser
        drawn = list(self.batches(seeds, labels, batch_size))
        process, stages, sampler = denoiser.process, denoiser.stages, self.sampler
        levels = sampler.evaluations(process) if self.start is None else self.start.evaluations(sampler, process)
        stage_calls = tuple(Counter(map(stages.of, levels))[stage] for stage in range(len(stages)))
        images = torch.cat([image for _, image in drawn]) if drawn else torch.zeros(0, *denoiser.shape)
        finished = tuple(seed for batch, _ in drawn for seed in batch.tolist())
        nfe, seconds = sum(stage_calls), time.perf_counter() - begin
        return Samples(images, finished, nfe, seconds, stage_calls, max(self._passes, default=nfe))

    def batches(self, seeds: Seeds, labels: Labels | None, batch_size: int) -> Iterator[SeedsAndImages]:
        """The images batch by batch; the arguments are checked at the call."""
        check_count(batch_size, "batch-size")
        seeds = _seeds(seeds)
        labels = _labels(self.denoiser, labels, len(seeds))
        _check_guidance(self.sampler.guidance, self.denoiser, labels)
        if self.start is not None:
            self.start.check(self.sampler, self.denoiser.process, self.denoiser.shape, len(seeds))
        return self._batches(seeds, labels, batch_size)

    def _batches(self, seeds: Tensor, labels: Tensor | None, batch_size: int) -> Iterator[SeedsAndImages]:
        """One batch after the other; smaller ones where memory does not suffice."""
        denoiser, start = self.denoiser, 0
        device = denoiser.device
        try:
            while start < len(seeds):
                rows, images = slice(start, start + batch_size), None
                count = len(seeds[rows])
                batch_labels = None if labels is None else labels[rows].to(device)
                try:
                    with (
                        evaluating(denoiser),
                        torch.inference_mode(),
                        reusing(denoiser, self.sampler.trunk_every) as encoders,
                    ):
                        images = self._batch(seeds[rows].to(device), batch_labels, rows)
                    if encoders:
                        self._passes.append(sum(encoder.passes for encoder in encoders))
                except _Stopped:
                    return
                except (MemoryError, RuntimeError) as error:
                    # A callback saw part of the batch already, and would see it again.
                    if not is_out_of_memory(error) or count == 1 or self.callback is not None:
                        raise
                if images is None:  # only here, as the error holds on to the memory of what failed
                    batch_size = (count + 1) // 2
                    if device.type == "cuda":
                        torch.cuda.empty_cache()
                    warnings.warn(
                        f"memory does not suffice for {count} images at once: going on with {batch_size}", stacklevel=2
                    )
                    continue
                # A copy made outside inference mode is an ordinary tensor, which callers may change or differentiate.
                yield seeds[rows].clone(), images.clone()
                start += batch_size
        finally:
            if self.offload:
                denoiser.offload(None)

    def _batch(self, seeds: Tensor, labels: Tensor | None, rows: slice) -> Tensor:
        """One batch, from its seeds to images on the CPU."""
        sampler, denoise = self.sampler, self.denoise(labels)

        def fresh(stream: str) -> Tensor:
            return self.noise(stream, seeds, self.denoiser.shape)

        options: dict[str, Any] = {"noise": lambda step: fresh(f"step-{step}"), "callback": self.callback}
        if self.start is None:
            levels = sampler.levels(self.denoiser.process).tolist()
            x = sampler.solve(denoise, fresh("prior") * levels[0], levels, **options)
        else:
            levels = sampler.levels(self.denoiser.process, self.start.sigma).tolist()
            x = self.start.draw(rows, sampler.solve, denoise, levels, fresh, **options)
        images = x.float().cpu()
        finite = images.isfinite().flatten(1).all(dim=1)
        if not finite.all():
            seed, solver = int(seeds.cpu()[~finite][0]), self.sampler.name
            raise NumericsError(f"the image of seed {seed} is not finite with solver {solver}; {self._suspects()}")
        return images

    def _suspects(self) -> str:
        """What may have made an image that is not finite."""
        sampler, precision = self.sampler, getattr(self.denoiser, "precision", "fp32")
        changed = [f"guidance {sampler.guidance:g}"] if sampler.guidance != 1 else []
        changed += [f"precision {precision}"] if precision == "fp16" else []
        return f"draw without {' and '.join(changed)}" if changed else "is the model trained?"

    def denoise(self, labels: Tensor | None) -> Callable[[Tensor, float], Tensor]:
        """The function that a solver gets, for one batch."""
        denoiser, sampler = self.denoiser, self.sampler
        stage_on_device: int | None = None

        def denoise(x: Tensor, sigma: float) -> Tensor:
            nonlocal stage_on_device
            if self.stop is not None and self.stop():
                raise _Stopped
            stage = denoiser.stages.of(sigma)
            if self.offload and stage != stage_on_device:
                denoiser.offload(stage)
                stage_on_device = stage
            if labels is None or not sampler.guides(sigma):
                return denoiser(x, sigma, Conditioning(labels))
            # D = D_none + guidance (D_class - D_none), Eq. 6 of Ho and Salimans 2022 in D, both in one batch; the
            # interval is that of Kynkäänniemi et al. 2024.
            both = Conditioning(torch.cat((torch.full_like(labels, denoiser.classes), labels)))
            without_class, with_class = denoiser(torch.cat((x, x)), sigma, both).chunk(2)
            return torch.lerp(without_class, with_class, float(sampler.guidance))

        return denoise


def _seeds(seeds: Seeds) -> Tensor:
    """The seed of each image, int64 on the CPU."""
    check(hasattr(seeds, "__len__") and getattr(seeds, "ndim", 1) == 1, "seeds", "a row of whole numbers", seeds)
    check(len(seeds) >= 1, "seeds", "at least one", "none")
    if not isinstance(seeds, Tensor):
        for seed in seeds:
            check_seed(seed)
    seeds = _whole_numbers(seeds, "seeds")
    check(seeds.ndim == 1, "seeds", "a row of whole numbers", f"the shape {tuple(seeds.shape)}")
    check_seed(int(seeds.min()))
    return seeds


def _labels(denoiser: SampledDenoiser, labels: Labels | None, num: int) -> Tensor | None:
    """One label for each image, int64 on the CPU; none if the model is unconditional or no class is asked for."""
    if labels is None:
        return None
    if denoiser.classes == 0:
        raise ConfigError("labels were given, but the model is unconditional (model.classes is 0)")
    record = getattr(denoiser, "trained_classes", None)  # a module of one's own need not have it
    labels = _whole_numbers(_without_names(labels, record), "labels")
    labels = labels.expand(num) if labels.ndim == 0 else labels
    check(labels.ndim == 1 and len(labels) == num, "labels", f"one class for each of {num} images", _size(labels))
    low, high = int(labels.min()), int(labels.max())
    out = low if low < 0 else high
    check(low >= 0 and high < denoiser.classes, "labels", f"between 0 and {denoiser.classes - 1}, or none", out)
    if record is not None:
        record.require_seen(labels)
    return labels


def _without_names(labels: Any, record: TrainedClasses | None) -> Any:
    """Labels of which some are names of classes, as numbers."""
    if isinstance(labels, str):
        if record is None and labels.isdecimal():
            return int(labels)
        if record is None:
            raise ConfigError(f"the model does not record the names of its classes, like {labels}; give a number")
        return record.number(labels)
    if isinstance(labels, Sequence):
        return [_without_names(label, record) if isinstance(label, str) else label for label in labels]
    return labels


def _size(labels: Tensor) -> str:
    return f"{len(labels)} classes" if labels.ndim == 1 else f"the shape {tuple(labels.shape)}"


def _whole_numbers(values: Seeds | Labels, name: str) -> Tensor:
    """The numbers as int64 on the CPU; fractions are refused and not rounded."""
    try:
        tensor = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ConfigError(f"{name} must be whole numbers, got {str(values)[:60]}") from error
    whole = not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
    check(whole, name, "whole numbers", tensor.dtype)
    return tensor.long().cpu()


def _check_guidance(guidance: float, denoiser: SampledDenoiser, labels: Tensor | None) -> None:
    """Refuse guidance without classes, and a comparison with images without a class where none was trained on."""
    if guidance != 1 and labels is None:
        raise ConfigError(f"guidance {guidance} needs a class for each image; give labels (--class), or guidance 1")
    if denoiser.classes == 0 or denoiser.label_optional:
        return
    trained = "the model was trained with training.label-dropout 0, so it knows no image without a class"
    if labels is None:
        raise ConfigError(f"{trained}; give labels (--class)")
    if guidance != 1:
        raise ConfigError(f"{trained}, and guidance compares with one; sample with guidance 1")
