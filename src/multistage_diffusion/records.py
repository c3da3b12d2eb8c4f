"""Frozen records to JSON and back: every key known, every value checked. Imports no torch.

A record is a frozen dataclass. `Tagged` is the base of a family of records that a file tells apart by one key, like
the processes by `kind`; a class of a user's own belongs to it as soon as it is imported.
"""

from __future__ import annotations

import builtins
import functools
import importlib
import itertools
import json
import os
import types
import typing
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from multistage_diffusion.errors import ConfigError, suggest
from multistage_diffusion.text import short

T = TypeVar("T")

# Old keys of files and old options, each readable for one version. A name without a section is that of an option.
RENAMED: dict[str, str] = {
    "ema_length": "sigma_rel",
    "training.ema_lengths": "training.sigma_rel",
    "engine.accumulation": "engine.gradient_accumulation",
    "engine.checkpointing": "engine.activation_checkpointing",
}

# Options that once were flags, with what they meant.
_FLAGS = {"--model.input-pyramid": "True"}

MAX_SEED = 2**63 - 1  # seeds are int64
_LARGEST = 1e30  # fits float32, and no sensible value comes near it


class Tagged:
    """Base of a family of records that one key of a file tells apart.

    The family's base names the key, and the member that files without the key mean: `class Process(Tagged,
    tag="kind")`. A member gives the key a default of its own, like `kind: Literal["vp"] = "vp"`.
    """

    _tag: ClassVar[str]
    _untagged: ClassVar[str | None]
    _family: ClassVar[str]
    _kinds: ClassVar[dict[str, type[Any]]]

    def __init_subclass__(cls, *, tag: str | None = None, untagged: str | None = None, **options: Any) -> None:
        super().__init_subclass__(**options)
        if tag is not None:
            cls._tag, cls._untagged, cls._family, cls._kinds = tag, untagged, cls.__name__.lower(), {}
            return
        kind = cls.__dict__.get(cls._tag)
        if isinstance(kind, str):
            if kind in cls._kinds and cls._kinds[kind].__qualname__ != cls.__qualname__:
                raise TypeError(f"{cls.__qualname__}.{cls._tag} is {kind}, as {cls._kinds[kind].__qualname__}'s is")
            cls._kinds[kind] = cls
        elif hasattr(cls, cls._tag):  # its files would be read as those of the class that it extends
            raise TypeError(f'{cls.__qualname__} needs a name of its own, like {cls._tag}: str = "mine"')

    @classmethod
    def kinds(cls) -> dict[str, type[Any]]:
        """Every member of the family that is imported, by its tag."""
        return dict(cls._kinds)

    def is_kind(self, document: Mapping[str, Any]) -> bool:
        """Whether a document, which may leave the tag out, is one of this member."""
        kind = getattr(self, self._tag)
        return document.get(self._tag, kind) == kind

    @classmethod
    def by_kind(cls, kind: str) -> type[Any]:
        """The member with a tag.

        Raises:
            ConfigError: None that is imported has it.
        """
        if kind not in cls._kinds:
            raise ConfigError(
                f"no {cls._family} {kind} (a class of your own must be imported first){suggest(kind, cls._kinds)}"
            )
        return cls._kinds[kind]

    @classmethod
    def of_document(cls, document: Mapping[str, Any]) -> type[Any]:
        """The member that a document describes.

        Raises:
            ConfigError: It names none, or one that is not imported.
        """
        return cls.by_kind(str(document.get(cls._tag, cls._untagged or "")))


def check(condition: bool, option: str, expected: str, value: object) -> None:
    """Refuse a value.

    Args:
        condition: Whether the value is right.
        option: Its name, as on the command line without dashes.
        expected: What would be right.
        value: What came.

    Raises:
        ConfigError: `condition` is false.
    """
    if not condition:
        raise ConfigError(f"{option} must be {expected}, got {short(value)}")


def check_needs(condition: bool, option: str, other: str, value: object) -> None:
    """Refuse an option that another one contradicts: "--by-class needs --method optimal-denoiser; it is snr".

    Args:
        condition: Whether the two fit.
        option: The option given, without dashes.
        other: The other option with the value that `option` needs, like `method gradient`.
        value: What the other option is.

    Raises:
        ConfigError: `condition` is false.
    """
    if not condition:
        raise ConfigError(f"--{option} needs --{other}; it is {value}")


