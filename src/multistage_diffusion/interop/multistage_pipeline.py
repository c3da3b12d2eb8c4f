"""A pipeline of diffusers that draws from multistage networks (https://arxiv.org/abs/2312.09181; Apache-2.0).

This file needs torch and diffusers alone: converted folders hold it as `pipeline.py`.
"""

# No `from __future__ import annotations`: diffusers reads the types of a pipeline's components from its signature.

import copy
import inspect
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast, final

import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

_SOURCE = Path(__file__).read_text(encoding="utf-8")
_OUTPUTS = ("pil", "np", "pt", "latent")
logger = logging.get_logger(__name__)


@final
class MultistagePipeline(DiffusionPipeline):
    """Images from a multistage model, with any scheduler of diffusers that represents its process.

    Args:
        unet: The network, a `MultistageUNet`.
        scheduler: A scheduler whose noise levels and prediction are those of the network's process.
        vae: Decodes latents; none for a model of pixels.
    """

    model_cpu_offload_seq = "unet->vae"
    _optional_components = ["vae"]  # noqa: RUF012  (read by diffusers)
    _callback_tensor_inputs = ["latents"]  # noqa: RUF012
    unet: Any
    scheduler: Any
    vae: Any

    def __init__(self, unet: ModelMixin, scheduler: SchedulerMixin, vae: ModelMixin | None = None) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, vae=vae)
        self._guidance_scale, self._interrupt, self._num_timesteps = 1.0, False, 0

    @property
    def guidance_scale(self) -> float:
        """Scale of classifier-free guidance of the drawing; a callback may set `_guidance_scale`."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """Timesteps of the drawing."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether the rest of the drawing is left out; a callback may set `_interrupt`."""
        return self._interrupt

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        num_inference_steps: int = 20,
        generator: torch.Generator | list[torch.Generator] | None = None,
        class_labels: int | list[int] | None = None,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] | None = None,
        eta: float = 0.0,
        num_images_per_prompt: int = 1,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Tensor, dict[str, Any]], dict[str, Any] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draw images.

        Args:
            batch_size: Number of images.
            num_inference_steps: Steps of the scheduler, at least 1.
            generator: Source of all noise, or one for each image.
            class_labels: Class of all images, or of each; only for a class-conditional network.
            guidance_scale: Scale of classifier-free guidance; 1 is none. A network without classes ignores it.
            guidance_interval: Lowest and highest sigma at which there is guidance; everywhere by default.
            eta: Noise of DDIM's steps, 0 to 1; other schedulers ignore it.
            num_images_per_prompt: Images for each of the `batch_size` classes; that many times the images in all.
            latents: Standard normal noise to start from, in place of the generator's.
            output_type: `pil`, `np` (in [0, 1], channels last), `pt` (in [0, 1]) or `latent` (what the network makes,
                neither decoded nor scaled).
            return_dict: Whether to return an object, and not a tuple.
            callback_on_step_end: Called after each step as `callback(pipeline, step, timestep, tensors)`; tensors that
                it returns replace those of the pipeline.
            callback_on_step_end_tensor_inputs: Which tensors it gets: `latents`, or none.

        Raises:
            ValueError: The scheduler does not represent the process, or an argument is wrong; the message says which.
        """
        count = batch_size * num_images_per_prompt
        self._check(batch_size, num_images_per_prompt, num_inference_steps, generator, output_type, latents)
        unknown = [name for name in callback_on_step_end_tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs must be of {self._callback_tensor_inputs}, got {unknown}"
            )
        device = self._execution_device
        labels = self._labels(class_labels, batch_size, guidance_scale)
        labels = None if labels is None else labels.repeat_interleave(num_images_per_prompt)
        require_fit(self.scheduler, self.unet, num_inference_steps, 1.0 if self.vae is None else 3.0)
        takes = inspect.signature(self.scheduler.step).parameters
        extra = {name: value for name, value in (("generator", generator), ("eta", eta)) if name in takes}
        if eta and "eta" not in takes:
            logger.warning(f"eta {eta} is ignored: {type(self.scheduler).__name__} has none")
        if latents is None:
            latents = randn_tensor((count, *self.unet.shape), generator=generator, device=device, dtype=torch.float32)
        _set_timesteps(self.scheduler, self.unet, num_inference_steps, device)
        x = latents.to(device, torch.float32) * getattr(self.scheduler, "init_noise_sigma", 1.0)
        low, high = guidance_interval or (0.0, float("inf"))
        self._guidance_scale, self._interrupt = guidance_scale, False
        self._num_timesteps = len(self.scheduler.timesteps)
        progress: Any = self.progress_bar
        for step, time in enumerate(progress(self.scheduler.timesteps)):
            if self._interrupt:
                continue
            scaled = _scaled(self.scheduler, x, time)
            guided = guidance_interval is None or low <= float(self.unet.level(time)) <= high
            output = self._output(scaled, time, labels, self._guidance_scale if guided else 1.0)
            x = self.scheduler.step(output, time, x, **extra).prev_sample
            if callback_on_step_end is not None:
                tensors = {"latents": x} if callback_on_step_end_tensor_inputs else {}
                x = (callback_on_step_end(self, step, time, tensors) or {}).pop("latents", x)
        images = x if output_type == "latent" else self._images(x, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=cast(Any, images)) if return_dict else (images,)

    def save_config(self, save_directory: Any, push_to_hub: bool = False, **options: Any) -> None:
        """Write `model_index.json` and the code that it names: this file, and the network's beside its weights."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "pipeline.py").write_text(_SOURCE, encoding="utf-8")
        super().save_config(save_directory, push_to_hub, **options)
        path = folder / self.config_name
        index = json.loads(path.read_text())
        index |= {
            "_class_name": ["pipeline", type(self).__name__],
            "unet": ["multistage_unet", type(self.unet).__name__],
        }
        path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")

    def _check(
        self,
        batch_size: int,
        images: int,
        steps: int,
        generator: torch.Generator | list[torch.Generator] | None,
        output_type: str,
        latents: Tensor | None,
    ) -> None:
        """Refuse arguments out of range."""
        counts = {"batch_size": batch_size, "num_images_per_prompt": images, "num_inference_steps": steps}
        for name, value in counts.items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value}")
        count = batch_size * images
        if isinstance(generator, list) and len(generator) != count:
            raise ValueError(f"a list of generators needs one for each of the {count} images, got {len(generator)}")
        if output_type not in _OUTPUTS:
            raise ValueError(f"output_type must be one of {', '.join(_OUTPUTS)}, got {output_type}")
        if latents is not None and latents.shape != (count, *self.unet.shape):
            raise ValueError(f"latents must have the shape {(count, *self.unet.shape)}, got {tuple(latents.shape)}")

    def _labels(self, classes: int | list[int] | None, batch_size: int, guidance: float) -> Tensor | None:
        count = self.unet.classes
        if classes is None:
            if guidance != 1 and count:
                raise ValueError(f"guidance_scale {guidance} needs class_labels")
            if guidance != 1:
                logger.warning(f"guidance_scale {guidance} is ignored: the network has no classes")
            return None
        labels = torch.as_tensor(classes, device=self._execution_device)
        if not count or not labels.numel() or not 0 <= int(labels.min()) <= int(labels.max()) < count:
            raise ValueError(
                f"the network has {count} classes, numbered from 0; got class_labels {classes}; leave them out for no "
                "class"
            )
        if labels.ndim and len(labels) not in (1, batch_size):
            raise ValueError(f"class_labels need one class for each of the {batch_size} images, got {len(labels)}")
        return labels.expand(batch_size)

    def _output(self, x: Tensor, time: Tensor, labels: Tensor | None, guidance: float) -> Tensor:
        """The network's output with guidance, which is that of the denoised image: one is linear in the other."""
        x = x.to(self.unet.dtype)
        if labels is None or guidance == 1:
            return self.unet(x, time, labels, return_dict=False)[0].float()
        both = torch.cat((torch.full_like(labels, self.unet.classes), labels))
        without, given = self.unet(torch.cat((x, x)), time, both, return_dict=False)[0].float().chunk(2)
        return torch.lerp(without, given, guidance)

    def _images(self, x: Tensor, output_type: str) -> Any:
        """Decoded, and in [0, 1]."""
        if self.vae is not None:
            x = self.vae.decode((x / self.vae.config.scaling_factor).to(self.vae.dtype)).sample
        images = (x.float() / 2 + 0.5).clamp(0, 1).cpu()
        if output_type == "pt":
            return images
        images = images.permute(0, 2, 3, 1).numpy()
        return self.numpy_to_pil(images) if output_type == "pil" else images


