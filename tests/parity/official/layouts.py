"""Published U-Nets as functions of their weights, with their names, orders and arithmetic, written from their facts.

`Weights` makes a weight of the shape that is asked for when a name is asked for the first time; so running a function
once makes a state dict in its layout, and running it again computes the network's output.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F

ROOT_HALF = 2**-0.5
FIR, BOX = [1.0, 3.0, 3.0, 1.0], [1.0, 1.0]


class Weights(dict):
    """A state dict that grows."""

    def __init__(self, seed=0):
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def get(self, name, *shape, scale=None, shift=0.0):
        if name not in self:
            scale = scale if scale is not None else 1 / math.sqrt(math.prod(shape[1:]) or 1)
            self[name] = torch.randn(shape, generator=self.generator) * scale + shift
        return self[name]

    def conv(self, x, name, outputs, size=3, *, stride=1, padding=None):
        weight = self.get(f"{name}.weight", outputs, x.shape[1], size, size)
        padding = size // 2 if padding is None else padding
        return F.conv2d(x, weight, self.get(f"{name}.bias", outputs, scale=0.1), stride=stride, padding=padding)

    def linear(self, x, name, outputs):
        weight = self.get(f"{name}.weight", outputs, x.shape[1])
        return F.linear(x, weight, self.get(f"{name}.bias", outputs, scale=0.1))

    def norm(self, x, name, groups, eps):
        weight = self.get(f"{name}.weight", x.shape[1], scale=0.2, shift=1.0)
        groups = min(groups, x.shape[1] // 4)
        return F.group_norm(x, groups, weight, self.get(f"{name}.bias", x.shape[1], scale=0.1), eps)


def kernel(taps):
    taps = torch.tensor(taps)
    return torch.outer(taps, taps) / taps.sum() ** 2


def filtered(x, taps, *, up=1, down=1, pad):
    """Zeros between pixels (up), zeros around, the filter, every down-th pixel: the definition of `upfirdn`."""
    if up > 1:
        wide = x.new_zeros(*x.shape[:2], x.shape[2] * up, x.shape[3] * up)
        wide[:, :, ::up, ::up] = x
        x = wide
    weight = kernel(taps).to(x).expand(x.shape[1], 1, -1, -1) * up**2
    return F.conv2d(F.pad(x, (pad[0], pad[1]) * 2), weight.flip(2, 3), groups=x.shape[1])[:, :, ::down, ::down]


def softmax_attention(query, key, value):
    """(..., channels, pixels)."""
    share = (query.transpose(-1, -2) @ key / math.sqrt(query.shape[-2])).softmax(dim=-1)
    return value @ share.transpose(-1, -2)


# EDM


def edm_embedding(w, c_noise, width, classes, labels, augment):
    rates = (1 / 10_000) ** (torch.arange(width // 2) / (width // 2 - 1))
    angle = c_noise.float()[:, None] * rates
    embedding = torch.cat((angle.sin(), angle.cos()), dim=1).to(c_noise)
    if classes:
        none = torch.zeros(len(c_noise), classes).to(c_noise)
        one_hot = none if labels is None else F.one_hot(labels, classes).to(c_noise)
        embedding = embedding + w.linear(one_hot * math.sqrt(classes), "map_label", width)
    if augment is not None:
        embedding = embedding + augment @ w.get("map_augment.weight", width, 9).T
    embedding = F.silu(w.linear(embedding, "map_layer0", 4 * width))
    return F.silu(w.linear(embedding, "map_layer1", 4 * width))


def edm_resample(x, taps, direction):
    pad = (len(taps) - 1) // 2
    if direction == "down":
        return filtered(x, taps, down=2, pad=(pad, pad))
    return filtered(x, taps, up=2, pad=(len(taps) - 1 - pad, pad))


def edm_block(w, embedding, groups, taps, x, name, outputs, *, resample=None, attend=False):
    h, skip = F.silu(w.norm(x, f"{name}.norm0", groups, 1e-6)), x
    if resample:
        h, skip = edm_resample(h, taps, resample), edm_resample(skip, taps, resample)
        w.setdefault(f"{name}.conv0.resample_filter", kernel(taps)[None, None])
        w.setdefault(f"{name}.skip.resample_filter", kernel(taps)[None, None])
    h = w.conv(h, f"{name}.conv0", outputs) + w.linear(embedding, f"{name}.affine", outputs)[:, :, None, None]
    h = w.conv(F.silu(w.norm(h, f"{name}.norm1", groups, 1e-6)), f"{name}.conv1", outputs)
    if resample or x.shape[1] != outputs:
        skip = w.conv(skip, f"{name}.skip", outputs, 1)
    x = (h + skip) * ROOT_HALF
    if attend:
        qkv = w.conv(w.norm(x, f"{name}.norm2", groups, 1e-6), f"{name}.qkv", 3 * outputs, 1)
        query, key, value = qkv.reshape(len(x), outputs, 3, -1).unbind(2)
        mixed = softmax_attention(query, key, value).reshape(x.shape)
        x = (w.conv(mixed, f"{name}.proj", outputs, 1) + x) * ROOT_HALF
    return x


def edm(
    w,
    x,
    c_noise,
    *,
    side,
    width,
    multipliers,
    blocks,
    attention,
    taps,
    pyramid=False,
    groups=32,
    decoder="dec",
    decoder_width=None,
    classes=0,
    labels=None,
    augment=None,
):
    block = partial(edm_block, w, edm_embedding(w, c_noise, width, classes, labels, augment), groups, taps)
    channels, aux, skips = x.shape[1], x, []
    for level, multiplier in enumerate(multipliers):
        name = f"enc.{side >> level}x{side >> level}"
        x = w.conv(x, f"{name}_conv", width) if level == 0 else block(x, f"{name}_down", x.shape[1], resample="down")
        if level > 0 and pyramid:
            pad = len(taps) // 2
            w.setdefault(f"{name}_aux_residual.resample_filter", kernel(taps)[None, None])
            smooth = filtered(aux, taps, pad=(pad, pad))
            x = aux = (x + w.conv(smooth, f"{name}_aux_residual", x.shape[1], stride=2, padding=0)) * ROOT_HALF
        skips.append(x)
        for index in range(blocks):
            x = block(x, f"{name}_block{index}", width * multiplier, attend=side >> level in attention)
            skips.append(x)
    for level, multiplier in reversed(list(enumerate(multipliers))):
        name = f"{decoder}.{side >> level}x{side >> level}"
        if level == len(multipliers) - 1:
            x = block(block(x, f"{name}_in0", x.shape[1], attend=True), f"{name}_in1", x.shape[1])
        else:
            x = block(x, f"{name}_up", x.shape[1], resample="up")
        for index in range(blocks + 1):
            attend = index == blocks and side >> level in attention
            outputs = (decoder_width or width) * multiplier
            x = block(torch.cat((x, skips.pop()), dim=1), f"{name}_block{index}", outputs, attend=attend)
    return w.conv(F.silu(w.norm(x, f"{name}_aux_norm", groups, 1e-6)), f"{name}_aux_conv", channels)


# Score SDE


class Modules:
    """Score SDE's modules, numbered in the order in which they are met."""

    def __init__(self, w, home, groups, fir):
        self.w, self.home, self.number, self.groups, self.fir = w, home, -1, groups, fir
        self.embedding = None

    def following(self):
        self.number += 1
        return f"{self.home}.{self.number}"

    def embed(self, time, width):
        half = width // 2
        angle = time.float()[:, None] * torch.exp(torch.arange(half) * -(math.log(10_000) / (half - 1)))
        embedding = self.w.linear(torch.cat((angle.sin(), angle.cos()), dim=1).to(time), self.following(), 4 * width)
        self.embedding = self.w.linear(F.silu(embedding), self.following(), 4 * width)

    def resample(self, x, direction):
        if self.fir:
            return filtered(x, FIR, down=2, pad=(1, 1)) if direction == "down" else filtered(x, FIR, up=2, pad=(2, 1))
        return F.avg_pool2d(x, 2) if direction == "down" else x.repeat_interleave(2, 2).repeat_interleave(2, 3)

    def block(self, x, outputs=None, resample=None):
        name, outputs, w = self.following(), outputs or x.shape[1], self.w
        h = F.silu(w.norm(x, f"{name}.GroupNorm_0", self.groups, 1e-6))
        if resample:
            h, x = self.resample(h, resample), self.resample(x, resample)
        h = w.conv(h, f"{name}.Conv_0", outputs)
        h = h + w.linear(F.silu(self.embedding), f"{name}.Dense_0", outputs)[:, :, None, None]
        h = w.conv(F.silu(w.norm(h, f"{name}.GroupNorm_1", self.groups, 1e-6)), f"{name}.Conv_1", outputs)
        if resample or outputs != x.shape[1]:
            x = w.conv(x, f"{name}.Conv_2", outputs, 1)
        return (x + h) * ROOT_HALF

    def attend(self, x):
        name, size, w = self.following(), x.shape[1], self.w
        h = w.norm(x, f"{name}.GroupNorm_0", self.groups, 1e-6).flatten(2)

        def matrix(h, k):
            weight, bias = w.get(f"{name}.NIN_{k}.W", size, size), w.get(f"{name}.NIN_{k}.b", size, scale=0.1)
            return torch.einsum("bci,cd->bdi", h, weight) + bias[:, None]

        mixed = softmax_attention(*(matrix(h, k) for k in range(3)))
        return (x + matrix(mixed, 3).reshape(x.shape)) * ROOT_HALF

    def pyramid(self, aux, x):
        smooth = filtered(aux, FIR, pad=(2, 2))
        step = self.w.conv(smooth, f"{self.following()}.Conv2d_0", x.shape[1], stride=2, padding=0)
        return (step + x) * ROOT_HALF


