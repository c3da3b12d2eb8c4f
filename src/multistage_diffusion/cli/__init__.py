"""The command line, `msd`: one small file a command; torch is imported only by the command that runs."""

from __future__ import annotations

import importlib
import io
import itertools
import json
import os
import re
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from decimal import Decimal
from types import FrameType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from multistage_diffusion.cli.streams import standard_streams
from multistage_diffusion.errors import ConfigError, PeerError, UserError, is_out_of_memory, suggest
from multistage_diffusion.records import new_words
from multistage_diffusion.text import line, message

COMMANDS = {
    "demo": "the main job on digits: cluster, train, sample, evaluate, report",
    "data": "what a source holds",
    "autoencoder": "train a small autoencoder for latent diffusion",
    "cluster": "find the stages of a data set",
    "profile": "parameters and FLOPs of a preset or a run, stage by stage",
    "train": "train a model; the same command again resumes",
    "sample": "draw images from a run",
    "serve": "a local page: draw images, watch stages and denoising",
    "evaluate": "measure a run, or a folder of images",
    "study": "a table or figure of the paper, with seeds and intervals",
    "verify": "check every file of a run against its manifest",
    "convert": "a run for diffusers, or the weights of others to a model",
    "merge": "a run's stages back to one unified network",
    "export": "a run's weights as one file, or its stages as graphs (torch.export, ONNX)",
}


