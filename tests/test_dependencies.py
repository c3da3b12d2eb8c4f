"""Whatever the package imports is declared: what it needs anywhere as a dependency, the rest at least as an extra."""

import ast
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DISTRIBUTION = {"yaml": "pyyaml", "PIL": "pillow", "sklearn": "scikit-learn", "fontTools": "fonttools"}


def names(requirements):
    return {re.split(r"[^\w.-]", requirement)[0].lower() for requirement in requirements}


def imported(nodes):
    """Distributions whose modules are imported: neither the standard library's nor the package's own."""
    modules = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            modules |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(str(node.module).partition(".")[0])
    foreign = modules - sys.stdlib_module_names - {"multistage_diffusion"}
    return {DISTRIBUTION.get(module, module).lower().replace("_", "-") for module in foreign}


def optional(tree):
    """Nodes below a `try`, which says how to get what is missing."""
    return {id(node) for block in ast.walk(tree) if isinstance(block, ast.Try) for node in ast.walk(block)}


def test_every_import_is_declared():
    needed, tried = set(), set()
    for path in (ROOT / "src").rglob("*.py"):
        tree = ast.parse(path.read_text())
        below_try = optional(tree)
        needed |= imported(node for node in ast.walk(tree) if id(node) not in below_try)
        tried |= imported(node for node in ast.walk(tree) if id(node) in below_try)
    extras = PROJECT["optional-dependencies"]
    required, users = names(PROJECT["dependencies"]), {name for name in extras if name not in ("dev", "test")}
    offered = names(requirement for name in users for requirement in extras[name])
    assert needed <= required | names(extras["diffusers"])  # the rooms of diffusers say themselves how to get it
    assert tried <= required | offered
    assert required - needed - tried == set()
