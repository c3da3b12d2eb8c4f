"""Classes and all that they need of their modules as one file, which runs where this package is not installed.

Text is taken as it stands in the modules, so the file reads like the source. What only annotations name is left out:
the file never evaluates them.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

from multistage_diffusion.errors import ConfigError

_PACKAGE = __name__.split(".")[0]
_HEADER = '''"""A network of multistage-diffusion (https://arxiv.org/abs/2312.09181; Apache-2.0), for diffusers.

It was put together from the package's modules, and needs torch and diffusers alone. Annotations are never evaluated;
their strings are shapes.
"""

from __future__ import annotations
'''
# In the file, the text that goes with the weights is the file itself.
_ITSELF = '''
_SOURCE = Path(__file__).read_text(encoding="utf-8")


def source_of(unet: MultistageUNet) -> str:
    """The text of the file that loads a network without the package: of this file."""
    return _SOURCE
'''


def bundle(*classes: type) -> str:
    """The text of one file with some classes and whatever they need.

    Args:
        classes: Classes of this package, or of a module of a user's own.

    Returns:
        Python's source; it imports what those modules import from elsewhere, and nothing of their own.

    Raises:
        ConfigError: The source of a class cannot be read, or a class is not at the top of its module.
    """
    return _Bundle({_PACKAGE, *(kind.__module__ for kind in classes)}, classes).text()


@dataclass
class _Module:
    """A module's source."""

    name: str
    needed: set[str] = field(default_factory=set)

    @cached_property
    def lines(self) -> list[str]:
        try:
            return inspect.getsource(sys.modules.get(self.name) or importlib.import_module(self.name)).splitlines()
        except (OSError, TypeError) as error:
            raise ConfigError(
                f"the source of {self.name} cannot be read, so that diffusers could not load it"
            ) from error

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse("\n".join(self.lines))

    @cached_property
    def definitions(self) -> dict[str, ast.stmt]:
        """What the module defines at its top, by name."""
        names: dict[str, ast.stmt] = {}
        for node in self.tree.body:
            match node:
                case ast.ClassDef(name=name) | ast.FunctionDef(name=name):
                    names[name] = node
                case ast.Assign(targets=targets):
                    names |= {
                        part.id: node for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)
                    }
                case ast.AnnAssign(target=ast.Name(id=name)):
                    names[name] = node
        return names

    def imports(self, node: ast.AST) -> dict[str, tuple[str, str]]:
        """What a node imports, by name: the module and the name in it, empty for the module itself."""
        found: dict[str, tuple[str, str]] = {}
        for part in ast.walk(node):
            if isinstance(part, ast.Import):
                found |= {alias.asname or alias.name.split(".")[0]: (alias.name, "") for alias in part.names}
            elif isinstance(part, ast.ImportFrom):
                found |= {alias.asname or alias.name: (part.module or "", alias.name) for alias in part.names}
        return found

    @cached_property
    def global_imports(self) -> dict[str, tuple[str, str]]:
        nodes = [node for node in self.tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        return self.imports(ast.Module(list(nodes), []))


class _Bundle:
    """Follows names from module to module, and writes down what it met."""

    def __init__(self, inside: set[str], classes: tuple[type, ...]) -> None:
        self.inside, self.modules = inside, dict[str, _Module]()
        self.outside: dict[str, tuple[str, str]] = {}
        self.names: dict[tuple[str, str], str] = {}  # what a name of a module is called in the file
        for kind in classes:
            self.need(kind.__module__, kind.__qualname__)

    def need(self, name: str, needed: str) -> None:
        """Take a module's name into the file, with all that it needs."""
        module = self.modules.setdefault(name, _Module(name))
        node = module.definitions.get(needed)
        if node is None:  # passed on from another module
            if needed not in module.global_imports:
                raise ConfigError(f"{needed} is not at the top of {name}, so that diffusers could not load it; move it")
            self.need(*module.global_imports[needed])
        elif needed not in module.needed:
            module.needed.add(needed)
            if needed not in self.names.values():
                self.names[name, needed] = needed
            else:  # of another module, too
                self.names[name, needed] = f"_{name.split('.')[-1]}_{needed.strip('_')}"
            if needed != "source_of":
                self._follow(module, node)

    def _follow(self, module: _Module, node: ast.stmt) -> None:
        imports = module.global_imports | module.imports(node)
        for part in _evaluated(node):
            if isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name):
                if self._is_module(imports.get(part.value.id)):
                    self.need(".".join(imports[part.value.id]), part.attr)
            elif isinstance(part, ast.Name) and part.id in module.definitions:
                self.need(module.name, part.id)
            elif isinstance(part, ast.Name) and part.id in imports and not self._is_module(imports[part.id]):
                self._import(module, part.id, *imports[part.id])
        for part in ast.walk(node):  # those of annotations, as far as torch and Python have them
            if isinstance(part, ast.Name) and imports.get(part.id, ("",))[0] in ("typing", "collections.abc", "torch"):
                self.outside[part.id] = imports[part.id]

    def _import(self, module: _Module, alias: str, home: str, name: str) -> None:
        if not self._inside(home):
            self.outside[alias] = (home, name)
        elif alias != name:
            raise ConfigError(f"{module.name} imports {name} as {alias}; in one file a thing has one name")
        else:
            self.need(home, name)

    def _inside(self, module: str) -> bool:
        return module in self.inside or module.split(".")[0] in self.inside

    def _is_module(self, imported: tuple[str, str] | None) -> bool:
        """Whether an import is of a module inside."""
        return imported is not None and self._inside(imported[0]) and ".".join(imported) in sys.modules

    def _ordered(self) -> list[_Module]:
        """A module after those that it imports at its top."""
        order: list[_Module] = []
        visited: set[str] = set()

        def visit(name: str) -> None:
            if name in visited or not self._inside(name):
                return
            visited.add(name)
            module = self.modules.setdefault(name, _Module(name))
            for imported in module.global_imports.values():
                visit(".".join(imported) if self._is_module(imported) else imported[0])
            order.append(module)

        for name in list(self.modules):
            visit(name)
        return [module for module in order if module.needed]

    def text(self) -> str:
        """The file."""
        parts = [_HEADER + "\n" + "\n".join(self._imports())]
        for module in self._ordered():
            nodes = {id(module.definitions[name]): module.definitions[name] for name in module.needed - {"source_of"}}
            pieces = [self._piece(module, node) for node in sorted(nodes.values(), key=lambda node: node.lineno)]
            parts.append("\n\n\n".join([f"# From {module.name}:", *pieces]))
        return "\n\n\n".join([*parts, _ITSELF.strip()]) + "\n"

    def _imports(self) -> list[str]:
        """Lines that import what comes from elsewhere."""
        whole, names = set[str](), dict[str, set[str]]()
        for alias, (home, name) in {**self.outside, "Path": ("pathlib", "Path")}.items():
            if name:
                names.setdefault(home, set()).add(name if name == alias else f"{name} as {alias}")
            else:
                whole.add(f"import {home}" if home.split(".")[0] == alias else f"import {home} as {alias}")
        return sorted(whole) + [f"from {home} import {', '.join(sorted(names[home]))}" for home in sorted(names)]

    def _piece(self, module: _Module, node: ast.stmt) -> str:
        """The text of a definition, with the names of the file and without imports from inside."""
        lines: list[str | None] = list(module.lines)
        imports = module.global_imports | module.imports(node)
        edits, modules = list[tuple[ast.expr, str]](), set[ast.AST]()
        for part in ast.walk(node):  # what holds a part comes before it
            if isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name):
                if self._is_module(imports.get(part.value.id)):
                    edits.append((part, self._called(".".join(imports[part.value.id]), part.attr)))
                    modules.add(part.value)
            elif isinstance(part, ast.Name) and part not in modules:
                home, name = imports.get(part.id, (module.name, part.id))
                edits.append((part, self._called(home, name, part.id)))
            elif isinstance(part, ast.ImportFrom) and self._inside(part.module or ""):
                lines[part.lineno - 1 : part.end_lineno] = [None] * ((part.end_lineno or 0) - part.lineno + 1)
        for part, text in sorted(edits, key=lambda edit: -edit[0].col_offset):
            line = (lines[part.lineno - 1] or "").encode()
            lines[part.lineno - 1] = (line[: part.col_offset] + text.encode() + line[part.end_col_offset :]).decode()
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            text = lines[node.lineno - 1] or ""
            lines[node.lineno - 1] = text.replace(node.name, self._called(module.name, node.name), 1)
        start = min([node.lineno, *(mark.lineno for mark in getattr(node, "decorator_list", []))]) - 1
        while start and module.lines[start - 1].startswith("#"):
            start -= 1
        return "\n".join(line for line in lines[start : node.end_lineno] if line is not None)

    def _called(self, home: str, name: str, default: str | None = None) -> str:
        """What a name of a module is called in the file; it may have been passed on by others."""
        while (home, name) not in self.names and self._inside(home):
            passed = self.modules[home].global_imports.get(name) if home in self.modules else None
            if passed is None:
                break
            home, name = passed
        return self.names.get((home, name), default or name)


def _evaluated(node: ast.AST) -> Iterator[ast.AST]:
    """The parts of a definition that are evaluated: all but annotations, of which dataclasses read `ClassVar`."""
    yield node
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST):
                continue
            if name in ("annotation", "returns"):
                yield from (part for part in ast.walk(child) if isinstance(part, ast.Name) and part.id == "ClassVar")
            else:
                yield from _evaluated(child)