def check_numbers(record: Any, section: str) -> None:
    """Refuse values that are not of their field's kind, NaN, infinity and numbers out of all proportion.

    Fields of numbers, text, switches and choices, and tuples of them, are checked; fields of other kinds are not.

    Args:
        record: A dataclass.
        section: Its name on the command line, for the message.

    Raises:
        ConfigError: A field holds such a value.
    """
    for name, hint in _hints(type(record)).items():
        value, option = getattr(record, name), ".".join(filter(None, (section, name.replace("_", "-"))))
        if expected := _unfit(value, hint):
            raise ConfigError(f"{option} must be {expected}, got {str(value)[:60]}")
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, (int, float)):
                check(abs(number) <= _LARGEST, option, "a finite number", value)


@functools.cache
def _hints(kind: type[Any]) -> dict[str, Any]:
    """Types of a dataclass's fields; none where they cannot be resolved."""
    try:
        hints = typing.get_type_hints(kind)
    except NameError:
        return {}
    return {item.name: hints[item.name] for item in fields(kind)}


def _unfit(value: Any, hint: Any) -> str | None:
    """What a value should be, if it is not of a type; none if it is, or if the type is not one that is checked."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return None if value in arguments else f"one of {', '.join(map(str, arguments))}"
    if origin in (typing.Union, types.UnionType):
        wrong = [_unfit(value, part) for part in arguments]
        return None if None in wrong else " or ".join(dict.fromkeys(filter(None, wrong)))
    if origin is tuple:
        if not isinstance(value, (tuple, list)):
            return "a tuple"
        return next(filter(None, (_unfit(item, arguments[0]) for item in value)), None)
    is_bool = isinstance(value, bool)
    match hint:
        case builtins.int:
            return None if isinstance(value, Integral) and not is_bool else "a whole number"
        case builtins.float:
            return None if isinstance(value, Real) and not is_bool else "a number"
        case builtins.bool:
            return None if is_bool else "true or false"
        case builtins.str:
            return None if isinstance(value, str) else "text"
        case types.NoneType:
            return None if value is None else "none"
    return None


def check_count(value: Any, option: str, least: int = 1) -> None:
    """Refuse a number that is not whole, or too small."""
    check(isinstance(value, Integral) and not isinstance(value, bool), option, "a whole number", value)
    check(int(value) >= least, option, f"at least {least}", value)


def check_path(path: Any, option: str) -> Path:
    """A path, refused where no file can have such a name."""
    text = os.fspath(path) if isinstance(path, (str, os.PathLike)) else ""
    usable = isinstance(text, str) and 0 < len(text) < 4096 and "\0" not in text
    check(usable and all(len(part) < 256 for part in str(text).split("/")), option, "a path", str(path)[:60])
    return Path(path)


def check_seed(seed: Any, count: int = 1, option: str = "seed") -> None:
    """Refuse a seed, or the first of several consecutive ones, that is no whole number in [0, 2^63)."""
    whole = isinstance(seed, Integral) and not isinstance(seed, bool)
    check(whole and 0 <= int(seed) <= MAX_SEED - (count - 1), option, "a whole number in [0, 2^63)", seed)


def to_dict(record: Any) -> dict[str, Any]:
    """A record as plain JSON types: nested dictionaries; tuples become lists.

    Raises:
        ConfigError: It holds something that no file can hold, like a function.
    """
    return json.loads(json.dumps(asdict(record), default=_refuse))


def _refuse(value: Any) -> None:
    name = getattr(value, "__qualname__", repr(value))
    raise ConfigError(f"{name} is an object of Python, which no file can hold; configure a run with a name instead")


def flat(document: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one level, with keys like `training.steps`."""
    named: dict[str, Any] = {}
    for key, value in document.items():
        named |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return named


def from_dict(kind: type[T], document: Any, where: str = "configuration", section: str = "") -> T:
    """Read and check a record: every key known, every value of its type.

    Args:
        kind: The record's class, or the base of its family.
        document: Nested dictionaries, as from JSON. Missing keys take their defaults; old keys are read as new ones.
        where: What the document is, for messages.
        section: What the record is called in a whole configuration, like `model`; none for the whole.

    Returns:
        The record.

    Raises:
        ConfigError: An unknown key (the nearest known one is named), or a value of the wrong type or range.
    """
    return _read(kind, with_new_keys(document, where, section), where, f"{section}." if section else "")