# What needs less memory, by command.
_LESS = {
    "train": "raise --engine.gradient-accumulation, or lower --training.batch-size or --data.memory",
    "sample": "lower --batch-size",
    "evaluate": "lower --batch-size",
    "cluster": "lower --max-images",
    "autoencoder": "lower --batch-size",
    "data": "write the set to disk with --convert, or choose a smaller --resolution",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit with its code.

    0 done; 1 unforeseen; 2 usage or configuration; 3 data; 4 numerics; 5 checkpoint; 130/143 after SIGINT/SIGTERM;
    141 when standard output is a pipe that was closed.

    Args:
        arguments: Words after `msd`; by default those of the process.
    """
    warnings.showwarning = _show_warning
    signal.signal(signal.SIGTERM, _stop)
    words = list(sys.argv[1:] if arguments is None else arguments)
    code = dispatch(words)
    if words[:1] == ["serve"]:  # nothing is left to save, and Python's own end aborts threads that still compute
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError, AttributeError):
                stream.flush()
        os._exit(code)
    sys.exit(code)


def dispatch(arguments: list[str]) -> int:
    """Run the command of the words after `msd`; the last line on stderr of a failure is `error: ...`.

    Returns:
        The exit code.
    """
    with standard_streams():
        try:
            return _exit_code(arguments)
        except BrokenPipeError:  # the reader of our output went away: nobody is left to tell
            return 128 + signal.SIGPIPE


def _exit_code(arguments: list[str]) -> int:
    """Run a command and print one line for a failure."""
    debug = "--debug" in arguments
    try:
        code = _run(arguments)
        sys.stdout.flush()
        return code
    except PeerError as error:
        return error.exit_code
    except UserError as error:
        if debug:
            raise
        print(f"error: {message(error)}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        if debug:
            raise
        print("error: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except StopError as stop:
        print(f"error: stopped by {signal.Signals(stop.number).name}", file=sys.stderr)
        return 128 + stop.number
    except BrokenPipeError:
        raise
    except Exception as error:
        if debug:
            raise
        print(f"error: {line(_unforeseen(error, arguments[0]))}", file=sys.stderr)
        return 1


class StopError(BaseException):
    """SIGTERM came outside of training; not an `Exception`, so that no handler of those swallows it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def _stop(number: int, frame: FrameType | None) -> None:
    raise StopError(number)


def _unforeseen(error: Exception, command: str) -> str:
    """One line for an error that is not a `UserError`."""
    first = " ".join((str(error).splitlines() or [""])[0].split())[:300]
    if is_out_of_memory(error):
        return f"out of memory: {first}; {_LESS.get(command, 'use a smaller set, or free memory')}"
    return f"{type(error).__name__}: {first}; run again with --debug to see where"


def _run(words: list[str]) -> int:
    """Parse a command's options, call it, print its document."""
    if not words or words[0] in ("-h", "--help"):
        print(_overview())
        return 0 if words else 2
    if words[0] in ("-V", "--version"):
        from importlib.metadata import version

        print(version("multistage-diffusion"))
        return 0

    from multistage_diffusion.cli.advice import next_step
    from multistage_diffusion.cli.common import Terminal

    name, arguments = words[0], words[1:]
    if name not in COMMANDS:
        raise ConfigError(f"no command {name}{suggest(name, COMMANDS)}; see msd --help")
    module = importlib.import_module(f"multistage_diffusion.cli.{name}")
    options = (
        module.parse(arguments)
        if hasattr(module, "parse")
        else parse(module.Options, name, arguments, common=getattr(module, "COMMON", ()))
    )
    console = Terminal(stderr=options.json, soft_wrap=True, quiet=not is_main())
    try:
        document = module.run(options, console)
    except UserError as error:
        if options.json and error.document is not None:
            print(json.dumps(error.document, allow_nan=False))
        raise
    if options.json and is_main():
        print(json.dumps(document, allow_nan=False))
    elif advice := next_step(name, options, document):
        console.print(f"next: {advice}")
    return 0


def is_main() -> bool:
    """Whether this process prints: it has rank 0, or `torchrun` did not start it."""
    return os.environ.get("RANK", "0") == "0"


def parse(kind: Any, name: str, arguments: Sequence[str], default: Any = None, common: Sequence[str] = ()) -> Any:
    """Parse a command's words into its dataclass of options with tyro; a mistake becomes one line.

    Args:
        kind: The dataclass; its docstring is the help's text, its fields' docstrings the options' texts.
        name: The command's name.
        arguments: Words after it.
        default: An instance to start from.
        common: Options that --help shows where it does not show all; --help-all does.

    Returns:
        An instance of `kind`.

    Raises:
        ConfigError: Unknown option, missing argument or value of the wrong type.
    """
    import tyro

    arguments = list(_switches(new_words(arguments), kind, default))
    config = (tyro.conf.FlagCreatePairsOff, tyro.conf.AvoidSubcommands)
    extra: dict[str, Any] = {"registry": _rules()} | ({} if default is None else {"default": default})
    out, err = io.StringIO(), io.StringIO()
    if any(word in ("-h", "--help", "--help-all") for word in arguments):
        from multistage_diffusion.cli.help import description, short_help

        if common and "--help-all" not in arguments:
            print(short_help(kind, name, default, common))
            raise SystemExit(0)
        with redirect_stdout(out), suppress(SystemExit):
            tyro.cli(kind, prog=f"msd {name}", args=["--help"], config=config, **extra)
        usage, _, rest = out.getvalue().partition("\n\n")  # tyro does not break the lines of a description
        options = re.split(r"^(?=[ ╭─]*(?:positional arguments|options))", rest, maxsplit=1, flags=re.MULTILINE)[-1]
        print(f"{usage}\n\n{description(kind)}\n")
        print(*(row.rstrip() for row in options.rstrip().splitlines()), sep="\n")
        raise SystemExit(0)
    try:
        with redirect_stdout(out), redirect_stderr(err):
            return tyro.cli(kind, prog=f"msd {name}", args=arguments, config=config, **extra)
    except SystemExit as stop:
        panel = _plain(err.getvalue() or out.getvalue())
        raise ConfigError(f"{_message(panel, kind, config, extra)}; see msd {name} --help") from stop


def _switches(words: Sequence[str], kind: Any, default: Any) -> Iterator[str]:
    """The words with `--data.flip true` as `--data.flip`, and `--data.flip false` as the word that means so, if any."""
    rest = iter(itertools.pairwise((*words, "")))
    for word, following in rest:
        name, equals, value = word.partition("=")
        value = (value if equals else following).lower()
        before = _switch(name, kind, default) if name.startswith("--") and value in ("true", "false") else None
        if before is None:
            yield word
            continue
        if not equals:
            next(rest)
        if value == "true" and not before:
            yield name
        elif value == "false" and before:
            section, dot, option = name.removeprefix("--").rpartition(".")
            yield f"--{section}{dot}no-{option}"


def _switch(option: str, kind: Any, default: Any) -> bool | None:
    """The default of an option without a value; none for other options."""
    for value in (kind,) if default is None else (default, getattr(default, "run", None)):
        for name in option.removeprefix("--").replace("-", "_").split("."):
            value = getattr(value, name, None)
        if isinstance(value, bool):
            return value
    return None


def _rules() -> Any:
    """Rules of tyro's: whole numbers may be written 1e3; of options of named values, the names are the choices."""
    from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

    registry = ConstructorRegistry()

    @registry.primitive_rule
    def whole_number(info: Any) -> Any:
        if info.type is not int:
            return None
        return PrimitiveConstructorSpec(
            nargs=1,
            metavar="INT",
            instance_from_str=lambda words: _whole_number(words[0]),
            is_instance=lambda value: isinstance(value, int),
            str_from_instance=lambda value: [str(value)],
        )

    @registry.primitive_rule
    def named_value(info: Any) -> Any:
        kinds = get_args(info.type) if get_origin(info.type) in (Union, UnionType) else ()
        if not (str in kinds and any(get_origin(kind) is Literal for kind in kinds)):
            return None
        names: Any = Union[tuple(kind for kind in kinds if get_origin(kind) is Literal or kind is type(None))]  # noqa: UP007
        return ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(names, info.markers))

    return registry


