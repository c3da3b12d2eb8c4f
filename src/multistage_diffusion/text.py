"""A user's text where it is shown, one function a surface: a line of a terminal, a message, Markdown, a page.

Names of files, classes and runs are text: they may hold markup, control characters, newlines and quotes, and none of
these may mean anything where they are shown.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Any

_LONGEST = 200  # characters of a value in a message
_ENTRIES = 6  # of a long list in a message


def line(text: str) -> str:
    """Text for one line of a terminal: control characters, newlines and lone surrogates as Python writes them."""
    return text if text.isprintable() else "".join(map(_visible, text))


def _visible(character: str) -> str:
    shown = character.isprintable() or unicodedata.category(character) == "Zs"
    return character if shown else character.encode("unicode_escape").decode()


def short(value: object) -> str:
    """A value for a message, cut where it is long, with how much there is."""
    if isinstance(value, (list, tuple)) and len(value) > 2 * _ENTRIES:
        return f"{short(type(value)(value[:_ENTRIES]))[:-1]}, ... ({len(value)} in all)"
    text = str(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}... ({len(text)} characters)"


def message(error: BaseException | str) -> str:
    """The one line of an error or a warning."""
    return bounded(line(" ".join(str(error).split())))


def bounded(text: str) -> str:
    """A message without its middle, if it is very long: it begins with what is wrong and ends with how to mend it."""
    half = 5 * _LONGEST
    return text if len(text) <= 2 * half else f"{text[:half]} ... ({len(text)} characters in all) ... {text[-half:]}"


def markdown(text: str) -> str:
    """Text for a line of Markdown, which HTML may be part of."""
    return re.sub(r"([\\`*_{}\[\]()<>#+.!|~&$:-])", r"\\\1", line(text))


def code(text: str) -> str:
    """Text as a span of code of Markdown."""
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{ticks}{space}{line(text)}{space}{ticks}"


def page_environment() -> Any:
    """A jinja2 environment for pages: what is not marked as safe is escaped, control characters made visible."""
    import jinja2
    from markupsafe import Markup

    def finalize(value: Any) -> Any:
        return line(value) if isinstance(value, str) and not isinstance(value, Markup) else value

    return jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=finalize
    )