def with_new_keys(document: Any, where: str | None = None, section: str = "") -> Any:
    """A document with its old keys under their new names, unless it has both.

    Args:
        document: As from JSON; it stays as it is.
        where: What the document is, for a warning that names the new keys; none to say nothing.
        section: What it is called in a whole configuration; none for the whole.

    Returns:
        The document, or a changed copy.
    """
    document = _with_old_meanings(document, section)
    prefix, moved = f"{section}." if section else "", []
    for old, new in RENAMED.items():
        if not old.startswith(prefix) or not new.startswith(prefix):
            continue
        *sections, key = old.removeprefix(prefix).split(".")
        *new_sections, new_key = new.removeprefix(prefix).split(".")
        if key not in _inside(document, sections) or new_key in _inside(document, new_sections):
            continue
        document = document if moved else json.loads(json.dumps(document))
        target = document
        for name in new_sections:
            target = target.setdefault(name, {})
        target[new_key] = _inside(document, sections).pop(key)
        moved.append(f"{old} is now called {new}")
    if moved and where is not None:
        _warn(f"{where}: {', '.join(moved)}; old names work for one more version")
    return document


def new_word(word: str) -> str:
    """An option of the command line under its new name, with a warning if it has one.

    Args:
        word: A word of the command line, like `--training.ema-lengths` or `--ema-length=0.1`.

    Returns:
        The same word, or the new one.
    """
    name, equals, value = word.partition("=")
    new = RENAMED.get(name.removeprefix("--").replace("-", "_")) if name.startswith("--") else None
    if new is None:
        return word
    option = f"--{new.replace('_', '-')}"
    _warn(f"{name} is now called {option}; the old name works for one more version")
    return f"{option}{equals}{value}"


def new_words(words: Sequence[str]) -> list[str]:
    """The words of a command line with options under their new names; flags that now take a value get one."""
    result = list(map(new_word, words))
    for index, (word, following) in enumerate(itertools.zip_longest(words, words[1:], fillvalue="--")):
        if word in _FLAGS and following.startswith("--"):
            result[index] = f"{word}={_FLAGS[word]}"
            _warn(f"{word} now takes a value; without one it means {_FLAGS[word]}, for one more version")
    return result


def old_names(module: str, names: Mapping[str, tuple[str, str]]) -> Callable[[str], Any]:
    """A module's `__getattr__` that finds names which moved, with a DeprecationWarning.

    Args:
        module: The module's `__name__`.
        names: Old name to the module and the name where it is now.

    Returns:
        The function.
    """

    def find(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        home, new = names[name]
        warnings.warn(f"{module}.{name} is now {home}.{new}", DeprecationWarning, stacklevel=2)
        return getattr(importlib.import_module(home), new)

    return find


def _with_old_meanings(document: Any, section: str) -> Any:
    """A document in which what version 0.1 did without saying so is said: the signs of augmentation labels."""
    data = _inside(document, [] if section == "data" else ["data"]) if section in ("", "data") else {}
    if not data.get("augment_probability") or "augment_signs" in data:
        return document
    changed = {**data, "augment_signs": "reversed"}
    return changed if section == "data" else {**document, "data": changed}


def _inside(document: Any, sections: list[str]) -> dict[str, Any]:
    """A section of a document; empty where there is none."""
    for section in sections:
        document = document.get(section) if isinstance(document, dict) else None
    return document if isinstance(document, dict) else {}


def _warn(message: str) -> None:
    warnings.warn(message, FutureWarning, stacklevel=4)


def _read(kind: type[Any], document: Any, where: str, path: str) -> Any:
    """A record and those inside it."""
    if not isinstance(document, dict):
        raise ConfigError(
            f"{where}: {path.rstrip('.') or 'the document'} must hold named values, got {short(repr(document))}"
        )
    try:
        kind = kind.of_document(document) if issubclass(kind, Tagged) else kind
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    hints = typing.get_type_hints(kind)
    names = [item.name for item in fields(kind)]
    values = {}
    for key, value in document.items():
        if key not in names:
            name = key if str(key).isprintable() else repr(key)
            raise ConfigError(f"{where}: unknown key {path}{name}{suggest(str(key), names)}")
        hint: Any = hints[key]
        if is_dataclass(hint):
            values[key] = _read(typing.cast(type[Any], hint), value, where, f"{path}{key}.")
        else:
            values[key] = _value(hint, value, where, f"{path}{key}")
    try:
        return kind(**values)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def _value(hint: Any, value: Any, where: str, key: str) -> Any:
    """A value of a field, of exactly its type."""
    import pydantic

    try:
        return _adapter(hint).validate_json(json.dumps(value), strict=True)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        place = ".".join((key, *(str(part) for part in first["loc"] if isinstance(part, int))))
        raise ConfigError(f"{where}: {place}: {first['msg'].lower()}, got {short(repr(first['input']))}") from error


@functools.cache
def _adapter(hint: Any) -> Any:
    import pydantic

    return pydantic.TypeAdapter(hint)
