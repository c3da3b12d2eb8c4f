"""`msd convert`: a network of diffusers to a model of ours, and a model of ours to a folder for diffusers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro
from rich.console import Console

from multistage_diffusion.cli.common import Common
from multistage_diffusion.config import check
from multistage_diffusion.errors import ConfigError
from multistage_diffusion.files import read_json

if TYPE_CHECKING:
    from multistage_diffusion.denoiser import Denoiser
else:
    Denoiser = Any


@dataclass(frozen=True, kw_only=True)
class Options(Common):
    """Turn a run into a folder for diffusers, or a network that diffusers saved into a model of ours.

    A run: a unified network that is a UNet2DModel or a DiTTransformer2DModel becomes a standard pipeline, any other our
    MultistagePipeline; with a model card. Its images are compared with ours.

    A UNet2DModel or DiTTransformer2DModel, or a pipeline with one: with stages, every stage gets a decoder of its own
    that starts as the network's, ready to be trained apart. Outputs are compared with those of diffusers, which must be
    installed.

    A file of weights that others published (.safetensors, or .pt, .pth, .ckpt without code in it): EDM's DDPM++, score
    SDE's DDPM++ and NCSN++, the U-Net of latent diffusion, DiT, SiT, and the networks of Zhang et al. 2024.

    example: msd convert runs/digits models/digits
    """

    source: tyro.conf.Positional[str]
    """Run directory, folder of save_pretrained, folder that diffusers saved, or file (or its folder) of published
    weights."""
    out: tyro.conf.Positional[str]
    """Folder for the result."""
    stages: str | None = None
    """Of others: file with the stages, from msd cluster; by default one, or those of the published network."""
    resolution: int | None = None
    """Of others: pixels a side; by default the U-Net's sample_size; of a file that does not tell 32, of latents 64."""
    released: Literal["dit", "sit"] = "dit"
    """Of a file: whose weights it has, DiT's (noise prediction, 1000 steps) or SiT's (velocity on the linear path)."""
    preconditioning: Literal["edm", "vp", "ve"] = "edm"
    """Of a file of EDM's code: what the network was trained for."""
    groups: int | None = None
    """Of a file: groups of the network's norms, which no file tells; by default as published."""
    head_channels: int | None = None
    """Of a file of latent diffusion: channels of an attention head, which no file tells; by default 32."""
    weights: Literal["ema", "raw"] = "ema"
    """Of a run, or of a file that has both: the averaged weights, or the trained ones."""
    license: str | None = None
    """Of a run: the license for the model card, like apache-2.0."""
    space: bool = False
    """Of a run: make the folder a Space of the Hugging Face hub, too, with an app that draws (gradio)."""


def run(options: Options, console: Console) -> dict[str, Any]:
    """Convert."""
    source = Path(options.source)
    if (file := _file(source)) is not None:
        return _import_released(file, options, console)
    for name, default in (("released", "dit"), ("preconditioning", "edm"), ("groups", None), ("head_channels", None)):
        value = getattr(options, name)
        check(value == default, name.replace("_", "-"), "used with a file of weights", value)
    if not source.is_dir():
        raise ConfigError(
            f"{source} is neither a run directory nor a folder that diffusers saved, nor a file of weights"
        )
    pipeline = any((source / name).exists() for name in ("model_index.json", "unet", "transformer"))
    about = None if pipeline else read_json(source / "config.json")
    if isinstance(about, dict) and "process" in about:
        check(options.stages is None, "stages", "used with a network of diffusers", options.stages)
        check(options.resolution is None, "resolution", "used with a network of diffusers", options.resolution)
        return _export(options, console)
    check(options.weights == "ema", "weights", "used with a run", options.weights)
    check(options.license is None, "license", "used with a run", options.license)
    check(not options.space, "space", "used with a run", options.space)
    return _import(options, console)


def _import(options: Options, console: Console) -> dict[str, Any]:
    """From diffusers."""
    from multistage_diffusion.interop.diffusers import largest_difference, load_diffusers, save_converted
    from multistage_diffusion.stages import Stages

    stages = Stages() if options.stages is None else Stages.load(Path(options.stages))
    denoiser = load_diffusers(options.source, stages=stages, resolution=options.resolution)
    error = largest_difference(denoiser, options.source)
    if not error < 1e-3:  # float32 rounding leaves a hundredth of this
        raise ConfigError(f"the converted network differs from that of diffusers by {error}; nothing was written")
    save_converted(options.source, denoiser, options.out)
    return _written(options, console, denoiser, error)


