"""Help that fits 80 columns: a command's most used options, and texts in lines of that length."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Sequence
from dataclasses import MISSING, fields
from functools import cache
from typing import Any

WIDTH = 80
_COLUMN = 30  # where the texts of options begin


def description(kind: type) -> str:
    """A class's docstring in lines of at most 80 characters; an example stays one line, to be copied."""
    paragraphs = inspect.cleandoc(kind.__doc__ or "").split("\n\n")
    return "\n\n".join(
        part if part.lower().startswith("example:") else textwrap.fill(part, WIDTH, break_on_hyphens=False)
        for part in paragraphs
    )


def short_help(kind: type, name: str, default: Any, common: Sequence[str]) -> str:
    """The help of a command with its most used options.

    Args:
        kind: The dataclass of its options.
        name: The command.
        default: An instance with the defaults, if there is one.
        common: Options, like `out` or `training.steps`.

    Returns:
        The text.
    """
    places = [item.name.upper() for item in fields(kind) if "Positional" in str(item.type)]
    lines = [" ".join(["usage: msd", name, *places, "[options]"]), "", description(kind), ""]
    options = [_option(kind, default, option) for option in (*common, "json")]
    for head, text in [*options, ("--help-all", "All options of the command.")]:
        wrapped = textwrap.wrap(text, WIDTH - _COLUMN, break_on_hyphens=False)
        if len(head) + 4 > _COLUMN:
            lines.append(f"  {head}")
        else:
            lines.append(f"  {head:<{_COLUMN - 2}}{wrapped.pop(0)}")
        lines += [" " * _COLUMN + part for part in wrapped]
    return "\n".join(lines)


def _option(kind: type, default: Any, option: str) -> tuple[str, str]:
    """An option as it is written, and its text with the default."""
    owner, instance = kind, default
    *sections, last = option.split(".")
    if sections and hasattr(default, "run"):
        instance = default.run
    for section in sections:
        instance = getattr(instance, section)
        owner = type(instance)
    found = next(item for item in fields(owner) if item.name == last)
    value = getattr(instance, last) if instance is not None else found.default
    alias = re.search(r"name=[\"'](.+?)[\"']", str(found.type))
    word = ".".join([*sections, alias[1] if alias else last]).replace("_", "-")
    metavar = _metavar(str(found.type))
    text = _docs(owner).get(last, "")
    shown = "" if value in (None, MISSING, False, ()) else f" (default: {_shown(value)})"
    return f"--{word} {metavar}".rstrip(), text + shown


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _metavar(kind: str) -> str:
    """What stands for an option's value."""
    if kind.startswith("bool"):
        return ""
    if choices := re.findall(r"\"(.+?)\"|'(.+?)'", kind) if "Literal" in kind else []:
        return "|".join(one or other for one, other in choices)
    for name, shown in (("tuple", "... "), ("int", "INT"), ("float", "FLOAT")):
        if re.search(rf"\b{name}\b", kind):
            return shown.strip()
    return "STR"


@cache
def _docs(owner: type) -> dict[str, str]:
    """The texts below the fields of a dataclass and of those that it extends."""
    texts: dict[str, str] = {}
    for one in reversed(owner.__mro__[:-1]):
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(one))).body
        assert isinstance(definition, ast.ClassDef)
        for item, following in zip(definition.body, definition.body[1:], strict=False):
            match item, following:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=text)):
                    texts[name] = " ".join(str(text).split())
                case _:
                    pass
    return texts
