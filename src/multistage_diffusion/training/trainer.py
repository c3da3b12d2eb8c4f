"""Training, one step after the other. Knows nothing of files: `run.py` adds the run directory around it."""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import final

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import record_function

from multistage_diffusion import rng
from multistage_diffusion.backbones.layers import takes_dropout_seed
from multistage_diffusion.config import AugmentSigns, EngineConfig, TrainingConfig
from multistage_diffusion.data.feed import Feed
from multistage_diffusion.data.user import Data, as_data
from multistage_diffusion.denoiser import Denoiser
from multistage_diffusion.errors import ConfigError, NumericsError
from multistage_diffusion.metrics.cost import Cost, denoiser_cost
from multistage_diffusion.process_group import SINGLE, ProcessGroup
from multistage_diffusion.training.batches import Batch, Batches, with_classes
from multistage_diffusion.training.callbacks import Callback
from multistage_diffusion.training.coupling import Coupling
from multistage_diffusion.training.distributed import local, parallelise, require_same_weights, whole_tensor
from multistage_diffusion.training.ema import EMA, HalfLife, Power
from multistage_diffusion.training.gradients import Gradients, Losses, by_stage
from multistage_diffusion.training.guard import SIGNALS
from multistage_diffusion.training.optimizer import MakeOptimizer, freeze, make_optimizer, parameter_groups, plain_state
from multistage_diffusion.training.precision import LossScale, require_few
from multistage_diffusion.training.quotas import GradientNoise
from multistage_diffusion.training.schedule import learning_rate
from multistage_diffusion.training.weighting import Uncertainty, relative_weight


