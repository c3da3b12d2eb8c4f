"""The denoiser: network, process and stages together. What is trained, saved, loaded and sampled from."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import safetensors.torch
import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from multistage_diffusion.config import ModelConfig, Precision, from_dict, to_dict
from multistage_diffusion.errors import CheckpointError, ConfigError
from multistage_diffusion.files import MANIFEST, check_directory, read_json, whole_directory
from multistage_diffusion.models.unet import MultiDecoderUNet
from multistage_diffusion.noise import Process, process_by_kind
from multistage_diffusion.stages import Stages

UNDIVIDED = Stages()
CONFIG, WEIGHTS = "config.json", "model.safetensors"
_MAX_HEADER_BYTES = 2**21  # of a safetensors file: the names and shapes of some 20,000 tensors


@final
class Denoiser(nn.Module):
    """Estimates the clean image: D(x, sigma) = c_skip x + c_out F(c_in x, c_noise), by the decoder of sigma's stage.

    Args:
        model: The network's configuration; one decoder a stage, unless unified.
        process: The process's configuration, or its name for the defaults.
        shape: (C, H, W) of an image.
        stages: The partition of the noise levels; ignored by a unified network, which has one stage.

    Raises:
        ConfigError: The number of decoders is not the number of stages, or the shape does not fit.

    Attributes:
        precision: What the network's matrix products and convolutions compute in, by autocast: "fp32", "bf16" or
            "fp16". Weights, inputs and estimates are float32 in each of them. It is not saved.
    """

    _home: Tensor
    precision: Precision

    def __init__(
        self, model: ModelConfig, process: Process | str, shape: tuple[int, int, int], stages: Stages = UNDIVIDED
    ) -> None:
        super().__init__()
        if model.architecture == "unified":
            stages = UNDIVIDED
        elif len(model.decoder_widths) != len(stages):
            raise ConfigError(
                f"model.decoder-widths {model.decoder_widths} must hold {len(stages)} widths, one for each stage that "
                f"the edges {stages.edges} cut"
            )
        self.process = process_by_kind(process) if isinstance(process, str) else process
        self.stages = stages
        self.network = MultiDecoderUNet(model, shape)
        self.precision = "fp32"
        self.register_buffer("_home", torch.empty(0), persistent=False)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        return self.network.shape

    @property
    def classes(self) -> int:
        """Number of class labels; 0 if unconditional."""
        return self.network.config.classes

    @property
    def device(self) -> torch.device:
        """Where the denoiser was put; `hold` may keep some of its weights elsewhere for a while."""
        return self._home.device

    def forward(
        self,
        x: Float[Tensor, "batch channels height width"],
        sigma: float | Float[Tensor, " batch"],
        labels: Int[Tensor, " batch"] | None = None,
        *,
        augment: Float[Tensor, "batch numbers"] | None = None,
        counts: Sequence[int] | None = None,
        number: Int[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, "batch channels height width"]:
        """Estimate the clean images in x = x0 + sigma eps.

        Args:
            x: Noisy images, in the unit of the data (not scaled by the process).
            sigma: One noise level for the whole batch (float: its stage is known on the host and one decoder runs), or
                one for each image.
            labels: Class of each image, `classes` for none; only for a conditional network.
            augment: How each image was augmented, for a network that is told so; none in sampling.
            counts: How many images each stage has, when those of stage 0 come first and so on; saves looking the
                stages up, and waiting for the device.
            number: Random 64-bit number of each image, from which its dropout is drawn in training; none draws from
                torch's generator.

        Returns:
            Estimates of x0, float32. An image's estimate does not depend on the other images.
        """
        if not isinstance(sigma, Tensor):
            return self._at_one_level(x, sigma, labels, augment)
        stage = counts if counts is not None else self.stages.of(sigma) if len(self.stages) > 1 else 0
        factors = self.process.preconditioning(sigma)
        c_skip, c_out, c_in = (
            factor.to(x)[:, None, None, None] for factor in (factors.c_skip, factors.c_out, factors.c_in)
        )
        with self._autocast():
            raw = self.network(c_in * x, factors.c_noise.to(x), stage, labels, augment, number)
        return c_skip * x + c_out * raw.to(x.dtype)

    def _at_one_level(self, x: Tensor, sigma: float, labels: Tensor | None, augment: Tensor | None) -> Tensor:
        """The factors stay numbers of the host: a copy to the device would wait for all that it still has to do."""
        factors = self.process.preconditioning(torch.tensor([sigma], dtype=torch.float64))
        c_noise = torch.full((len(x),), factors.c_noise.item(), device=x.device, dtype=x.dtype)
        with self._autocast():
            raw = self.network(factors.c_in.item() * x, c_noise, self.stages.of(sigma), labels, augment)
        return factors.c_skip.item() * x + factors.c_out.item() * raw.to(x.dtype)

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16 if self.precision == "bf16" else torch.float16)

    def hold(self, stage: int | None) -> None:
        """Keep one stage's decoder (and encoder, if separate) on the device; move the others to the CPU.

        Args:
            stage: The stage to hold; none brings all back.
        """
        groups = [self.network.decoders, self.network.encoders]
        for group in groups[: 1 if len(self.network.encoders) == 1 else 2]:
            for index, module in enumerate(group):
                with torch.inference_mode(False):  # parameters moved in that mode could never be trained again
                    module.to(self.device if stage is None or index == stage else "cpu")

    def save_pretrained(self, directory: str | Path) -> None:
        """Write `config.json` and `model.safetensors`, whole or not at all; replaces what was there.

        Args:
            directory: Destination folder.

        Raises:
            CheckpointError: The disk is full, or the folder cannot be written.
        """
        document = {
            "format": "multistage-diffusion denoiser 1",
            "shape": list(self.shape),
            "process": to_dict(self.process),
            "stages": {**self.stages.provenance, "edges": list(self.stages.edges)},
            "model": to_dict(self.network.config),
        }
        with whole_directory(Path(directory)) as temporary:
            (temporary / CONFIG).write_text(json.dumps(document, indent=2) + "\n")
            state = {name: tensor.contiguous() for name, tensor in self.network.state_dict().items()}
            safetensors.torch.save_file(state, temporary / WEIGHTS)

    @classmethod
    def from_pretrained(cls, directory: str | Path, *, device: str | torch.device = "cpu") -> Denoiser:
        """Read what `save_pretrained` wrote.

        Args:
            directory: The folder.
            device: Where the weights go.

        Returns:
            The denoiser, in evaluation mode.

        Raises:
            CheckpointError: A file is missing, disagrees with the manifest, or belongs to another architecture.
        """
        folder = Path(directory)
        if (folder / MANIFEST).exists() and (damage := check_directory(folder, (CONFIG, WEIGHTS))):
            raise CheckpointError(f"{damage}; if you changed it on purpose, delete {folder / MANIFEST}")
        try:
            document = read_json(folder / CONFIG)
            model = from_dict(ModelConfig, document["model"], str(folder / CONFIG), "model")
            shape = _shape(document["shape"])
            stages = Stages.parse(document["stages"], f"{folder / CONFIG}, stages")
            with torch.device("meta"):
                skeleton = MultiDecoderUNet(model, shape)
            _require_fit(skeleton, folder / WEIGHTS)  # before memory is taken for what a strange file asks
            process = from_dict(Process, document["process"], str(folder / CONFIG), "process")
            denoiser = cls(model, process, shape, stages)
        except (ConfigError, KeyError, TypeError, AttributeError, ValueError) as error:
            raise CheckpointError(f"{folder} holds no saved denoiser: {error}") from error
        load_weights(denoiser.network, folder / WEIGHTS)
        return denoiser.to(device).eval()


def load_weights(network: nn.Module, path: Path) -> None:
    """Read a safetensors file into a network.

    Args:
        network: The network, whose names and shapes the file must have, all of them.
        path: The file.

    Raises:
        CheckpointError: The file is missing or damaged, or belongs to another architecture.
    """
    weights = read_weights(network, path)
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(f"cannot read weights {path}: {' '.join(str(error).split())}") from error


def read_weights(network: nn.Module, path: Path) -> dict[str, Tensor]:
    """Read a safetensors file that fits a network.

    Args:
        network: The network, whose names and shapes the file must have, all of them.
        path: The file.

    Returns:
        Tensors by name, on the CPU.

    Raises:
        CheckpointError: The file is missing or damaged, or belongs to another architecture.
    """
    _require_fit(network, path)
    try:
        return safetensors.torch.load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read weights {path}: {' '.join(str(error).split())}") from error


def _require_fit(network: nn.Module, path: Path) -> None:
    """Compare the names and shapes in a file's header with those of a network, which may be on the meta device."""
    wanted = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    try:
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
        if header > _MAX_HEADER_BYTES:
            raise CheckpointError(f"cannot read weights {path}: a header of {header} bytes is not that of a network")
        with safe_open(path, framework="pt") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read weights {path}: {error}") from error
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise CheckpointError(
                f"{path} belongs to another architecture: {name} is {found.get(name, 'missing')} there and "
                f"{wanted.get(name, 'missing')} here"
            )


def _shape(document: Any) -> tuple[int, int, int]:
    """The shape of an image, from JSON."""
    match document:
        case [int(channels), int(high), int(wide)] if all(1 <= size <= 65_536 for size in document):
            return channels, high, wide
    raise ConfigError(f"shape must be [channels, height, width], got {document}")
