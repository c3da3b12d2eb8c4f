"""Trunk and heads of the staged transformer: adaLN-Zero blocks on patches (Peebles and Xie 2023).

What depends on the noise level is zero at the start, so that a fresh network predicts zero.
"""

from __future__ import annotations

from typing import NamedTuple, final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from multistage_diffusion.backbones.layers import (
    FeatureMaps,
    TokenAttention,
    Tokens,
    initialise,
    modulated,
    positions,
    sinusoids,
    without_autocast,
)
from multistage_diffusion.backbones.resize import Entry, Plan
from multistage_diffusion.backbones.transformer import Transformer
from multistage_diffusion.conditioning import NO_CONDITIONING, Conditioning
from multistage_diffusion.errors import ConfigError

_SINUSOIDS = 256  # channels of the noise level before its layers


class TrunkFeatures(NamedTuple):
    """What the trunk hands to the heads: a token a patch, row by row, and each image's embedding."""

    tokens: Tensor
    embedding: Tensor


@final
class Embedding(nn.Module):
    """Sinusoids of c_noise through two layers, plus vectors of class and augmentation; SiLU at the end."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.shift, self.none, width = model.frequency_shift, model.classes, model.width
        self.first, self.second = initialise(nn.Linear(_SINUSOIDS, width)), initialise(nn.Linear(width, width))
        self.label = nn.Embedding(model.classes + 1, width) if model.classes else None
        if self.label is not None:
            nn.init.normal_(self.label.weight, std=0.02)
        self.augment = initialise(nn.Linear(model.augment_labels, width, bias=False)) if model.augment_labels else None

    def forward(self, c_noise: Float[Tensor, " batch"], conditioning: Conditioning) -> Float[Tensor, "batch width"]:
        """Embed a noise level, a class (absent: none) and an augmentation (absent: the same as zeros)."""
        wave = sinusoids(c_noise, _SINUSOIDS, self.shift).to(self.first.weight.dtype)
        labels, augment = conditioning.labels, conditioning.augment
        with without_autocast(wave):
            embedding = self.second(F.silu(self.first(wave)))
            if self.label is not None:
                none = torch.full_like(c_noise, self.none, dtype=torch.int64)
                embedding = embedding + self.label(none if labels is None else labels)
            if self.augment is not None and augment is not None:
                embedding = embedding + self.augment(augment.to(wave.dtype))
        return F.silu(embedding)


@final
class Block(nn.Module):
    """Attention and an MLP as residual branches behind norms, scaled, shifted and gated by the noise level."""

    def __init__(self, model: Transformer, width: int) -> None:
        super().__init__()
        self.rms, self.eps, self.gated = model.norm == "rms", model.norm_eps, model.mlp == "swiglu"
        hidden = 8 * round(width / 3) if self.gated else 4 * width
        self.modulation = initialise(nn.Linear(model.width, 6 * width), zero=True)
        self.attention = TokenAttention(width, head_channels=model.head_channels, qk_norm=model.qk_norm)
        self.first = initialise(nn.Linear(width, 2 * hidden if self.gated else hidden))
        self.second = initialise(nn.Linear(hidden, width))

    def forward(self, x: Tokens, embedding: Float[Tensor, "batch embedding"]) -> Tokens:
        """Tokens of the same shape; the embedding is the trunk's, whatever the width here."""
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = _modulation(self.modulation, embedding, 6)
        branch = self.attention(modulated(x, shift, scale, self.rms))
        x = torch.addcmul(x, gate, branch.to(x.dtype))
        hidden = self.first(modulated(x, shift_mlp, scale_mlp, self.rms, self.eps))
        if self.gated:
            gates, hidden = hidden.chunk(2, dim=2)
            hidden = F.silu(gates) * hidden
        else:
            hidden = F.gelu(hidden, approximate="tanh")
        return torch.addcmul(x, gate_mlp, self.second(hidden).to(x.dtype))


