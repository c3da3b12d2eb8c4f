"""A folder for diffusers as a Space of the Hugging Face hub: an app, what it needs, and the hub's front matter."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Sequence
from string import Template

_FRONT = Template("""---
title: $title
sdk: gradio
app_file: app.py
pinned: false
---

""")
_APP = Template('''"""Draws images with the model in this folder: `python app.py`, or upload it as a Space."""

from pathlib import Path

import gradio
import torch
from diffusers import DiffusionPipeline

CLASSES = $classes
pipeline = DiffusionPipeline.from_pretrained(str(Path(__file__).parent)$trust)
pipeline.to("cuda" if torch.cuda.is_available() else "cpu")


def draw(label, guidance, steps, images, seed):
    """Draw images; image k has the noise of seed + k."""
    generators = [torch.Generator().manual_seed(int(seed) + k) for k in range(int(images))]
    options = {"generator": generators, "num_inference_steps": int(steps)}
    $count
    if CLASSES:
        options |= {"class_labels": [CLASSES.index(label)] * int(images), "guidance_scale": float(guidance)}
    drawn = pipeline(**options).images
    return [image.resize((256, round(256 * image.height / image.width)), 0) for image in drawn]


with gradio.Blocks(title=$title) as app:
    gradio.Markdown($heading)
    with gradio.Row():
        label = gradio.Dropdown(CLASSES, value=CLASSES[0] if CLASSES else None, label="class", visible=bool(CLASSES))
        guidance = gradio.Slider(1.0, 6.0, 1.5, label="guidance", visible=bool(CLASSES))
        steps = gradio.Slider(5, 100, 20, step=1, label="steps")
        images = gradio.Slider(1, 16, 4, step=1, label="images")
        seed = gradio.Number(0, precision=0, minimum=0, label="seed")
    gallery = gradio.Gallery(label="images", columns=4)
    button = gradio.Button("Draw", variant="primary")
    button.click(draw, [label, guidance, steps, images, seed], gallery)

if __name__ == "__main__":
    app.launch()
''')


def space_files(title: str, pipeline: str, classes: Sequence[str], card: str) -> dict[str, str]:
    """The files that make a folder of a pipeline a Space.

    Args:
        title: Of the page.
        pipeline: The class of the pipeline in the folder.
        classes: Names of the classes, in order; empty for a model without.
        card: The model card, whose front matter gives way to that of a Space.

    Returns:
        Texts by file name.
    """
    trusted = pipeline == "MultistagePipeline"
    app = _APP.substitute(
        title=json.dumps(title),
        heading=json.dumps(f"# {title}"),
        classes=json.dumps(list(classes)),
        trust=", trust_remote_code=True" if trusted else "",
        count="" if pipeline == "DiTPipeline" else 'options["batch_size"] = int(images)',
    )
    return {
        "app.py": app.replace("\n    \n", "\n"),
        "requirements.txt": f"diffusers>={importlib.metadata.version('diffusers')}\nsafetensors\ntorch>=2.9\n",
        "README.md": _FRONT.substitute(title=json.dumps(title)) + card.split("---\n", 2)[-1].lstrip(),
    }
