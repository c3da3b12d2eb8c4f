"""Files of values for `msd train --config`: JSON, TOML or YAML, a whole command or a part of one, and sweeps."""

from __future__ import annotations

import itertools
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from multistage_diffusion.config import RunConfig, from_dict, to_dict
from multistage_diffusion.errors import CheckpointError, ConfigError, suggest
from multistage_diffusion.files import read_json
from multistage_diffusion.records import Tagged, with_new_keys

# Options of the command that a file may hold beside the sections of a run, with their kinds.
COMMAND = {
    "recipe": str, "out": str, "device": str, "threads": int, "data_root": str, "init": str, "init_names": str,
}  # fmt: skip
SECTIONS = tuple(RunConfig.__dataclass_fields__)
_WHOLE = ("data", "process", "model", "training")  # sections without which a file needs a recipe
_MOST = 1000  # runs of a sweep


@dataclass(frozen=True)
class Values:
    """What a file says.

    Attributes:
        file: The file.
        command: Options of the command, by name.
        sections: Sections of a run.
        sweep: Lists of values, by option, like `training.learning_rate`.
    """

    file: str
    command: Mapping[str, Any] = field(default_factory=dict)
    sections: Mapping[str, Any] = field(default_factory=dict)
    sweep: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def merge(self, base: RunConfig) -> RunConfig:
        """The configuration with the file's values in place of its own."""
        return _merged(base, self.sections, self.file)


def read_values(file: str) -> Values:
    """Read a file by the ending of its name; another ending than .toml, .yaml and .yml is JSON.

    Raises:
        CheckpointError: The file cannot be read, or is not what its name says.
        ConfigError: It holds no named sections, an option of another kind, or a sweep that is none.
    """
    document = _document(file)
    if not isinstance(document, dict):
        raise ConfigError(f"{file} must hold named sections, like the config.json of a run")
    document = with_new_keys(_underscored(document), file)
    command = {name: document.pop(name) for name in tuple(document) if name in COMMAND}
    for name, value in command.items():
        if type(value) is not COMMAND[name]:
            kind = "a whole number" if COMMAND[name] is int else "text"
            raise ConfigError(f"{file}: {name} must be {kind}, got {value!r}")
    sweep = document.pop("sweep", {})
    return Values(file, command, document, dict(_lists(sweep, file)))


def start(values: Values, name: str) -> RunConfig:
    """What a file without a recipe starts from: the defaults, if it holds a whole run.

    Args:
        values: The file.
        name: The command, for the message.

    Raises:
        ConfigError: It holds less, so it needs a recipe.
    """
    if missing := [section for section in _WHOLE if section not in values.sections]:
        raise ConfigError(
            f"{values.file} holds no {missing[0]}, so it needs a recipe: add recipe: digits to it, or write "
            f"{name} digits --config {values.file}"
        )
    return RunConfig()


def combinations(config: RunConfig, sweep: Mapping[str, Sequence[Any]], file: str) -> list[tuple[str, dict, RunConfig]]:
    """The runs of a sweep: every combination of its lists.

    Args:
        config: The run.
        sweep: Lists of values, by option.
        file: Where they stand, for messages.

    Returns:
        For each run the name of its folder, its values by option, and its configuration.

    Raises:
        ConfigError: No such option, a value that it cannot take, two runs alike, or too many.
    """
    runs: dict[str, tuple[str, dict, RunConfig]] = {}
    names = _short(sweep)
    count = 1
    for values in sweep.values():
        count *= len(values)
    if count > _MOST:
        raise ConfigError(f"{file}: the sweep has {count} runs; the most is {_MOST}")
    for values in itertools.product(*sweep.values()):
        chosen = dict(zip(sweep, values, strict=True))
        changed = config
        for option, value in chosen.items():
            section, _, key = option.partition(".")
            changed = _merged(changed, {section: {key: value}}, f"{file}, sweep")
        folder = ",".join(f"{names[option]}={_word(value)}" for option, value in chosen.items())
        if folder in runs:
            raise ConfigError(f"{file}: two runs of the sweep are alike: {folder}")
        runs[folder] = (folder, chosen, changed)
    return list(runs.values())


