"""Encoder and decoder of the U-Net. The decoder has a width of its own and takes the encoder's features as they are.

Source: blocks of Song et al. 2021 (DDPM++, NCSN++) and Rombach et al. 2022.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from multistage_diffusion.backbones.layers import (
    Attention,
    Blur,
    ConvResample,
    FeatureMaps,
    NoiseEmbedding,
    Resample,
    ResidualBlock,
    group_norm,
    initialise,
    merge,
)
from multistage_diffusion.backbones.unet import UNet
from multistage_diffusion.conditioning import NO_CONDITIONING, Conditioning


class UNetFeatures(NamedTuple):
    """What an encoder hands to the decoders; all tensors have the images along dimension 0."""

    bottleneck: Tensor
    embedding: Tensor
    skips: tuple[Tensor, ...]
    dropout_seed: Int[Tensor, " batch"] | None = None


@final
class UNetEncoder(nn.Module):
    """Noise embedding and the downward half; with the middle blocks, if `unet.middle` says so.

    Attributes:
        skip_channels: Channels of each skip connection, in the order they are made.
        entry_channels: Channels at the beginning of each resolution.
        channels: Channels of the bottleneck.
    """

    def __init__(self, unet: UNet, shape: tuple[int, int, int]) -> None:
        super().__init__()
        block = _blocks(unet)
        self.scale = unet.skip_scale
        self.embedding = NoiseEmbedding(
            unet.width,
            classes=unet.classes,
            augment_labels=unet.augment_labels,
            frequency_shift=unet.frequency_shift,
        )
        self.stem = initialise(nn.Conv2d(shape[0], unet.width, 3, padding=1))
        # One entry a resolution; `levels` is its name in files of weights.
        self.levels, self.downs, self.pyramid = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        channels, pyramid = unet.width, shape[0]
        self.skip_channels, self.entry_channels = [channels], [channels]
        for depth, multiplier in enumerate(unet.multipliers):
            width = unet.width * multiplier
            attention = shape[1] >> depth in unet.attention
            blocks = nn.ModuleList()
            for _ in range(unet.blocks):
                blocks.append(block(channels, width, attention=attention))
                self.skip_channels.append(channels := width)
            self.levels.append(blocks)
            if depth + 1 == len(unet.multipliers):
                break
            self.skip_channels.append(channels)
            self.entry_channels.append(channels)
            if unet.resampling == "block":
                self.downs.append(block(channels, channels, resample="down"))
            else:
                self.downs.append(ConvResample(channels, "down", pad_after=unet.resampling == "conv-after"))
            if unet.input_pyramid:
                first = unet.input_pyramid == "ncsnpp"  # the filter sees all pixels, and the convolution halves
                filter_input = Blur(unet.filter) if first else Resample("down", unet.filter)
                halve = nn.Conv2d(pyramid, channels, 3, stride=2 if first else 1, padding=0 if first else 1)
                self.pyramid.append(nn.Sequential(filter_input, initialise(halve)))
                pyramid = channels
        self.channels = channels
        self.middle = _middle(block, channels) if unet.middle == "encoder" else nn.ModuleList()

    def blocks(self) -> list[nn.Module]:
        """What may be checkpointed and sharded by itself."""
        return [module for module in self.modules() if isinstance(module, ResidualBlock)]

    def forward(
        self,
        x: FeatureMaps,
        c_noise: Float[Tensor, " batch"],
        conditioning: Conditioning = NO_CONDITIONING,
        entry: int = 0,
    ) -> UNetFeatures:
        """Encode images once, for whichever decoder that they enter for.

        Args:
            x: Preconditioned noisy images; what a decoder's `entry` made of them, if `entry` is not 0.
            c_noise: The process's conditioning value of each image.
            conditioning: Labels, augmentation and dropout seeds of the images.
            entry: Resolutions passed over: the (B, C, H, W) of `x` are those at the beginning of this one.

        Returns:
            Bottleneck, noise embedding, skip connections and dropout seeds.
        """
        embedding, seed = self.embedding(c_noise, conditioning), conditioning.dropout_seed
        h = x if entry else self.stem(x)
        pyramid, skips = x, [h]
        for depth, blocks in enumerate(self.levels):
            if depth < entry:
                continue
            for block in blocks.children():
                skips.append(h := block(h, embedding, seed))
            if depth < len(self.downs):
                h = self.downs[depth](h, embedding, seed)
                if self.pyramid:
                    h = pyramid = merge(h, self.pyramid[depth](pyramid), self.scale)
                skips.append(h)
        for block in self.middle:
            h = block(h, embedding, seed)
        return UNetFeatures(h, embedding, tuple(skips), seed)


@final
class UNetDecoder(nn.Module):
    """The upward half at one stage's width; consumes the encoder's bottleneck and skips as they are.

    Attributes:
        entry_level: Resolutions of the encoder, and of this half, that the stage's images pass over.
        entry: What makes of them, halved so often, the features at the beginning of the first resolution that is used.
    """

    entry: nn.Module | None

    def __init__(
        self, width: int, encoder: UNetEncoder, unet: UNet, shape: tuple[int, int, int], *, entry: int = 0
    ) -> None:
        super().__init__()
        self.entry_level, self.entry = entry, None
        inside = shape[0] * 4**entry  # channels of the images, halved
        if entry:
            enter = initialise(nn.Conv2d(inside, encoder.entry_channels[entry], 3, padding=1))
            self.entry = nn.Sequential(nn.PixelUnshuffle(2**entry), enter)
        block = _blocks(unet)
        channels, skips, every = encoder.channels, list(encoder.skip_channels), unet.decoder_attention == "all"
        self.middle = _middle(block, channels) if unet.middle == "decoder" else nn.ModuleList()
        self.levels, self.ups = nn.ModuleList(), nn.ModuleList()
        for depth in reversed(range(entry, len(unet.multipliers))):
            outputs = width * unet.multipliers[depth]
            attends = shape[1] >> depth in unet.attention
            blocks = nn.ModuleList()
            for index in range(unet.blocks + 1):
                attention = attends and (every or (unet.decoder_attention == "last" and index == unet.blocks))
                blocks.append(block(channels + skips.pop(), outputs, attention=attention))
                channels = outputs
            self.levels.append(blocks)
            if depth > entry and unet.resampling == "block":
                self.ups.append(block(channels, channels, resample="up"))
            elif depth > entry:
                self.ups.append(ConvResample(channels, "up"))
        self.norm = group_norm(channels, groups=unet.groups, least=unet.group_channels, eps=unet.norm_eps)
        self.head = initialise(nn.Conv2d(channels, inside, 3, padding=1), zero=True)

    def blocks(self) -> list[nn.Module]:
        """What may be checkpointed and sharded by itself; the entry among it, as it runs before the encoder."""
        blocks: list[nn.Module] = [module for module in self.modules() if isinstance(module, ResidualBlock)]
        return blocks if self.entry is None else [*blocks, self.entry]

    def forward(self, features: UNetFeatures) -> FeatureMaps:
        """The raw network output F from the encoder's features."""
        h, embedding, skips, seed = features
        remaining = list(skips)
        for block in self.middle:
            h = block(h, embedding, seed)
        for depth, blocks in enumerate(self.levels):
            for block in blocks.children():
                h = block(torch.cat((h, remaining.pop()), dim=1), embedding, seed)
            if depth < len(self.ups):
                h = self.ups[depth](h, embedding, seed)
        output = self.head(F.silu(self.norm(h)))
        return F.pixel_shuffle(output, 2**self.entry_level) if self.entry_level else output


