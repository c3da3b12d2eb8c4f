"""One training step after the other. Knows nothing of files: `run.py` adds the run directory around it."""

from __future__ import annotations

import contextlib
import math
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from multistage_diffusion import rng
from multistage_diffusion.config import RunConfig
from multistage_diffusion.data.examples import Examples
from multistage_diffusion.data.feed import make_feed
from multistage_diffusion.errors import ConfigError, NumericsError
from multistage_diffusion.loss import denoising_loss
from multistage_diffusion.models.denoiser import Denoiser
from multistage_diffusion.process_group import SINGLE, ProcessGroup
from multistage_diffusion.stages import Stages
from multistage_diffusion.training.batches import Batch, Batches
from multistage_diffusion.training.distributed import local, parallelise, require_same_weights, whole_tensor
from multistage_diffusion.training.ema import EMA, HalfLife, Power
from multistage_diffusion.training.precision import LossScale, require_few

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@dataclass(frozen=True)
class StepResult:
    """What one step did.

    Attributes:
        step: Steps taken, this one included.
        images: Images seen, this step's included.
        loss: Importance-weighted mean loss of the batch.
        stage_loss: Mean loss of each stage's images, none where the batch had none of the stage.
        learning_rate: The step's learning rate.
        gradient_norm: Norm of the gradient before clipping.
        clipped: Whether the gradient was clipped.
        overflows: How often the step was repeated at half the loss scale, because gradients overflowed in fp16.
        stop: Number of the signal that asks to stop, heard by any of several processes; none: go on.
    """

    step: int
    images: int
    loss: float
    stage_loss: tuple[float | None, ...]
    learning_rate: float
    gradient_norm: float
    clipped: bool = False
    overflows: int = 0
    stop: int | None = None


def build_denoiser(config: RunConfig, shape: tuple[int, int, int], found: Stages | None = None) -> Denoiser:
    """A freshly initialised denoiser; the weights depend on the configuration and its seed alone.

    Args:
        config: The run.
        shape: (C, H, W) of an image.
        found: The partition with its provenance, if there is one; its edges are those of the configuration.

    Returns:
        The denoiser, on the CPU.
    """
    stages = found if found is not None and found.edges == config.stages.edges else Stages(config.stages.edges)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.training.seed)  # torch.manual_seed would seed the GPUs, too
        return Denoiser(config.model, config.process, shape, stages)


