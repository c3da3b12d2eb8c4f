"""What a GPU (or, for a look, the CPU) does with this library, part by part; done parts are not done again.

    python benchmarks/gpu.py                        # `make gpu`: all parts, into benchmarks/results/gpu-<card>.json
    python benchmarks/gpu.py --parts steps sampling
    python benchmarks/gpu.py --device cpu --quick   # the same code at a toy size

Each part is meant to end within 8 minutes on one GPU of a data centre; the study goes as far as `--minutes` allow and
is taken up again by the same command. Parts:

- correctness: estimates and a few steps of training against the CPU's, in float32, bf16, compiled, and in a process
  group of one;
- steps: time and memory of a training step of presets, unified and multistage, beside diffusers' loop;
- sampling: images a second of a preset, unified and multistage;
- clustering: seconds to find the stages of Fashion-MNIST;
- scaling: `msd study scaling` at the budget `gpu`, 32x32 pixels.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from bench_diffusers import peer

from multistage_diffusion import recipe
from multistage_diffusion.clustering import ClusterOptions, cluster
from multistage_diffusion.config import EngineConfig, RunConfig
from multistage_diffusion.data import Images, load_data
from multistage_diffusion.files import read_json, write_json
from multistage_diffusion.noise import VP
from multistage_diffusion.runs import build_denoiser
from multistage_diffusion.studies.designs import unified
from multistage_diffusion.training.run import build_trainer

HERE = Path(__file__).parent
PRESETS = ("fashion-mnist", "edm-cifar10", "vp-cifar10", "dit-b-2")
TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2}  # of the estimates' rms and of losses: float32 sums in another order


def name_of(device: torch.device) -> str:
    """The card, or the processor."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def made(shape: tuple[int, int, int], count: int = 512) -> Images:
    """Images of noise: what they show does not matter to the time of a step."""
    generator = torch.Generator().manual_seed(0)
    return Images("noise", torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=generator))


def losses(run: RunConfig, data: Images, device: torch.device, steps: int) -> list[float]:
    """The losses of the first steps."""
    trainer = build_trainer(run, data, device=device)
    return [float(step.loss) for step in trainer.run(steps)]


def correctness(device: torch.device, quick: bool) -> dict[str, Any]:
    """The same weights and images on the CPU and on the device.

    Raises:
        SystemExit: A difference is larger than rounding explains.
    """
    base = recipe("digits" if quick else "fashion-mnist")
    base = replace(base, training=replace(base.training, batch_size=32, log_every=1))
    data = load_data(base.data.source)
    reference = build_denoiser(base, data.shape).eval()
    x, sigma = torch.randn(12, *data.shape), torch.logspace(-1, 1.5, 12)
    found: dict[str, Any] = {}
    with torch.no_grad():
        wanted = reference(x, sigma)
        given = build_denoiser(base, data.shape).to(device).eval()
        given.load_state_dict(reference.state_dict())
        off = (
            given(x.to(device), sigma.to(device)).cpu() - wanted
        ).square().mean().sqrt() / wanted.square().mean().sqrt()
    found["estimates"] = {"difference": float(off), "bound": TOLERANCE["fp32"]}
    steps = 3 if quick else 10
    on_cpu = losses(base, data, torch.device("cpu"), steps)
    engines = {"fp32": EngineConfig(), "bf16": EngineConfig(precision="bf16"), "compile": EngineConfig(compile=True)}
    for name, engine in engines.items():
        if quick and name == "compile":
            continue
        own = losses(replace(base, engine=engine), data, device, steps)
        worst = max(abs(one - other) / abs(other) for one, other in zip(own, on_cpu, strict=True))
        bound = TOLERANCE.get(name, 1e-3)
        found[f"losses, {name}"] = {"difference": worst, "bound": bound, "steps": steps}
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    words += [str(Path(__file__).resolve()), "--one-of-one", "--device", str(device), *(["--quick"] if quick else [])]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("[")]
    if done.returncode or not lines:
        raise SystemExit(f"a process group of one failed: {done.stderr[-2000:]}")
    worst = max(abs(one - other) / abs(other) for one, other in zip(json.loads(lines[-1]), on_cpu, strict=True))
    found["losses, process group of one"] = {"difference": worst, "bound": 1e-3, "steps": steps}
    bad = {name: item for name, item in found.items() if not item["difference"] <= item["bound"]}
    if bad:
        raise SystemExit(f"differs from the CPU by more than rounding: {json.dumps(bad)}")
    return found