def score_sde(
    w, x, time, *, side, width, multipliers, blocks, attention, fir, groups=32, stage=None, decoder_width=None
):
    w.setdefault("sigmas", torch.linspace(50, 0.01, 8))
    modules = Modules(w, "all_modules" if stage is None else "en_modules", groups, fir)
    modules.embed(time, width)
    channels, aux, last = x.shape[1], x, len(multipliers) - 1
    skips = [x := w.conv(x, modules.following(), width)]
    for level, multiplier in enumerate(multipliers):
        for _ in range(blocks):
            x = modules.block(x, width * multiplier)
            skips.append(x := modules.attend(x) if side >> level in attention else x)
        if level < last:
            x = modules.block(x, resample="down")
            x = aux = modules.pyramid(aux, x) if fir else x
            skips.append(x)
    x = modules.block(modules.attend(modules.block(x)))
    if stage is not None:
        modules.home, modules.number = f"de_modules.{stage}", -1
    for level, multiplier in reversed(list(enumerate(multipliers))):
        for _ in range(blocks + 1):
            x = modules.block(torch.cat((x, skips.pop()), dim=1), (decoder_width or width) * multiplier)
        x = modules.attend(x) if side >> level in attention else x
        x = modules.block(x, resample="up") if level else x
    return w.conv(F.silu(w.norm(x, modules.following(), groups, 1e-6)), modules.following(), channels)


