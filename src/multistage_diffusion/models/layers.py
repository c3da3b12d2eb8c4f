"""Building blocks of the U-Net: noise embedding, resampling, attention, residual block."""

from __future__ import annotations

import contextlib
import math
from typing import Literal, TypeVar, final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from multistage_diffusion import rng
from multistage_diffusion.config import ModelConfig
from multistage_diffusion.errors import ConfigError

Maps = Float[Tensor, "batch channels height width"]
Direction = Literal["down", "up"]
_Layer = TypeVar("_Layer", nn.Conv2d, nn.Linear)


@final
class GroupNorm(nn.GroupNorm):
    """Group norm in the precision of its input: under autocast GPUs compute it in float32, and would go on so."""

    def forward(self, input: Maps) -> Maps:
        """Normalise.

        Args:
            input: Feature maps.

        Returns:
            Feature maps of the same shape and precision.
        """
        return super().forward(input).to(input.dtype)


def group_norm(channels: int, config: ModelConfig) -> GroupNorm:
    """Group norm with at most `config.groups` groups of at least 4 channels each.

    Args:
        channels: Number of channels.
        config: Gives the largest number of groups, and epsilon.

    Returns:
        The layer; the number of groups is the largest one that divides the channels.
    """
    most = max(1, min(config.groups, channels // 4))
    groups = next(groups for groups in range(most, 0, -1) if channels % groups == 0)
    return GroupNorm(groups, channels, eps=config.norm_eps)


def merge(x: Maps, branch: Maps, scale: float) -> Maps:
    """A residual branch added to its input, with the variance kept where the scale is sqrt(1/2).

    Args:
        x: Feature maps.
        branch: Feature maps of the same shape.
        scale: What the sum is multiplied by.

    Returns:
        Feature maps of the same shape.
    """
    total = x + branch
    return total if scale == 1.0 else total.mul_(scale)


def initialise(layer: _Layer, *, zero: bool = False) -> _Layer:
    """Xavier-uniform weights, or zeros for a layer that ends a residual branch; biases are zero.

    Args:
        layer: Convolution or linear layer.
        zero: Whether the layer begins as zero.

    Returns:
        The same layer.
    """
    if zero:
        nn.init.zeros_(layer.weight)
    else:
        nn.init.xavier_uniform_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def _exact(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Without autocast: rounding the noise embedding to half precision is like a wrong noise level."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if kind in ("cpu", "cuda", "mps", "xpu") else contextlib.nullcontext()


@final
class NoiseEmbedding(nn.Module):
    """Sinusoids of c_noise, plus vectors of class and augmentation, through a two-layer MLP (Ho et al. 2020)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.width, self.shift = config.width, config.frequency_shift
        self.label = nn.Embedding(config.classes + 1, config.width) if config.classes else None
        self.first = nn.Linear(config.width, 4 * config.width)
        self.second = nn.Linear(4 * config.width, 4 * config.width)
        initialise(self.first)
        initialise(self.second)
        self.augment: nn.Linear | None = None
        if config.augment_labels:
            self.augment = nn.Linear(config.augment_labels, config.width, bias=False)
            initialise(self.augment)

    def forward(
        self,
        c_noise: Float[Tensor, " batch"],
        labels: Int[Tensor, " batch"] | None,
        augment: Float[Tensor, "batch numbers"] | None = None,
    ) -> Float[Tensor, "batch embed"]:
        """Embed a noise level, a class and an augmentation.

        Args:
            c_noise: The process's conditioning value.
            labels: Class of each image; `classes` means none. Absent for an unconditional network.
            augment: How each image was augmented; absent means not at all, and is the same as zeros.

        Returns:
            The embedding, of 4 base widths.
        """
        half = self.width // 2
        ramp = torch.arange(half, device=c_noise.device, dtype=torch.float32) / max(half - self.shift, 1)
        angle = c_noise.float()[:, None] * torch.exp(-math.log(10_000) * ramp)
        wave = torch.cat((angle.cos(), angle.sin()), dim=1).to(self.first.weight.dtype)
        with _exact(wave):
            return self._embed(wave, labels, augment)

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

    def __init__(self, direction: Direction, kind: Literal["box", "fir"]) -> None:
        super().__init__()
        self.direction, self.kind = direction, kind
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0])
        self.register_buffer("kernel", torch.outer(taps, taps) / taps.sum() ** 2, persistent=False)

    def forward(self, x: Maps) -> Float[Tensor, "batch channels height2 width2"]:
        """Resample each channel by itself.

        Args:
            x: Feature maps of even height and width when halved.

        Returns:
            Feature maps of half or twice the height and width.
        """
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
class Dropout(nn.Module):
    """Dropout whose mask belongs to the image: a pure function of the image's number, the layer and the place.

    The mask is the same however a batch is cut into parts and on whatever devices they are, and when a forward pass is
    repeated to save memory. At each place, (a n + b) mod 2^32 is compared with a threshold; n is random for each
    place, a and b for each image and layer. So the places of an image are independent of each other, and those of two
    images are in pairs (Dietzfelbinger 1996, multiply-shift hashing).

    Attributes:
        layer: Which of the network's dropout layers this is.
    """

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share, self.layer = share, 0

    def forward(self, x: Maps, number: Int[Tensor, " batch"] | None = None) -> Maps:
        """Drop entries, and scale up the others; in evaluation mode nothing.

        Args:
            x: Feature maps.
            number: Random 64-bit number of each image; none draws from torch's generator.

        Returns:
            Feature maps of the same shape.
        """
        if not self.training or self.share == 0.0:
            return x
        if number is None:
            return F.dropout(x, self.share)
        word = rng.mix(number + self.layer)
        places = rng.mix(torch.arange(x[0].numel(), device=x.device) ^ rng.GAMMA).int().view(x.shape[1:])  # compiles
        factor, start = (word | 1).int()[:, None, None, None], (word >> 32).int()[:, None, None, None]
        keep = torch.addcmul(start, places, factor) >= int(self.share * 2**32) - 2**31
        return (x * keep).div_(1.0 - self.share)  # in the layout of x


@final
class Attention(nn.Module):
    """Self-attention over the pixels of a feature map, as a residual branch."""

    def __init__(self, channels: int, config: ModelConfig) -> None:
        super().__init__()
        size = min(channels, config.head_channels or channels)
        if channels % size:
            raise ConfigError(f"model.head-channels {size} must divide the {channels} channels of an attention layer")
        self.heads = channels // size
        self.scale = config.skip_scale
        self.norm = group_norm(channels, config)
        self.qkv = initialise(nn.Conv2d(channels, 3 * channels, 1))
        self.out = initialise(nn.Conv2d(channels, channels, 1), zero=True)

    def forward(self, x: Maps) -> Maps:
        """Attend.

        Args:
            x: Feature maps.

        Returns:
            Feature maps of the same shape.
        """
        # A head's channels side by side in memory: fused attention takes no others, and torch falls back in silence.
        qkv = self.qkv(self.norm(x).contiguous(memory_format=torch.channels_last)).permute(0, 2, 3, 1).flatten(1, 2)
        query, key, value = qkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return merge(x, self.out(mixed.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)), self.scale)


@final
class ResidualBlock(nn.Module):
    """Norm, SiLU, (resample,) convolution, noise embedding, norm, SiLU, dropout, convolution; then perhaps attention.

    Attributes:
        recompute: Keep only the input for the backward pass, and repeat the forward pass there.

    Source: the BigGAN-style block of Song et al. 2021 (score SDE), which EDM's DDPM++ shares.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        config: ModelConfig,
        *,
        resample: Direction | None = None,
        attention: bool = False,
    ) -> None:
        super().__init__()
        self.scale = config.skip_scale
        self.norm0 = group_norm(inputs, config)
        self.resample = Resample(resample, config.filter) if resample else None
        self.conv0 = initialise(nn.Conv2d(inputs, outputs, 3, padding=1))
        self.affine = initialise(nn.Linear(4 * config.width, outputs))
        self.norm1 = group_norm(outputs, config)
        self.dropout = Dropout(config.dropout)
        self.conv1 = initialise(nn.Conv2d(outputs, outputs, 3, padding=1), zero=True)
        changes = inputs != outputs or resample is not None
        self.shortcut = initialise(nn.Conv2d(inputs, outputs, 1)) if changes else None
        self.attention = Attention(outputs, config) if attention else None
        self.recompute = False

    def forward(
        self, x: Maps, embedding: Float[Tensor, "batch embed"], number: Int[Tensor, " batch"] | None = None
    ) -> Float[Tensor, "batch channels2 height2 width2"]:
        """Transform feature maps.

        Args:
            x: Feature maps.
            embedding: Noise embedding of each image.
            number: What each image's dropout is drawn from.

        Returns:
            Feature maps of the block's output width (and resolution).
        """
        if self.recompute and torch.is_grad_enabled():
            # A mask without a number comes from the generator, whose state must then be repeated, too.
            keep = number is None and self.dropout.share > 0
            return checkpoint(self._transform, x, embedding, number, use_reentrant=False, preserve_rng_state=keep)
        return self._transform(x, embedding, number)

    def _transform(self, x: Tensor, embedding: Tensor, number: Tensor | None) -> Tensor:
        h = F.silu(self.norm0(x))
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        with _exact(embedding):
            shift = self.affine(embedding)
        h = self.conv0(h) + shift.to(h.dtype)[:, :, None, None]
        h = self.conv1(self.dropout(F.silu(self.norm1(h)), number))
        if self.shortcut is not None:
            x = self.shortcut(x)
        x = merge(x, h, self.scale)
        return x if self.attention is None else self.attention(x)


@final
class ConvResample(nn.Module):
    """Halve by a strided 3x3 convolution, or double by nearest neighbours and a 3x3 convolution (latent diffusion).

    With `config.resampling` "conv-after" the strided convolution is padded right and below only (Ho et al. 2020).
    """

    def __init__(self, channels: int, direction: Direction, config: ModelConfig) -> None:
        super().__init__()
        self.direction = direction
        self.pad_after = direction == "down" and config.resampling == "conv-after"
        stride = 2 if direction == "down" else 1
        self.conv = initialise(nn.Conv2d(channels, channels, 3, stride=stride, padding=0 if self.pad_after else 1))

    def forward(
        self, x: Maps, embedding: Float[Tensor, "batch embed"], number: Int[Tensor, " batch"] | None = None
    ) -> Float[Tensor, "batch channels height2 width2"]:
        """Resample; embedding and number are not used, so that all up and down steps are called alike.

        Args:
            x: Feature maps.
            embedding: Noise embedding.
            number: What each image's dropout is drawn from.

        Returns:
            Feature maps of half or twice the height and width.
        """
        if self.direction == "up":
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.pad_after else x)