@final
class Trainer:
    """Network, average, optimiser and the number of steps taken.

    Args:
        config: The run.
        data: Training images, or their latents (with the mirrored ones among them, if there is to be a flip).
        device: Where to train.
        found: The partition with its provenance, if there is one.
        processes: The processes that train together; each of them makes its trainer.

    Raises:
        ConfigError: The configuration does not fit the data, or the batch has fewer images than parts.

    Attributes:
        denoiser: The trained denoiser.
        ema: The average of its weights.
        powers: Its power-function averages, by their length.
        scale: The loss scale of fp16; none in other precisions.
        lap: Called with the name of each part of a step as it ends; a profile listens there.
        step: Steps taken.
        stage_images: Images that each stage was trained on.
    """

    def __init__(
        self, config: RunConfig, data: Examples, device: torch.device | str = "cpu", found: Stages | None = None,
        processes: ProcessGroup = SINGLE,
    ) -> None:  # fmt: skip
        self.config, self.device, self.processes = config, torch.device(device), processes
        training, engine = config.training, config.engine
        parts = processes.size * engine.gradient_accumulation
        if training.batch_size < parts:
            raise ConfigError(
                f"training.batch-size {training.batch_size} is less than {parts}, one image for each of "
                f"{processes.size} processes and engine.gradient-accumulation {engine.gradient_accumulation}"
            )
        self.denoiser = build_denoiser(config, data.shape, found).to(self.device).train()
        self.batches = Batches(
            data, self.denoiser.process, self.denoiser.stages, training,
            flip=config.data.flip and config.data.autoencoder is None,
            augment_probability=config.data.augment_probability, classes=config.model.classes, device=self.device,
            feed=make_feed(data, self.device, config.data),
        )  # fmt: skip
        self._model = self._engine()
        self.scale = LossScale() if engine.precision == "fp16" else None
        self._flags = torch.cat((torch.zeros(1, 2), torch.eye(2))).to(self.device)
        self.ema = EMA(self.denoiser.network, HalfLife(training.ema_half_life, training.ema_ramp_up))
        self.powers = {length: EMA(self.denoiser.network, Power(length)) for length in training.sigma_rel}
        kind = torch.optim.AdamW if training.weight_decay else torch.optim.Adam
        self.optimizer = kind(
            self.denoiser.network.parameters(), lr=training.learning_rate, betas=training.betas,
            weight_decay=training.weight_decay, fused=self.device.type in ("cpu", "cuda"),
        )  # fmt: skip
        self.lap: Callable[[str], None] = _nobody_listens
        self.step = 0
        self.stage_images = [0] * len(self.denoiser.stages)

    @property
    def images(self) -> int:
        """Images seen."""
        return self.step * self.config.training.batch_size

    def run(self, steps: int, asked: Sequence[int] = ()) -> Iterator[StepResult]:
        """Train until `steps` steps have been taken in all.

        Args:
            steps: Where to stop.
            asked: Signals that this process has received; grows meanwhile. Several processes tell one another.

        Yields:
            The result of each step, after it.

        Raises:
            NumericsError: The loss or the gradient is not finite; the weights are those before the step.
        """
        while self.step < steps:
            yield self._advance(asked)

    def averaged(self) -> Denoiser:
        """A copy of the denoiser with the averaged weights, in evaluation mode; all processes must call.

        Returns:
            A denoiser that shares nothing with the trained one.

        Raises:
            PeerError: Memory did not suffice in another process.
        """
        with self.processes.all_or_none():
            copy = build_denoiser(self.config, self.denoiser.shape, self.denoiser.stages).to(self.device)
        self.ema.copy_to(copy.network)
        return copy.eval()

    def _engine(self) -> nn.Module:
        """Prepare the network as the engine's options say, before anything refers to its weights."""
        engine, network = self.config.engine, self.denoiser.network
        torch.set_float32_matmul_precision("high" if engine.tf32 else "highest")  # of the process, not of a network
        self.denoiser.precision = engine.precision
        if engine.channels_last:
            network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        if engine.activation_checkpointing:
            network.recompute()
        if engine.compile:
            network.compile_parts()
        return parallelise(
            _Losses(self.denoiser), network, self.processes, self.device, engine.parallel,
            unused=self.config.training.batches != "mixed" and len(self.denoiser.stages) > 1,
        )  # fmt: skip

    def _advance(self, asked: Sequence[int]) -> StepResult:
        training, network = self.config.training, self.denoiser.network
        overflows = 0
        while True:
            figures, whole = self._gradients(asked)
            gradients = [p.grad for p in network.parameters() if p.grad is not None]
            if self.scale is not None:
                torch._foreach_mul_(gradients, 1.0 / self.scale.value)  # pyright: ignore[reportPrivateImportUsage]
            norm = whole_tensor(torch.nn.utils.get_total_norm(gradients))
            # Read at once, as each read waits for the device, and before the update, which a bad value must not reach.
            norm_read, loss_read, *rest = torch.cat((norm[None], figures)).tolist()
            stage_loss = _spread(rest, whole)
            self._require_finite(stage_loss)
            self.lap("norm of the gradient, figures")
            if math.isfinite(norm_read):
                break
            if self.scale is None:
                raise NumericsError(
                    f"gradient norm is {norm_read} at step {self.step + 1}; the weights were not updated; lower "
                    "training.learning-rate"
                )
            overflows += 1  # the step is repeated at half the scale, so that no image is lost
            require_few(overflows, self.step + 1)
            self.scale.shrink()
        clip = training.clip_norm
        if clip is not None and norm_read + 1e-6 > clip:  # as torch has it; below, all factors are 1
            torch.nn.utils.clip_grads_with_norm_(network.parameters(), clip, norm)
            self.lap("clipping")
        seen = self.images + training.batch_size
        rate = training.learning_rate * min(1.0, seen / max(training.warmup_images, 1))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.lap("optimiser")
        for average in (self.ema, *self.powers.values()):
            average.update(seen, training.batch_size)
        self.lap("averages")
        if self.scale is not None:
            self.scale.keep()
        self.step += 1
        self.stage_images = [total + count for total, count in zip(self.stage_images, whole, strict=True)]
        if self.step % training.log_every == 0:
            whole_ones = {name: tensor for name, tensor in network.named_parameters() if local(tensor) is tensor}
            require_same_weights(self.processes, whole_ones, self.step)
        return StepResult(
            self.step, self.images, loss_read, stage_loss, rate, norm_read,
            clipped=clip is not None and norm_read > clip, overflows=overflows, stop=self._heard(rest),
        )  # fmt: skip

    def _gradients(self, asked: Sequence[int]) -> tuple[Tensor, tuple[int, ...]]:
        """Gradients of the whole batch's loss, over all processes and parts.

        Returns:
            The loss, the mean loss of each stage in the batch, and for several processes the signals that they heard;
            and how many images of each stage there are.
        """
        processes, training, turns = self.processes, self.config.training, self.config.engine.gradient_accumulation
        self.optimizer.zero_grad(set_to_none=True)
        figures, whole = torch.empty(0), ()
        for turn in range(turns):
            batch = self.batches(self.step, turn * processes.size + processes.rank, turns * processes.size)
            dropout = self.config.model.dropout > 0
            number = rng.bits(training.seed, "dropout", batch.index, 1)[:, 0] if dropout else None
            self.lap("batch")
            with self._synchronised(turn + 1 == turns):
                losses = self._model(batch, number)
                loss = (batch.weight * losses).sum() / training.batch_size
                self.lap("forward: loss")
                factor = processes.size * (
                    self.scale.value if self.scale is not None else 1.0
                )  # processes are averaged
                (loss if factor == 1.0 else loss * factor).backward()
                self.lap("backward")
            rows = zip(losses.detach().split(batch.counts), batch.whole, batch.real, strict=True)
            means = [part.sum() / count if real else part.new_zeros(()) for part, count, real in rows if count]
            summands = torch.stack([loss.detach(), *means])
            figures, whole = (figures + summands, whole) if turn else (summands, batch.whole)
        if processes.size > 1:
            flags = self._flags[1 + _SIGNALS.index(asked[0]) if asked else 0]
            figures = processes.all_reduce(torch.cat((figures, flags)))
        return figures, whole

    def _synchronised(self, last: bool) -> contextlib.AbstractContextManager[object]:
        """Where gradients are summed over the processes: DDP does so once a step; FSDP each time, to free memory."""
        if last or not isinstance(self._model, DistributedDataParallel):
            return contextlib.nullcontext()
        return self._model.no_sync()

    def _heard(self, rest: Sequence[float]) -> int | None:
        """The signal that any of several processes heard; all know at the same step."""
        if self.processes.size == 1:
            return None
        return next((int(number) for number, heard in zip(_SIGNALS, rest[-2:], strict=True) if heard), None)

    def _require_finite(self, stage_loss: tuple[float | None, ...]) -> None:
        """Stop before the update where a loss is not finite."""
        for stage, mean in enumerate(stage_loss):
            if mean is not None and not math.isfinite(mean):
                low, high = self.denoiser.stages.bounds(stage)
                raise NumericsError(
                    f"loss is {mean} at step {self.step + 1} in stage {stage} (sigma {low:g} to {high:g}); the weights "
                    "were not updated; lower training.learning-rate or training.clip-norm, or look at the data"
                )


@final
class _Losses(nn.Module):
    """What is called in training, whole: one forward pass for each backward pass, as DDP wants it."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, batch: Batch, number: Tensor | None) -> Tensor:
        return denoising_loss(
            self.denoiser, batch.images, batch.noise, batch.sigma, batch.labels, augment=batch.augment,
            counts=batch.counts, number=number,
        )  # fmt: skip


def _nobody_listens(part: str) -> None:
    """What a part's end is told to where no profile listens."""


def _spread(means: Sequence[float], counts: tuple[int, ...]) -> tuple[float | None, ...]:
    """One entry a stage, none where it has no rows."""
    remaining = iter(means)
    return tuple(next(remaining) if count else None for count in counts)
