"""How tests stop a run, look at what it left, and compare two of them."""

import json
from pathlib import Path

import safetensors.torch

import tiny
from multistage_diffusion.runs.checkpoints import EMA_WEIGHTS, OPTIMIZER, RAW, list_checkpoints
from multistage_diffusion.training.run import train

WALL_CLOCK = ("seconds", "images_per_second")


class PowerError(Exception):
    """The power fails."""


def train_until(step, out, config=None, data=None):
    """Train, and stop dead after a step: no checkpoint of it, no goodbye."""

    def fail(result, steps):
        if result.step == step:
            raise PowerError

    try:
        train(config or tiny.run_config(), out, data=data or tiny.images(), on_step=fail)
    except PowerError:
        return
    raise AssertionError(f"the run ended before step {step}")


def tensors(run: Path, step: int | None = None):
    """All tensors of a checkpoint, by file and name."""
    found = [item for item in list_checkpoints(run / "checkpoints") if step in (None, item.step)][-1]
    return {
        f"{file}/{name}": tensor
        for file in (RAW, EMA_WEIGHTS, OPTIMIZER)
        for name, tensor in safetensors.torch.load_file(found.path / file).items()
    }


def log(run: Path):
    """The lines of metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [json.dumps({key: value for key, value in line.items() if key not in WALL_CLOCK}) for line in lines]


def same_run(run: Path, other: Path):
    """Weights, average, optimiser, log and exported model are the same to the bit."""
    assert [item.step for item in list_checkpoints(run / "checkpoints")][-1] == 8
    assert tiny.bits_equal(tensors(run), tensors(other))
    assert log(run) == log(other)
    for file in ("model.safetensors", "config.json"):
        assert (run / "model" / file).read_bytes() == (other / "model" / file).read_bytes()