# Latent diffusion


def latent_diffusion(
    w,
    x,
    step,
    *,
    side,
    width,
    multipliers,
    blocks,
    attention,
    head_channels,
    stage=None,
    decoder_width=None,
    decoder_attends=True,
):
    channels, half = x.shape[1], width // 2
    angle = step.float()[:, None] * torch.exp(-math.log(10_000) * torch.arange(half) / half)
    embedding = w.linear(torch.cat((angle.cos(), angle.sin()), dim=1).to(step), "time_embed.0", 4 * width)
    embedding = w.linear(F.silu(embedding), "time_embed.2", 4 * width)

    def block(x, name, outputs=None):
        outputs = outputs or x.shape[1]
        h = w.conv(F.silu(w.norm(x, f"{name}.in_layers.0", 32, 1e-5)), f"{name}.in_layers.2", outputs)
        h = h + w.linear(F.silu(embedding), f"{name}.emb_layers.1", outputs)[:, :, None, None]
        h = w.conv(F.silu(w.norm(h, f"{name}.out_layers.0", 32, 1e-5)), f"{name}.out_layers.3", outputs)
        return h + (x if outputs == x.shape[1] else w.conv(x, f"{name}.skip_connection", outputs, 1))

    def attend(x, name):
        size, flat = x.shape[1], x.flatten(2)
        h = w.norm(flat, f"{name}.norm", 32, 1e-5)
        weight, bias = w.get(f"{name}.qkv.weight", 3 * size, size, 1), w.get(f"{name}.qkv.bias", 3 * size, scale=0.1)
        qkv = F.conv1d(h, weight, bias).reshape(len(x), size // head_channels, 3, head_channels, -1)
        mixed = softmax_attention(*qkv.unbind(2)).flatten(1, 2)
        weight, bias = w.get(f"{name}.proj_out.weight", size, size, 1), w.get(f"{name}.proj_out.bias", size, scale=0.1)
        return (flat + F.conv1d(mixed, weight, bias)).reshape(x.shape)

    skips, number = [x := w.conv(x, "input_blocks.0.0", width)], 0
    for level, multiplier in enumerate(multipliers):
        for _ in range(blocks):
            number += 1
            x = block(x, f"input_blocks.{number}.0", width * multiplier)
            x = attend(x, f"input_blocks.{number}.1") if side >> level in attention else x
            skips.append(x)
        if level < len(multipliers) - 1:
            number += 1
            skips.append(x := w.conv(x, f"input_blocks.{number}.0.op", x.shape[1], stride=2, padding=1))
    x = block(attend(block(x, "middle_block.0"), "middle_block.1"), "middle_block.2")
    home, number = ("output_blocks" if stage is None else f"de_modules.{stage}"), -1
    for level, multiplier in reversed(list(enumerate(multipliers))):
        for index in range(blocks + 1):
            number += 1
            name, place = f"{home}.{number}", 1
            x = block(torch.cat((x, skips.pop()), dim=1), f"{name}.0", (decoder_width or width) * multiplier)
            if side >> level in attention and decoder_attends:
                x, place = attend(x, f"{name}.1"), 2
            if level and index == blocks:
                x = w.conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3), f"{name}.{place}.conv", x.shape[1])
    out = "out" if stage is None else f"outs.{stage}"
    return w.conv(F.silu(w.norm(x, f"{out}.0", 32, 1e-5)), f"{out}.2", channels)
