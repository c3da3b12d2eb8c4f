"""The README: its links exist, its commands parse, and (slow) run from a clean folder."""

import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from multistage_diffusion import cli
from multistage_diffusion.files import write_json

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = re.findall(r"^msd .*?(?=\s+#|$)", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
PYTHON = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)[1]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    targets = [target for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()) if "://" not in target]
    assert not [target for target in targets if not (page.parent / target).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_hold_no_placeholders(page):
    assert not re.search(r"DEMO_[A-Z]+|@[A-Z]+@|TODO|TBD", page.read_text())


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_json(tmp_path / "stages.json", {"edges": [0.69, 5.7]})  # what the command before leaves
    name, *words = shlex.split(command)[1:]
    module = importlib.import_module(f"multistage_diffusion.cli.{name}")
    options = module.parse(words) if "parse" in vars(module) else cli.parse(module.Options, name, words)
    assert options is not None


def test_every_command_of_the_program_is_shown():
    shown = {name for page in PAGES for name in re.findall(r"^msd (\w+)", page.read_text(), flags=re.MULTILINE)}
    assert shown | {"demo"} == set(cli.COMMANDS)


@pytest.mark.slow
def test_commands_run_one_after_the_other(tmp_path):
    environment = {**os.environ, "MSD_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "2"}
    for command in COMMANDS:
        words = shlex.split(command)[1:]
        if words[0] == "serve":  # until it is stopped: tests/test_serving.py
            continue
        if words[0] == "train":
            words += ["--training.steps", "30"]
        done = subprocess.run([sys.executable, "-m", "multistage_diffusion", *words], cwd=tmp_path, env=environment,
                              capture_output=True, text=True)  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stderr}"


@pytest.mark.slow
def test_five_lines_of_python_run(tmp_path):
    code = PYTHON.replace('msd.recipe("digits")', 'short(msd.recipe("digits"))')
    assert code != PYTHON
    code = (
        "from dataclasses import replace\n"
        "def short(config):\n    return replace(config, training=replace(config.training, steps=5))\n" + code
    )
    environment = {**os.environ, "MSD_CACHE": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 0 < float(done.stdout) < 10