@dataclass(frozen=True)
class StepResult:
    """What one step did.

    Attributes:
        step: Steps taken, this one included.
        images: Images seen, this step's included.
        loss: Mean loss of the batch, importance-weighted and as `training.weighting` says.
        stage_loss: Mean loss of each stage's images by the process's weight, none where the batch had none of it.
        learning_rate: The step's learning rate.
        gradient_norm: Norm of the gradient before clipping.
        clipped: Whether the gradient was clipped.
        overflows: How often the step was repeated at half the loss scale, because gradients overflowed in fp16.
        stop: Number of the signal that asks to stop, received by any of several processes; none: go on.
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


@final
class Trainer:
    """Trains a denoiser: network, averages, optimiser and the number of steps taken.

    Args:
        denoiser: What is trained, in place; any network, process and stages.
        data: What `as_data` takes: training images, fields, or latents (with the mirrored ones among them, if there is
            to be a flip).
        training: Steps, batches, optimisation, averages.
        engine: How steps are computed.
        flip: Mirror half of the images left to right.
        augment_probability: Probability of each of EDM's geometric augmentations, which the network must be told.
        augment_signs: Signs of their labels.
        feed: Where the images come from; by default from the memory of the device, or from disk if they do not fit.
        optimizer: Makes the optimiser from the parameters (groups of them, if parts have rates of their own); by
            default what `training.optimizer` names. Its learning rate is set in each step.
        device: Where to train; by default where the denoiser is.
        processes: The processes that train together; each of them makes its trainer.
        callbacks: Whose `on_log` takes what a run directory's metrics.jsonl and grids show.

    Raises:
        ConfigError: The options do not fit the data, or the batch has fewer images than micro-batches.

    Attributes:
        ema: The average of the weights.
        powers: Its power-function averages, by their relative width sigma_rel.
        scale: The loss scale of fp16; none in other precisions.
        step: Steps taken.
        stage_images: Images that each stage was trained on.
        trunk_images: Images that the unified network was trained on from which this one branched.
        uncertainty: Mean losses by noise level, where `training.weighting` asks for them.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        data: Data,
        training: TrainingConfig = TrainingConfig(),  # noqa: B008  (frozen)
        engine: EngineConfig = EngineConfig(),  # noqa: B008
        *,
        flip: bool = False,
        augment_probability: float = 0.0,
        augment_signs: AugmentSigns = "edm",
        feed: Feed | None = None,
        optimizer: MakeOptimizer | None = None,
        device: torch.device | str | None = None,
        processes: ProcessGroup = SINGLE,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self.device = denoiser.device if device is None else torch.device(device)
        data = with_classes(denoiser, as_data(data), training.label_dropout)
        self.data, self.training, self.engine, self.processes = data, training, engine, processes
        self.flip, self.augment_probability = flip, augment_probability
        self.augment_signs: AugmentSigns = augment_signs
        self.callbacks = callbacks
        micro_batches = processes.size * engine.gradient_accumulation
        if training.batch_size < micro_batches:
            raise ConfigError(
                f"training.batch-size {training.batch_size} is less than {micro_batches}, one image for each of "
                f"{processes.size} processes and engine.gradient-accumulation {engine.gradient_accumulation}"
            )
        if tuple(denoiser.shape) != tuple(data.shape):
            raise ConfigError(
                f"the denoiser is made for images of shape {tuple(denoiser.shape)}, and {data.name} has "
                f"{tuple(data.shape)} (channels, height, width)"
            )
        # A network that no record can build is copied before the engine changes it, to carry averages.
        self._template = None if denoiser.backbone.builds else copy.deepcopy(denoiser).cpu()
        rates = freeze(denoiser.network, training)
        self.denoiser = denoiser.to(self.device).train()
        self.batches = Batches(
            data,
            denoiser.process,
            denoiser.stages,
            training,
            flip=flip,
            augment_probability=augment_probability,
            augment_signs=augment_signs,
            classes=denoiser.classes,
            device=self.device,
            feed=feed,
        )
        self._dropout = takes_dropout_seed(denoiser.network)
        self._model = self._prepare()
        self.scale = LossScale() if engine.precision == "fp16" else None
        self._signal_flags = torch.eye(len(SIGNALS) + 1)[:, 1:].to(self.device)  # no signal, then each of them
        network = denoiser.network
        self.ema = EMA(network, HalfLife(training.ema_half_life, training.ema_ramp_up))
        self.powers = {width: EMA(network, Power(width)) for width in training.sigma_rel}
        self.user_optimizer = optimizer
        if optimizer:
            self.optimizer = optimizer(parameter_groups(network, rates))
            plain_state(self.optimizer)  # refuses what no checkpoint could hold
        else:
            self.optimizer = make_optimizer(network, rates, training, engine, self.device)
        self._coupling = Coupling(network, training.coupling) if training.coupling and network.stages > 1 else None
        self.step = self.trunk_images = 0
        self.stage_images = [0] * len(denoiser.stages)
        self.uncertainty = Uncertainty(denoiser.process) if training.weighting == "uncertainty" else None
        self.noise = GradientNoise.of(network, training, processes.size)

    @property
    def images(self) -> int:
        """Images seen."""
        return self.step * self.training.batch_size

    @cached_property
    def cost(self) -> Cost:
        """What the network costs; that of a user's is counted once, on the copy, as one in shards cannot be copied."""
        return denoiser_cost(self._template or self.denoiser)

    def run(self, steps: int | None = None, received: Sequence[int] = ()) -> Iterator[StepResult]:
        """Train until `steps` steps have been taken in all.

        Args:
            steps: Where to stop; by default as `training.steps` says.
            received: Signals that this process has received; grows meanwhile. Several processes share what they got.

        Yields:
            The result of each step, after it.

        Raises:
            NumericsError: The loss or the gradient is not finite; the weights are those before the step.
        """
        last = self.training.steps if steps is None else steps
        while self.step < last:
            yield self._advance(received)

    def averaged(self) -> Denoiser:
        """A copy of the denoiser with the averaged weights, in evaluation mode; all processes must call.

        Returns:
            A denoiser that shares nothing with the trained one.

        Raises:
            PeerError: Memory did not suffice in another process.
        """
        with self.processes.all_or_none():
            average = self._copy().to(self.device)
        self.ema.copy_to(average.network)
        average.sampler, average.label_optional = self.denoiser.sampler, self.training.label_dropout > 0
        average.trained_classes = self.denoiser.trained_classes
        return average.eval()

    def whole(self) -> Denoiser:
        """A copy of the denoiser with the trained weights, on the CPU; all processes must call."""
        copied = self._copy()
        state = {name: whole_tensor(tensor).cpu() for name, tensor in self.denoiser.network.state_dict().items()}
        copied.network.load_state_dict(state)
        copied.sampler = self.denoiser.sampler
        return copied

    def _copy(self) -> Denoiser:
        """A denoiser of the same kind, whose weights are to be replaced."""
        if self._template is not None:
            return copy.deepcopy(self._template)
        denoiser = self.denoiser
        with torch.random.fork_rng(devices=[]):
            return Denoiser.from_backbone(denoiser.backbone, denoiser.process, denoiser.shape, denoiser.stages)

    def _prepare(self) -> nn.Module:
        """The network as the engine's options ask, before anything refers to its weights."""
        engine, network = self.engine, self.denoiser.network
        torch.set_float32_matmul_precision("high" if engine.tf32 else "highest")  # of the process, not of a network
        self.denoiser.precision = engine.precision
        if engine.channels_last:
            network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        if engine.activation_checkpointing:
            network.checkpoint_activations()
        if engine.compile:
            network.compile_parts()
        return parallelise(
            Losses(self.denoiser),
            network,
            self.processes,
            self.device,
            engine.parallel,
            unused=self.training.batches != "mixed" and len(self.denoiser.stages) > 1,
        )

    def _advance(self, received: Sequence[int]) -> StepResult:
        """One step: gradients, clipping, update, averages."""
        training, network = self.training, self.denoiser.network
        gradients = self._finite_gradients(received)
        clip = training.clip_norm
        if clip is not None and gradients.norm + 1e-6 > clip:  # as torch has it; below, all factors are 1
            torch.nn.utils.clip_grads_with_norm_(network.parameters(), clip, gradients.norm_tensor)
        seen = self.images + training.batch_size
        rate = learning_rate(training, self.step)
        coupling = self._coupling if seen <= (training.coupling_images or math.inf) else None
        with record_function("optimizer"), coupling() if coupling else contextlib.nullcontext():
            for group in self.optimizer.param_groups:
                group["lr"] = rate * group.get("rate", 1.0)
            self.optimizer.step()
        with record_function("averages"):
            for average in (self.ema, *self.powers.values()):
                average.update(seen, training.batch_size)
        if self.scale is not None:
            self.scale.keep()
        self._learn(gradients.measured)
        self.step += 1
        self.stage_images = [total + count for total, count in zip(self.stage_images, gradients.counts, strict=True)]
        if self.step % training.log_every == 0:
            whole = {name: tensor for name, tensor in network.named_parameters() if local(tensor) is tensor}
            require_same_weights(self.processes, whole, self.step)
        return StepResult(
            step=self.step,
            images=self.images,
            loss=gradients.loss,
            stage_loss=gradients.stage_loss,
            learning_rate=rate,
            gradient_norm=gradients.norm,
            clipped=clip is not None and gradients.norm > clip,
            overflows=gradients.overflows,
            stop=gradients.stop,
        )

    def _learn(self, measured: Tensor) -> None:
        """Take in what the step measured: losses by noise level, and the noise of the gradients."""
        levels = 2 * Uncertainty.cells if self.uncertainty is not None else 0
        if self.uncertainty is not None:
            self.uncertainty.update(measured[:levels], self.training.batch_size)
        if self.noise is not None and self.noise.due(self.step):
            self.noise.update(measured[levels:])
            self.batches.set_shares(self.noise.shares())

    def _finite_gradients(self, received: Sequence[int]) -> Gradients:
        """Gradients of the step; in fp16 again, at half the loss scale, where they overflow: no image is lost."""
        for overflows in itertools.count():
            figures, counts, measured = self._gradients(received)
            gradients = [p.grad for p in self.denoiser.network.parameters() if p.grad is not None]
            if self.scale is not None:
                torch._foreach_mul_(gradients, 1.0 / self.scale.value)  # pyright: ignore[reportPrivateImportUsage]
            norm_tensor = whole_tensor(torch.nn.utils.get_total_norm(gradients))
            # Read at once, as each read waits for the device, and before the update, which a bad value must not reach.
            read = torch.cat((norm_tensor[None], figures, measured)).cpu()
            norm, loss, *rest = read[: 1 + len(figures)].tolist()
            stage_loss = by_stage(rest, counts)
            self._require_finite(stage_loss)
            if math.isfinite(norm):
                measured = read[1 + len(figures) :]
                return Gradients(loss, stage_loss, counts, norm, norm_tensor, measured, overflows, self._signal(rest))
            if self.scale is None:
                raise NumericsError(
                    f"gradient norm is {norm} at step {self.step + 1}; the weights were not updated; lower "
                    "training.learning-rate"
                )
            require_few(overflows + 1, self.step + 1)
            self.scale.shrink()
        raise AssertionError("unreachable")

    def _gradients(self, received: Sequence[int]) -> tuple[Tensor, tuple[int, ...], Tensor]:
        """Gradients of the whole batch's loss, over all processes and micro-batches.

        Returns:
            The loss, the mean loss of each stage in the batch, and for several processes the signals that they got;
            how many images of each stage there are; and what `_learn` takes.
        """
        processes, training, accumulation = self.processes, self.training, self.engine.gradient_accumulation
        noise = self.noise if self.noise is not None and self.noise.due(self.step) else None
        accumulation, first = (accumulation if noise is None else max(accumulation, 2)), list[list[Tensor]]()
        self.optimizer.zero_grad(set_to_none=True)
        figures, counts, measured = torch.empty(0), (), torch.empty(0, device=self.device)
        for turn in range(accumulation):
            with record_function("batch"):
                batch = self.batches(self.step, turn * processes.size + processes.rank, accumulation * processes.size)
                seed = rng.bits(training.seed, "dropout", batch.index, 1)[:, 0] if self._dropout else None
            with self._synchronised(turn + 1 == accumulation or (noise is not None and turn == 0)):
                with record_function("forward"):
                    losses = self._model(batch, seed)
                    loss = (self._weight(batch) * losses).sum() / training.batch_size
                with record_function("backward"):  # the gradients of processes are averaged
                    factor = processes.size * (self.scale.value if self.scale is not None else 1.0)
                    (loss if factor == 1.0 else loss * factor).backward()
            rows = zip(losses.detach().split(batch.counts), batch.batch_counts, batch.counted, strict=True)
            means = [part.sum() / count if counted else part.new_zeros(()) for part, count, counted in rows if count]
            summands = torch.stack([loss.detach(), *means])
            figures, counts = (figures + summands if turn else summands), batch.batch_counts
            first = noise.first_part() if noise is not None and turn == 0 else first
            if self.uncertainty is not None:
                levels = self.uncertainty.figures(batch.sigma.to(losses), losses.detach(), batch.weight > 0)
                measured = measured + levels if turn else levels
        if noise is not None:
            scale = self.scale.value if self.scale is not None else 1.0
            measured = torch.cat((measured, noise.figures(first, counts, accumulation, scale)))
        if processes.size > 1:
            flags = self._signal_flags[1 + SIGNALS.index(received[0]) if received else 0]
            figures = processes.all_reduce(torch.cat((figures, flags)))
            measured = processes.all_reduce(measured) if len(measured) else measured
        return figures, counts, measured

    def _weight(self, batch: Batch) -> Tensor:
        """Weights of the losses: importance weights, times what the weighting makes of the process's weight."""
        if self.training.weighting == "process":
            return batch.weight
        if self.training.weighting == "uncertainty":
            assert self.uncertainty is not None
            return batch.weight * self.uncertainty.factor(batch.sigma).to(batch.weight)
        factor = relative_weight(self.training.weighting, self.denoiser.process, batch.sigma)
        return batch.weight * factor.to(batch.weight)

    def _synchronised(self, last: bool) -> contextlib.AbstractContextManager[object]:
        """Where gradients are summed over the processes: DDP does so once a step; FSDP each time, to free memory."""
        if last or not isinstance(self._model, DistributedDataParallel):
            return contextlib.nullcontext()
        return self._model.no_sync()

    def _signal(self, figures: Sequence[float]) -> int | None:
        """The signal that any of several processes got; all know it at the same step."""
        if self.processes.size == 1:
            return None
        counts = figures[-len(SIGNALS) :]
        return next((int(number) for number, count in zip(SIGNALS, counts, strict=True) if count), None)

    def _require_finite(self, stage_loss: tuple[float | None, ...]) -> None:
        """Stop before the update where a loss is not finite."""
        for stage, mean in enumerate(stage_loss):
            if mean is not None and not math.isfinite(mean):
                low, high = self.denoiser.stages.bounds(stage)
                raise NumericsError(
                    f"loss is {mean} at step {self.step + 1} in stage {stage} (sigma {low:g} to {high:g}); the weights "
                    "were not updated; lower training.learning-rate or training.clip-norm, or look at the data"
                )
