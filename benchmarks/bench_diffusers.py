"""Training steps beside diffusers: its network in a plain loop, the same network here, and the multistage one.

    python benchmarks/bench_diffusers.py --out benchmarks/results/diffusers-cpu.json
    python benchmarks/bench_diffusers.py --recipe fashion-mnist-dit --out benchmarks/results/diffusers-dit-cpu.json

Its network is a `UNet2DModel`, or for a recipe of the transformer a `DiTTransformer2DModel`, with one class for all.

The peer is the loop of diffusers' own training example: data loader, random timesteps, `add_noise`, mean squared error,
clipping, AdamW, `EMAModel`. Its network is the unified one, converted: the same weights and FLOPs. Each loop takes a
step in turn, several times over; medians are kept, with the quartiles of the ratio to diffusers turn by turn.

Needs the `dev` extra (diffusers).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import diffusers
import torch
import torch.nn.functional as F
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.training_utils import EMAModel
from torch.utils.data import DataLoader, TensorDataset

from multistage_diffusion import recipe
from multistage_diffusion.backbones import Transformer
from multistage_diffusion.config import RunConfig
from multistage_diffusion.data import Images, load_data
from multistage_diffusion.interop.transformers import dit_options, dit_weights
from multistage_diffusion.interop.weights import unet_options, unet_weights
from multistage_diffusion.runs import build_denoiser
from multistage_diffusion.studies.cells import Cell
from multistage_diffusion.studies.designs import unified
from multistage_diffusion.training.run import build_trainer


def peer(run: RunConfig, data: Images, device: torch.device) -> Iterator[None]:
    """Steps of a plain loop with diffusers' parts and the run's own network, batch and optimiser."""
    denoiser, training = build_denoiser(run, data.shape), run.training
    if isinstance(run.model, Transformer):
        # Each of its blocks has a table of classes, which costs a step in proportion: the smallest one.
        model = DiTTransformer2DModel(**{**dit_options(denoiser), "num_embeds_ada_norm": 1})
        weights = dit_weights(denoiser).items()
        model.load_state_dict({name: value[:2] if "class_embedder" in name else value for name, value in weights})
    else:
        model = UNet2DModel(**unet_options(denoiser))
        model.load_state_dict(unet_weights(denoiser))
    model.to(device).train()  # pyright: ignore[reportArgumentType]
    labels = torch.zeros(training.batch_size, dtype=torch.int64, device=device)
    classes = {"class_labels": labels} if isinstance(run.model, Transformer) else {}
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.0015, beta_end=0.0195)
    average = EMAModel(model.parameters(), decay=0.9999)
    optimizer = torch.optim.AdamW(model.parameters(), lr=training.learning_rate, fused=True)
    loader = DataLoader(
        TensorDataset(data.pixels().float() / 127.5 - 1), training.batch_size, shuffle=True, drop_last=True
    )
    while True:
        for (images,) in loader:
            images = images.to(device)
            noise = torch.randn_like(images)
            timesteps = torch.randint(0, scheduler.config["num_train_timesteps"], (len(images),), device=device)
            output = model(scheduler.add_noise(images, noise, timesteps), timesteps, **classes).sample  # pyright: ignore[reportArgumentType]
            loss = F.mse_loss(output, noise)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            average.step(model.parameters())
            loss.item()  # what a progress bar shows
            yield


def ours(run: RunConfig, data: Images, device: torch.device) -> Iterator[None]:
    """Steps of a run."""
    for _ in build_trainer(run, data, device=device).run(1_000_000):
        yield


def timed(step: Callable[[], None], device: torch.device) -> float:
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--recipe", default="fashion-mnist-ldm")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device, base = torch.device(options.device), recipe(options.recipe)
    training = replace(base.training, batch_size=options.batch, weight_decay=0.01)
    base = replace(base, data=replace(base.data, flip=False), training=training)
    data = load_data(base.data.source, resolution=base.data.resolution)
    runs = {"diffusers, unified": unified(base), "unified": unified(base), "multistage": base}
    loops = {name: (peer if name.startswith("diffusers") else ours)(run, data, device) for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(options.turns + 3):
        for name, loop in loops.items():
            taken = timed(lambda loop=loop: next(loop), device)
            if turn >= 3:  # the first turns warm up
                times[name].append(taken)
    first, rows = next(iter(runs)), []
    for name, run in runs.items():
        flops = Cell(run, 1.0, 1).step_flops(data.shape)
        ratios = [own / other for own, other in zip(times[name], times[first], strict=True)]
        rows.append({
            "loop": name, "decoder widths": list(run.model.capacities), "GFLOPs a step": flops / 1e9,
            "ms a step": 1e3 * statistics.median(times[name]),
            "images/s": options.batch / statistics.median(times[name]),
            "time, diffusers 1": statistics.median(ratios), "quartiles": statistics.quantiles(ratios, n=4)[::2],
        })  # fmt: skip
    result = {
        "command": " ".join(["python", *sys.argv]),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "cores": os.cpu_count(), "load before": os.getloadavg()[0], "torch": torch.__version__,
        "diffusers": diffusers.__version__, "threads": options.threads, "recipe": options.recipe,
        "batch": options.batch, "images": list(data.shape), "rows": rows,
    }  # fmt: skip
    text = json.dumps(result, indent=1)
    print(text)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