def _file(source: Path) -> Path | None:
    """The file of published weights: the source itself, or the only one in a folder that holds nothing else of ours."""
    suffixes = (".safetensors", ".pt", ".pth", ".ckpt", ".pkl")
    if source.is_dir():
        files = [file for file in source.iterdir() if file.suffix in suffixes]
        described = any((source / name).exists() for name in ("config.json", "model_index.json"))
        return files[0] if len(files) == 1 and not described else None
    return source if source.suffix in suffixes else None


def _import_released(file: Path, options: Options, console: Console) -> dict[str, Any]:
    """From a file of weights, which no configuration comes with: nothing to compare with."""
    from multistage_diffusion.interop.official import from_official, read_state, recognise
    from multistage_diffusion.interop.transformers import from_released
    from multistage_diffusion.noise import Flow
    from multistage_diffusion.stages import Stages

    check(options.license is None, "license", "used with a run", options.license)
    check(not options.space, "space", "used with a run", options.space)
    stages = None if options.stages is None else Stages.load(Path(options.stages))
    state = read_state(file, weights=options.weights)
    if "x_embedder.proj.weight" in state:
        what, process = "DiT", None
        if options.released == "sit":
            what, process = "SiT", Flow(time_scale=1.0, times="uniform")
        denoiser = from_released(state, process, head_channels=options.head_channels, stages=stages or Stages())
    else:
        official = recognise(
            state,
            resolution=options.resolution,
            process=options.preconditioning,
            groups=options.groups,
            head_channels=options.head_channels,
        )
        what, denoiser = official.what, from_official(official, stages)
    denoiser.save_pretrained(options.out)
    console.print(f"{file}: {what}")
    return {**_written(options, console, denoiser, None), "what": what}


def _written(options: Options, console: Console, denoiser: Denoiser, error: float | None) -> dict[str, Any]:
    """The document of a model of ours that was written."""
    document = {
        "source": options.source,
        "out": options.out,
        "parameters": sum(parameter.numel() for parameter in denoiser.parameters()),
        "stages": len(denoiser.stages),
        "shape": list(denoiser.shape),
        "max_error": error,
    }
    compared = "" if error is None else f", largest difference from diffusers {error:.1e}"
    console.print(
        f"wrote {options.out}: {document['parameters'] / 1e6:.2f} M parameters, {len(denoiser.stages)} stages{compared}"
    )
    return document


def _export(options: Options, console: Console) -> dict[str, Any]:
    """To diffusers."""
    from multistage_diffusion.data.latents import LatentCodec, load_codec
    from multistage_diffusion.interop.card import Facts, model_card
    from multistage_diffusion.interop.export import export
    from multistage_diffusion.interop.space import space_files
    from multistage_diffusion.runs import load_run

    loaded = load_run(options.source, weights=options.weights, device="cpu")
    results, title = Path(options.source) / "results.json", Path(options.out).absolute().name
    names = loaded.denoiser.trained_classes
    count = loaded.denoiser.classes
    classes = [str(k) for k in range(count)] if names is None or not count else list(names.names)

    def texts(pipeline: str) -> dict[str, str]:
        facts = Facts(
            name=title,
            pipeline=pipeline,
            license=options.license,
            data=loaded.config.data if loaded.config else None,
            step=loaded.step,
            stage_images=loaded.stage_images,
            trunk_images=loaded.trunk_images,
            results=read_json(results) if results.is_file() else None,
        )
        card = model_card(loaded.denoiser, facts)
        return space_files(title, pipeline, classes, card) if options.space else {"README.md": card}

    codec = load_codec(options.source)
    if codec is not None and not isinstance(codec, LatentCodec):
        raise ConfigError(f"{options.source} is a run on fields, whose scale diffusers has no place for")
    done = export(loaded.denoiser, options.out, codec=codec, texts=texts)
    why = f" (no standard one: {done.reason})" if done.reason else ""
    console.print(
        f"wrote {options.out}: {done.pipeline}{why} with {done.scheduler}, {done.parameters / 1e6:.2f} M parameters, "
        f"largest difference of its images from ours {done.max_error:.1e}"
    )
    trust = ", trust_remote_code=True" if done.pipeline == "MultistagePipeline" else ""
    console.print(
        "load it by: from diffusers import DiffusionPipeline; "
        f"DiffusionPipeline.from_pretrained({options.out!r}{trust})"
    )
    if options.space:
        console.print(
            f"try it by: pip install gradio && python {Path(options.out) / 'app.py'}; or upload the folder as a Space"
        )
    return {
        "source": options.source,
        "out": options.out,
        "parameters": done.parameters,
        "stages": len(loaded.denoiser.stages),
        "shape": list(loaded.denoiser.shape),
        "max_error": done.max_error,
        "pipeline": done.pipeline,
        "scheduler": done.scheduler,
        "reason": done.reason,
        "weights": options.weights,
        "step": loaded.step,
    }
