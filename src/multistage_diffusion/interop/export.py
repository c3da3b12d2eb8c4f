"""A model of ours as a folder for diffusers: a standard pipeline where one fits, else our `MultistagePipeline`."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from multistage_diffusion.backbones import Backbone, Transformer
from multistage_diffusion.config import to_dict
from multistage_diffusion.data.latents import LatentCodec
from multistage_diffusion.denoiser import Denoiser
from multistage_diffusion.errors import ConfigError
from multistage_diffusion.files import whole_directory
from multistage_diffusion.interop import transformers
from multistage_diffusion.interop.schedulers import scheduler_options
from multistage_diffusion.interop.weights import misfit, unet_options, unet_weights
from multistage_diffusion.noise import EDM, LDM, VP, Cosine, Flow, Process
from multistage_diffusion.sampling import dpmpp_2m, euler

_TOLERANCE = 1e-3  # float32 rounding leaves a hundredth of this
_STEPS = 10


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        pipeline: The class of the pipeline.
        scheduler: The class of its scheduler.
        parameters: Weights of the network.
        max_error: Largest difference between images of the pipeline, read back, and ours from the same noise, in units
            of [-1, 1].
        reason: Why it is no standard pipeline; none if it is.
    """

    pipeline: str
    scheduler: str
    parameters: int
    max_error: float
    reason: str | None


def why_not_standard(backbone: Backbone, process: Process, shape: tuple[int, int, int], *, latent: bool) -> str | None:
    """Why a model becomes no standard pipeline of diffusers.

    Args:
        backbone: The network's record.
        process: Its process.
        shape: (C, H, W) of what it denoises.
        latent: Whether that is latents.

    Returns:
        The first reason; none if it becomes one.
    """
    transformer = isinstance(backbone, Transformer)
    if (reason := (transformers.misfit if transformer else misfit)(backbone, shape)) is not None:
        return reason
    if transformer and not latent:
        return "DiTPipeline draws latents"
    if not isinstance(process, VP | Cosine | LDM):
        return f"no standard pipeline draws from a process {process.kind}"
    return f"LDMPipeline draws no latents of {shape[1]}x{shape[2]}" if latent and shape[1] != shape[2] else None


def export(
    denoiser: Denoiser,
    out: str | Path,
    *,
    codec: LatentCodec | None = None,
    texts: Callable[[str], dict[str, str]] | None = None,
) -> Exported:
    """Write a folder that diffusers loads, and compare its images with ours.

    A unified model whose network is a `UNet2DModel` and whose process is variance-preserving becomes a `DDIMPipeline`
    (`LDMPipeline` for latents); a transformer for latents that is a `DiTTransformer2DModel`, a `DiTPipeline`. Any
    other becomes a `MultistagePipeline`, whose code lies in the folder. All load without this package, by
    `DiffusionPipeline.from_pretrained`, the last with `trust_remote_code=True`.

    Args:
        denoiser: The model.
        out: The folder; replaced if an earlier call wrote it.
        codec: Autoencoder and scale of a model of latents.
        texts: Makes further files, like README.md, given the name of the pipeline's class.

    Raises:
        ConfigError: diffusers is not installed or has no scheduler for the process, or the images differ; nothing is
            written then.
        CheckpointError: The folder cannot be written.
    """
    try:
        importlib.import_module("multistage_diffusion.interop.pipeline")
    except (ImportError, RuntimeError) as error:
        raise ConfigError(f"diffusers is needed ({error}): pip install multistage-diffusion[diffusers]") from error
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    reason = why_not_standard(denoiser.backbone, denoiser.process, denoiser.shape, latent=codec is not None)
    vae = None
    if codec is not None:
        vae = codec.autoencoder.module
        vae.register_to_config(scaling_factor=codec.scale)
    pipeline = _standard(denoiser, vae) if reason is None else _multistage(denoiser, vae)
    parameters = sum(parameter.numel() for parameter in denoiser.parameters())
    name = type(pipeline).__name__
    with whole_directory(Path(out)) as folder, _quiet():
        pipeline.save_pretrained(folder)
        parts = {} if reason is None else {"unet": _by_its_own_code(folder / "unet")}
        written = DiffusionPipeline.from_pretrained(str(folder), low_cpu_mem_usage=False, **parts)
        error = _difference(written, denoiser, codec)
        if not error < _TOLERANCE:
            raise ConfigError(f"the pipeline's images differ from ours by {error}; nothing was written")
        for file, text in (texts(name) if texts is not None else {}).items():
            (folder / file).write_text(text, encoding="utf-8")
    return Exported(name, type(pipeline.scheduler).__name__, parameters, error, reason)


