"""Latents of images: encoded once, kept in a cache, read as memory-mapped files; and the way back to images."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from multistage_diffusion.config import DataConfig
from multistage_diffusion.data.autoencoder import Autoencoder, load_autoencoder
from multistage_diffusion.data.cache import cache_directory
from multistage_diffusion.data.images import Images
from multistage_diffusion.data.sources import load_data
from multistage_diffusion.errors import CheckpointError, ConfigError
from multistage_diffusion.files import check_directory, read_json, whole_directory, write_json

RECORD = "latents.json"
_VALUES, _ABOUT = "latents.f32", "about.json"
Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class Latents:
    """A set of latents of one shape; what `Images` is to pixels.

    Attributes:
        name: The source of the images.
        images: Latents in the autoencoder's own unit, float32; may be mapped from a file.
        stage: Autoencoder and scale that they were made with.
        labels: Class of each image, int64, or None where the source has none.
        classes: Names of the classes.
        key: SHA-256 of images and autoencoder together.
    """

    name: str
    images: Float[Tensor, "batch chan high wide"]
    stage: FirstStage
    key: str
    labels: Int[Tensor, " labelled"] | None = None
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.images)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one image's latents."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    @cached_property
    def digest(self) -> str:
        """SHA-256 of what the networks see: images, autoencoder and scale."""
        return hashlib.sha256(f"{self.key} {self.stage.scale!r}".encode()).hexdigest()

    def floats(self, index: Int[Tensor, " n"] | None = None) -> Float[Tensor, "n chan high wide"]:
        """Latents as the networks see them.

        Args:
            index: Which images, on the device of `images`; by default all.

        Returns:
            float32, scaled.
        """
        return (self.images if index is None else self.images[index]) * self.stage.scale


Examples: TypeAlias = Images | Latents


@final
@dataclass(frozen=True, eq=False)
class FirstStage:
    """An autoencoder with the scale of its latents: from images to what a model is trained on, and back.

    Attributes:
        autoencoder: The autoencoder.
        scale: Factor of the latents.
        channels: Channels of the images.
    """

    autoencoder: Autoencoder
    scale: float
    channels: int

    def decode(
        self, latents: Float[Tensor, "batch latent high2 wide2"], batch_size: int = 64
    ) -> Float[Tensor, "batch chan high wide"]:
        """Images of a model's latents.

        Args:
            latents: What the model made.
            batch_size: Images at a time.

        Returns:
            Images, nominally in [-1, 1], on the CPU.
        """
        parts = (latents / self.scale).split(batch_size)
        return torch.cat([self.autoencoder.decode(part, self.channels) for part in parts])

    def encode(self, images: Images) -> Latents:
        """Latents of other images with the same scale.

        Args:
            images: The images.

        Returns:
            Their latents, from the cache where they are in it.
        """
        return encode(images, self.autoencoder, scale=self.scale)

    def save(self, path: Path) -> None:
        """Write the record that `load_first_stage` reads.

        Args:
            path: Destination file.
        """
        autoencoder = self.autoencoder
        record = {"autoencoder": autoencoder.name, "digest": autoencoder.digest, "scale": self.scale}
        write_json(path, {**record, "channels": self.channels})


def load_examples(config: DataConfig, device: torch.device | str = "cpu", progress: Progress | None = None) -> Examples:
    """What a configuration trains on: images, or their latents.

    Args:
        config: Source, resolution, autoencoder, scale.
        device: Where images are encoded.
        progress: Told how many images are encoded, of how many.

    Returns:
        The training images; with `flip`, latents of the mirrored images behind those of the images.

    Raises:
        ConfigError: The autoencoder cannot be found or read.
        DataError: The source cannot be read, or the autoencoder cannot encode it.
    """
    images = load_data(config.source, root=config.root, resolution=config.resolution, max_bad=config.max_bad)
    if config.autoencoder is None:
        return images
    if config.flip:
        labels = None if images.labels is None else images.labels.repeat(2)
        images = replace(images, images=torch.cat((images.images, images.images.flip(3))), labels=labels)
    autoencoder = load_autoencoder(config.autoencoder, device)
    return encode(images, autoencoder, scale=config.latent_scale, progress=progress)


def encode(
    images: Images, autoencoder: Autoencoder, *, scale: float | None = None, batch_size: int = 256,
    progress: Progress | None = None,
) -> Latents:  # fmt: skip
    """Encode images once; the cache is keyed by their content and the autoencoder's weights.

    Args:
        images: The images.
        autoencoder: The autoencoder.
        scale: Factor of the latents; by default 1 over their standard deviation.
        batch_size: Images at a time.
        progress: Told how many images are encoded, of how many.

    Returns:
        The latents.

    Raises:
        DataError: The autoencoder cannot encode images of this shape.
        CheckpointError: The cache cannot be written.
    """
    key = hashlib.sha256(f"latents 1 {images.digest} {autoencoder.digest}".encode()).hexdigest()
    folder = cache_directory() / "latents" / key[:32]
    if check_directory(folder, (_VALUES, _ABOUT)) is not None:
        with whole_directory(folder, replace=True) as temporary:
            _write(images, autoencoder, temporary, batch_size, progress)
    about = read_json(folder / _ABOUT)
    shape = [int(side) for side in about["shape"]]
    values = torch.from_file(str(folder / _VALUES), shared=False, size=math.prod(shape), dtype=torch.float32)
    stage = FirstStage(autoencoder, scale or 1 / about["deviation"], images.shape[0])
    return Latents(images.name, values.reshape(shape), stage, key, images.labels, images.classes)


def load_first_stage(run: str | Path, device: torch.device | str = "cpu") -> FirstStage | None:
    """The first stage of a run.

    Args:
        run: The run directory, or the folder `model` in it.
        device: Where the autoencoder goes.

    Returns:
        Autoencoder and scale; none for a run on images.

    Raises:
        ConfigError: The autoencoder cannot be found or read.
        CheckpointError: It is not the one that the run was trained with.
    """
    folder = Path(run)
    if folder.name == "model" and not (folder / RECORD).is_file():
        folder = folder.parent
    if not (folder / RECORD).is_file():
        return None
    try:
        record: dict[str, Any] = read_json(folder / RECORD)
        name, digest, scale, channels = (record[key] for key in ("autoencoder", "digest", "scale", "channels"))
    except (ConfigError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / RECORD} is not readable: {error}") from error
    autoencoder = load_autoencoder(str(name), device)
    if autoencoder.digest != digest:
        raise CheckpointError(f"{name} is another autoencoder than {folder} was trained with: its weights differ")
    return FirstStage(autoencoder, float(scale), int(channels))


def _write(images: Images, autoencoder: Autoencoder, folder: Path, batch_size: int, progress: Progress | None) -> None:
    """Encode batch by batch into a file, and measure the standard deviation on the way."""
    total, square, count = 0.0, 0.0, 0
    shape: list[int] = []
    with (folder / _VALUES).open("wb") as file:
        for rows in torch.arange(len(images)).split(batch_size):
            latents = autoencoder.encode(images.floats(rows)).contiguous()
            file.write(latents.numpy().data)
            shape = [len(images), *latents.shape[1:]]
            total += float(latents.double().sum())
            square += float(latents.double().square().sum())
            count += latents.numel()
            if progress is not None:
                progress(int(rows[-1]) + 1, len(images))
    deviation = math.sqrt(max(square / count - (total / count) ** 2, 0.0))
    about = {"source": images.name, "autoencoder": autoencoder.name, "shape": shape, "deviation": deviation}
    (folder / _ABOUT).write_text(json.dumps(about, indent=2) + "\n")
