"""Building blocks: noise embedding, resampling, attention, residual block."""

from __future__ import annotations

import contextlib
import math
from functools import partial
from typing import Literal, TypeVar, final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from multistage_diffusion import rng
from multistage_diffusion.conditioning import NO_CONDITIONING, Conditioning
from multistage_diffusion.errors import ConfigError

FeatureMaps = Float[Tensor, "batch channels height width"]
Tokens = Float[Tensor, "batch tokens width"]
Direction = Literal["down", "up"]
Filter = Literal["box", "fir"]
_Layer = TypeVar("_Layer", nn.Conv2d, nn.Linear)


@final
class GroupNorm(nn.GroupNorm):
    """Group norm in the precision of its input: under autocast GPUs compute it in float32, and would go on so."""

    def forward(self, input: FeatureMaps) -> FeatureMaps:
        """Normalise feature maps; shape and dtype stay."""
        return super().forward(input).to(input.dtype)


def group_norm(channels: int, *, groups: int, eps: float, least: int = 4) -> GroupNorm:
    """Group norm with as many groups as divide the channels into `least` or more each, `groups` at most."""
    most = max(1, min(groups, channels // least))
    divisor = next(count for count in range(most, 0, -1) if channels % count == 0)
    return GroupNorm(divisor, channels, eps=eps)


def merge(x: FeatureMaps, branch: FeatureMaps, scale: float) -> FeatureMaps:
    """(x + branch) scale: a residual branch added to its input; sqrt(1/2) keeps the variance."""
    total = x + branch
    return total if scale == 1.0 else total.mul_(scale)


def initialise(layer: _Layer, *, zero: bool = False) -> _Layer:
    """Xavier-uniform weights, or zeros for a layer that ends a residual branch; biases are zero. Returns the layer."""
    if zero:
        nn.init.zeros_(layer.weight)
    else:
        nn.init.xavier_uniform_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def without_autocast(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Without autocast: rounding the noise embedding to half precision is like a wrong noise level."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if kind in ("cpu", "cuda", "mps", "xpu") else contextlib.nullcontext()


def sinusoids(c_noise: Float[Tensor, " batch"], channels: int, shift: int) -> Float[Tensor, "batch channels"]:
    """Cosines, then sines, of a noise level at geometric frequencies from 1 to 1/10000; with `shift` 0, just above."""
    half = channels // 2
    ramp = torch.arange(half, device=c_noise.device, dtype=torch.float32) / max(half - shift, 1)
    angle = c_noise.float()[:, None] * torch.exp(-math.log(10_000) * ramp)
    return torch.cat((angle.cos(), angle.sin()), dim=1)


def positions(height: int, width: int, channels: int) -> Float[Tensor, "tokens channels"]:
    """Sines, then cosines, of each patch's column, and then of its row, at frequencies from 1 to just above 1/10000."""
    rates = 10_000.0 ** -(torch.arange(channels // 4, dtype=torch.float64) / (channels // 4))
    angles = (torch.arange(size, dtype=torch.float64)[:, None] * rates for size in (width, height))
    columns, rows = (torch.cat((angle.sin(), angle.cos()), dim=1) for angle in angles)
    return torch.cat((columns.repeat(height, 1), rows.repeat_interleave(width, dim=0)), dim=1).float()


def modulated(x: Tokens, shift: Tensor, scale: Tensor, rms: bool, eps: float = 1e-6) -> Tokens:
    """norm(x) (1 + scale) + shift, with RMSNorm or layer norm without weights (Peebles and Xie 2023)."""
    normed = F.rms_norm(x, x.shape[2:], eps=eps) if rms else F.layer_norm(x, x.shape[2:], eps=eps)
    return torch.addcmul(shift, normed.to(shift.dtype), 1 + scale)


@final
class NoiseEmbedding(nn.Module):
    """Sinusoids of c_noise, plus vectors of class and augmentation, through a two-layer MLP (Ho et al. 2020).

    Args:
        width: Sinusoids (half sines, half cosines); the embedding has 4 times as many channels.
        classes: Number of class labels; label `classes` means none. 0: unconditional.
        augment_labels: Numbers that describe an image's augmentation; 0: none.
        frequency_shift: 1: the frequencies end at 1/10000 (DDPM); 0: just above it (latent diffusion).
    """

    def __init__(self, width: int, *, classes: int = 0, augment_labels: int = 0, frequency_shift: int = 1) -> None:
        super().__init__()
        self.width, self.shift = width, frequency_shift
        self.label = nn.Embedding(classes + 1, width) if classes else None
        self.first, self.second = nn.Linear(width, 4 * width), nn.Linear(4 * width, 4 * width)
        initialise(self.first)
        initialise(self.second)
        self.augment = initialise(nn.Linear(augment_labels, width, bias=False)) if augment_labels else None

    def forward(
        self, c_noise: Float[Tensor, " batch"], conditioning: Conditioning = NO_CONDITIONING
    ) -> Float[Tensor, "batch embedding"]:
        """Embed a noise level, a class (absent: none) and an augmentation (absent: the same as zeros)."""
        wave = sinusoids(c_noise, self.width, self.shift).to(self.first.weight.dtype)
        with without_autocast(wave):
            return self._embed(wave, conditioning.labels, conditioning.augment)

    def _embed(self, wave: Tensor, labels: Tensor | None, augment: Tensor | None) -> Tensor:
        if self.label is not None:
            if labels is None:
                labels = torch.full_like(wave[:, 0], self.label.num_embeddings - 1, dtype=torch.int64)
            wave = wave + self.label(labels)
        if self.augment is not None and augment is not None:
            wave = wave + self.augment(augment.to(wave.dtype))
        return F.silu(self.second(F.silu(self.first(wave))))


@final
class Resample(nn.Module):
    """Halve or double the resolution, with the box filter (average, nearest) or FIR 1, 3, 3, 1 (Zhang 2019)."""

    kernel: Tensor

    def __init__(self, direction: Direction, kind: Filter) -> None:
        super().__init__()
        self.direction, self.kind = direction, kind
        self.register_buffer("kernel", _kernel("fir"), persistent=False)

    def forward(self, x: FeatureMaps) -> Float[Tensor, "batch channels height2 width2"]:
        """Resample each channel by itself; height and width must be even where they are halved."""
        if self.kind == "box":
            if self.direction == "down":
                return F.avg_pool2d(x, 2)
            return F.interpolate(x, scale_factor=2.0, mode="nearest")
        channels = x.shape[1]
        kernel = self.kernel.to(x.dtype).expand(channels, 1, 4, 4)
        if self.direction == "down":
            return F.conv2d(x, kernel, stride=2, padding=1, groups=channels)
        return F.conv_transpose2d(x, kernel * 4, stride=2, padding=1, groups=channels)


@final
class Blur(nn.Module):
    """The filter of `Resample` at full resolution, one pixel larger all around for a 3x3 convolution without padding.

    With a convolution of stride 2 behind it, it is the input pyramid of Song et al. 2021 (score SDE).
    """

    kernel: Tensor

    def __init__(self, kind: Filter) -> None:
        super().__init__()
        self.register_buffer("kernel", _kernel(kind), persistent=False)

    def forward(self, x: FeatureMaps) -> Float[Tensor, "batch channels height2 width2"]:
        """Filter each channel by itself; zeros lie around the images, and both sides grow by 1."""
        size = len(self.kernel)
        kernel = self.kernel.to(x.dtype).expand(x.shape[1], 1, size, size)
        return F.conv2d(x, kernel, padding=size // 2, groups=x.shape[1])


def _kernel(kind: Filter) -> Float[Tensor, "size size"]:
    """The filter in two dimensions; without arithmetic on tensors, which on the meta device loads torch's compiler."""
    taps = (1.0, 1.0) if kind == "box" else (1.0, 3.0, 3.0, 1.0)
    return torch.tensor([[a * b / sum(taps) ** 2 for b in taps] for a in taps])


@final
class Dropout(nn.Module):
    """Dropout whose mask belongs to the image: a pure function of the image's dropout seed, the layer and the entry.

    The mask is the same in whatever micro-batches and on whatever devices a batch is computed, and when a forward pass
    is repeated in activation checkpointing. At entry i it keeps those with (a_i n_i + b) mod 2^32 above a threshold,
    where n_i is a fixed random number of the entry, and a, b are random numbers of the image and the layer
    (multiply-shift hashing, Dietzfelbinger 1996: entries of an image are independent, those of two images in pairs).

    Attributes:
        layer: Index of this layer among the network's dropout layers.
    """

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share, self.layer = share, 0

    def forward(self, x: FeatureMaps, seed: Int[Tensor, " batch"] | None = None) -> FeatureMaps:
        """Drop entries and scale up the others; in evaluation mode nothing. Without seeds, torch's generator draws."""
        if not self.training or self.share == 0.0:
            return x
        if seed is None:
            return F.dropout(x, self.share)
        word = rng.mix(seed + self.layer)
        places = rng.mix(torch.arange(x[0].numel(), device=x.device) ^ rng.GAMMA).int().view(x.shape[1:])  # compiles
        factor, start = (word | 1).int()[:, None, None, None], (word >> 32).int()[:, None, None, None]
        keep = torch.addcmul(start, places, factor) >= int(self.share * 2**32) - 2**31
        return (x * keep).div_(1.0 - self.share)  # in the layout of x


def takes_dropout_seed(network: nn.Module) -> bool:
    """Whether a network has dropout whose masks are made from the images' seeds."""
    return any(isinstance(module, Dropout) and module.share > 0 for module in network.modules())


def number_dropouts(network: nn.Module) -> None:
    """Give each dropout layer of a network a number, so that each draws masks of its own from an image's seed."""
    for layer, dropout in enumerate(module for module in network.modules() if isinstance(module, Dropout)):
        dropout.layer = layer


@final
class Attention(nn.Module):
    """Self-attention over the pixels of a feature map, as a residual branch.

    Args:
        channels: Channels of the feature map.
        head_channels: Channels of a head; none: one head.
        groups: Largest number of groups of the norm.
        group_channels: Smallest number of channels of a group.
        eps: Epsilon of the norm.
        scale: Factor of the sum of input and branch.

    Raises:
        ConfigError: `head_channels` does not divide `channels`.
    """

    is_attention = True  # FLOPs are counted with and without such modules

    def __init__(
        self,
        channels: int,
        *,
        head_channels: int | None = None,
        groups: int = 32,
        group_channels: int = 4,
        eps: float = 1e-6,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        size = min(channels, head_channels or channels)
        if channels % size:
            raise ConfigError(f"model.head-channels {size} must divide the {channels} channels of an attention layer")
        self.heads, self.scale = channels // size, scale
        self.norm = group_norm(channels, groups=groups, least=group_channels, eps=eps)
        self.qkv = initialise(nn.Conv2d(channels, 3 * channels, 1))
        self.out = initialise(nn.Conv2d(channels, channels, 1), zero=True)

    def forward(self, x: FeatureMaps) -> FeatureMaps:
        """Attend; the shape stays."""
        # A head's channels side by side in memory: fused attention takes no others, and torch falls back in silence.
        qkv = self.qkv(self.norm(x).contiguous(memory_format=torch.channels_last)).permute(0, 2, 3, 1).flatten(1, 2)
        query, key, value = qkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, H W, C / heads)
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return merge(x, self.out(mixed.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)), self.scale)


@final
class TokenAttention(nn.Module):
    """Self-attention over tokens.

    Args:
        width: Channels of a token.
        head_channels: Channels of a head, a divisor of `width`.
        qk_norm: Whether RMSNorm comes before the products of queries and keys.
    """

    is_attention = True

    def __init__(self, width: int, *, head_channels: int, qk_norm: bool = False) -> None:
        super().__init__()
        self.channels = head_channels
        self.qkv, self.out = initialise(nn.Linear(width, 3 * width)), initialise(nn.Linear(width, width))
        self.scales = nn.Parameter(torch.ones(2, head_channels)) if qk_norm else None  # of queries and keys

    def forward(self, x: Tokens) -> Tokens:
        """Attend; the shape stays."""
        query, key, value = self.qkv(x).unflatten(2, (3, -1, self.channels)).permute(2, 0, 3, 1, 4)
        if self.scales is not None:
            first, second = self.scales.to(value.dtype)
            query = F.rms_norm(query, (self.channels,), first, 1e-6)
            key = F.rms_norm(key, (self.channels,), second, 1e-6)
        return self.out(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


@final
class ResidualBlock(nn.Module):
    """Norm, SiLU, (resample,) convolution, noise embedding, norm, SiLU, dropout, convolution; then perhaps attention.

    Args:
        inputs: Channels of the input.
        outputs: Channels of the output.
        embedding: Channels of the noise embedding.
        resample: Whether to halve or double the resolution.
        filter: Filter of the resampling.
        attention: Whether attention follows.
        head_channels: Channels of an attention head; none: one head.
        groups: Largest number of groups of a norm.
        group_channels: Smallest number of channels of a group.
        eps: Epsilon of a norm.
        scale: Factor of the sum of input and branch.
        dropout: Share of entries dropped before the second convolution.

    Source: the BigGAN-style block of Song et al. 2021 (score SDE), which EDM's DDPM++ shares.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        embedding: int,
        *,
        resample: Direction | None = None,
        filter: Filter = "box",
        attention: bool = False,
        head_channels: int | None = None,
        groups: int = 32,
        group_channels: int = 4,
        eps: float = 1e-6,
        scale: float = 1.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.scale = scale
        norm = partial(group_norm, groups=groups, eps=eps, least=group_channels)
        self.norm0 = norm(inputs)
        self.resample = Resample(resample, filter) if resample else None
        self.conv0 = initialise(nn.Conv2d(inputs, outputs, 3, padding=1))
        self.affine = initialise(nn.Linear(embedding, outputs))
        self.norm1 = norm(outputs)
        self.dropout = Dropout(dropout)
        self.conv1 = initialise(nn.Conv2d(outputs, outputs, 3, padding=1), zero=True)
        changes = inputs != outputs or resample is not None
        self.shortcut = initialise(nn.Conv2d(inputs, outputs, 1)) if changes else None
        self.attention: Attention | None = None
        if attention:
            self.attention = Attention(
                outputs, head_channels=head_channels, groups=groups, group_channels=group_channels, eps=eps, scale=scale
            )

    def forward(
        self, x: FeatureMaps, embedding: Float[Tensor, "batch embedding"], seed: Int[Tensor, " batch"] | None = None
    ) -> Float[Tensor, "batch channels2 height2 width2"]:
        """Feature maps of the output's channels and resolution, from those of the input and each image's embedding."""
        h = F.silu(self.norm0(x))
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        with without_autocast(embedding):
            shift = self.affine(embedding)
        h = self.conv0(h) + shift.to(h.dtype)[:, :, None, None]
        h = self.conv1(self.dropout(F.silu(self.norm1(h)), seed))
        if self.shortcut is not None:
            x = self.shortcut(x)
        x = merge(x, h, self.scale)
        return x if self.attention is None else self.attention(x)


@final
class ConvResample(nn.Module):
    """Halve by a strided 3x3 convolution, or double by nearest neighbours and a 3x3 convolution (latent diffusion).

    Args:
        channels: Channels of input and output.
        direction: Whether to halve or to double.
        pad_after: Pad a strided convolution right and below only (Ho et al. 2020).
    """

    def __init__(self, channels: int, direction: Direction, *, pad_after: bool = False) -> None:
        super().__init__()
        self.direction = direction
        self.pad_after = direction == "down" and pad_after
        stride = 2 if direction == "down" else 1
        self.conv = initialise(nn.Conv2d(channels, channels, 3, stride=stride, padding=0 if self.pad_after else 1))

    def forward(
        self, x: FeatureMaps, embedding: Float[Tensor, "batch embedding"], seed: Int[Tensor, " batch"] | None = None
    ) -> Float[Tensor, "batch channels height2 width2"]:
        """Resample; embedding and seed are not used: all steps up and down are called alike."""
        if self.direction == "up":
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.pad_after else x)
