"""Many lives of one command, cheaply: torch is imported once, and each life is a fork of that process.

Run as a script, this file is the fork server: it reads one JSON document a line (`arguments`, and `limit`, the largest
file in bytes that the life may write, and `stopped`, whether it waits for SIGCONT), answers with the life's process
number, and then with its exit code.
"""

import json
import os
import signal
import subprocess
import sys
import traceback
from pathlib import Path

MODEL = [
    "--model.width", "8", "--model.decoder-widths", "8", "8", "4", "--model.multipliers", "1", "--model.attention",
    "--model.blocks", "1", "--training.batch-size", "4", "--training.log-every", "1", "--device", "cpu",
    "--threads", "1",
]  # fmt: skip


class Life:
    """A running command."""

    def __init__(self, pid: int, server: "Lives", errors: Path) -> None:
        self.pid, self._server, self._errors = pid, server, errors

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, number)  # the server reaps it only when asked, so the number is still its own

    def wait(self) -> int:
        """Its exit code, negative after a signal, as `subprocess` has it."""
        return int(self._server.ask({"wait": self.pid}))

    @property
    def errors(self) -> list[str]:
        """The lines it wrote to stderr."""
        return self._errors.read_text().splitlines()


class Lives:
    """The fork server, seen from a test."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._count = folder, 0
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def ask(self, document: dict) -> str:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(document) + "\n")
        self._process.stdin.flush()
        return self._process.stdout.readline()

    def run(self, *words: str, limit: int | None = None, stopped: bool = False) -> Life:
        """Start `msd` with these words; stopped, it waits for SIGCONT."""
        self._count += 1
        errors = self._folder / f"errors-{self._count}"
        asked = {"arguments": words, "errors": str(errors), "limit": limit, "stopped": stopped}
        return Life(int(self.ask(asked)), self, errors)

    def train(self, out: Path, *options: str, limit: int | None = None, stopped: bool = False) -> Life:
        """Start `msd train digits` with the smallest network."""
        return self.run("train", "digits", "--out", str(out), *MODEL, *options, limit=limit, stopped=stopped)

    def close(self) -> None:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        self._process.wait(60)
        self._process.stdout.close()


def live(document: dict) -> None:
    """What the forked process does."""
    import resource

    signal.alarm(120)
    os.dup2(os.open(document["errors"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if document["limit"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (document["limit"], resource.RLIM_INFINITY))
    if document["stopped"]:
        os.kill(os.getpid(), signal.SIGSTOP)
    code = 99  # a traceback
    try:
        code = dispatch(document["arguments"])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    import tempfile

    from multistage_diffusion.cli import dispatch

    with tempfile.TemporaryDirectory() as first:  # import, load and count once, before any fork
        sys.stdout = sys.stderr
        dispatch(["train", "digits", "--out", first, *MODEL, "--training.steps", "1", "--json"])
        sys.stdout = sys.__stdout__
    for line in sys.stdin:
        asked = json.loads(line)
        if "wait" in asked:
            print(os.waitstatus_to_exitcode(os.waitpid(asked["wait"], 0)[1]), flush=True)
        elif pid := os.fork():
            print(pid, flush=True)
        else:
            live(asked)