def one_of_one(device: torch.device, quick: bool) -> None:
    """Started by torchrun: the losses of the first steps, in a process group."""
    from multistage_diffusion.process_group import join

    base = recipe("digits" if quick else "fashion-mnist")
    base = replace(base, training=replace(base.training, batch_size=32, log_every=1))
    data = load_data(base.data.source)
    with join(device, base.engine.timeout) as processes:
        trainer = build_trainer(base, data, device=device, processes=processes)
        print(json.dumps([float(step.loss) for step in trainer.run(3 if quick else 10)]))


def in_turn(loops: dict[str, Iterator[Any]], device: torch.device, turns: int) -> dict[str, list[float]]:
    """Seconds of a step of each loop; each takes one in turn, the first three warm up."""
    times: dict[str, list[float]] = {name: [] for name in loops}
    for turn in range(turns + 3):
        for name, loop in loops.items():
            wait(device)
            start = time.perf_counter()
            next(loop)
            wait(device)
            if turn >= 3:
                times[name].append(time.perf_counter() - start)
    return times


def steps(device: torch.device, quick: bool) -> dict[str, Any]:
    """Time, images a second and memory of a step, unified and multistage; for the transformer beside diffusers."""
    found: dict[str, Any] = {}
    for preset in ("digits",) if quick else PRESETS:
        base = recipe(preset)
        shape = {"digits": (1, 8, 8), "fashion-mnist": (1, 28, 28), "dit-b-2": (4, 32, 32)}.get(preset, (3, 32, 32))
        batch = 16 if quick else 64
        engine = EngineConfig() if device.type == "cpu" else EngineConfig(precision="bf16", channels_last=True)
        training = replace(base.training, batch_size=batch)
        data_options = replace(base.data, flip=False, augment_probability=0.0, autoencoder=None)
        model = replace(base.model, augment_labels=0, classes=0)
        base = replace(base, training=training, data=data_options, model=model, engine=engine)
        data = made(shape)
        runs = {"unified": unified(base), "multistage": base}
        rows = {}
        loops: dict[str, Iterator[Any]] = {
            name: build_trainer(run, data, device=device).run(10**6) for name, run in runs.items()
        }
        if preset == "dit-b-2":  # the others' networks are not diffusers' own
            loops = {"diffusers, unified, float32": peer(unified(base), data, device), **loops}
        for name, taken in in_turn(loops, device, 3 if quick else 20).items():
            middle = statistics.median(taken)
            rows[name] = {"ms a step": 1e3 * middle, "images/s": batch / middle}
        del loops
        if device.type == "cuda":
            for name, run in runs.items():
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(device)
                for _ in build_trainer(run, data, device=device).run(3):
                    pass
                rows[name]["GiB at most"] = torch.cuda.max_memory_allocated(device) / 2**30
        found[preset] = {"batch": batch, "engine": engine.precision, "rows": rows}
    return found


def sampling(device: torch.device, quick: bool) -> dict[str, Any]:
    """Images a second by each preset's own sampler, unified and multistage."""
    found: dict[str, Any] = {}
    for preset in ("digits",) if quick else ("fashion-mnist", "edm-cifar10"):
        base, count = recipe(preset), 16 if quick else 512
        base = replace(base, model=replace(base.model, augment_labels=0, classes=0))
        base = replace(base, data=replace(base.data, augment_probability=0.0))
        shape = {"digits": (1, 8, 8), "fashion-mnist": (1, 28, 28)}.get(preset, (3, 32, 32))
        rows = {}
        for name, run in {"unified": unified(base), "multistage": base}.items():
            denoiser = build_denoiser(run, shape).to(device).eval()
            taken = []
            for _ in range(3):
                wait(device)
                start = time.perf_counter()
                run.sampling.draw(denoiser, range(count))
                wait(device)
                taken.append(time.perf_counter() - start)
            rows[name] = {"images/s": count / min(taken), "solver": run.sampling.solver, "steps": run.sampling.steps}
        found[preset] = rows
    return found


