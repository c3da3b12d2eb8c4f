"""Where the time of a training step goes, part by part.

The parts follow one another without a gap, so their times add up to the step's. On a GPU they are taken between events
on its own timeline: nothing waits that would not wait in training, and a part in which the GPU had nothing to do counts
as long as it lasted. How much slower the step is for being watched is measured too.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from multistage_diffusion.config import RunConfig
from multistage_diffusion.data.examples import Examples
from multistage_diffusion.metrics.cost import network_cost
from multistage_diffusion.process_group import SINGLE, ProcessGroup
from multistage_diffusion.training.run import build_trainer
from multistage_diffusion.training.trainer import Trainer

_PASSES = ("batch", "forward", "backward")  # then what follows them, as it came
_BACKWARD, _FIRST_BACKWARD = "backward", "backward: loss"
_WARM_UP = 5  # steps before anything is measured: memory is taken, kernels are chosen and compiled


@dataclass(frozen=True)
class StepProfile:
    """Where the time of a step goes.

    Attributes:
        steps: Steps that were measured.
        seconds: Mean time of a step, unwatched.
        watched_seconds: Mean time of a step while its parts are timed; what `parts` add up to.
        parts: Seconds of each part in a mean step, in their order.
        images_per_second: Images trained on, unwatched.
        tflops: Achieved 10^12 FLOPs a second, counting those of the network's forward and backward pass.
        gpu_memory_gib: Most memory that torch held of the GPU; none on a CPU.
    """

    steps: int
    seconds: float
    watched_seconds: float
    parts: dict[str, float]
    images_per_second: float
    tflops: float
    gpu_memory_gib: float | None


def profile(
    config: RunConfig,
    data: Examples,
    *,
    device: torch.device | str = "cpu",
    steps: int = 20,
    processes: ProcessGroup = SINGLE,
) -> StepProfile:
    """Train for a few steps, and time them; nothing is written.

    Args:
        config: The run.
        data: Its images or latents.
        device: Where to train.
        steps: Steps to measure unwatched, and as many watched.
        processes: The processes that train together; each of them profiles itself.

    Returns:
        The profile of this process.

    Raises:
        ConfigError: The configuration does not fit the data.
    """
    trainer = build_trainer(config, data, device=device, processes=processes)
    clock = _Clock(trainer.device)
    _run(trainer, _WARM_UP)
    clock.wait()
    begin, seen = time.perf_counter(), list(trainer.stage_images)
    _run(trainer, steps)
    clock.wait()
    seconds = (time.perf_counter() - begin) / steps
    spent = [now - before for now, before in zip(trainer.stage_images, seen, strict=True)]
    flops = network_cost(config.model, data.shape).training_flops(spent) / processes.size / steps
    _listen(trainer, clock)
    _run(trainer, 1)  # one more, as the first timed call of each part is slower
    clock.start()
    _run(trainer, steps)
    parts = {name: total / steps for name, total in clock.totals().items()}
    memory = torch.cuda.max_memory_reserved(trainer.device) / 2**30 if trainer.device.type == "cuda" else None
    return StepProfile(
        steps, seconds, sum(parts.values()), parts, config.training.batch_size / seconds, flops / seconds / 1e12, memory
    )


def _run(trainer: Trainer, steps: int) -> None:
    for _ in trainer.run(trainer.step + steps):
        pass


@final
class _Clock:
    """The ends of parts, as they come; read at the very end."""

    def __init__(self, device: torch.device) -> None:
        self._gpu = device if device.type == "cuda" else None
        self._laps: list[tuple[str, Any]] = []
        self._backward = _FIRST_BACKWARD  # what the backward pass is at

    def start(self) -> None:
        """Forget what came before."""
        self._laps.clear()
        self.lap("")

    def lap(self, part: str) -> None:
        """A part has ended."""
        if part == _BACKWARD:
            part, self._backward = self._backward, _FIRST_BACKWARD
        time_of = self._event() if self._gpu is not None else time.perf_counter()
        self._laps.append((part, time_of))

    def enter(self) -> None:
        """The forward pass of a part of the network begins."""
        if self._laps[-1][0] == "batch":
            self.lap("forward: input")

    def backward(self, part: str) -> None:
        """The gradient has reached a part's output: the backward pass has ended what comes after it."""
        self.lap(self._backward)
        self._backward = f"backward: {part}"

    def wait(self) -> None:
        """Until the GPU has done all that it was given."""
        if self._gpu is not None:
            torch.cuda.synchronize(self._gpu)

    def totals(self) -> dict[str, float]:
        """Seconds of each part in all."""
        self.wait()
        totals: dict[str, float] = {}
        for (_, begin), (part, end) in itertools.pairwise(self._laps):
            seconds = end - begin if self._gpu is None else begin.elapsed_time(end) / 1e3
            totals[part] = totals.get(part, 0.0) + seconds
        return dict(sorted(totals.items(), key=lambda item: _place(item[0])))

    def _event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._gpu))
        return event


def _place(part: str) -> int:
    kind = part.partition(":")[0]
    return _PASSES.index(kind) if kind in _PASSES else len(_PASSES)


def _listen(trainer: Trainer, clock: _Clock) -> None:
    """Have a trainer tell the clock about the parts of its steps, and of its network."""
    network, trainer.lap = trainer.denoiser.network, clock.lap
    shared = len(network.encoders) == 1
    for index, encoder in enumerate(network.encoders):
        _time_calls(encoder, "encoder" if shared else f"encoder {index}", clock)
    for index, decoder in enumerate(network.decoders):
        _time_calls(decoder, f"decoder {index}", clock)


def _time_calls(module: nn.Module, name: str, clock: _Clock) -> None:
    """Tell when a call begins and ends, and when the gradient reaches its output, whether it is compiled or not."""
    call: Callable[..., Any] = module._compiled_call_impl or module._call_impl

    def timed(*words: Any, **named: Any) -> Any:
        clock.enter()
        output = call(*words, **named)
        clock.lap(f"forward: {name}")
        first = output if isinstance(output, Tensor) else output[0]
        if first.requires_grad:
            first.register_hook(lambda gradient: clock.backward(name))
        return output

    setattr(module, "_compiled_call_impl", timed)  # noqa: B010  (what torch calls in place of a module)
