"""The multi-decoder network as a model of diffusers: it takes a scheduler's timesteps and finds their stages.

Converted folders hold this module with all that it needs of the package, as `interop/bundle.py` puts it together.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.outputs import BaseOutput
from jaxtyping import Float, Int
from torch import Tensor

from multistage_diffusion.backbones.protocol import Backbone
from multistage_diffusion.conditioning import Conditioning
from multistage_diffusion.noise.base import Preconditioning, Process
from multistage_diffusion.stages import stage_at

_LARGEST_LEVEL = 1e6  # of the levels that are told from each other: flow matching's first is infinite


@dataclass
class MultistageOutput(BaseOutput):
    """What the network returns.

    Attributes:
        sample: Its raw output, of the shape of the input: noise, velocity or EDM's F, as the process predicts.
    """

    sample: Tensor


@final
class MultistageUNet(ModelMixin, ConfigMixin):
    """The multi-decoder network; finds the stage of each timestep.

    Args:
        model: The network's configuration, as JSON.
        process: The process's configuration, as JSON.
        edges: Edges of the stages in sigma.
        shape: Channels, height and width of what it denoises.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(self, model: dict[str, Any], process: dict[str, Any], edges: list[float], shape: list[int]) -> None:
        super().__init__()
        self.process: Process = _record(Process, process)
        self.backbone: Backbone = _record(Backbone, model)
        self.edges, self.shape = tuple(map(float, edges)), (shape[0], shape[1], shape[2])
        self.network, self._checkpoints = self.backbone.network(self.shape), False
        if self.network.stages != len(self.edges) + 1:
            raise ValueError(f"{self.network.stages} decoders do not fit the stage edges {edges}")

    @property
    def classes(self) -> int:
        """Number of class labels; the label `classes` stands for none."""
        return self.backbone.classes

    @property
    def flow_times(self) -> tuple[float, float] | None:
        """First and last time of sampling, if the process is flow matching; others leave them to their schedulers."""
        return (self.process.t_max, self.process.t_min) if self.process.kind == "flow" else None  # pyright: ignore

    @property
    def _time_scale(self) -> float:
        """What the network sees of a timestep; schedulers of flow matching have 1000 of them."""
        return self.process.time_scale / 1000 if self.process.kind == "flow" else 1.0  # pyright: ignore

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether blocks keep only their inputs for the backward pass; see `enable_gradient_checkpointing`."""
        return self._checkpoints

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, enabled: bool) -> None:
        self._checkpoints = enabled
        self.network.checkpoint_activations(enabled)

    def level(self, timestep: Float[Tensor, "*steps"] | Int[Tensor, "*steps"]) -> Float[Tensor, "*steps"]:
        """Noise level sigma at a scheduler's timestep, float64, on the CPU."""
        return self._level(timestep.detach().cpu().double())

    def _level(self, time: Tensor) -> Tensor:
        return self.process.level(self._time_scale * time).clamp(max=_LARGEST_LEVEL)

    def preconditioning(self, timestep: Float[Tensor, "*steps"] | Int[Tensor, "*steps"]) -> Preconditioning:
        """How the raw output becomes an estimate of the clean image at a timestep."""
        return self.process.preconditioning(self.level(timestep))

    def forward(
        self,
        sample: Float[Tensor, "batch channels height width"],
        timestep: Tensor | float,
        class_labels: Int[Tensor, " batch"] | None = None,
        return_dict: bool = True,
    ) -> MultistageOutput | tuple[Tensor]:
        """The raw output for a scheduler of the process.

        Args:
            sample: Noisy images as the scheduler scales them.
            timestep: The scheduler's time, one for all images or one for each.
            class_labels: Class of each image; the number of classes means none.
            return_dict: Whether to return an object, and not a tuple.

        Returns:
            The output, of the shape of `sample`.
        """
        stage = stage_at(timestep, self.edges, self._level)
        if isinstance(stage, Tensor):
            stage = stage.to(sample.device) if stage.numel() > 1 else int(stage)
        steps = torch.as_tensor(timestep)
        time = (self._time_scale * steps.to(sample.device, torch.float32)).expand(len(sample))
        output = self.network(sample, time, stage, Conditioning(class_labels))
        return MultistageOutput(sample=output) if return_dict else (output,)

    def save_config(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **options: Any) -> None:
        """Write `config.json`, and beside it the file that `trust_remote_code` loads."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        (Path(save_directory) / "multistage_unet.py").write_text(source_of(self), encoding="utf-8")
        super().save_config(save_directory, push_to_hub, **options)


def source_of(unet: MultistageUNet) -> str:
    """The text of the file that loads a network without this package."""
    from multistage_diffusion.interop.bundle import bundle

    return bundle(type(unet), type(unet.backbone), type(unet.process))


def _record(family: Any, values: Mapping[str, Any]) -> Any:
    """A member of a family of records from its JSON."""
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return family.of_document(values)(**values)
