"""One training step after the other. Knows nothing of files: `run.py` adds the run directory around it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import torch

from multistage_diffusion import rng
from multistage_diffusion.config import RunConfig
from multistage_diffusion.data.latents import Examples
from multistage_diffusion.errors import NumericsError
from multistage_diffusion.loss import denoising_loss
from multistage_diffusion.models.denoiser import Denoiser
from multistage_diffusion.stages import Stages
from multistage_diffusion.training.batches import Batches
from multistage_diffusion.training.ema import EMA, HalfLife, Power


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
    """

    step: int
    images: int
    loss: float
    stage_loss: tuple[float | None, ...]
    learning_rate: float
    gradient_norm: float


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

    Raises:
        ConfigError: The configuration does not fit the data.

    Attributes:
        denoiser: The trained denoiser.
        ema: The average of its weights.
        powers: Its power-function averages, by their length.
        step: Steps taken.
        stage_images: Images that each stage was trained on.
    """

    def __init__(
        self, config: RunConfig, data: Examples, device: torch.device | str = "cpu", found: Stages | None = None
    ) -> None:
        self.config, self.device = config, torch.device(device)
        self.denoiser = build_denoiser(config, data.shape, found).to(self.device).train()
        training = config.training
        self.batches = Batches(
            data, self.denoiser.process, self.denoiser.stages, training,
            flip=config.data.flip and config.data.autoencoder is None,
            augment_probability=config.data.augment_probability, classes=config.model.classes, device=self.device,
        )  # fmt: skip
        self.ema = EMA(self.denoiser.network, HalfLife(training.ema_half_life, training.ema_ramp_up))
        self.powers = {length: EMA(self.denoiser.network, Power(length)) for length in training.ema_lengths}
        kind = torch.optim.AdamW if training.weight_decay else torch.optim.Adam
        self.optimizer = kind(
            self.denoiser.network.parameters(), lr=training.learning_rate, betas=training.betas,
            weight_decay=training.weight_decay, fused=self.device.type in ("cpu", "cuda"),
        )  # fmt: skip
        self.step = 0
        self.stage_images = [0] * len(self.denoiser.stages)

    @property
    def images(self) -> int:
        """Images seen."""
        return self.step * self.config.training.batch_size

    def run(self, steps: int) -> Iterator[StepResult]:
        """Train until `steps` steps have been taken in all.

        Args:
            steps: Where to stop.

        Yields:
            The result of each step, after it.

        Raises:
            NumericsError: The loss or the gradient is not finite; the weights are those before the step.
        """
        while self.step < steps:
            yield self._advance()

    def averaged(self) -> Denoiser:
        """A copy of the denoiser with the averaged weights, in evaluation mode.

        Returns:
            A denoiser that shares nothing with the trained one.
        """
        copy = build_denoiser(self.config, self.denoiser.shape, self.denoiser.stages).to(self.device)
        self.ema.copy_to(copy.network)
        return copy.eval()

    def _advance(self) -> StepResult:
        training = self.config.training
        batch = self.batches(self.step)
        network = self.denoiser.network
        with self._dropout_seeded():
            losses = denoising_loss(
                self.denoiser, batch.images, batch.noise, batch.sigma, batch.labels, augment=batch.augment,
                counts=batch.counts,
            )  # fmt: skip
        loss = (batch.weight * losses).mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in network.parameters() if p.grad is not None])
        means = [part.mean() for part in losses.detach().split(batch.counts) if len(part)]
        # Read at once, as each read waits for the device, and before the update, which a bad value must not reach.
        loss_read, norm_read, *means_read = torch.stack([loss.detach(), norm, *means]).tolist()
        stage_loss = _spread(means_read, batch.counts)
        self._require_finite(stage_loss, norm_read)
        if training.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(network.parameters(), training.clip_norm, norm)
        seen = self.images + training.batch_size
        rate = training.learning_rate * min(1.0, seen / max(training.warmup_images, 1))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        for average in (self.ema, *self.powers.values()):
            average.update(network, seen, training.batch_size)
        self.step += 1
        self.stage_images = [total + count for total, count in zip(self.stage_images, batch.counts, strict=True)]
        return StepResult(self.step, self.images, loss_read, stage_loss, rate, norm_read)

    @contextlib.contextmanager
    def _dropout_seeded(self) -> Iterator[None]:
        """Dropout of a step depends on the step alone; the device's generator goes on as if it had not been used."""
        if not self.config.model.dropout:
            yield
            return
        seed = int(rng.bits(self.config.training.seed, "dropout", torch.tensor([self.step]), 1))
        cuda = self.device.type == "cuda"
        with torch.random.fork_rng(devices=[self.device] if cuda else []):
            _generator(self.device).manual_seed(seed)  # torch.manual_seed would seed every other device, too
            yield

    def _require_finite(self, stage_loss: tuple[float | None, ...], norm: float) -> None:
        """Stop before the update where a loss or the gradient is not finite."""
        for stage, mean in enumerate(stage_loss):
            if mean is not None and not math.isfinite(mean):
                low, high = self.denoiser.stages.bounds(stage)
                raise NumericsError(
                    f"loss is {mean} at step {self.step + 1} in stage {stage} (sigma {low:g} to {high:g}); the weights "
                    "were not updated; lower training.learning-rate or training.clip-norm, or look at the data"
                )
        if not math.isfinite(norm):
            raise NumericsError(
                f"gradient norm is {norm} at step {self.step + 1}; the weights were not updated; lower "
                "training.learning-rate"
            )


def _spread(means: list[float], counts: tuple[int, ...]) -> tuple[float | None, ...]:
    """One entry a stage, none where it has no rows."""
    remaining = iter(means)
    return tuple(next(remaining) if count else None for count in counts)


def _generator(device: torch.device) -> torch.Generator:
    """The generator that a device's dropout draws from."""
    if device.type != "cuda":
        return torch.default_generator
    return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
