"""What a network costs: parameters, and true FLOPs stage by stage, counted on the meta device.

FLOPs are those of every matrix product and convolution, attention included, 2 a multiply-accumulate. The counter sees
no attention on the CPU's fused kernels, so the network is built and run without data on the meta device.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from multistage_diffusion.backbones import Backbone
from multistage_diffusion.denoiser import Denoiser
from multistage_diffusion.multidecoder import MultiDecoder

CONVENTION = (
    "GMACs: 10^9 multiply-accumulates of every matrix product and convolution of one image's forward pass, attention "
    "included; FLOPs: 2 a multiply-accumulate; training: forward and backward pass of each image in its stage"
)


@dataclass(frozen=True)
class StageCost:
    """Cost of one stage, for one image.

    Attributes:
        parameters: Parameters in use: its encoder and its decoder.
        flops: One forward pass, 2 FLOPs a multiply-accumulate.
        training_flops: Forward and backward pass.
        flops_without_attention: One forward pass without attention blocks.
        additions: Biases added by the convolutions outside attention.
    """

    parameters: int
    flops: int
    training_flops: int
    flops_without_attention: int
    additions: int

    @property
    def gmacs(self) -> float:
        """Multiply-accumulates of one forward pass, attention included, in 10^9."""
        return self.flops / 2e9

    @property
    def paper_gflops(self) -> float:
        """GFLOPs as the paper's tables count them.

        10^9 multiply-accumulates of convolutions and linear layers outside attention, plus the convolutions' biases:
        what torchstat, the authors' counter, reports.
        """
        return (self.flops_without_attention / 2 + self.additions) / 1e9


@dataclass(frozen=True)
class Cost:
    """Cost of a network.

    Attributes:
        encoder: Parameters of the encoder(s), noise embedding included.
        decoders: Parameters of each decoder.
        stages: Cost of each stage.
    """

    encoder: int
    decoders: tuple[int, ...]
    stages: tuple[StageCost, ...]

    @cached_property
    def parameters(self) -> int:
        """All parameters."""
        return self.encoder + sum(self.decoders)

    def flops(self, shares: Sequence[int | float]) -> float:
        """Forward FLOPs of one image, weighted over stages.

        Args:
            shares: Weight of each stage, summing to 1 (or calls of each stage, for a sampler).

        Returns:
            The weighted sum.
        """
        return math.fsum(share * stage.flops for share, stage in zip(shares, self.stages, strict=True))

    def paper_gflops(self, shares: Sequence[int | float]) -> float:
        """GFLOPs in the convention of the paper's tables, weighted over stages.

        Args:
            shares: Weight of each stage, summing to 1.

        Returns:
            The weighted sum of the stages' `paper_gflops`.
        """
        return math.fsum(share * stage.paper_gflops for share, stage in zip(shares, self.stages, strict=True))

    def training_flops(self, images: Sequence[int | float]) -> float:
        """Forward and backward FLOPs of training.

        Args:
            images: Number of images that each stage was trained on.

        Returns:
            The sum over stages.
        """
        return math.fsum(count * stage.training_flops for count, stage in zip(images, self.stages, strict=True))


def network_cost(network: Backbone | MultiDecoder, shape: tuple[int, int, int]) -> Cost:
    """Count the parameters and FLOPs of a network.

    Args:
        network: A backbone's record, for which no memory is taken; or any network, of which a copy is counted.
        shape: (C, H, W) of an image.

    Returns:
        Its cost.
    """
    if isinstance(network, Backbone):
        return _backbone_cost(network, shape)
    return _count(copy.deepcopy(network).to("meta"), shape)


def denoiser_cost(denoiser: Denoiser) -> Cost:
    """Count the parameters and FLOPs of a denoiser's network."""
    return network_cost(denoiser.backbone if denoiser.backbone.builds else denoiser.network, denoiser.shape)


def training_flops(
    denoiser: Denoiser, stage_images: Sequence[int], trunk_images: int = 0, cost: Cost | None = None
) -> float:
    """Forward and backward FLOPs that a training has spent.

    Args:
        denoiser: The trained denoiser.
        stage_images: Images that each stage was trained on.
        trunk_images: Images that the unified network was trained on from which it branched.
        cost: The denoiser's cost, where it is known.

    Returns:
        The sum over both parts.
    """
    flops = (denoiser_cost(denoiser) if cost is None else cost).training_flops(stage_images)
    if trunk_images:
        flops += network_cost(denoiser.backbone.unified(), denoiser.shape).training_flops([trunk_images])
    return flops


@lru_cache(maxsize=64)
def encoder_flops(backbone: Backbone, shape: tuple[int, int, int]) -> int:
    """FLOPs of an encoder alone for one image (C, H, W)."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        backbone.encoder(shape)(torch.empty(1, *shape), torch.empty(1))
    return counter.get_total_flops()


@lru_cache(maxsize=64)
def _backbone_cost(backbone: Backbone, shape: tuple[int, int, int]) -> Cost:
    with torch.device("meta"):
        network = backbone.network(shape)
    return _count(network, shape)


def _count(network: MultiDecoder, shape: tuple[int, int, int]) -> Cost:
    """Count a network on the meta device, which is changed by hooks and not to be used afterwards."""
    x, c_noise = torch.empty(1, *shape, device="meta"), torch.empty(1, device="meta")
    attention = [part for part in network.modules() if getattr(part, "is_attention", False)]
    inside = {part for block in attention for part in block.modules()}
    added, spent = list[int](), list[int]()  # biases of convolutions, and FLOPs of attention
    counter = FlopCounterMode(display=False)
    for block in attention:
        block.register_forward_pre_hook(lambda module, inputs: spent.append(-counter.get_total_flops()))
        block.register_forward_hook(lambda module, inputs, output: spent.append(counter.get_total_flops()))
    for part in network.modules():
        if isinstance(part, nn.Conv2d) and part.bias is not None and part not in inside:
            part.register_forward_hook(lambda module, inputs, output: added.append(output.numel()))
    stages = list[StageCost]()
    for stage, decoder in enumerate(network.decoders):
        added.clear()
        spent.clear()
        with (counter := FlopCounterMode(display=False)):
            output = network(x, c_noise, stage)
        forward = counter.get_total_flops()
        with FlopCounterMode(display=False) as backward:
            output.sum().backward()
        stages.append(
            StageCost(
                parameters=_parameters(network.encoder(stage)) + _parameters(decoder),
                flops=forward,
                training_flops=forward + backward.get_total_flops(),
                flops_without_attention=forward - sum(spent),
                additions=sum(added),
            )
        )
    return Cost(_parameters(network.encoders), tuple(map(_parameters, network.decoders)), tuple(stages))


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