@final
class Trunk(nn.Module):
    """Embeddings of patches, their places, noise level and class; then the blocks that all stages share."""

    positions: Tensor

    def __init__(self, model: Transformer, shape: tuple[int, int, int]) -> None:
        super().__init__()
        channels, height, width = shape
        self.patch, self.embedding = model.patch, Embedding(model)
        self.stem = initialise(nn.Linear(channels * model.patch**2, model.width))
        self.layers = nn.ModuleList(Block(model, model.width) for _ in range(model.trunk))
        places = positions(height // model.patch, width // model.patch, model.width)
        self.register_buffer("positions", places, persistent=False)

    def blocks(self) -> list[nn.Module]:
        """What may be checkpointed and sharded by itself."""
        return list(self.layers)

    def forward(
        self, x: FeatureMaps, c_noise: Float[Tensor, " batch"], conditioning: Conditioning = NO_CONDITIONING
    ) -> TrunkFeatures:
        """Encode preconditioned noisy images once, for whichever head."""
        embedding = self.embedding(c_noise, conditioning)
        tokens = self.stem(F.pixel_unshuffle(x, self.patch).flatten(2).transpose(1, 2)) + self.positions
        for block in self.layers:
            tokens = block(tokens, embedding)
        return TrunkFeatures(tokens, embedding)

    def refresh(
        self, features: TrunkFeatures, change: FeatureMaps, c_noise: Float[Tensor, " batch"], conditioning: Conditioning
    ) -> TrunkFeatures:
        """Features of an earlier call for images that changed and another noise level, without the blocks.

        The change goes through the residual stream alone; what the blocks would make of it is left out.
        """
        moved = F.linear(F.pixel_unshuffle(change, self.patch).flatten(2).transpose(1, 2), self.stem.weight)
        return TrunkFeatures(features.tokens + moved, self.embedding(c_noise, conditioning))


@final
class Head(nn.Module):
    """A stage's blocks, at a width of its own, and its last layer.

    Patches larger than the trunk's are several of its tokens side by side, brought to the width by one linear layer.
    """

    def __init__(self, model: Transformer, shape: tuple[int, int, int], width: int, blocks: int, patch: int) -> None:
        super().__init__()
        self.grid = shape[1] // model.patch, shape[2] // model.patch
        self.merged, self.patch, self.rms = patch // model.patch, patch, model.norm == "rms"
        same = (width, patch) == (model.width, model.patch)
        self.project = None if same else initialise(nn.Linear(model.width * self.merged**2, width))
        self.layers = nn.ModuleList(Block(model, width) for _ in range(blocks))
        self.modulation = initialise(nn.Linear(model.width, 2 * width), zero=True)
        self.last = initialise(nn.Linear(width, shape[0] * patch**2), zero=True)

    def blocks(self) -> list[nn.Module]:
        """What may be checkpointed and sharded by itself."""
        return list(self.layers)

    def forward(self, features: TrunkFeatures) -> FeatureMaps:
        """The raw network output F from the trunk's features."""
        (x, embedding), (rows, columns) = features, self.grid
        if self.merged > 1:
            x = F.pixel_unshuffle(x.transpose(1, 2).unflatten(2, self.grid), self.merged).flatten(2).transpose(1, 2)
        if self.project is not None:
            x = self.project(x)
        for block in self.layers:
            x = block(x, embedding)
        shift, scale = _modulation(self.modulation, embedding, 2)
        patches = self.last(modulated(x, shift, scale, self.rms)).transpose(1, 2)
        return F.pixel_shuffle(patches.unflatten(2, (rows // self.merged, columns // self.merged)), self.patch)


def _modulation(layer: nn.Linear, embedding: Tensor, parts: int) -> tuple[Tensor, ...]:
    """Shifts, scales and gates, (batch, 1, width); not in half precision, which would change the noise level."""
    with without_autocast(embedding):
        return layer(embedding)[:, None].chunk(parts, dim=2)


def deeper(trained: nn.Module, target: nn.Module) -> Plan:
    """How the weights of a head follow from those of one of another depth.

    Raises:
        ConfigError: They differ in width or patch, too.
    """
    old, new = trained.state_dict(), target.state_dict()
    for name, tensor in new.items():
        if name in old and old[name].shape != tensor.shape:
            raise ConfigError("the heads of a transformer start from trained ones of the same width and patch alone")
    # A fresh block adds nothing: its gates are zero.
    return {name: Entry() if name in old else Entry(fixed=tensor.clone()) for name, tensor in new.items()}
