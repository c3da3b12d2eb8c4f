"""Several processes of one test, cheaply: forks of a server that has imported torch, without torchrun.

What the processes do is a function of a test file, called with this process's rank first; what it returns comes back.
"""

import multiprocessing
import os
import socket
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch

PRELOAD = ["torch.distributed.fsdp", "torch.distributed.tensor", "multistage_diffusion.training.run", "ranks"]


def run(function, folder: Path, *arguments, size: int = 2, seconds: float = 300, hangs: Sequence[int] = ()):
    """Call `function(rank, *arguments)` in processes that find each other as those of torchrun do.

    Returns what each returned (tensors, numbers, text in lists and dictionaries), or None where it was killed. Those
    that are to hang are killed when the others have ended.
    """
    folder.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    port = free_port()
    processes = [
        context.Process(target=_live, args=(function, folder, rank, size, port, arguments)) for rank in range(size)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + seconds
    for rank, process in enumerate(processes):
        process.join(0 if rank in hangs else max(deadline - time.monotonic(), 0))
    hanging = [rank for rank, process in enumerate(processes) if process.is_alive() and rank not in hangs]
    for process in processes:
        process.kill()
        process.join()
    assert not hanging, f"processes {hanging} hang"
    results = []
    for rank, process in enumerate(processes):
        failure = folder / f"failure-{rank}.txt"
        assert not failure.exists(), failure.read_text()
        results.append(torch.load(folder / f"result-{rank}.pt") if process.exitcode == 0 else None)
    return results


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def command(rank: int, words: list[str], errors: Path) -> int:
    """What `msd` would do in this process: its exit code; what it prints goes to a file a rank."""
    from multistage_diffusion.cli import dispatch

    (errors / f"out-{rank}").touch()
    with (errors / f"out-{rank}").open("w") as out, (errors / f"err-{rank}").open("w") as err:
        sys.stdout, sys.stderr = out, err
        try:
            return dispatch(words)
        finally:
            sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__


def printed(errors: Path, size: int = 2) -> tuple[list[str], list[str]]:
    """The lines that all processes wrote to stdout and to stderr."""
    found = []
    for kind in ("out", "err"):
        found.append([line for r in range(size) for line in (errors / f"{kind}-{r}").read_text().splitlines()])
    return found[0], found[1]


def _live(function, folder: Path, rank: int, size: int, port: int, arguments) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )  # fmt: skip
    try:
        torch.save(function(rank, *arguments), folder / f"result-{rank}.pt")
    except BaseException:
        (folder / f"failure-{rank}.txt").write_text(traceback.format_exc())
