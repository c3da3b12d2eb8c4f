"""Decoders of other widths from trained ones: a narrower one picks channels, a wider one repeats them.

The channels of a layer's output are a list of channels of the trained layer. All layers that read or normalise that
output use the same list, so a plan follows the decoder from its first layer to its head. Where channels are repeated,
the weights of the layer that reads them are divided among the copies, so its sum stays. They are divided unevenly, and
differently for each output, as copies with equal gradients would stay equal.

Picking follows Fang et al. 2023 (structural pruning by groups of tied channels) with norms as the importance; repeating
follows Chen et al. 2016 (Net2Net). Group norms are kept where whole groups are picked or repeated. A decoder's first
norm of a block spans the encoder's features, too, whose number stays: there the groups shift, and the function changes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from multistage_diffusion import rng
from multistage_diffusion.backbones.layers import Attention, ConvResample, ResidualBlock
from multistage_diffusion.backbones.unet_parts import UNetDecoder


class Channels(NamedTuple):
    """The trained channel behind each channel: int64, one entry a new channel; and the number of trained ones."""

    trained: Tensor
    total: int

    @classmethod
    def same(cls, count: int) -> Channels:
        """All channels as they are."""
        return cls(torch.arange(count), count)

    def followed_by(self, count: int) -> Channels:
        """These channels, then `count` others as they are."""
        return Channels(torch.cat((self.trained, self.total + torch.arange(count))), self.total + count)

    def divided(self, outputs: int) -> Tensor:
        """Factors (outputs, channels) for the weights that read the channels; those of copies sum to 1."""
        times = self.trained.bincount(minlength=self.total)[self.trained].float()
        if not (times > 1).any():
            return torch.ones(1, len(self.trained))
        uneven = rng.uniform(0, "resize", torch.arange(outputs), len(self.trained)).float()
        sums = torch.zeros(outputs, self.total).index_add_(1, self.trained, uneven)
        return (1 + 0.5 * (uneven - sums[:, self.trained] / times)) / times


@dataclass(frozen=True)
class Entry:
    """How a tensor is made from the trained one of the same name.

    Attributes:
        rows: Trained entry of dimension 0 behind each entry; none: as they are.
        columns: Channels of dimension 1, which the layer reads; none: as they are.
        factor: Factor of each row of a weight; none: 1.
        fixed: The tensor itself, where there is no trained one.
    """

    rows: Tensor | None = None
    columns: Channels | None = None
    factor: Tensor | None = None
    fixed: Tensor | None = None

    def weight(self, trained: Tensor | None) -> Tensor:
        """The tensor, from a trained weight."""
        if self.fixed is not None:
            return self.fixed
        assert trained is not None
        tensor = self.moment(trained)
        if self.columns is not None:
            divided = self.columns.divided(len(tensor)).to(tensor)
            tensor = tensor * divided.reshape(*divided.shape, *(1,) * (tensor.ndim - 2))
        return tensor if self.factor is None else tensor * self.factor.to(tensor).reshape(-1, *(1,) * (tensor.ndim - 1))

    def moment(self, trained: Tensor) -> Tensor:
        """The same without factors, for an optimiser's moments."""
        tensor = trained if self.rows is None else trained[self.rows.to(trained.device)]
        return tensor if self.columns is None else tensor[:, self.columns.trained.to(trained.device)]


Plan = dict[str, Entry]


def choose(strength: Tensor, count: int, groups: int, new_groups: int) -> Channels:
    """Which trained channels to keep, or to repeat.

    Args:
        strength: Importance of each trained channel.
        count: Number of channels to make.
        groups: Groups that the trained channels are normalised in, of equal size.
        new_groups: Groups of the new ones.

    Returns:
        Fewer: the strongest groups, of each its strongest channels. More: each group, or each channel of a group,
        repeated; a group norm with the same statistics where both numbers are multiples. Where groups and their sizes
        change in opposite directions: the strongest channels, or all in turn.
    """
    trained = len(strength)
    if count == trained:
        return Channels.same(trained)
    size, new_size = trained // groups, count // new_groups
    if new_groups <= groups and new_size <= size:
        table = strength.reshape(groups, size)
        best = table.sum(dim=1).topk(new_groups).indices.sort().values
        within = table[best].topk(new_size, dim=1).indices.sort(dim=1).values
        index = (best[:, None] * size + within).flatten()
    elif new_groups >= groups and new_size >= size:
        group = torch.arange(new_groups) * groups // new_groups
        index = (group[:, None] * size + torch.arange(new_size) % size).flatten()
    elif count < trained:
        index = strength.topk(count).indices.sort().values
    else:
        index = torch.arange(count) % trained
    return Channels(index, trained)


