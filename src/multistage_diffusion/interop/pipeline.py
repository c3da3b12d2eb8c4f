"""Our models as components of diffusers: a network that takes its scheduler's timesteps, and a pipeline around it.

Import this module, then `MultistagePipeline.from_pretrained(FOLDER)`. diffusers is an extra, so nothing else in the
package imports this at its top.
"""

# No `from __future__ import annotations`: diffusers reads the types of a pipeline's components from its signature.

import inspect
from dataclasses import dataclass
from typing import Any, cast, final

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.outputs import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from multistage_diffusion.backbones import Backbone
from multistage_diffusion.conditioning import Conditioning
from multistage_diffusion.errors import ConfigError
from multistage_diffusion.interop.schedulers import level, require_fit
from multistage_diffusion.noise import Flow, Process
from multistage_diffusion.records import from_dict
from multistage_diffusion.stages import Stages


@dataclass
class UNetOutput(BaseOutput):
    """What the network returns.

    Attributes:
        sample: Its raw output: noise, velocity or EDM's F, as the process predicts.
    """

    sample: Tensor


@final
class MultistageUNet(ModelMixin, ConfigMixin):
    """The multi-decoder network as a model of diffusers; finds the stage of each timestep.

    Args:
        model: The network's configuration, as JSON.
        process: The process's configuration, as JSON.
        edges: Edges of the stages in sigma.
        shape: Channels, height and width of what it denoises.
    """

    @register_to_config
    def __init__(self, model: dict[str, Any], process: dict[str, Any], edges: list[float], shape: list[int]) -> None:
        super().__init__()
        self.process = from_dict(Process, process, "the network's process", "process")
        self.stages = Stages(tuple(edges))
        self.backbone = from_dict(Backbone, model, "the network's model", "model")
        self.shape = (shape[0], shape[1], shape[2])
        self.network = self.backbone.network(self.shape)
        if len(self.network.decoders) != len(self.stages):
            raise ConfigError(f"{len(self.network.decoders)} decoders do not fit the stage edges {edges}")

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNetOutput | tuple[Tensor]:
        """The raw output for a scheduler of the process.

        Args:
            sample: Noisy images as the scheduler scales them.
            timestep: The scheduler's time, one for all images or one for each.
            class_labels: Class of each image; the number of classes means none.
            return_dict: Whether to return an object, and not a tuple.

        Returns:
            The output, of the shape of `sample`.
        """
        time = torch.as_tensor(timestep, device=sample.device).float().expand(len(sample))
        sigma = level(self.process, torch.as_tensor(timestep).detach().cpu().double())
        stage = self.stages.of(sigma).to(sample.device) if sigma.numel() > 1 else self.stages.of(sigma.item())
        output = self.network(sample, time, stage, Conditioning(class_labels))
        return UNetOutput(sample=output) if return_dict else (output,)


@final
class MultistagePipeline(DiffusionPipeline):
    """Images from a multistage model, with any scheduler of diffusers that fits its process.

    Args:
        unet: The network.
        scheduler: A scheduler with the betas (or sigma_data) and the prediction of the network's process.
        vae: Decodes latents; none for a model of pixels.
    """

    model_cpu_offload_seq = "unet->vae"
    _optional_components = ["vae"]  # noqa: RUF012  (read by diffusers)
    unet: MultistageUNet
    scheduler: Any
    vae: Any

    def __init__(self, unet: MultistageUNet, scheduler: SchedulerMixin, vae: ModelMixin | None = None) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, vae=vae)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        num_inference_steps: int = 20,
        generator: torch.Generator | list[torch.Generator] | None = None,
        class_labels: int | list[int] | None = None,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draw images.

        Args:
            batch_size: Number of images.
            num_inference_steps: Steps of the scheduler.
            generator: Source of all noise, or one for each image.
            class_labels: Class of all images, or of each; only for a class-conditional network.
            guidance_scale: Scale of classifier-free guidance; 1 is none.
            guidance_interval: Lowest and highest sigma at which there is guidance; everywhere by default.
            latents: Standard normal noise to start from, in place of the generator's.
            output_type: `pil`, `np` (in [0, 1], channels last) or `pt` (in [0, 1]).
            return_dict: Whether to return an object, and not a tuple.

        Raises:
            ConfigError: The scheduler does not fit the process, or classes are asked of a network that has none.
        """
        process = self.unet.process
        require_fit(self.scheduler.config, process)
        labels = self._labels(class_labels, batch_size, guidance_scale)
        low, high = guidance_interval or (0.0, float("inf"))
        shape = (batch_size, *self.unet.shape)
        device = self._execution_device
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        self._set_timesteps(num_inference_steps, device)
        x = latents.to(device, torch.float32) * getattr(self.scheduler, "init_noise_sigma", 1.0)
        takes = inspect.signature(self.scheduler.step).parameters
        extra = {"generator": generator} if "generator" in takes else {}
        progress: Any = self.progress_bar
        for time in progress(self.scheduler.timesteps):
            scaled = x if isinstance(process, Flow) else self.scheduler.scale_model_input(x, time)
            guided = guidance_scale != 1 and low <= float(level(process, time.double().cpu())) <= high
            output = self._output(scaled, time, labels, guidance_scale if guided else 1.0)
            x = self.scheduler.step(output, time, x, **extra).prev_sample
        images = x if self.vae is None else self._decode(x)
        images = (images.float() / 2 + 0.5).clamp(0, 1).cpu()
        if output_type != "pt":
            images = images.permute(0, 2, 3, 1).numpy()
        if output_type == "pil":
            images = self.numpy_to_pil(images)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=cast(Any, images)) if return_dict else (images,)

    def _set_timesteps(self, steps: int, device: torch.device) -> None:
        """The scheduler's own; for flow matching the process's range, as t = 1 was never trained on."""
        process, parameters = self.unet.process, inspect.signature(self.scheduler.set_timesteps).parameters
        if isinstance(process, Flow) and "sigmas" in parameters:
            ramp = torch.linspace(process.t_max, process.t_min, steps)
            self.scheduler.set_timesteps(sigmas=ramp.tolist(), device=device)
        else:
            self.scheduler.set_timesteps(steps, device=device)

    def _labels(self, classes: int | list[int] | None, batch_size: int, guidance: float) -> Tensor | None:
        count = self.unet.backbone.classes
        if classes is None:
            if guidance != 1:
                raise ConfigError(f"guidance_scale {guidance} needs class_labels")
            return None
        labels = torch.as_tensor(classes, device=self._execution_device)
        if not count or not 0 <= int(labels.min()) <= int(labels.max()) < count:
            raise ConfigError(
                f"the network has {count} classes, numbered from 0; got class_labels {classes}; leave them out for no "
                "class"
            )
        return labels.expand(batch_size)

    def _output(self, x: Tensor, time: Tensor, labels: Tensor | None, guidance: float) -> Tensor:
        """The network's output with guidance, which is that of the denoised image: one is linear in the other."""
        x = x.to(self.unet.dtype)
        if labels is None or guidance == 1:
            return self.unet(x, time, labels, return_dict=False)[0].float()
        both = torch.cat((torch.full_like(labels, self.unet.backbone.classes), labels))
        without, given = self.unet(torch.cat((x, x)), time, both, return_dict=False)[0].float().chunk(2)
        return torch.lerp(without, given, guidance)

    def _decode(self, x: Tensor) -> Tensor:
        return self.vae.decode((x / self.vae.config.scaling_factor).to(self.vae.dtype)).sample
