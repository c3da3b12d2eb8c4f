"""The interval study (the paper's Fig. 2): a network under test on one stage, a well-trained one on the others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from multistage_diffusion import rng
from multistage_diffusion.data import to_uint8
from multistage_diffusion.denoiser import Denoiser
from multistage_diffusion.evaluation import distances
from multistage_diffusion.sampling import Sampler
from multistage_diffusion.stages import Stages
from multistage_diffusion.studies.cells import IMAGE_SEED, Cell
from multistage_diffusion.studies.designs import Variants, unified
from multistage_diffusion.studies.estimate import difference, differs, estimate
from multistage_diffusion.studies.tables import Lab


def well_trained(lab: Lab) -> Cell:
    """The model on the stages that are not under test: the unified one, trained several budgets long."""
    return lab.runs(unified(lab.budget.base), seeds=1, times=lab.budget.long)[0]


def intervals(lab: Lab, variants: Variants) -> list[dict[str, Any]]:
    """Quality of one stage's network against the images that it saw, for each stage and network.

    Returns:
        A row for each stage and network: `stage`, `label`, `parameters` in use and `curve`, whose points have `images`
        (that the stage saw), the Fréchet distance of images drawn with the network on that stage alone, and its
        held-out loss there.
    """
    others, rows = well_trained(lab), []
    for stage in range(len(lab.cells.stages)):
        for label, config in variants.items():
            cells = lab.runs(config)
            cost = cells[0].cost(lab.data.shape)
            curve = []
            for point in range(1, cells[0].points, 2):
                distances_by_seed = [_distance(lab, one, others, stage, point) for one in cells]
                losses = [lab.cells.loss(one, point)["stage_loss"][stage] for one in cells]
                curve.append(
                    {
                        "images": _seen(lab, cells[0], stage, point),
                        "fd": estimate(distances_by_seed).document(),
                        "loss": estimate(losses).document(),
                    }
                )
            rows.append(
                {
                    "stage": stage,
                    "label": label,
                    "parameters": cost.stages[stage % len(cost.stages)].parameters,
                    "curve": curve,
                }
            )
    return rows


def intervals_findings(rows: Sequence[dict[str, Any]]) -> list[str]:
    """For each stage: the network of least loss and distance, and whether it differs from the first."""
    sentences = []
    for stage in sorted({entry["stage"] for entry in rows}):
        of_stage = [item for item in rows if item["stage"] == stage]
        for name, words in (("loss", "held-out loss"), ("fd", "Fréchet distance")):
            ranked = sorted(of_stage, key=lambda item: item["curve"][-1][name]["mean"])
            best, first = ranked[0], of_stage[0]
            change = difference(best["curve"][-1][name]["values"], first["curve"][-1][name]["values"])
            note = {True: "", False: " (not told apart)", None: " (one seed)"}[differs(change)]
            low, high = best["curve"][-1][name]["mean"], first["curve"][-1][name]["mean"]
            beside = "" if best is first else f", {first['label']} {high:.4g}{note}"
            sentences.append(f"stage {stage}, {words}: best {best['label']} ({low:.4g}){beside}.")
    return sentences


def spliced(
    parts: Sequence[Denoiser], stages: Stages, num: int, sampler: Sampler, *, seed: int, batch_size: int = 128
) -> Iterator[Tensor]:
    """Images drawn by one denoiser on each stage, rounded to 8 bits.

    Args:
        parts: A denoiser for each stage; all of one process and shape.
        stages: The partition.
        num: How many images.
        sampler: How images are drawn.
        seed: Seed of the first image.
        batch_size: Images at a time; changes no image.

    Yields:
        Batches (B, C, H, W) in [-1, 1], the images that `generated` gives for equal parts.
    """
    shape, device = parts[0].shape, parts[0].device
    sigmas = sampler.levels(parts[0].process).tolist()

    def denoise(x: Tensor, sigma: float) -> Tensor:
        return parts[stages.of(sigma)](x, sigma)

    for seeds in torch.arange(seed, seed + num, device=device).split(batch_size):

        def noise(step: int, seeds: Tensor = seeds) -> Tensor:
            return rng.normal(0, f"step-{step}", seeds, shape)

        with torch.inference_mode():
            x = rng.normal(0, "prior", seeds, shape) * sigmas[0]
            images = sampler.solve(denoise, x, sigmas, noise=noise)
        yield to_uint8(images.float().cpu()).float() / 127.5 - 1


def _distance(lab: Lab, one: Cell, others: Cell, stage: int, point: int) -> float:
    """Fréchet distance with a model on one stage and the well-trained one on the others."""
    samples = lab.budget.samples_on_the_way

    def measure() -> dict[str, Any]:
        parts = [lab.cells.denoiser(others)] * len(lab.cells.stages)
        parts[stage] = lab.cells.denoiser(one, point)
        images = spliced(parts, lab.cells.stages, samples, one.config.sampling, seed=IMAGE_SEED)
        return distances(lab.extractor, lab.test, images, ["fd"])

    name = f"stage-{stage}-{samples}-{lab.extractor.digest[:8]}-beside-{lab.cells.path(others).name}"
    return lab.cells.cached(one, point, name, measure)["fd"]


def _seen(lab: Lab, one: Cell, stage: int, point: int) -> float:
    """Images that a model saw at a stage's levels until a point."""
    seen = lab.cells.spent(one, point)["stage_images"]
    if len(seen) == len(lab.cells.stages):
        return float(seen[stage])
    shares = lab.cells.stages.shares(lab.cells.denoiser(one, point).process)
    return seen[0] * shares[stage]
