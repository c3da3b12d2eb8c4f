"""From stages back to one unified network: a weighted sum of the decoders, its weights chosen on held-out images.

Source: task arithmetic (Ilharco et al. 2023), by stage as in Decouple-Then-Merge (Ma et al. 2024).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn
from torch.func import functional_call

from multistage_diffusion import rng
from multistage_diffusion.conditioning import Conditioning
from multistage_diffusion.data.examples import Examples
from multistage_diffusion.denoiser import UNDIVIDED, Denoiser
from multistage_diffusion.errors import ConfigError
from multistage_diffusion.inherit import inheritance
from multistage_diffusion.loss import denoising_loss
from multistage_diffusion.metrics.held_out import held_out_loss, model_labels
from multistage_diffusion.multidecoder import entry_level

_MEAN = 10  # steps whose mean loss tells weights apart


@dataclass(frozen=True)
class Merged:
    """A merged network.

    Attributes:
        denoiser: The unified denoiser, in evaluation mode.
        weights: Weight of each stage's decoder; of its change from the trunk, where there is a trunk.
        loss: Held-out loss of the merged network; none without images.
        staged_loss: That of the staged one, on the same images.
    """

    denoiser: Denoiser
    weights: tuple[float, ...]
    loss: float | None = None
    staged_loss: float | None = None


def merge(
    staged: Denoiser,
    images: Examples | None = None,
    *,
    trunk: Denoiser | None = None,
    weights: Sequence[float] | None = None,
    steps: int = 60,
    batch_size: int = 128,
    seed: int = 0,
) -> Merged:
    """One unified network from the decoders of all stages.

    With a trunk it is theta + sum_k w_k (theta_k - theta), with theta the trunk's decoder and theta_k the stages';
    without one sum_k w_k theta_k, where the weights sum to 1.

    Args:
        staged: A staged denoiser with one encoder, all of whose decoders have the encoder's capacity.
        images: Held-out images: the first half chooses the weights, by the loss over all noise levels; the losses that
            are reported are of the second half. None: the weights are as given, or equal.
        trunk: The unified denoiser that the stages started from. Where the encoder was trained on, the staged one's is
            taken.
        weights: Where the search starts, or what is taken without images; by default equal, summing to 1.
        steps: Steps of the search.
        batch_size: Images of a step.
        seed: Seed of the search's noise.

    Returns:
        The merged denoiser.

    Raises:
        ConfigError: Decoders of other capacities than the encoder's, separate encoders, or a trunk of another network.
    """
    network, backbone = staged.network, staged.backbone
    entered = [stage for stage, decoder in enumerate(network.decoders) if entry_level(decoder)]
    if entered:
        raise ConfigError(
            f"merging needs decoders of all resolutions; stages {entered} enter below (model.entry-levels) and cannot "
            "be averaged with a network that does not"
        )
    if len(network.encoders) > 1 or not backbone.builds or set(backbone.capacities) != {backbone.capacity}:
        raise ConfigError(
            f"merging needs one encoder and decoders of its capacity {backbone.capacity}; the network has "
            f"{len(network.encoders)} encoders and decoders of {backbone.capacities}"
        )
    count = network.stages
    start = [1 / count] * count if weights is None else list(weights)
    if len(start) != count:
        raise ConfigError(f"weights must be one for each of {count} stages, got {start}")
    with torch.random.fork_rng(devices=[]):
        merged = Denoiser.from_backbone(backbone.unified(), staged.process, staged.shape, UNDIVIDED).to(staged.device)
    merged.sampler, merged.trained_classes = staged.sampler, staged.trained_classes
    merged.label_optional = staged.label_optional
    decoders = [decoder.state_dict() for decoder in network.decoders]
    base = None
    if trunk is not None:
        inheritance(merged, trunk, "the trunk")  # refuses another network
        base = trunk.network.decoders[0].state_dict()
    encoder = {f"encoders.0.{name}": tensor for name, tensor in network.encoders[0].state_dict().items()}

    def state(w: Tensor) -> dict[str, Tensor]:
        """All weights of the merged network."""
        mixed = dict(encoder)
        for name in decoders[0]:
            stack = torch.stack([decoder[name].to(staged.device) for decoder in decoders])
            if base is not None:
                stack = stack - (origin := base[name].to(staged.device))
            mean = torch.tensordot(w.to(stack), stack, dims=1)
            mixed[f"decoders.0.{name}"] = mean if base is None else mean + origin  # pyright: ignore
        return mixed

    chosen = torch.tensor(start, device=staged.device)
    report = images
    if images is not None:
        half = len(images) // 2
        if half < 1:
            raise ConfigError(f"merging needs at least two held-out images to choose weights on, got {len(images)}")
        chosen = _choose(merged, state, chosen, images.take(torch.arange(half)), base is None, steps, batch_size, seed)
        report = images.take(torch.arange(half, len(images)))
    with torch.no_grad():
        merged.network.load_state_dict(state(chosen))
    merged.eval()
    losses = (None, None)
    if report is not None:
        losses = tuple(held_out_loss(model, report, repeats=4, seed=seed).loss for model in (merged, staged))
    return Merged(merged, tuple(float(value) for value in chosen), *losses)


def _choose(
    merged: Denoiser,
    state: Callable[[Tensor], dict[str, Tensor]],
    weights: Tensor,
    images: Examples,
    normalised: bool,
    steps: int,
    batch_size: int,
    seed: int,
) -> Tensor:
    """Weights of least loss over all noise levels, by Adam; normalised ones sum to 1."""
    module, labels = _Loss(merged.eval()), model_labels(merged, images)
    raw = weights.clone().requires_grad_()
    optimizer = torch.optim.Adam([raw], lr=0.02)
    best, least, recent = weights, float("inf"), list[float]()

    def value() -> Tensor:
        return raw / raw.sum() if normalised else raw

    for step in range(steps):
        index = torch.arange(step * batch_size, (step + 1) * batch_size)
        rows = index % len(images)
        # A stratified sample of the training distribution, the same stratum for all steps: only the images change.
        u = (torch.arange(batch_size) + rng.uniform(seed, "merge sigma", index, 1)[:, 0]) / batch_size
        sigma = merged.process.icdf(u).to(merged.device)
        clean = images.floats(rows).to(merged.device)
        noise = rng.normal(seed, "merge noise", index.to(merged.device), clean.shape[1:])
        conditioning = Conditioning(None if labels is None else labels[rows].to(merged.device))
        weights_here = {f"denoiser.network.{name}": tensor for name, tensor in state(value()).items()}
        loss = functional_call(module, weights_here, (clean, noise, sigma, conditioning))
        recent = [*recent, float(loss.detach())][-_MEAN:]
        if len(recent) == _MEAN and sum(recent) / _MEAN < least:
            best, least = value().detach().clone(), sum(recent) / _MEAN
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return best


@final
class _Loss(nn.Module):
    """The mean loss of a batch as a function of a denoiser's weights."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, images: Tensor, noise: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        return denoising_loss(self.denoiser, images, noise, sigma, conditioning).mean()
