"""The model card: README.md of a folder for diffusers, with front matter that the hub reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from multistage_diffusion.config import DataConfig
from multistage_diffusion.denoiser import Denoiser
from multistage_diffusion.metrics.cost import denoiser_cost, training_flops
from multistage_diffusion.metrics.table import SHOWN
from multistage_diffusion.text import code, markdown

_TASK = "unconditional-image-generation"
_DATASETS = {"cifar10": "uoft-cs/cifar10", "fashion-mnist": "zalando-datasets/fashion_mnist"}


@dataclass(frozen=True)
class Facts:
    """Facts of a model beside its weights.

    Attributes:
        name: Name of the folder.
        pipeline: Class of the pipeline in it.
        license: The license's identifier, if it has one.
        data: What it was trained on, if that is known.
        step: Steps it was trained for.
        stage_images: Images that each stage was trained on.
        trunk_images: Images that the unified network was trained on from which it branched.
        results: What `msd evaluate --out RUN/results.json` wrote.
    """

    name: str
    pipeline: str
    license: str | None = None
    data: DataConfig | None = None
    step: int | None = None
    stage_images: tuple[int, ...] | None = None
    trunk_images: int = 0
    results: Mapping[str, Any] | None = None


def model_card(denoiser: Denoiser, facts: Facts) -> str:
    """Write the card.

    Args:
        denoiser: The model.
        facts: What else is known.

    Returns:
        Markdown, with YAML front matter.
    """
    sections = [_front(facts), f"# {markdown(facts.name)}", _about(denoiser, facts), "## Use", _usage(denoiser, facts)]
    sections += ["## Stages", _stages(denoiser)]
    if facts.step is not None and facts.stage_images is not None:
        flops = training_flops(denoiser, facts.stage_images, facts.trunk_images)
        sections += [
            "## Training",
            f"{facts.step} steps, {sum(facts.stage_images) + facts.trunk_images} images, {flops / 1e15:.3g} PFLOPs "
            "(forward and backward, 2 a multiply-accumulate, attention included).",
        ]
    if figures := _figures(facts.results):
        rows = "\n".join(f"| {name} | {value:.5g} |" for name, value in figures.items())
        sections += ["## Results", f"| metric | value |\n|---|---|\n{rows}", _measured(facts.results or {})]
    return "\n\n".join(section for section in sections if section) + "\n"


def _front(facts: Facts) -> str:
    """What the hub indexes; no path of a local source."""
    from huggingface_hub import EvalResult, ModelCardData

    source = None if facts.data is None else facts.data.source
    dataset = None if source is None else _DATASETS.get(source, source[3:] if source.startswith("hf:") else None)
    shown = "images" if source is None or ":" in source else source
    results = [
        EvalResult(
            task_type=_TASK, dataset_type=dataset or shown, dataset_name=shown, metric_type=name, metric_value=value
        )
        for name, value in _figures(facts.results).items()
    ]
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag=_TASK,
        tags=["diffusion", "multistage-diffusion", facts.pipeline],
        license=facts.license,
        datasets=None if dataset is None else [dataset],
        model_name=facts.name,
        eval_results=results or None,
    )
    return f"---\n{data.to_yaml()}\n---"


def _about(denoiser: Denoiser, facts: Facts) -> str:
    config, (channels, height, width) = denoiser.backbone, denoiser.shape
    latent = facts.data is not None and facts.data.autoencoder is not None
    record = denoiser.trained_classes
    names = "" if record is None else f" ({', '.join(f'{k} {markdown(name)}' for k, name in enumerate(record.names))})"
    classes = f" of {config.classes} classes{names}" if config.classes else ""
    source = facts.data.source if facts.data is not None and ":" not in facts.data.source else None
    return (
        f"A {config.architecture} diffusion model{classes} with the process `{denoiser.process.kind}`, "
        f"{channels}x{height}x{width} {'latents' if latent else 'pixels'}"
        f"{f', trained on {markdown(source)}' if source else ''}. "
        "Made with multistage-diffusion, after [Zhang et al. 2024](https://arxiv.org/abs/2312.09181): noise levels in "
        "stages, one encoder, a decoder for each stage."
    )


def _usage(denoiser: Denoiser, facts: Facts) -> str:
    trust = ", trust_remote_code=True" if facts.pipeline == "MultistagePipeline" else ""
    arguments = "batch_size=4" + (", class_labels=0, guidance_scale=1.5" if denoiser.classes else "")
    return (
        "`pip install diffusers torch`\n\n```python\nfrom diffusers import DiffusionPipeline\n\n"
        f"pipeline = DiffusionPipeline.from_pretrained({json.dumps(facts.name)}{trust})\n"
        f"images = pipeline({arguments}).images\n```"
    )


def _stages(denoiser: Denoiser) -> str:
    cost = denoiser_cost(denoiser)
    shares = denoiser.stages.shares(denoiser.process)
    rows = [
        "| stage | noise levels sigma | parameters in use | GFLOPs an image | share of training |",
        "|---|---|---|---|---|",
    ]
    for stage, (part, share) in enumerate(zip(cost.stages, shares, strict=True)):
        low, high = denoiser.stages.bounds(stage)
        cells = (
            f"{stage}",
            f"{low:.4g} to {high:.4g}",
            f"{part.parameters / 1e6:.3g} M",
            f"{part.flops / 1e9:.3g}",
            f"{share:.1%}",
        )
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + f"\n\n{cost.parameters / 1e6:.3g} M parameters in all."


def _figures(results: Mapping[str, Any] | None) -> dict[str, float]:
    """The metrics among what was written, by name."""
    flat = {**(results or {})}
    flat.update(flat.pop("prdc", None) or {})
    return {name: float(flat[name]) for name in SHOWN if isinstance(flat.get(name), int | float)}


def _measured(results: Mapping[str, Any]) -> str:
    """With what: distances of other features do not compare."""
    conditions = {name: results[name] for name in ("features", "samples", "reference") if results.get(name)}
    return f"Measured with {code(json.dumps(conditions))}." if conditions else ""
