"""The site: every page is in the navigation, every name in the reference; (slow) it builds without a warning."""

import importlib
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

import multistage_diffusion as msd

ROOT = Path(__file__).parents[1]
NAV = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
REFERENCE = sorted((ROOT / "docs/reference").glob("*.md"))


def pages(entry):
    if isinstance(entry, str):
        return [entry]
    return [page for part in (entry.values() if isinstance(entry, dict) else entry) for page in pages(part)]


def test_the_navigation_lists_every_page_once():
    written = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    assert sorted(pages(NAV)) == sorted(written | {"changelog.md"})


def test_the_reference_describes_every_public_name_once():
    names = [
        name for page in REFERENCE for name in re.findall(r"^::: multistage_diffusion\.(\S+)$", page.read_text(), re.M)
    ]
    assert sorted(name for name in names if "." not in name) == sorted(msd.__all__)
    for name in names:
        module, _, member = f"multistage_diffusion.{name}".rpartition(".")
        if module.startswith("multistage_diffusion.interop"):
            pytest.importorskip("diffusers")
        assert getattr(importlib.import_module(module), member).__doc__


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    program = shutil.which("mkdocs", path=f"{ROOT / '.docs-venv/bin'}{os.pathsep}{os.environ['PATH']}")
    if program is None:
        pytest.skip("mkdocs is not installed: make docs")
    command = [program, "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
