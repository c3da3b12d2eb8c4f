"""The interference study: do the stages pull shared weights in different directions, and does a decoder each help?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from multistage_diffusion import rng
from multistage_diffusion.denoiser import Denoiser
from multistage_diffusion.loss import denoising_loss
from multistage_diffusion.stages import Stages
from multistage_diffusion.studies.cells import Cell
from multistage_diffusion.studies.designs import Variants
from multistage_diffusion.studies.estimate import differs, estimate
from multistage_diffusion.studies.tables import Lab

_IMAGES = 512  # images behind each half of a gradient
_BATCH = 64


def interference(lab: Lab, variants: Variants) -> list[dict[str, Any]]:
    """Cosine of the gradients of every two stages, for the encoder's weights and for the decoders'.

    Returns:
        A row for each model, part of the network and point of training: `cosine`, a list of estimates over seeds, one
        for each pair of stages in `pairs`, corrected for the noise of the gradients. Decoders that are not shared
        have gradients on different weights: their rows say `shared` false and hold 0.
    """
    rows = []
    for label, config in variants.items():
        cells = lab.runs(config)
        for point in (0, cells[0].points - 1):
            cosines = [_cosines(lab, one, point) for one in cells]
            for part in ("encoder", "decoder"):
                pairs = sorted(cosines[0][part])
                rows.append(
                    {
                        "label": label,
                        "part": part,
                        "point": point,
                        "steps": lab.cells.spent(cells[0], point)["steps"],
                        "shared": part == "encoder" or config.model.architecture == "unified",
                        "pairs": pairs,
                        "cosine": [estimate([item[part][pair] for item in cosines]).document() for pair in pairs],
                    }
                )
    return rows


def interference_findings(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What the outermost stages do to each other at the end of training.

    Returns:
        A sentence for each model and shared part.
    """
    last = max(entry["point"] for entry in rows)
    sentences = []
    for entry in rows:
        if entry["point"] != last:
            continue
        if not entry["shared"]:
            sentences.append(f"{entry['label']}: the decoders share no weight, so their stages cannot interfere there.")
            continue
        parts = []
        for pair, cosine in zip(entry["pairs"], entry["cosine"], strict=True):
            significant = differs(estimate(cosine["values"]))
            parts.append(
                f"stages {pair} {cosine['mean']:.2f}{' (not told apart from 0)' if significant is False else ''}"
            )
        sentences.append(f"{entry['label']}, {entry['part']}: cosine of gradients {', '.join(parts)}.")
    return sentences


def stage_gradients(denoiser: Denoiser, images: Tensor, stages: Stages, stage: int, seed: int) -> dict[str, Tensor]:
    """Mean gradient of the training loss over the noise levels of one stage.

    Args:
        denoiser: The model.
        images: (B, C, H, W) clean images.
        stages: The partition, not necessarily the model's own.
        stage: The stage.
        seed: Seed of noise and levels.

    Returns:
        The gradient as one vector, float64, for `encoder` and `decoder`. Decoders that are not shared lie one after
        the other in the vector, so different stages have disjoint parts.
    """
    before = sum(stages.shares(denoiser.process)[:stage])
    share = stages.shares(denoiser.process)[stage]
    index = torch.arange(len(images))
    u = before + share * (index + rng.uniform(seed, "interference sigma", index, 1)[:, 0]) / len(images)
    sigma = denoiser.process.icdf(u.clamp(max=1 - 2.0**-53)).to(images.device)
    noise = rng.normal(seed, "interference noise", index.to(images.device), images.shape[1:])
    parts = {"encoder": denoiser.network.encoders, "decoder": denoiser.network.decoders}
    weights = {name: list(module.parameters()) for name, module in parts.items()}
    every = [weight.requires_grad_() for group in weights.values() for weight in group]
    sums = [torch.zeros_like(weight, dtype=torch.float64) for weight in every]
    for rows in torch.arange(len(images), device=images.device).split(_BATCH):
        loss = denoising_loss(denoiser, images[rows], noise[rows], sigma[rows]).sum() / len(images)
        for total, gradient in zip(sums, torch.autograd.grad(loss, every, allow_unused=True), strict=True):
            if gradient is not None:
                total += gradient
    flat = [total.flatten() for total in sums]
    count = len(weights["encoder"])
    return {"encoder": torch.cat(flat[:count]), "decoder": torch.cat(flat[count:])}


def corrected_cosines(halves: Sequence[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Cosines of the true gradients, from two independent estimates of each.

    Two halves of the images give two estimates whose noise is independent, so products of different halves have the
    true gradients' products as their mean (the correction for attenuation of Spearman, 1904). Products of the same half
    have not, as the stages see the same images and noise there.

    Args:
        halves: Two estimates for each stage.

    Returns:
        By pair of stages, like `0-1`, in [-1, 1].
    """
    cosines = {}
    for low in range(len(halves)):
        for high in range(low + 1, len(halves)):
            (a, b), (c, d) = halves[low], halves[high]
            product = float((a @ d + b @ c) / 2)
            size = float((a @ b).clamp(min=0).sqrt() * (c @ d).clamp(min=0).sqrt())
            cosines[f"{low}-{high}"] = max(-1.0, min(1.0, product / size)) if size > 0 else 0.0
    return cosines


def _cosines(lab: Lab, one: Cell, point: int) -> dict[str, dict[str, float]]:
    def measure() -> dict[str, Any]:
        denoiser = lab.cells.denoiser(one, point)
        stages, count = lab.cells.stages, min(_IMAGES, len(lab.data) // 2)
        halves = [lab.data.floats(torch.arange(count) + start).to(lab.cells.device) for start in (0, count)]
        gradients = [
            [stage_gradients(denoiser, images, stages, stage, seed) for seed, images in enumerate(halves)]
            for stage in range(len(stages))
        ]
        return {
            part: corrected_cosines([(first[part], second[part]) for first, second in gradients])
            for part in ("encoder", "decoder")
        }

    return lab.cells.cached(one, point, f"cosines-{_IMAGES}", measure)