def _blocks(unet: UNet) -> Callable[..., ResidualBlock]:
    """Makes the residual blocks of a U-Net, which differ in channels, resampling and attention alone."""

    def block(inputs: int, outputs: int, **options: object) -> ResidualBlock:
        return ResidualBlock(
            inputs,
            outputs,
            4 * unet.width,
            filter=unet.filter,
            head_channels=unet.head_channels,
            groups=unet.groups,
            group_channels=unet.group_channels,
            eps=unet.norm_eps,
            scale=unet.skip_scale,
            dropout=unet.dropout,
            **options,  # pyright: ignore[reportArgumentType]
        )

    return block


def _middle(block: Callable[..., ResidualBlock], channels: int) -> nn.ModuleList:
    """The two blocks at the lowest resolution, the first one with attention."""
    return nn.ModuleList([block(channels, channels, attention=True), block(channels, channels)])


@torch.no_grad()
def initialise_as_edm(network: nn.Module) -> None:
    """EDM's weights at the start, in place: Xavier-uniform ones, by sqrt 0.2 or 1e-5 (Karras et al. 2022, App. F.1)."""
    for module in network.modules():
        if isinstance(module, Attention):
            module.qkv.weight *= math.sqrt(0.2)
            initialise(module.out).weight *= 1e-5
        elif isinstance(module, ResidualBlock):
            initialise(module.conv1).weight *= 1e-5
        elif isinstance(module, UNetDecoder):
            initialise(module.head).weight *= 1e-5
        elif isinstance(module, NoiseEmbedding) and module.label is not None:
            # A linear layer of one-hot labels, scaled to unit variance; its bias, and so no label, is zero.
            label = module.label.weight
            classes = module.label.num_embeddings - 1
            label.uniform_(-1, 1).mul_(math.sqrt(6 * classes / (classes + module.width)))
            label[classes] = 0