@torch.no_grad()
def require_fit(scheduler: Any, unet: Any, steps: int, limit: float) -> None:
    """Refuse a scheduler that would run a network wrongly, and silently, by what it computes.

    If all images are one image c, the exact network is known: its estimate is c. Whatever a right scheduler does, each
    input that it makes is then c plus noise of the level that its timestep means to the network, and its last is c.

    Args:
        scheduler: It stays as it is: a copy is run.
        unet: The network; only its process is used.
        steps: Number of steps.
        limit: Largest value of c; a scheduler that clips images of larger values is refused.

    Raises:
        ValueError: It does not do so.
    """
    name, scheduler = type(scheduler).__name__, copy.deepcopy(scheduler)
    advice = "make one from the pipeline's own, like DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)"
    seed = torch.Generator().manual_seed(0)
    clean = torch.linspace(-limit, limit, 4096, dtype=torch.float64).view(1, 1, 64, 64)
    noise = torch.randn(clean.shape, generator=seed, dtype=torch.float64)
    x = None
    try:
        extra = {"generator": seed} if "generator" in inspect.signature(scheduler.step).parameters else {}
        with torch.random.fork_rng(devices=[]):  # some schedulers draw from torch's own
            _set_timesteps(scheduler, unet, steps, torch.device("cpu"))
            for time in scheduler.timesteps:
                sigma, factors = float(unet.level(time)), unet.preconditioning(time)
                c_in, c_skip, c_out = (float(factor) for factor in (factors.c_in, factors.c_skip, factors.c_out))
                if x is None:
                    scale = float(_scaled(scheduler, torch.ones_like(clean), time).mean())
                    x = (clean + sigma * noise) * c_in / scale
                    ratio = scale * float(getattr(scheduler, "init_noise_sigma", 1.0)) / (c_in * (1 + sigma**2) ** 0.5)
                    if not 1 / 1.5 < ratio < 1.5:
                        raise ValueError(f"it begins with {ratio:.3g} times the noise that the network expects")
                seen = _scaled(scheduler, x, time) / c_in
                level = float((seen - clean).square().mean().sqrt())
                if not abs(level - sigma) <= 0.05 * sigma + 0.02:
                    raise ValueError(
                        f"at timestep {float(time):.4g} its images have noise of {level:.3g}, and the network expects "
                        f"{sigma:.3g}"
                    )
                x = scheduler.step((clean - c_skip * seen) / c_out, time, x, **extra).prev_sample
        error = float((x - clean).square().mean().sqrt()) if x is not None else float("inf")
        if not error < 0.1:
            raise ValueError(f"its images miss those of an exact network by {error:.3g}")
    except Exception as error:
        reason = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
        raise ValueError(f"{name} does not represent the network's process: {reason}; {advice}") from error


def _scaled(scheduler: Any, x: Tensor, time: Tensor) -> Tensor:
    """The network's input; schedulers of flow matching leave it as it is."""
    return scheduler.scale_model_input(x, time) if hasattr(scheduler, "scale_model_input") else x


def _set_timesteps(scheduler: Any, unet: Any, steps: int, device: torch.device) -> None:
    """The scheduler's own; for flow matching the process's range, as t = 1 was never trained on."""
    times = unet.flow_times
    if times is not None and "sigmas" in inspect.signature(scheduler.set_timesteps).parameters:
        scheduler.set_timesteps(sigmas=torch.linspace(times[0], times[1], steps).tolist(), device=device)
    else:
        scheduler.set_timesteps(steps, device=device)