def with_command(options: Any, values: Values, given: set[str]) -> Any:
    """The command's options with those of the file, where the words do not give them.

    Args:
        options: The command's default options.
        values: The file.
        given: Options that the words give, like `--out`.
    """
    changes = {
        name: value
        for name, value in values.command.items()
        if name != "recipe" and f"--{name.replace('_', '-')}" not in given
    }
    return replace(options, **changes)


def _document(file: str) -> Any:
    path = Path(file)
    ending = path.suffix.lower()
    if ending not in (".toml", ".yaml", ".yml"):
        return read_json(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not text in UTF-8") from error
    if ending == ".toml":
        try:
            return tomllib.loads(text)
        except (tomllib.TOMLDecodeError, RecursionError) as error:
            raise ConfigError(f"{file} is not valid TOML: {error}") from error
    try:
        import yaml
    except ImportError as error:
        raise ConfigError(
            f"{file}: YAML needs pyyaml, which is not installed; write the file as TOML or JSON"
        ) from error
    try:
        return _numbers(yaml.safe_load(text))
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from error


def _numbers(document: Any) -> Any:
    """What YAML read, with 1e-3 as a number: YAML 1.1 takes it for text as it has no point."""
    if isinstance(document, dict):
        return {key: _numbers(value) for key, value in document.items()}
    if isinstance(document, list):
        return [_numbers(value) for value in document]
    if isinstance(document, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", document):
        return float(document)
    return document


def _underscored(document: dict[Any, Any]) -> dict[str, Any]:
    """Keys as they are in records: learning-rate and learning_rate are the same."""
    return {
        str(key).replace("-", "_"): _underscored(value) if isinstance(value, dict) else value
        for key, value in document.items()
    }


def _lists(sweep: Any, file: str, before: str = "") -> list[tuple[str, list[Any]]]:
    """A sweep's lists by option: `"training.steps" = [..]`, or nested as TOML writes `training.steps = [..]`."""
    found = []
    if not isinstance(sweep, dict):
        raise ConfigError(f'{file}: sweep must hold lists by option, like "training.learning-rate" = [1e-4, 2e-4]')
    for key, value in sweep.items():
        option = before + key
        section = option.partition(".")[0]
        if section not in SECTIONS:
            raise ConfigError(f"{file}: no section {section} to sweep{suggest(section, SECTIONS)}")
        if isinstance(value, dict):
            found += _lists(value, file, f"{option}.")
        elif not isinstance(value, list) or not value or "." not in option:
            raise ConfigError(f"{file}: sweep must give {option} a list of values, got {value!r}")
        else:
            found.append((option, value))
    return found


def _merged(base: RunConfig, changes: Mapping[str, Any], file: str) -> RunConfig:
    """The configuration with some values in place of its own; a section of another kind replaces the whole."""
    document = to_dict(base)
    for section, values in changes.items():
        record = getattr(base, section, None)
        other = isinstance(record, Tagged) and isinstance(values, dict) and not record.is_kind(values)
        if isinstance(values, dict) and isinstance(document.get(section), dict) and not other:
            document[section] = {**document[section], **values}
        else:
            document[section] = values
    return from_dict(RunConfig, document, file)


def _short(options: Mapping[str, Any]) -> dict[str, str]:
    """The last word of each option, or all of it where two end alike."""
    last = [option.rpartition(".")[2] for option in options]
    return {
        option: (word if last.count(word) == 1 else option).replace("_", "-")
        for option, word in zip(options, last, strict=True)
    }


def _word(value: Any) -> str:
    """A value in the name of a folder."""
    if isinstance(value, list):
        return "-".join(map(_word, value)) or "none"
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return re.sub(r"[^\w.+-]+", "-", text).lower() or "none"