def _by_its_own_code(folder: Path) -> Any:
    """The network of a folder, by the file that lies in it."""
    name = "multistage_unet_as_written"
    spec = importlib.util.spec_from_file_location(name, folder / "multistage_unet.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        return module.MultistageUNet.from_pretrained(str(folder), low_cpu_mem_usage=False)
    finally:
        del sys.modules[name]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without diffusers' progress bars: files are small or local."""
    from diffusers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _standard(denoiser: Denoiser, vae: Any) -> Any:
    """A pipeline of diffusers itself."""
    from diffusers import LDMPipeline  # pyright: ignore[reportPrivateImportUsage]
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
    from diffusers.models.unets.unet_2d import UNet2DModel
    from diffusers.pipelines.ddim.pipeline_ddim import DDIMPipeline
    from diffusers.pipelines.dit.pipeline_dit import DiTPipeline
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    scheduler = DDIMScheduler(clip_sample=False, **scheduler_options(denoiser.process))
    if isinstance(denoiser.backbone, Transformer):
        transformer = DiTTransformer2DModel(**transformers.dit_options(denoiser))
        transformer.load_state_dict(transformers.dit_weights(denoiser))
        return DiTPipeline(transformer=transformer.eval(), vae=vae, scheduler=scheduler)  # pyright: ignore
    unet = UNet2DModel(**unet_options(denoiser))
    unet.load_state_dict(unet_weights(denoiser))
    if vae is None:
        return DDIMPipeline(unet=unet.eval(), scheduler=scheduler)
    return LDMPipeline(vqvae=vae, unet=unet.eval(), scheduler=scheduler)


def _multistage(denoiser: Denoiser, vae: Any) -> Any:
    """Our own pipeline, with the scheduler of diffusers that needs the fewest steps."""
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
    from diffusers.schedulers.scheduling_edm_dpmsolver_multistep import EDMDPMSolverMultistepScheduler
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    from multistage_diffusion.interop.pipeline import MultistagePipeline, MultistageUNet

    process = denoiser.process
    unet = MultistageUNet(
        model=to_dict(denoiser.backbone),
        process=to_dict(process),
        edges=list(denoiser.stages.edges),
        shape=list(denoiser.shape),
    )
    unet.network.load_state_dict(denoiser.network.state_dict())
    options = scheduler_options(process)
    match process:
        case EDM():
            scheduler: Any = EDMDPMSolverMultistepScheduler(**options)
        case Flow():
            scheduler = FlowMatchEulerDiscreteScheduler(shift=process.shift)
        case _:  # by way of DDIM, so that one made from this one does not clip either
            scheduler = DPMSolverMultistepScheduler.from_config(DDIMScheduler(clip_sample=False, **options).config)
    return MultistagePipeline(unet=unet.eval(), scheduler=scheduler, vae=vae)


@torch.inference_mode()
def _difference(pipeline: Any, denoiser: Denoiser, codec: LatentCodec | None) -> float:
    """Largest difference of a pipeline's images from those of our solver on the same levels, from the same noise."""
    timesteps = pipeline.scheduler.config.get("num_train_timesteps", _STEPS)
    steps = max(number for number in range(1, _STEPS + 1) if timesteps % number == 0)  # DDIM's levels, exactly
    pipeline.set_progress_bar_config(disable=True)
    seed, shape = torch.Generator().manual_seed(0), (1, *denoiser.shape)
    drawn: Any = {"batch_size": 1}
    if isinstance(denoiser.backbone, Transformer) and hasattr(pipeline, "transformer"):  # DiTPipeline's label for none
        drawn = {"class_labels": [transformers.NONE], "guidance_scale": 1.0}
    expected = pipeline(**drawn, generator=seed, num_inference_steps=steps, output_type="np").images
    scheduler, process = pipeline.scheduler, denoiser.process
    level = pipeline.unet.level if hasattr(getattr(pipeline, "unet", None), "level") else process.level
    sigmas = level(scheduler.timesteps.double())
    x = torch.randn(shape, generator=seed.manual_seed(0)) * float(getattr(scheduler, "init_noise_sigma", 1.0))
    solver = dpmpp_2m if "solver_order" in scheduler.config else euler
    images = solver(denoiser, x / process.scale(sigmas[0]).item(), [*sigmas.tolist(), 0.0])
    if codec is not None:
        images = codec.autoencoder.decode(images / codec.scale, codec.autoencoder.channels)
    images = (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    return 2 * float((images - torch.from_numpy(expected)).abs().max())
