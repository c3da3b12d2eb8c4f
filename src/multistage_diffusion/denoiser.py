"""The denoiser: network, process and stages together. What is trained, saved, loaded and sampled from."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, final

import safetensors
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from multistage_diffusion.backbones import Backbone, CustomNetwork
from multistage_diffusion.classes import TrainedClasses
from multistage_diffusion.conditioning import NO_CONDITIONING, Conditioning
from multistage_diffusion.devices import untraced
from multistage_diffusion.errors import CheckpointError, ConfigError
from multistage_diffusion.files import MANIFEST, check_directory, read_json, whole_directory
from multistage_diffusion.multidecoder import MultiDecoder
from multistage_diffusion.noise import Process, process_by_kind
from multistage_diffusion.records import check, from_dict, to_dict
from multistage_diffusion.sampling.sampler import Sampler
from multistage_diffusion.stages import Stages
from multistage_diffusion.text import short
from multistage_diffusion.weights import Unfilled, load_weights, require_fit, save_weights

Precision = Literal["fp32", "bf16", "fp16"]
UNDIVIDED = Stages()
CONFIG, WEIGHTS = "config.json", "model.safetensors"
METADATA = "multistage-diffusion"  # key in the header of an export


@final
class Denoiser(nn.Module):
    """Estimates the clean image: D(x, sigma) = c_skip x + c_out F(c_in x, c_noise), by the decoder of sigma's stage.

    Args:
        network: A `MultiDecoder` with a decoder for each stage; or any module without stages, called as
            `network(x, c_noise)`, or `network(x, c_noise, labels)` where there are classes, which gives F of the shape
            of x.
        process: The process, or its name for the defaults.
        stages: The partition of the noise levels; ignored by a network with one decoder.
        shape: (C, H, W) of an image.
        classes: Number of class labels; 0 if unconditional. The label `classes` stands for none.

    Raises:
        ConfigError: The number of decoders is not the number of stages.

    Attributes:
        backbone: Record from which the network was built, or which names its class where it was given as it is.
        precision: What the network's matrix products and convolutions compute in, by autocast: "fp32", "bf16" or
            "fp16". Weights, inputs and estimates are float32 in each of them. It is not saved.
        sampler: How images are drawn by default, as its run was configured; saved with the weights.
        label_optional: Whether a conditional model draws images without a class: not where training hid no labels.
            Saved with the weights.
        trained_classes: The classes that it was trained on, where that is known; saved with the weights.
    """

    _home: Tensor
    backbone: Backbone
    precision: Precision
    sampler: Sampler | None
    label_optional: bool
    trained_classes: TrainedClasses | None

    def __init__(
        self,
        network: nn.Module,
        process: Process | str,
        stages: Stages = UNDIVIDED,
        *,
        shape: tuple[int, int, int],
        classes: int = 0,
    ) -> None:
        super().__init__()
        if not isinstance(network, MultiDecoder):
            network = MultiDecoder.unified(network, classes=classes)
        if network.stages == 1:
            stages = UNDIVIDED
        elif network.stages != len(stages):
            raise ConfigError(
                f"the network has {network.stages} decoders, and the edges {short(stages.edges)} cut {len(stages)} "
                "stages; each stage needs a decoder"
            )
        self.process = process_by_kind(process) if isinstance(process, str) else process
        self.network, self.stages, self.shape, self.classes = network, stages, shape, classes
        self.backbone, self.precision = _describe(network, classes), "fp32"
        self.sampler, self.label_optional, self.trained_classes = None, True, None
        self.register_buffer("_home", torch.empty(0), persistent=False)

    @classmethod
    def from_backbone(
        cls, backbone: Backbone, process: Process | str, shape: tuple[int, int, int], stages: Stages = UNDIVIDED
    ) -> Denoiser:
        """A denoiser with a freshly initialised network.

        Args:
            backbone: The network's record; one decoder a stage, unless unified.
            process: The process, or its name for the defaults.
            shape: (C, H, W) of an image.
            stages: The partition of the noise levels; ignored by a unified network, which has one stage.

        Returns:
            The denoiser, on the CPU.

        Raises:
            ConfigError: The number of decoders is not the number of stages, or the shape does not fit.
        """
        check(isinstance(backbone, Backbone), "backbone", "a network's record, like preset(NAME).model", backbone)
        backbone.require_stages(len(stages), stages.edges)
        denoiser = cls(backbone.network(shape), process, stages, shape=shape, classes=backbone.classes)
        denoiser.backbone = backbone
        return denoiser

    def __repr__(self) -> str:
        """Process, stages, shape and size on one line; `denoiser.network` shows the layers."""
        edges = ", ".join(f"{edge:.3g}" for edge in self.stages.edges)
        stages = f"{len(self.stages)} stages with edges at sigma {edges}" if edges else "1 stage"
        parameters = sum(parameter.numel() for parameter in self.network.parameters())
        kind = f"{self.process.kind}, {stages}, images of {self.shape}, {parameters / 1e6:.3g} M parameters"
        return f"Denoiser({kind}{f', {self.classes} classes' if self.classes else ''})"

    @property
    def device(self) -> torch.device:
        """Where the denoiser was put; `offload` may keep some of its weights elsewhere for a while."""
        return self._home.device

    @property
    def sigma_min(self) -> float:
        """Lowest noise level of the process; for samplers of other projects."""
        return self.process.sigma_min

    @property
    def sigma_max(self) -> float:
        """Highest noise level of the process; for samplers of other projects."""
        return self.process.sigma_max

    def round_sigma(self, sigma: float | Tensor) -> Tensor:
        """The nearest noise level that the denoiser takes: the level itself; for samplers of other projects."""
        return torch.as_tensor(sigma)

    def forward(
        self,
        x: Float[Tensor, "batch channels height width"],
        sigma: float | Float[Tensor, ""] | Float[Tensor, " batch"],
        conditioning: Conditioning | Int[Tensor, " batch"] | None = None,
        *,
        counts: Sequence[int] | None = None,
    ) -> Float[Tensor, "batch channels height width"]:
        """Estimate the clean images in x = x0 + sigma eps.

        Args:
            x: Noisy images, in the unit of the data (not scaled by the process).
            sigma: One noise level for the whole batch (a float, whose stage is known on the host, or a tensor without
                dimensions: one decoder runs), or one for each image, (B,) or (B, 1, 1, 1).
            conditioning: Labels, augmentation and dropout seeds of the images; a tensor of integers is labels.
            counts: How many images each stage has, when those of stage 0 come first and so on; saves looking the
                stages up, and waiting for the device.

        Returns:
            Estimates of x0, of the type of x, whatever that of the weights. An image's estimate does not depend on the
            other images.

        Raises:
            ConfigError: Another number of noise levels than of images.
        """
        if conditioning is None:
            conditioning = NO_CONDITIONING
        elif isinstance(conditioning, Tensor):
            conditioning = Conditioning(conditioning)
        if not isinstance(sigma, Tensor):
            return self._at_one_level(x, sigma, conditioning)
        if sigma.ndim == 0:
            return self._at_one_level(x, float(sigma), conditioning)
        sigma = sigma.flatten()
        if not torch.compiler.is_compiling() and len(sigma) not in (1, len(x)):
            raise ConfigError(f"{len(sigma)} noise levels for {len(x)} images; give one for all, or one for each")
        stage = counts if counts is not None else self.stages.of(sigma) if len(self.stages) > 1 else 0
        factors = self.process.preconditioning(sigma.to(_at_least_float32(sigma.dtype)))
        c_skip, c_out, c_in = (
            factor.to(x)[:, None, None, None] for factor in (factors.c_skip, factors.c_out, factors.c_in)
        )
        c_noise = factors.c_noise.to(x.device, _at_least_float32(x.dtype))
        with self._autocast():
            raw = self.network((c_in * x).to(self._weights_dtype(x)), c_noise, stage, conditioning)
        return c_skip * x + c_out * raw.to(x.dtype)

    def _at_one_level(self, x: Tensor, sigma: float, conditioning: Conditioning) -> Tensor:
        """The factors stay numbers of the host: a copy to the device would wait for all that it still has to do."""
        if sigma < 0:
            raise ConfigError(f"a noise level must be at least 0, got {sigma:g}")
        with untraced():  # a graph of a fixed level holds them
            factors = self.process.preconditioning(torch.tensor([sigma], dtype=torch.float64))
            c_noise, c_in = factors.c_noise.item(), factors.c_in.item()
            c_skip, c_out = factors.c_skip.item(), factors.c_out.item()
        noise = torch.full((len(x),), c_noise, device=x.device, dtype=_at_least_float32(x.dtype))
        with self._autocast():
            scaled = (c_in * x).to(self._weights_dtype(x))
            raw = self.network(scaled, noise, self.stages.of(sigma), conditioning)
        return c_skip * x + c_out * raw.to(x.dtype)

    def _weights_dtype(self, x: Tensor) -> torch.dtype:
        """What the network takes after `half()`, `bfloat16()` or `double()`; without weights, what comes."""
        return next((weight.dtype for weight in self.network.parameters() if weight.is_floating_point()), x.dtype)

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16 if self.precision == "bf16" else torch.float16)

    def offload(self, stage: int | None) -> None:
        """Keep one stage's decoder (and encoder, if separate) on the device; move the others to the CPU.

        Args:
            stage: The stage to keep; none brings all back.
        """
        self.network.offload(stage, self.device)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write `config.json` and `model.safetensors`, whole or not at all; replaces what was there.

        Args:
            directory: Destination folder.

        Raises:
            CheckpointError: The disk is full, or the folder cannot be written.
        """
        with whole_directory(Path(directory)) as temporary:
            (temporary / CONFIG).write_text(json.dumps(self.document(), indent=2) + "\n")
            save_weights(self.network.state_dict(), temporary / WEIGHTS)

    def document(self) -> dict[str, Any]:
        """What the denoiser is, but for its weights, as JSON holds it."""
        document = {
            "format": "multistage-diffusion denoiser 1",
            "shape": list(self.shape),
            "process": to_dict(self.process),
            "stages": {**self.stages.provenance, "edges": list(self.stages.edges)},
            "model": to_dict(self.backbone),
        }
        if self.sampler is not None:
            document["sampling"] = to_dict(self.sampler)
        if not self.label_optional:
            document["label_optional"] = False
        if self.trained_classes is not None:
            document["classes"] = self.trained_classes.document()
        return document

    @classmethod
    def from_pretrained(
        cls, directory: str | Path, *, device: str | torch.device = "cpu", network: nn.Module | None = None
    ) -> Denoiser:
        """Read what `save_pretrained` or `msd export` wrote. Nothing that the folder names is imported.

        Args:
            directory: The folder, or the safetensors file of `msd export`.
            device: Where the weights go.
            network: The network, for a folder of one that no backbone of this package made; its weights are replaced.

        Returns:
            The denoiser, in evaluation mode.

        Raises:
            CheckpointError: A file is missing, disagrees with the manifest, or belongs to another architecture; or the
                network is of a class of the user's and was not given.
        """
        folder = Path(directory)
        if (folder / MANIFEST).exists() and (damage := check_directory(folder, (CONFIG, WEIGHTS))):
            raise CheckpointError(f"{damage}; if you changed it on purpose, delete {folder / MANIFEST}")
        is_export = folder.is_file()
        where, weights = (str(folder), folder) if is_export else (str(folder / CONFIG), folder / WEIGHTS)
        try:
            document = _exported(folder) if is_export else read_json(folder / CONFIG)
            process = from_dict(Process, document["process"], where, "process")
            shape, backbone = _shape(document["shape"]), from_dict(Backbone, document["model"], where, "model")
            stages = Stages.parse(document["stages"], f"{where}, stages")
            if network is not None:
                denoiser = cls(network, process, stages, shape=shape, classes=backbone.classes)
            else:
                with torch.device("meta"), Unfilled():
                    skeleton = backbone.network(shape)
                require_fit(skeleton, weights)  # before memory is taken for what a strange file asks
                with torch.random.fork_rng(devices=[]), Unfilled():  # the caller's random numbers are not drawn from
                    denoiser = cls.from_backbone(backbone, process, shape, stages)
            if "sampling" in document:
                denoiser.sampler = from_dict(Sampler, document["sampling"], where, "sampling")
            denoiser.label_optional = document.get("label_optional") is not False
            if document.get("classes") is not None:
                denoiser.trained_classes = TrainedClasses.parse(document["classes"], where)
        except (ConfigError, KeyError, TypeError, AttributeError, ValueError) as error:
            raise CheckpointError(f"{folder} holds no saved denoiser: {error}") from error
        load_weights(denoiser.network, weights)
        return denoiser.to(device).eval()


def _exported(path: Path) -> dict[str, Any]:
    """What the metadata of a file of `msd export` say."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(METADATA)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    if text is None:
        raise ConfigError("its metadata do not say what it is; msd export writes files that do")
    document = json.loads(text)
    return {"stages": {"edges": document.get("edges")}, **document}


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """For noise levels: half precision rounds 999 t to whole numbers."""
    return torch.promote_types(dtype, torch.float32)


def _describe(network: MultiDecoder, classes: int) -> CustomNetwork:
    """What files say of a network that was given as it is."""
    last = network.decoders[-1]
    kind = type(getattr(last, "module", last))
    split = "separate" if len(network.encoders) > 1 else "multistage"
    return CustomNetwork(
        architecture="unified" if network.stages == 1 else split,
        classes=classes,
        network_class=f"{kind.__module__}.{kind.__qualname__}",
        decoders=network.stages,
    )


def _shape(document: Any) -> tuple[int, int, int]:
    """The shape of an image, from JSON."""
    match document:
        case [int(channels), int(height), int(width)] if all(1 <= size <= 65_536 for size in document):
            return channels, height, width
    raise ConfigError(f"shape must be [channels, height, width], got {document}")
