"""Latents of images: encoded once, kept in a cache of files and read from there; and the way back to images."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, final

import torch
from jaxtyping import Float, Int
from safetensors import safe_open
from torch import Tensor

from multistage_diffusion.config import DataConfig
from multistage_diffusion.data.autoencoder import Autoencoder, load_autoencoder
from multistage_diffusion.data.cache import cache_directory
from multistage_diffusion.data.doubts import warn_of
from multistage_diffusion.data.examples import Examples
from multistage_diffusion.data.fields import RECORD as SCALE
from multistage_diffusion.data.fields import Scale, load_scale
from multistage_diffusion.data.shards import ShardWriter, open_shards
from multistage_diffusion.data.sources import Split, load_data
from multistage_diffusion.errors import CheckpointError, ConfigError, DataError
from multistage_diffusion.files import read_json, whole_directory, write_json

RECORD = "latents.json"
Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class Latents(Examples):
    """A set of latents in the autoencoder's unit, float32.

    Attributes:
        codec: Autoencoder and scale that they were made with.
        key: SHA-256 of images and autoencoder together.
    """

    codec: LatentCodec = field(kw_only=True)
    key: str = field(kw_only=True)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of what the networks see: images, autoencoder and scale."""
        return hashlib.sha256(f"{self.key} {self.codec.scale!r}".encode()).hexdigest()

    def to_model(
        self, rows: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        """Latents times their scale."""
        return self.codec.to_model(rows)

    def take(self, index: Int[Tensor, " n"]) -> Latents:
        """A subset; as `Examples.take`."""
        chosen = hashlib.sha256(index.cpu().contiguous().numpy().data).hexdigest()
        return replace(super().take(index), key=hashlib.sha256(f"{self.key} {chosen}".encode()).hexdigest())


@final
@dataclass(frozen=True, eq=False)
class LatentCodec:
    """An autoencoder with the scale of its latents: from images to what a model is trained on, and back.

    Attributes:
        autoencoder: The autoencoder.
        scale: Factor of the latents.
        channels: Channels of the images.
    """

    pictures: ClassVar[bool] = True
    autoencoder: Autoencoder
    scale: float
    channels: int

    def to_model(
        self, rows: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        """Stored latents as a model sees them."""
        return rows * self.scale

    def decode(
        self, latents: Float[Tensor, "batch latent height2 width2"], batch_size: int = 64
    ) -> Float[Tensor, "batch channels height width"]:
        """Images of a model's latents.

        Args:
            latents: What the model made.
            batch_size: Images at a time.

        Returns:
            Images, nominally in [-1, 1], on the CPU.
        """
        parts = (latents / self.scale).split(batch_size)
        return torch.cat([self.autoencoder.decode(part, self.channels) for part in parts])

    def preview(self, x: Float[Tensor, "batch latent height2 width2"]) -> Float[Tensor, "batch channels height width"]:
        """The images of a model's latents."""
        return self.decode(x)

    def encode(self, images: Examples) -> Latents:
        """Latents of other images with the same scale.

        Args:
            images: The images.

        Returns:
            Their latents, from the cache where they are in it.
        """
        return encode(images, self.autoencoder, scale=self.scale)

    def save(self, folder: Path) -> None:
        """Write the record that `load_codec` reads into a run directory."""
        autoencoder = self.autoencoder
        record = {"autoencoder": autoencoder.name, "digest": autoencoder.digest, "scale": self.scale}
        write_json(folder / RECORD, {**record, "channels": self.channels})


def load_examples(
    config: DataConfig,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    images: Examples | None = None,
) -> Examples:
    """What a configuration trains on: images, or their latents.

    Args:
        config: Source, resolution, autoencoder, scale.
        device: Where images are encoded.
        progress: Told how many images are encoded, of how many.
        images: The training images, where they have been read.

    Returns:
        The training images; with `flip`, latents of the mirrored images behind those of the images.

    Raises:
        ConfigError: The autoencoder cannot be found or read.
        DataError: The source cannot be read, or the autoencoder cannot encode it.
    """
    if images is None:
        images = load_images(config)
    if config.autoencoder is None:
        return images
    autoencoder = load_autoencoder(config.autoencoder, device)
    return encode(images, autoencoder, scale=config.latent_scale, mirrored=config.flip, progress=progress)


def load_images(config: DataConfig, split: Split = "train") -> Examples:
    """Images of a configuration's source; of pictures that were left out there is a warning, once.

    Args:
        config: Source, resolution, what becomes of pictures that cannot be read.
        split: The part wanted.

    Returns:
        The images, whether or not the configuration encodes them.

    Raises:
        DataError: The source cannot be read.
    """
    images = load_data(
        config.source,
        split=split,
        root=config.root,
        resolution=config.resolution,
        max_bad=config.tolerated,
        scale=config.scale,
        labels=config.labels,
    )
    if split == "train":
        warn_of(images)
    return images


def encode(
    images: Examples,
    autoencoder: Autoencoder,
    *,
    scale: float | None = None,
    mirrored: bool = False,
    batch_size: int = 256,
    progress: Progress | None = None,
) -> Latents:
    """Encode images once; the cache is keyed by their content and the autoencoder's weights.

    Args:
        images: The images.
        autoencoder: The autoencoder.
        scale: Factor of the latents; by default 1 over their standard deviation.
        mirrored: Encode the mirrored images, too; their latents come behind those of the images.
        batch_size: Images at a time.
        progress: Told how many images are encoded, of how many.

    Returns:
        The latents.

    Raises:
        DataError: The autoencoder cannot encode images of this shape.
        CheckpointError: The cache cannot be written.
    """
    key = hashlib.sha256(f"latents 2 {images.digest} {mirrored} {autoencoder.digest}".encode()).hexdigest()
    folder = cache_directory() / "latents" / key[:32]
    try:
        values, about = open_shards(folder)
    except DataError:  # missing, or damaged
        with whole_directory(folder, replace=True) as temporary:
            _write(images, autoencoder, temporary, mirrored, batch_size, progress)
        values, about = open_shards(folder)
    codec = LatentCodec(autoencoder, scale or 1 / about["deviation"], images.shape[0])
    labels = images.labels.repeat(2) if mirrored and images.labels is not None else images.labels
    return Latents(images.name, values, labels, images.classes, images.skipped, images.notes, codec=codec, key=key)


def load_codec(run: str | Path, device: torch.device | str = "cpu") -> LatentCodec | Scale | None:
    """What turns the output of a run's model into images.

    Args:
        run: The run directory, or the folder `model` in it.
        device: Where the autoencoder goes.

    Returns:
        The latent codec, or the scale of fields; none for a run on pictures.

    Raises:
        ConfigError: The autoencoder cannot be found or read.
        CheckpointError: It is not the one that the run was trained with.
    """
    folder = Path(run)
    if folder.is_file():
        return _require_plain(folder)
    if folder.name == "model" and not any((folder / name).is_file() for name in (RECORD, SCALE)):
        folder = folder.parent
    if (folder / SCALE).is_file():
        return load_scale(folder / SCALE)
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
    return LatentCodec(autoencoder, float(scale), int(channels))


def _require_plain(export: Path) -> None:
    """Refuse a file of `msd export` whose model needs a codec, which the file does not hold."""
    with safe_open(export, framework="pt") as file:
        about = (file.metadata() or {}).get("multistage-diffusion", "{}")
    if json.loads(about).get("decoded"):
        raise ConfigError(f"{export} holds a model of latents or fields without what decodes them; give the run itself")


def _write(
    images: Examples, autoencoder: Autoencoder, folder: Path, mirrored: bool, batch_size: int, progress: Progress | None
) -> None:
    """Encode batch by batch into shards, and measure the standard deviation on the way."""
    total, square, count, done = 0.0, 0.0, 0, 0
    expected = len(images) * (1 + mirrored)
    with contextlib.closing(ShardWriter(folder, expected=expected)) as writer:
        for mirror in (False, True) if mirrored else (False,):
            for rows in torch.arange(len(images)).split(batch_size):
                pixels = images.floats(rows)
                latents = autoencoder.encode(pixels.flip(3) if mirror else pixels).contiguous()
                writer.add(latents)
                total += float(latents.double().sum())
                square += float(latents.double().square().sum())
                count, done = count + latents.numel(), done + len(rows)
                if progress is not None:
                    progress(done, expected)
        deviation = math.sqrt(max(square / count - (total / count) ** 2, 0.0))
        writer.finish(source=images.name, autoencoder=autoencoder.name, deviation=deviation)