def _whole_number(word: str) -> int:
    try:
        number = Decimal(word)
        if number == number.to_integral_value() and abs(number) < 10**30:
            return int(number)
    except ArithmeticError:
        pass
    raise ValueError(f"must be a whole number, got {word}")


def _plain(panel: str) -> str:
    """The message of tyro's panel on one line."""
    text = re.sub(r"\x1b\[[0-9;]*m|[│╭╮╰╯]", "", panel).replace("─", "-")
    parts = [" ".join(part.split()) for part in re.split(r"\n\s*-{10,}\s*(?=\n)", text)]
    return re.sub(r"^Error parsing run(\.[\w-]+)?: ", "", parts[1] if len(parts) > 1 else parts[0])


def _message(plain: str, kind: Any, config: Any, extra: dict[str, Any]) -> str:
    """tyro's message, with the nearest choice or option: tyro lists all choices, and options of similar spelling."""
    if choice := re.match(r"invalid choice '(.*)' for argument '(.*)'\. Expected one of \((.*)\)", plain):
        choices = sorted(set(re.findall(r"'([^']*)'", choice[3])) - {"None"})
        return f"{choice[2]} must be one of {', '.join(choices)}, got {choice[1]}{_near(choice[1], choices)}"
    if wrong := re.match(r"Error parsing (--\S+): no type matching (.*) could be instantiated from \[(.*?)\]", plain):
        words = {"{None}": "none", "FLOAT": "a number", "INT": "a whole number", "STR": "text"}
        kinds = [words.get(kind, "numbers" if " " in kind else kind.strip("{}")) for kind in wrong[2].split("|")]
        return f"{wrong[1]} must be {' or '.join(kinds)}, got {wrong[3].replace(chr(39), '')}"
    if wrong := re.match(r"Error parsing (--\S+): (?:could not convert string to float: '(.*)'|(must be .*))$", plain):
        return f"{wrong[1]} {wrong[3] or f'must be a number, got {wrong[2]}'}"
    if wrong := re.match(r"Error parsing (--\S+): Could not find valid parse for arguments: \[(.*)\]", plain):
        return f"{wrong[1]} must be values of its kind, as --help shows, got {wrong[2].replace(chr(39), '')}"
    if option := re.match(r"Unrecognized options: (--[^\s,=]+)", plain):
        import tyro

        with redirect_stdout(io.StringIO()) as text, suppress(SystemExit):
            tyro.cli(kind, args=["--help"], config=config, **extra)
        options = sorted(set(re.findall(r"^ +(?:-\w, )?(--[a-z][\w.-]*)", text.getvalue(), re.MULTILINE)) - {"--help"})
        if inside := [name for name in options if name.startswith(f"{option[1]}.")]:
            return f"no option {option[1]}; there are {', '.join(inside)}"
        same = [name for name in options if re.split("--|[.]", name)[-1] == re.split("--|[.]", option[1])[-1]]
        lasts = {re.split("--|[.]", name)[-1]: name for name in options}
        if not same and (near := _near(re.split("--|[.]", option[1])[-1], list(lasts))):
            same = [name for last, name in lasts.items() if f" {last}?" in near]
        hint = f"; did you mean {' or '.join(same)}?" if same else _near(option[1], options)
        return f"no option {option[1]}{hint}"
    return plain


def _near(name: str, names: Sequence[str]) -> str:
    """A hint, if one is near; a list of all would be too long, or is there already."""
    hint = suggest(name, names)
    return hint.replace('"', "") if "did you mean" in hint else ""


def _show_warning(warning: Warning | str, *_: object, **__: object) -> None:
    """One line for people, without the place in the code."""
    if is_main():
        print(f"warning: {message(str(warning))}", file=sys.stderr)


def _overview() -> str:
    width = max(map(len, COMMANDS)) + 2
    rows = "\n".join(f"  {name:<{width}}{text}" for name, text in COMMANDS.items())
    return f"""usage: msd COMMAND ...    (each has --help with an example)

Train diffusion models in stages: noise levels clustered, one shared encoder,
one decoder per stage.

{rows}

example: msd demo --out runs/demo"""
