"""A callback of your own: a CSV file of the losses, and an end when they are low enough: python own_callback.py OUT."""

import csv
import sys
from dataclasses import replace
from pathlib import Path

import multistage_diffusion as msd


class LowEnoughError(Exception):
    """What a callback raises ends the run; the same call goes on from the last checkpoint."""


class Losses:
    """Anything with `on_log` is a callback; `record` is a line of metrics.jsonl as numbers, or a grid of samples."""

    def __init__(self, path: Path, low_enough: float) -> None:
        self.path, self.low_enough = path, low_enough

    def on_log(self, record: msd.LogRecord) -> None:
        if record.picture is not None:
            print(f"step {record.step}: {record.picture}")
            return
        with self.path.open("a", newline="") as file:
            csv.writer(file).writerow([record.step, record.images, record.scalars["loss"]])
        if record.scalars["loss"] < self.low_enough:
            raise LowEnoughError(f"loss {record.scalars['loss']:.3f} after step {record.step}")


def main(out: str, steps: int = 200, low_enough: float = 0.3) -> None:
    config = msd.recipe("digits")
    training = replace(config.training, steps=steps, log_every=2)
    config = replace(config, training=training, logging=msd.LoggingConfig(grid_every=steps, grid_images=4))
    msd.train(config, out, callbacks=[Losses(Path(f"{out}.csv"), low_enough)])


if __name__ == "__main__":
    main(sys.argv[1])
