"""The walls of the house: a room imports only from the rooms above it, and stays readable."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import multistage_diffusion

SOURCE = Path(multistage_diffusion.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
ORDER = [
    ("text",),
    ("errors",),
    ("files", "records", "rng", "devices"),
    ("process_group",),
    ("noise",),
    ("stages",),
    ("classes", "conditioning", "weights"),
    ("sampling",),
    ("multidecoder",),
    ("backbones",),
    ("denoiser",),
    ("inherit",),
    ("loss",),
    ("config",),
    ("data",),
    ("models",),
    ("metrics",),
    ("clustering",),
    ("evaluation",),
    ("runs",),
    ("training",),
    ("allocation",),
    ("interop",),
    ("serving",),
    ("recipes",),
    ("studies",),
    ("cli",),
    ("__main__",),
]
FLOOR = {room: floor for floor, rooms in enumerate(ORDER) for room in rooms}
QUICK = [
    "records",
    "noise",
    "sampling.sampler",
    "sampling.solvers",
    "config",
    "recipes",
    "backbones",
    "cli",
    "cli.train",
    "cli.common",
    "errors",
    "files",
]
MAX_FILE, MAX_FUNCTION = 400, 70


def name(path):
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__") or "__init__"


def trees():
    return [(name(path), ast.parse(path.read_text())) for path in FILES]


def imports(module, tree):
    """Full names of what a module imports, anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own(imported):
    return (
        imported.removeprefix("multistage_diffusion.").split(".")
        if imported.startswith("multistage_diffusion.")
        else None
    )


def test_every_room_has_its_floor():
    rooms = {name(path).split(".")[0] for path in FILES} - {"__init__"}
    assert rooms <= FLOOR.keys()


def test_rooms_import_only_from_above():
    wrong = []
    for module, tree in trees():
        if module == "__init__":
            continue
        room = module.split(".")[0]
        for imported in imports(module, tree):
            parts = own(imported)
            if parts and parts[0] in FLOOR and parts[0] != room and FLOOR[parts[0]] >= FLOOR[room]:
                wrong.append(f"{module} imports {imported}")
    assert wrong == []


def test_recipes_know_only_configurations():
    tree = dict(trees())["recipes"]
    allowed = ("config", "errors", "noise", "backbones")
    ours = [".".join(own(imported)) for imported in imports("recipes", tree) if own(imported)]
    assert ours and all(imported.startswith(allowed) for imported in ours)


def test_nothing_unpickles_and_nothing_imports_torchvision():
    wrong, called = [], []
    for module, tree in trees():
        for imported in imports(module, tree):
            if imported.split(".")[0] in (
                "torchvision",
                "pickle",
                "cPickle",
                "dill",
                "cloudpickle",
                "joblib",
                "shelve",
            ):
                wrong.append(f"{module} imports {imported}")
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.load", "torch.save"):
                called.append(f"{module} calls {ast.unparse(node)}")
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False":
                wrong.append(f"{module} allows pickles")
    assert wrong == []
    # Weights that their authors published as a pickle: only tensors are read.
    assert sorted(called) == ["interop.official calls torch.load", "metrics.weights calls torch.load"]
    for file in ("interop/official.py", "metrics/weights.py"):
        assert (SOURCE / file).read_text().count("weights_only=True") == 1


def test_files_and_functions_are_short():
    long = [
        f"{name(path)} has {count} lines" for path in FILES if (count := len(path.read_text().splitlines())) > MAX_FILE
    ]
    for module, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                count = (node.end_lineno or 0) - node.lineno + 1 - docstring_lines(node)
                if count > MAX_FUNCTION:
                    long.append(f"{module}.{node.name} has {count} lines")
    assert long == []


def docstring_lines(node):
    first = node.body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        return (first.end_lineno or 0) - first.lineno + 1
    return 0


def test_nothing_is_asked_for_its_class_name():
    wrong = [
        f"{module}:{node.lineno}"
        for module, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node).endswith("__class__.__name__")
    ]
    assert wrong == []


def test_only_backbones_know_their_parts():
    """Nobody asks for the class of an encoder or a decoder, or names one: any modules may stand there."""
    parts = {
        "UNetEncoder",
        "UNetDecoder",
        "UNetFeatures",
        "ResidualBlock",
        "MultiDecoderUNet",
        "Trunk",
        "TrunkFeatures",
        "Head",
    }
    wrong = [
        f"{module}:{node.lineno}"
        for module, tree in trees()
        if not module.startswith("backbones")
        for node in ast.walk(tree)
        if (isinstance(node, ast.Name) and node.id in parts)
        or (isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.split(".")[0] in parts)
    ]
    assert wrong == []


@pytest.mark.parametrize("start", [0])
def test_help_and_recipes_need_no_torch(start):
    code = f"""
import importlib, sys
for name in {QUICK}:
    importlib.import_module("multistage_diffusion." + name)
    heavy = [module for module in ("torch", "numpy", "sklearn", "matplotlib", "torchmetrics") if module in sys.modules]
    assert not heavy, f"{{name}} imports {{heavy}}"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