@torch.no_grad()
def resize(trained: UNetDecoder, target: UNetDecoder, bottleneck: int) -> Plan:
    """How the weights of a decoder follow from those of a trained one of another width or entry.

    Where images enter at another resolution, what lies between the images and the first one that both have starts anew.

    Args:
        trained: The trained decoder.
        target: A decoder of the same options behind the same encoder, but for its entry.
        bottleneck: Channels that the encoder hands to both.

    Returns:
        An entry for each parameter of `target`.
    """
    plan: Plan = {}
    h = Channels.same(bottleneck)
    for index, (old, new) in enumerate(zip(_list(trained.middle), _list(target.middle), strict=True)):
        h = _block(plan, f"middle.{index}", old, new, h)
    anew = trained.entry_level != target.entry_level
    shared = min(len(trained.levels), len(target.levels))  # the lowest resolutions
    if anew:
        plan |= {name: Entry(fixed=tensor.clone()) for name, tensor in target.state_dict().items()}
    for depth, (blocks, new_blocks) in enumerate(zip(trained.levels[:shared], target.levels[:shared], strict=True)):
        for index, (old, new) in enumerate(zip(_list(blocks), _list(new_blocks), strict=True)):
            h = _block(plan, f"levels.{depth}.{index}", old, new, h.followed_by(old.conv0.in_channels - h.total))
        if depth < shared - 1:
            old, new, name = trained.ups[depth], target.ups[depth], f"ups.{depth}"
            if isinstance(old, ConvResample) and isinstance(new, ConvResample):
                outputs = choose(_strength(old.conv), len(new.conv.weight), 1, 1)
                _layer(plan, f"{name}.conv", h, outputs)
                h = outputs
            elif isinstance(old, ResidualBlock) and isinstance(new, ResidualBlock):
                h = _block(plan, name, old, new, h)
    if anew:
        return plan
    if target.entry is not None:
        plan |= {f"entry.{name}": Entry() for name in target.entry.state_dict()}
    _norm(plan, "norm", h)
    _layer(plan, "head", h, Channels.same(trained.head.out_channels))
    return plan


def _block(plan: Plan, name: str, trained: ResidualBlock, target: ResidualBlock, inputs: Channels) -> Channels:
    """Plan a residual block; the channels of its output."""
    _norm(plan, f"{name}.norm0", inputs)
    groups, new_groups = trained.norm1.num_groups, target.norm1.num_groups
    hidden = choose(_strength(trained.conv0), target.conv0.out_channels, groups, new_groups)
    _layer(plan, f"{name}.conv0", inputs, hidden)
    _layer(plan, f"{name}.affine", None, hidden)
    _norm(plan, f"{name}.norm1", hidden)
    outputs = inputs
    if trained.shortcut is not None or target.shortcut is not None:
        strength = _strength(trained.conv1)
        strength = strength if trained.shortcut is None else strength + _strength(trained.shortcut)
        outputs = choose(strength, target.conv1.out_channels, groups, new_groups)
    _layer(plan, f"{name}.conv1", hidden, outputs)
    if target.shortcut is not None and trained.shortcut is not None:
        _layer(plan, f"{name}.shortcut", inputs, outputs)
    elif target.shortcut is not None:  # the trained block adds its input as it is: each output its own channel
        same = (outputs.trained[:, None] == inputs.trained).float() * inputs.divided(len(outputs.trained))
        plan[f"{name}.shortcut.weight"] = Entry(fixed=same[:, :, None, None])
        plan[f"{name}.shortcut.bias"] = Entry(fixed=torch.zeros(len(same)))
    if trained.attention is not None and target.attention is not None:
        _attention(plan, f"{name}.attention", trained.attention, target.attention, outputs)
    return outputs


def _attention(plan: Plan, name: str, trained: Attention, target: Attention, channels: Channels) -> None:
    """Plan an attention layer: whole heads are picked or repeated, or channels within its one head.

    A logit is sum_i q_i k_i / sqrt(d) over the d channels of a head. A channel that is there n times counts n times,
    and d becomes d': q and k each take the factor n^(-1/2) (d'/d)^(1/4), which keeps the logits of a repeated head.
    """
    _norm(plan, f"{name}.norm", channels)
    count, new = trained.out.in_channels, target.out.in_channels
    value = trained.qkv.weight[2 * count :].flatten(1).norm(dim=1)
    inner = choose(value * trained.out.weight.flatten(1).norm(dim=0), new, trained.heads, target.heads)
    size = new // target.heads
    within = torch.stack([(head[:, None] == head).sum(dim=1) for head in inner.trained.split(size)]).flatten()
    factor = (size / (count // trained.heads)) ** 0.25 * within.float().rsqrt()
    rows = torch.cat([part * count + inner.trained for part in range(3)])
    factors = torch.cat((factor, factor, torch.ones(new)))
    plan[f"{name}.qkv.weight"] = Entry(rows, channels, factors)
    plan[f"{name}.qkv.bias"] = Entry(rows, factor=factors)
    _layer(plan, f"{name}.out", inner, channels)


def _layer(plan: Plan, name: str, inputs: Channels | None, outputs: Channels) -> None:
    """Plan a convolution or a linear layer; one that reads the noise embedding has no `inputs`."""
    plan[f"{name}.weight"], plan[f"{name}.bias"] = Entry(outputs.trained, inputs), Entry(outputs.trained)


def _norm(plan: Plan, name: str, channels: Channels) -> None:
    plan[f"{name}.weight"] = plan[f"{name}.bias"] = Entry(channels.trained)


def _list(blocks: nn.Module) -> list[ResidualBlock]:
    return cast(list[ResidualBlock], list(blocks.children()))


def _strength(layer: nn.Conv2d) -> Tensor:
    """Norm of the weights of each output."""
    return layer.weight.flatten(1).norm(dim=1)
