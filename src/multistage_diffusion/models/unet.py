"""The multi-decoder U-Net: encoder(s) and one decoder a stage, each decoder of its own width.

One class is all three architectures: *multistage* (one encoder, K decoders), *separate* (K encoders, K decoders) and
*unified* (one of each). It takes an integer stage per image and knows nothing of noise levels or edges.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from multistage_diffusion.config import ModelConfig
from multistage_diffusion.errors import ConfigError
from multistage_diffusion.models.layers import (
    ConvResample,
    Dropout,
    Maps,
    NoiseEmbedding,
    Resample,
    ResidualBlock,
    group_norm,
    initialise,
    merge,
)


class Features(NamedTuple):
    """What an encoder hands to the decoders; all tensors have the images along dimension 0."""

    bottleneck: Tensor
    embedding: Tensor
    skips: tuple[Tensor, ...]
    number: Tensor | None = None

    def split(self, counts: Sequence[int]) -> list[Features]:
        """The features of so many consecutive images each; views, whose gradients are put together once."""
        if max(counts) == sum(counts):
            return [self] * len(counts)
        sizes = list(counts)
        skips = zip(*(skip.split(sizes) for skip in self.skips), strict=True)
        numbers = [None] * len(sizes) if self.number is None else self.number.split(sizes)
        return list(map(Features, self.bottleneck.split(sizes), self.embedding.split(sizes), skips, numbers))


@final
class Encoder(nn.Module):
    """Noise embedding and the downward half; with the middle blocks, if `config.middle` says so.

    Attributes:
        skip_channels: Channels of each skip connection, in the order they are made.
        channels: Channels of the bottleneck.
    """

    def __init__(self, config: ModelConfig, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.scale = config.skip_scale
        self.embedding = NoiseEmbedding(config)
        self.stem = initialise(nn.Conv2d(shape[0], config.width, 3, padding=1))
        self.levels, self.downs, self.pyramid = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        channels, pyramid = config.width, shape[0]
        self.skip_channels = [channels]
        for level, multiplier in enumerate(config.multipliers):
            width = config.width * multiplier
            attention = shape[1] >> level in config.attention
            blocks = nn.ModuleList()
            for _ in range(config.blocks):
                blocks.append(ResidualBlock(channels, width, config, attention=attention))
                self.skip_channels.append(channels := width)
            self.levels.append(blocks)
            if level + 1 == len(config.multipliers):
                break
            self.skip_channels.append(channels)
            if config.resampling == "block":
                self.downs.append(ResidualBlock(channels, channels, config, resample="down"))
            else:
                self.downs.append(ConvResample(channels, "down", config))
            if config.input_pyramid:
                step = initialise(nn.Conv2d(pyramid, channels, 3, padding=1))
                self.pyramid.append(nn.Sequential(Resample("down", config.filter), step))
                pyramid = channels
        self.channels = channels
        self.middle = _middle(channels, config) if config.middle == "encoder" else nn.ModuleList()

    def forward(
        self,
        x: Maps,
        c_noise: Float[Tensor, " batch"],
        labels: Int[Tensor, " batch"] | None = None,
        augment: Float[Tensor, "batch numbers"] | None = None,
        number: Int[Tensor, " batch"] | None = None,
    ) -> Features:
        """Encode images once, for whichever decoder.

        Args:
            x: Preconditioned noisy images.
            c_noise: The process's conditioning value of each image.
            labels: Class of each image, or none.
            augment: How each image was augmented, or none.
            number: What each image's dropout is drawn from; none draws from torch's generator.

        Returns:
            Bottleneck, noise embedding, skip connections and numbers.
        """
        embedding = self.embedding(c_noise, labels, augment)
        pyramid, h = x, self.stem(x)
        skips = [h]
        for level, blocks in enumerate(self.levels):
            for block in blocks.children():
                skips.append(h := block(h, embedding, number))
            if level < len(self.downs):
                h = self.downs[level](h, embedding, number)
                if self.pyramid:
                    h = pyramid = merge(h, self.pyramid[level](pyramid), self.scale)
                skips.append(h)
        for block in self.middle:
            h = block(h, embedding, number)
        return Features(h, embedding, tuple(skips), number)


@final
class Decoder(nn.Module):
    """The upward half at one stage's width; consumes the encoder's bottleneck and skips as they are."""

    def __init__(self, width: int, encoder: Encoder, config: ModelConfig, shape: tuple[int, int, int]) -> None:
        super().__init__()
        channels, skips = encoder.channels, list(encoder.skip_channels)
        self.middle = _middle(channels, config) if config.middle == "decoder" else nn.ModuleList()
        self.levels, self.ups = nn.ModuleList(), nn.ModuleList()
        for level in reversed(range(len(config.multipliers))):
            outputs = width * config.multipliers[level]
            attends = shape[1] >> level in config.attention
            blocks = nn.ModuleList()
            for index in range(config.blocks + 1):
                attention = attends and (config.decoder_attention == "all" or index == config.blocks)
                blocks.append(ResidualBlock(channels + skips.pop(), outputs, config, attention=attention))
                channels = outputs
            self.levels.append(blocks)
            if level > 0 and config.resampling == "block":
                self.ups.append(ResidualBlock(channels, channels, config, resample="up"))
            elif level > 0:
                self.ups.append(ConvResample(channels, "up", config))
        self.norm = group_norm(channels, config)
        self.head = initialise(nn.Conv2d(channels, shape[0], 3, padding=1), zero=True)

    def forward(self, features: Features) -> Maps:
        """Decode.

        Args:
            features: The encoder's output.

        Returns:
            The raw network output F.
        """
        h, embedding, skips, number = features
        remaining = list(skips)
        for block in self.middle:
            h = block(h, embedding, number)
        for level, blocks in enumerate(self.levels):
            for block in blocks.children():
                h = block(torch.cat((h, remaining.pop()), dim=1), embedding, number)
            if level < len(self.ups):
                h = self.ups[level](h, embedding, number)
        return self.head(F.silu(self.norm(h)))


@final
class MultiDecoderUNet(nn.Module):
    """Encoder(s) and K decoders; image i goes through the decoder of its stage.

    Args:
        config: Widths, depth and details; K is the number of `decoder_widths`, or 1 for a unified network.
        shape: (C, H, W) of an image; H and W must be divisible by 2 for every level but the first.

    Raises:
        ConfigError: The shape does not fit the number of levels.

    Source: Zhang et al. 2024, Sec. 4; blocks of Song et al. 2021 (DDPM++, NCSN++) and Rombach et al. 2022.
    """

    def __init__(self, config: ModelConfig, shape: tuple[int, int, int]) -> None:
        super().__init__()
        factor = 2 ** (len(config.multipliers) - 1)
        if shape[1] % factor or shape[2] % factor:
            raise ConfigError(
                f"images of {shape[1]}x{shape[2]} pixels cannot be halved {len(config.multipliers) - 1} times as "
                f"model.multipliers {config.multipliers} ask; set data.resolution to a multiple of {factor}"
            )
        self.config, self.shape = config, shape
        widths = (config.width,) if config.architecture == "unified" else config.decoder_widths
        encoders = len(widths) if config.architecture == "separate" else 1
        self.encoders = nn.ModuleList(Encoder(config, shape) for _ in range(encoders))
        first = self.encoders[0]
        assert isinstance(first, Encoder)
        self.decoders = nn.ModuleList(Decoder(width, first, config, shape) for width in widths)
        for layer, dropout in enumerate(module for module in self.modules() if isinstance(module, Dropout)):
            dropout.layer = layer

    def recompute(self) -> None:
        """Keep only the inputs of residual blocks for the backward pass; less memory, a third more time."""
        for module in self.modules():
            if isinstance(module, ResidualBlock):
                module.recompute = True

    def compile_parts(self, backend: str = "inductor") -> None:
        """Compile each encoder and decoder by itself, in place; names of parameters stay, and so does the routing.

        Args:
            backend: Compiler of torch.
        """
        parts = (*self.encoders, *self.decoders)
        # All decoders share one forward function, and torch counts compilations by function, in all networks so far.
        torch._dynamo.config.recompile_limit += 4 * len(parts)  # pyright: ignore[reportPrivateImportUsage]
        for part in parts:
            part.compile(backend=backend, dynamic=False)

    def encoder(self, stage: int) -> nn.Module:
        """The encoder that a stage uses.

        Args:
            stage: Index of the stage.

        Returns:
            The shared encoder, or the stage's own.
        """
        return self.encoders[stage if len(self.encoders) > 1 else 0]

    def forward(
        self,
        x: Maps,
        c_noise: Float[Tensor, " batch"],
        stage: int | Sequence[int] | Int[Tensor, " batch"],
        labels: Int[Tensor, " batch"] | None = None,
        augment: Float[Tensor, "batch numbers"] | None = None,
        number: Int[Tensor, " batch"] | None = None,
    ) -> Maps:
        """Raw network output F for each image by its stage's decoder.

        Args:
            x: Preconditioned noisy images, float32.
            c_noise: The process's conditioning value of each image.
            stage: The stage of the whole batch (int); or how many images each stage has, those of stage 0 first
                (sequence of K counts: nothing is moved and no device is waited for); or the stage of each image in any
                order (tensor).
            labels: Class of each image, `config.classes` for none; only for a conditional network.
            augment: The `config.augment_labels` numbers of each image; none where nothing was augmented.
            number: Random 64-bit number of each image, from which its dropout is drawn; none draws from torch's
                generator.

        Returns:
            Output of the shape of `x`. An image's output does not depend on the other images.
        """
        if isinstance(stage, int):
            return self.decoders[stage](self.encoder(stage)(x, c_noise, labels, augment, number))
        if not isinstance(stage, Tensor):
            return self._grouped(x, c_noise, stage, labels, augment, number)
        order = stage.argsort(stable=True)
        counts = torch.bincount(stage, minlength=len(self.decoders)).tolist()
        known = None if labels is None else labels[order]
        told = None if augment is None else augment[order]
        drawn = None if number is None else number[order]
        rows = self._grouped(x[order], c_noise[order], counts, known, told, drawn)
        return rows[order.argsort()]

    def _grouped(
        self, x: Tensor, c_noise: Tensor, counts: Sequence[int], labels: Tensor | None, augment: Tensor | None,
        number: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Rows of a stage lie side by side: encode all at once (or per stage, if separate), decode slice by slice."""
        assert len(counts) == len(self.decoders) and sum(counts) == len(x), "counts must cover the batch"
        shared = None
        if len(self.encoders) == 1:
            shared = self.encoders[0](x, c_noise, labels, augment, number).split(counts)
        outputs, start = [], 0
        for stage, count in enumerate(counts):
            stop = start + count
            if count > 0:
                if shared is not None:
                    features = shared[stage]
                else:
                    own = (_part(values, start, stop) for values in (labels, augment, number))
                    features = self.encoders[stage](x[start:stop], c_noise[start:stop], *own)
                outputs.append(self.decoders[stage](features))
            start = stop
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def _part(values: Tensor | None, start: int, stop: int) -> Tensor | None:
    """Some consecutive rows of what may be absent."""
    return None if values is None else values[start:stop]


def _middle(channels: int, config: ModelConfig) -> nn.ModuleList:
    """The two blocks at the lowest resolution, the first one with attention."""
    return nn.ModuleList(
        [ResidualBlock(channels, channels, config, attention=True), ResidualBlock(channels, channels, config)]
    )
