"""Where the time of a training step goes, measured by `torch.profiler`."""

from __future__ import annotations

import bisect
import contextlib
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import torch
from torch import nn
from torch.profiler import ProfilerActivity, record_function, schedule

from multistage_diffusion.errors import CheckpointError

if TYPE_CHECKING:
    from multistage_diffusion.multidecoder import MultiDecoder
    from multistage_diffusion.training.trainer import Trainer

SCOPES = ("batch", "forward", "backward", "optimizer", "averages")  # of a step, in this order
_FORWARD, _REST = "forward: ", "rest"
_WARM_UP = 5  # steps before anything is measured: memory is taken, kernels are chosen and compiled


@dataclass(frozen=True)
class PartTime:
    """Mean time that a step spends in a part.

    Attributes:
        part: Its name.
        seconds: Of the host.
        gpu_seconds: Of the kernels that the part started on the GPU; none on a CPU.
    """

    part: str
    seconds: float
    gpu_seconds: float | None = None


@dataclass(frozen=True)
class StepProfile:
    """Where the time of a step goes.

    Attributes:
        steps: Steps that were measured.
        seconds: Mean time of a step without the profiler.
        profiled_seconds: Mean time of a step with the profiler; what `parts` add up to.
        parts: The parts in their order.
        images_per_second: Images trained on, without the profiler.
        tflops: Achieved 10^12 FLOPs a second, counting those of the network's forward and backward pass.
        gpu_memory_gib: Most memory that torch held of the GPU; none on a CPU.
    """

    steps: int
    seconds: float
    profiled_seconds: float
    parts: tuple[PartTime, ...]
    images_per_second: float
    tflops: float
    gpu_memory_gib: float | None


def profile(trainer: Trainer, *, steps: int = 20, trace: Path | None = None) -> StepProfile:
    """Train for a few steps and measure them: first without the profiler, then as many with it.

    Args:
        trainer: Its steps are taken as in a run; under `torchrun` each process profiles itself.
        steps: Steps to measure each time.
        trace: Where to write a trace for chrome://tracing or Perfetto.

    Returns:
        The profile of this process.

    Raises:
        CheckpointError: The trace cannot be written.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it says on stderr that it starts
    _advance(trainer, _WARM_UP)
    begin, before = time.perf_counter(), list(trainer.stage_images)
    _advance(trainer, steps)
    seconds = (time.perf_counter() - begin) / steps
    images = [now - then for now, then in zip(trainer.stage_images, before, strict=True)]
    flops = trainer.cost.training_flops(images) / trainer.processes.size / steps
    is_gpu = trainer.device.type == "cuda"
    events: list[Any] = []

    def collect(profiler: torch.profiler.profile) -> None:
        events.extend(profiler.events() or ())
        if trace is not None:
            try:
                trace.parent.mkdir(parents=True, exist_ok=True)
                profiler.export_chrome_trace(str(trace))
            except (OSError, RuntimeError) as error:
                raise CheckpointError(f"cannot write {trace}: {error}; choose another --profile-trace") from error

    with (
        _network_scopes(trainer.denoiser.network),
        torch.profiler.profile(
            activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_gpu else [])],
            schedule=schedule(wait=0, warmup=1, active=steps, repeat=1),
            on_trace_ready=collect,
        ) as profiler,
    ):
        for _ in trainer.run(trainer.step + 1 + steps):
            profiler.step()
    parts = tuple(_parts(events, steps, is_gpu))
    memory = torch.cuda.max_memory_reserved(trainer.device) / 2**30 if is_gpu else None
    return StepProfile(
        steps=steps,
        seconds=seconds,
        profiled_seconds=sum(part.seconds for part in parts),
        parts=parts,
        images_per_second=trainer.training.batch_size / seconds,
        tflops=flops / seconds / 1e12,
        gpu_memory_gib=memory,
    )


def _advance(trainer: Trainer, steps: int) -> None:
    for _ in trainer.run(trainer.step + steps):
        pass
    if trainer.device.type == "cuda":
        torch.cuda.synchronize(trainer.device)


@final
class _Scope(nn.Module):
    """A part of the network whose calls the profiler sees by a name."""

    def __init__(self, part: nn.Module, name: str) -> None:
        super().__init__()
        self.part, self.name = part, name

    def forward(self, *inputs: Any) -> Any:
        with record_function(self.name):
            return self.part(*inputs)


@contextlib.contextmanager
def _network_scopes(network: MultiDecoder) -> Iterator[None]:
    """Let each call of an encoder or decoder be a scope, whether it is compiled, checkpointed or sharded."""
    shared = len(network.encoders) == 1
    groups = [(network.encoders, "encoder" if shared else "encoder {}"), (network.decoders, "decoder {}")]
    for group, name in groups:
        for index, part in enumerate(group):
            group[index] = _Scope(part, _FORWARD + name.format(index))
    try:
        yield
    finally:
        for group, _ in groups:
            for index, scope in enumerate(group):
                assert isinstance(scope, _Scope)
                group[index] = scope.part


def _parts(events: Sequence[Any], steps: int, is_gpu: bool) -> Iterator[PartTime]:
    """The scopes, those of the network in place of the forward pass, and what is left of the forward pass and the step.

    The backward pass of a GPU runs on a thread of its own, so kernels belong to the scope at whose time they were
    started, not to the scope that called.
    """
    host = [event for event in events if event.device_type.name == "CPU"]
    outer, inner = (
        sorted((event.time_range.start, event.time_range.end, event.name) for event in host if is_scope(event.name))
        for is_scope in (lambda name: name in SCOPES, lambda name: name.startswith(_FORWARD))
    )
    names = [*dict.fromkeys(name for *_, name in inner), _FORWARD + _REST]
    order = [part for scope in SCOPES for part in (names if scope == "forward" else [scope])] + [_REST]
    seconds = dict.fromkeys([*order, "forward"], 0.0)
    for begin, end, name in outer + inner:
        seconds[name] += (end - begin) / 1e6
    whole = sum(event.time_range.elapsed_us() for event in host if event.name.startswith("ProfilerStep")) / 1e6
    seconds[_REST] = whole - sum(seconds[name] for name in SCOPES)
    seconds[_FORWARD + _REST] = seconds["forward"] - sum(seconds[name] for name in names[:-1])
    gpu = dict.fromkeys(order, 0.0)
    for event in host:
        if event.kernels:
            name = _scope_at(event.time_range.start, inner) or _scope_at(event.time_range.start, outer) or _REST
            gpu[_FORWARD + _REST if name == "forward" else name] += sum(k.duration for k in event.kernels) / 1e6
    return (PartTime(name, seconds[name] / steps, gpu[name] / steps if is_gpu else None) for name in order)


def _scope_at(time_us: float, scopes: Sequence[tuple[float, float, str]]) -> str | None:
    index = bisect.bisect_right(scopes, (time_us, math.inf, "")) - 1
    return scopes[index][2] if index >= 0 and time_us <= scopes[index][1] else None