def clustering(device: torch.device, quick: bool) -> dict[str, Any]:
    """Seconds to find three stages."""
    source = "digits" if quick else "fashion-mnist"
    data = load_data(source)
    wait(device)
    start = time.perf_counter()
    result = cluster(data, VP(), ClusterOptions(stages=3), device=device)
    wait(device)
    return {"source": source, "seconds": time.perf_counter() - start, "edges": list(result.stages.edges)}


def scaling(device: torch.device, quick: bool, minutes: float) -> dict[str, Any]:
    """The study, in the command's own process, stopped when its time is over; what was trained is kept."""
    out = Path("runs/gpu-scaling")
    words = [
        sys.executable,
        "-m",
        "multistage_diffusion",
        "study",
        "scaling",
        "--out",
        str(out),
        "--device",
        str(device),
    ]
    if quick:
        words += ["--budget", "small", "--data", "digits", "--dry-run"]
    else:
        words += ["--budget", "gpu", "--data", "fashion-mnist"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        text, _ = process.communicate(timeout=60 * minutes)
    except subprocess.TimeoutExpired:
        process.terminate()  # saves, and the same command goes on
        text, _ = process.communicate()
    if process.returncode not in (0, 143, 130, -15) and "stopped" not in text:
        raise SystemExit(f"the study failed: {text[-2000:]}")
    return {"command": " ".join(words[1:]), "finished": process.returncode == 0, "last lines": text.splitlines()[-5:]}


PARTS = ("correctness", "steps", "sampling", "clustering", "scaling")


def main() -> None:
    """Do the parts that are not done, and write each as it ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--out", type=Path, help="by default benchmarks/results/gpu-<card>.json")
    parser.add_argument("--minutes", type=float, default=8.0, help="for the study, a call")
    parser.add_argument("--quick", action="store_true", help="a toy size, to try the script")
    parser.add_argument("--again", action="store_true", help="do what is done, too")
    parser.add_argument("--one-of-one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit("error: torch sees no GPU; --device cpu --quick tries the script without one")
    device = torch.device(options.device)
    if options.one_of_one:
        one_of_one(device, options.quick)
        return
    card = re.sub(r"[^a-z0-9]+", "-", name_of(device).lower()).strip("-")
    out = options.out or HERE / "results" / f"gpu-{card}{'-quick' if options.quick else ''}.json"
    report: dict[str, Any] = read_json(out) if out.is_file() else {"device": name_of(device), "parts": {}}
    works: dict[str, Callable[[], dict[str, Any]]] = {
        "correctness": lambda: correctness(device, options.quick),
        "steps": lambda: steps(device, options.quick),
        "sampling": lambda: sampling(device, options.quick),
        "clustering": lambda: clustering(device, options.quick),
        "scaling": lambda: scaling(device, options.quick, options.minutes),
    }
    for part in options.parts:
        done = report["parts"].get(part)
        if done and done["result"].get("finished", True) and not options.again:
            print(f"{part}: done before, {done['seconds']:.0f} s", flush=True)
            continue
        start = time.perf_counter()
        result = works[part]()
        report["parts"][part] = {
            "seconds": time.perf_counter() - start,
            "command": " ".join(["python", *sys.argv]),
            "torch": torch.__version__,
            "cores": os.cpu_count(),
            "result": result,
        }
        write_json(out, report)
        print(f"{part}: {json.dumps(result, indent=1)}", flush=True)


if __name__ == "__main__":
    main()
