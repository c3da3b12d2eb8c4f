"""Weights that others published, read from one file without running its code, and recognised by their names.

EDM (DDPM++), score SDE (DDPM++ and NCSN++ for VP), latent diffusion's U-Net, DiT and SiT, and the three networks of
Zhang et al. 2024, with a decoder a stage.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from torch import Tensor

from multistage_diffusion.denoiser import Denoiser
from multistage_diffusion.errors import CheckpointError, ConfigError
from multistage_diffusion.interop.layouts import (
    Official,
    Preconditioned,
    from_edm,
    from_latent_diffusion,
    from_score_sde,
)
from multistage_diffusion.stages import Stages

SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt")
RECIPE = (
    "run its authors' code to export the weights: import pickle, torch; net = pickle.load(open('{file}', 'rb'))['ema'];"
    " torch.save(net.state_dict(), '{stem}.pt'); then convert {stem}.pt"
)


def read_state(path: str | Path, *, weights: Literal["ema", "raw"] = "ema") -> dict[str, Tensor]:
    """Tensors by name from a safetensors file, or from one of torch's, read with `weights_only`.

    Args:
        path: A file of one of `SUFFIXES`, which may hold a checkpoint with its state dict and its average.
        weights: The averaged weights where the file has them (score SDE's `ema`, latent diffusion's `model_ema`), or
            the trained ones.

    Returns:
        The state dict, without prefixes like `module.`.

    Raises:
        ConfigError: A pickle of code, which is never opened.
        CheckpointError: The file is missing or damaged, or holds more than tensors.
    """
    path = Path(path)
    if path.suffix == ".pkl":
        raise ConfigError(f"{path} holds code, which is not run here; {RECIPE.format(file=path, stem=path.stem)}")
    try:
        if path.suffix == ".safetensors":
            document: Any = safetensors.torch.load_file(path)
        else:
            document = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a strange file raises anything
        if type(error).__name__ == "UnpicklingError":
            recipe = RECIPE.format(file=path, stem=path.stem)
            raise CheckpointError(f"{path} holds more than tensors, and code is not run here; {recipe}") from error
        raise CheckpointError(f"cannot read weights {path}: {' '.join(str(error).split())[:300]}") from error
    state = next((document[key] for key in ("state_dict", "model") if _is_state(document, key)), document)
    if not isinstance(state, Mapping) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise CheckpointError(f"{path} holds no state dict: tensors by name, as it is or under state_dict or model")
    state = {str(name).removeprefix("module."): tensor for name, tensor in state.items()}
    if weights == "ema" and isinstance(document, Mapping):
        state |= _averages(state, document.get("ema"), path)
    return state


def recognise(
    state: Mapping[str, Tensor],
    *,
    resolution: int | None = None,
    process: Preconditioned = "edm",
    groups: int | None = None,
    head_channels: int | None = None,
) -> Official:
    """The network that a state dict belongs to, with its weights by our names.

    Args:
        state: Tensors by name.
        resolution: Pixels a side, where names do not tell: 32 for score SDE, 64 for latents by default.
        process: What a network of EDM's code was trained for.
        groups: Groups of its norms, which no file tells.
        head_channels: Channels of an attention head of latent diffusion, which no file tells; 32 by default.

    Raises:
        ConfigError: None of the layouts, or a part that ours has not.
        CheckpointError: A weight is missing or left over.
    """
    for prefix, key in (("model.diffusion_model.", "input_blocks.0.0.weight"), ("model.", "map_layer0.weight")):
        if prefix + key in state:
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    if "map_layer0.weight" in state:
        return from_edm(state, kind=process, groups=groups)
    if any(name.startswith(("all_modules.0.", "en_modules.0.")) for name in state):
        return from_score_sde(state, resolution=resolution or 32, groups=groups)
    if "input_blocks.0.0.weight" in state:
        return from_latent_diffusion(state, resolution=resolution or 64, head_channels=head_channels)
    some = ", ".join(list(state)[:3]) or "nothing"
    raise ConfigError(
        f"the names ({some}, ...) are not those of EDM, score SDE, latent diffusion, DiT or SiT, nor the paper's;"
        " a network of another kind loads by train --init with --init-names"
    )


@torch.random.fork_rng(devices=[])
def from_official(official: Official, stages: Stages | None = None) -> Denoiser:
    """A published network as a denoiser.

    Args:
        official: What `recognise` returns.
        stages: A partition: for one decoder, every stage gets a copy of it; for several, as many stages in place of
            the published ones.

    Returns:
        The denoiser, in evaluation mode.

    Raises:
        ConfigError: There are more or fewer stages than decoders.
        CheckpointError: A weight is missing or of another shape.
    """
    model, state = official.model, official.state
    decoders = 1 if model.architecture == "unified" else len(model.decoder_widths)
    edges = official.edges if len(official.edges) + 1 == decoders else ()
    if stages is None and decoders > 1 and not edges:
        raise ConfigError(f"the network has {decoders} decoders, of unknown edges; give --stages")
    stages = Stages(edges) if stages is None else stages
    if decoders == 1 and len(stages) > 1:
        model = replace(model.with_capacities((model.capacity,) * len(stages)), architecture="multistage")
        own = {name: tensor for name, tensor in state.items() if not name.startswith("decoders.")}
        copies = {
            name.replace("decoders.0", f"decoders.{stage}", 1): tensor.clone()
            for name, tensor in state.items()
            for stage in range(len(stages))
            if name.startswith("decoders.")
        }
        state = own | copies
    shape = (official.channels, official.resolution, official.resolution)
    denoiser = Denoiser.from_backbone(model, official.process, shape, stages)
    try:
        denoiser.network.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(f"the weights are not whole: {str(error).splitlines()[1].strip()}") from error
    return denoiser.eval()


def _is_state(document: Any, key: str) -> bool:
    return isinstance(document, Mapping) and isinstance(document.get(key), Mapping)


def _averages(state: Mapping[str, Tensor], ema: Any, path: Path) -> dict[str, Tensor]:
    """The averaged weights of a checkpoint by the names of the trained ones; nothing if it has none."""
    shadow = ema.get("shadow_params") if isinstance(ema, Mapping) else None
    if shadow is not None:  # score SDE's, in the order of the parameters, without the buffer of noise levels
        names = [name for name in state if name != "sigmas"]
        if len(names) != len(shadow) or any(state[k].shape != v.shape for k, v in zip(names, shadow, strict=True)):
            raise CheckpointError(f"{path} has an average of other weights than its own; try --weights raw")
        return dict(zip(names, shadow, strict=True))
    # Latent diffusion's, by names without dots.
    names = {f"model_ema.{name.removeprefix('model.').replace('.', '')}": name for name in state}
    return {
        names[short]: tensor for short, tensor in state.items() if short in names and short.startswith("model_ema.")
    }
