"""Trained denoisers that a run may start from: runs, saved models, folders of diffusers, plain state dicts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from multistage_diffusion.config import RunConfig
from multistage_diffusion.denoiser import Denoiser
from multistage_diffusion.errors import CheckpointError, ConfigError
from multistage_diffusion.files import read_json
from multistage_diffusion.interop.diffusers import load_diffusers
from multistage_diffusion.runs import load_run
from multistage_diffusion.stages import Stages

_NAMED = 3  # names that an error repeats


def load_initial(source: str | Path) -> Denoiser:
    """A trained denoiser from a folder; nothing that it names is imported.

    Args:
        source: A run directory (its averaged weights), a folder of `save_pretrained`, or a folder that diffusers saved.

    Returns:
        The denoiser, on the CPU.

    Raises:
        ConfigError: The folder holds no such model.
        CheckpointError: The weights are damaged or missing.
    """
    folder = Path(source)
    if not folder.is_dir():
        raise ConfigError(f"--init {folder} is neither a folder nor a .safetensors file")
    pipeline = any((folder / name).exists() for name in ("model_index.json", "unet", "transformer"))
    document = None if pipeline or not (folder / "config.json").is_file() else read_json(folder / "config.json")
    if isinstance(document, dict) and "process" in document:
        return load_run(folder, device="cpu").denoiser
    if pipeline or isinstance(document, dict):
        return load_diffusers(folder)
    raise ConfigError(f"--init {folder} holds no config.json and no model_index.json: it is no run and no saved model")


def load_state(file: str | Path, config: RunConfig, shape: tuple[int, int, int], names: str | None = None) -> Denoiser:
    """A denoiser of a configuration's network, unified or in stages, with the weights of a plain state dict.

    Args:
        file: A safetensors file.
        config: Says the network.
        shape: (C, H, W) of an image.
        names: JSON file that maps names, or beginnings of names, in the file to those of the network.

    Returns:
        The denoiser; the unified one if the weights are those of the unified network.

    Raises:
        ConfigError: The file of names is malformed.
        CheckpointError: The file cannot be read, or a name or a shape is not the network's; the first are named.
    """
    path = Path(file)
    try:
        state = safetensors.torch.load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read weights {path}: {' '.join(str(error).split())}") from error
    if names is not None:
        state = renamed(state, read_json(Path(names)), names)
    differences = {}
    for model, edges in ((config.model.unified(), ()), (config.model, config.edges)):
        with torch.device("meta"):
            network = model.network(shape)
        expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
        given = {name: tuple(tensor.shape) for name, tensor in state.items()}
        differing = [name for name in sorted(expected | given) if expected.get(name) != given.get(name)]
        if not differing:
            denoiser = Denoiser.from_backbone(model, config.process, shape, Stages(edges))
            denoiser.network.load_state_dict(state)
            return denoiser.eval()
        differences[len(differing)] = [
            f"{name} is {given.get(name, 'missing')} there and {expected.get(name, 'missing')} in the network"
            for name in differing
        ]
    count = min(differences)
    more = f" and {count - _NAMED} more" if count > _NAMED else ""
    raise CheckpointError(
        f"{path} does not fit the network: {', '.join(differences[count][:_NAMED])}{more}; choose its --model options, "
        "or map names with --init-names FILE.json"
    )


def renamed(state: Mapping[str, Tensor], names: Any, where: str) -> dict[str, Tensor]:
    """A state dict with other names: the longest entry that a name begins with is replaced.

    Raises:
        ConfigError: `names` is no mapping of text to text, or two tensors get one name.
    """
    if not isinstance(names, dict) or not all(isinstance(value, str) for value in names.values()):
        raise ConfigError(f'{where} must map names to names, like {{"model.encoder.": "encoders.0."}}')
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        begin = max((key for key in names if name.startswith(key)), key=len, default=None)
        new = name if begin is None else names[begin] + name.removeprefix(begin)
        if new in result:
            raise ConfigError(f"{where} gives two tensors the name {new}")
        result[new] = tensor
    return result


def start_from(config: RunConfig, trained: Denoiser) -> RunConfig:
    """A configuration with the network and the process of a trained denoiser.

    Args:
        config: The run: its data, stages and training stay, and so does whether the network has stages.
        trained: What it is to start from.

    Returns:
        The configuration. Decoders have the trained ones' capacities where there are as many, else the encoder's.

    Raises:
        ConfigError: The network was given as an object, which no file describes.
    """
    model = trained.backbone
    if not model.builds:
        raise ConfigError("--init needs a network of a backbone of this package; from Python, pass the network itself")
    stages = len(config.stages.edges) + 1
    if config.model.architecture == "unified" or stages == 1:
        model = model.unified()
    else:
        same = len(model.capacities) == stages and model.architecture != "unified"
        capacities = model.capacities if same else (model.capacity,) * stages
        architecture = config.model.architecture if model.architecture == "unified" else model.architecture
        model = replace(model.with_capacities(capacities), architecture=architecture)
    return replace(config, model=model, process=trained.process, sampling=trained.sampler or config.sampling)
