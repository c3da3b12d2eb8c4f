"""A process of several, with a fault: a script for torchrun, and a function for forks.

A fault is "step:kind", kind one of kill, stop, term, error, perturb, spike; it strikes process 1, at most once a run.
When it struck is the time of the file "struck".
"""

import os
import signal
import sys
from pathlib import Path


def install(fault: str, folder: Path) -> None:
    """Let something happen when this process makes the batch of a step."""
    from dataclasses import replace

    from multistage_diffusion.errors import DataError
    from multistage_diffusion.training.batches import Batches
    from multistage_diffusion.training.trainer import Trainer

    when, kind = fault.split(":")
    make, made = Batches.__call__, Trainer.__init__

    def strike(self, step, part=0, parts=1):
        batch = make(self, step, part, parts)
        if step == int(when):
            (folder / "struck").touch()
            if kind == "error":
                raise DataError("images/broken.png is damaged: replace it")
            if kind == "spike":
                return replace(batch, weight=batch.weight * 1e4)
            if kind in ("kill", "stop", "term"):
                numbers = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM}
                os.kill(os.getpid(), numbers[kind])
        return batch

    def perturb(self, *words, **named):
        made(self, *words, **named)
        with __import__("torch").no_grad():
            self.denoiser.network.decoders[1].head.bias.add_(1e-6)

    Batches.__call__ = strike
    if kind == "perturb":
        Trainer.__init__ = perturb


def life(rank: int, words: list[str], errors: Path, fault: str | None = None) -> int:
    import ranks

    if fault is not None and rank == 1:
        install(fault, errors)
    return ranks.command(rank, words, errors)


if __name__ == "__main__":
    first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    if sys.argv[1] != "none" and first and os.environ["RANK"] == "1":
        install(sys.argv[1], Path())
    from multistage_diffusion.cli import main

    main(sys.argv[2:])
