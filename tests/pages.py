"""The commands and blocks of Python in the pages of docs/, in the order in which a reader meets them."""

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"
BLOCK = re.compile(r"```(\w+)\n(.*?)```|((?:^    [^\n]*\n)+)", flags=re.MULTILINE | re.DOTALL)
PROGRAMS = ("msd", "torchrun", "srun", "curl", "git", "pip")
RECORDING = "\n".join(f"{name}() {{ printf '%s\\037' {name} \"$@\"; printf '\\n'; }}" for name in PROGRAMS)


@dataclass(frozen=True)
class Block:
    """A block of a page: Python's text, or the commands of a shell's."""

    python: str = ""
    commands: tuple[tuple[str, ...], ...] = ()


def blocks(page: str) -> list[Block]:
    """What can be run in a page; indented blocks are commands where they begin with one."""
    found = []
    for language, text, indented in BLOCK.findall((DOCS / page).read_text()):
        if language == "python":
            found.append(Block(python=text))
        elif language in ("sh", "console") or re.match(r" +(?:\w+=\S+ )?(?:msd|torchrun|srun) ", indented):
            found.append(Block(commands=commands(text or indented)))
    return found


def commands(text: str) -> tuple[tuple[str, ...], ...]:
    """The words of each command, as bash reads them: variables, loops, comments and lines that go on."""
    script = f"{RECORDING}\ncd() {{ :; }}\n" + re.sub(r"&$", "", text, flags=re.MULTILINE)
    done = subprocess.run(["bash", "-eu", "-c", script], capture_output=True, text=True,
                          env={"PATH": os.environ["PATH"], "SLURM_NNODES": "2", "SLURM_JOB_ID": "1"})  # fmt: skip
    assert done.returncode == 0, f"{text}\n{done.stderr}"
    return tuple(tuple(line.split("\x1f")[:-1]) for line in done.stdout.splitlines())
