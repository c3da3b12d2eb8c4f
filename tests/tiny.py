"""Small things for the tests: a network of 8 channels, images of 8x8 pixels, a run of a few steps."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from multistage_diffusion.config import DataConfig, ModelConfig, RunConfig, StagesConfig, TrainingConfig
from multistage_diffusion.data import Images
from multistage_diffusion.denoiser import Denoiser
from multistage_diffusion.noise import VP
from multistage_diffusion.stages import Stages

EDGES = (0.6, 3.0)
SHAPE = (1, 8, 8)
MODEL = ModelConfig(width=8, decoder_widths=(8, 12, 4), multipliers=(1, 2), blocks=1, attention=(4,), dropout=0.0)
SMALLEST = ModelConfig(width=8, decoder_widths=(8, 8, 4), multipliers=(1,), blocks=1, attention=(), dropout=0.0)


def images(count: int = 10, shape: tuple[int, int, int] = SHAPE, seed: int = 0, *, labels: bool = False) -> Images:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=generator)
    if not labels:
        return Images("tiny", pixels)
    return Images("tiny", pixels, torch.arange(count) % 3, ("a", "b", "c"))


def run_config(model: ModelConfig = SMALLEST, **training: Any) -> RunConfig:
    """A run of 8 steps of 4 images over 10 images, so that an epoch ends inside a batch."""
    options = {"steps": 8, "batch_size": 4, "learning_rate": 3e-3, "warmup_images": 12, "save_every": 3, "log_every": 2}
    return RunConfig(
        data=DataConfig(source="digits"),
        process=VP(),
        stages=StagesConfig(edges=EDGES),
        model=model,
        training=TrainingConfig(**{**options, "ema_half_life": 20.0, **training}),
    )


def denoiser(model: ModelConfig = MODEL, process: Any = "vp", shape: tuple[int, int, int] = SHAPE) -> Denoiser:
    """With random weights everywhere: fresh layers that end a residual branch are zero, and would hide mistakes."""
    stages = Stages() if model.architecture == "unified" else Stages(EDGES[: len(model.decoder_widths) - 1])
    return randomise(Denoiser.from_backbone(model, process, shape, stages)).eval()


def randomise(module: Any, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            fan = max(parameter[0].numel(), 1) if parameter.dim() > 1 else 100
            parameter.copy_(values / fan**0.5 + ("norm" in name and name.endswith("weight")))
    return module


def architecture(name: str, model: ModelConfig = MODEL) -> ModelConfig:
    return replace(model, architecture=name)


def bits_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
