"""Names are text: one hostile name through every surface and command; errors stay short."""

import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image
from rich.table import Table

import multistage_diffusion as msd
from multistage_diffusion.cli import dispatch
from multistage_diffusion.cli.common import Terminal
from multistage_diffusion.errors import ConfigError, DataError
from multistage_diffusion.records import check
from multistage_diffusion.text import bounded, code, line, markdown, message, page_environment, short

NAME = "s[b][red]r $x^2$ :smile: <b>&amp;`|*_\\ \x1b[31m\r\n\t\"'\u202eé"
SHOWN = "s[b][red]r $x^2$ :smile: <b>&amp;`|*_\\ \\x1b[31m\\r\\n\\t\"'\\u202eé"
TINY = ["--model.width", "8", "--model.decoder-widths", "8", "8", "8", "--model.multipliers", "1", "--model.blocks",
        "1", "--model.attention", "4", "--training.batch-size", "4", "--stages.edges", "0.6", "3.0"]  # fmt: skip


def test_a_line_of_a_terminal():
    assert line(NAME) == SHOWN and line("ünï 日本\u00a0🙂") == "ünï 日本\u00a0🙂"
    assert line("a\udcffb\x00\u2028") == "a\\udcffb\\x00\\u2028"


def test_a_console_takes_nothing_as_markup(capsys):
    console, table = Terminal(width=200), Table(NAME, title=NAME, box=None)
    table.add_row(NAME)
    console.print(f"wrote s[/b]{NAME}")
    console.print(table)
    lines = [text.strip() for text in capsys.readouterr().out.splitlines()]
    assert lines == [f"wrote s[/b]{SHOWN}", SHOWN, SHOWN, SHOWN]


def test_markdown_and_code():
    text = markdown(NAME)
    assert "\n" not in text and "\x1b" not in text
    assert all(text[text.index(mark) - 1] == "\\" for mark in "[]<>`|*_$&")
    assert code("a`b``c") == "```a`b``c```" and code("`a") == "`` `a ``" and code("a\nb") == "`a\\nb`"


def test_a_page_shows_text_as_text():
    page = page_environment().from_string("<p>{{ name }}</p>{{ svg|safe }}").render(name=NAME, svg="<svg>\n</svg>")
    assert "<b>" not in page and "&lt;b&gt;" in page and "\x1b" not in page and page.endswith("<svg>\n</svg>")


def test_errors_stay_short():
    many = tuple(float(number) for number in range(1_000_000))
    with pytest.raises(ConfigError) as caught:
        check(False, "stages.edges", "increasing", many)
    assert (
        str(caught.value) == "stages.edges must be increasing, got (0.0, 1.0, 2.0, 3.0, 4.0, 5.0, ... (1000000 in all)"
    )
    with pytest.raises(ConfigError) as caught:
        msd.Stages(many)
    assert len(str(caught.value)) < 300
    assert short("x" * 1000) == f"{'x' * 200}... (1000 characters)" and short([1, 2]) == "[1, 2]"
    assert len(str(DataError("x" * 10**7 + "; mend it so"))) < 2100 and str(DataError("x" * 10**7 + "; so")).endswith(
        "so"
    )
    assert message(ValueError("a\nb\x07")) == "a b\\x07" and bounded("x" * 2000) == "x" * 2000


@pytest.mark.slow
@pytest.mark.parametrize("edges", [list(range(300_000)), ["x"] * 300_000, "y" * 3_000_000])
def test_a_file_of_a_million_values_is_one_short_line(edges, tmp_path, capsys):
    (tmp_path / "stages.json").write_text(json.dumps({"edges": edges}))
    assert dispatch(["train", "digits", "--stages", str(tmp_path / "stages.json"), "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and len(error) < 3000


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Pictures in folders of hostile names, and a run of such a name, trained on them."""
    home = tmp_path_factory.mktemp("home") / "s[" / "b]" / NAME
    for name in (NAME, f"{NAME}2"):
        for index in range(6):
            path = home / "pictures" / name / f"{NAME}{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.random.default_rng(index).integers(0, 256, (8, 8), np.uint8)).save(path)
    words = ["train", "digits", "--data.source", f"folder:{home / 'pictures'}", "--out", str(home / "run"),
             "--training.steps", "2", "--logging.name", NAME, "--model.classes", "2", *TINY]  # fmt: skip
    assert dispatch(words) == 0
    return home


COMMANDS = {
    "data": ["data", "folder:{home}/pictures"],
    "cluster": ["cluster", "folder:{home}/pictures", "--samples", "100", "--out", "{out}/{name}"],
    "train": ["train", "digits", "--data.source", "folder:{home}/pictures", "--out", "{home}/run",
              "--training.steps", "2", "--logging.name", NAME, "--model.classes", "2", *TINY],
    "sample": ["sample", "{home}/run", "--num", "2", "--steps", "2", "--class", NAME, "--out", "{out}/{name}"],
    "evaluate": ["evaluate", "{home}/run", "--metrics", "loss", "--out", "{out}/results.json"],
    "verify": ["verify", "{home}/run"],
    "profile": ["profile", "{home}/run"],
    "export": ["export", "{home}/run", "--out", "{out}/{name}.safetensors"],
    "convert": ["convert", "{home}/run", "{out}/{name}", "--license", NAME],
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
@pytest.mark.parametrize("json_too", [False, True])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_hostile_name_goes_through_every_command(command, json_too, home, tmp_path, capsys):
    words = [word.format(home=home, out=tmp_path, name=NAME) if "{" in word else word for word in COMMANDS[command]]
    assert dispatch([*words, *(["--json"] if json_too else [])]) == 0
    out, err = capsys.readouterr()
    for text in (out, err):
        assert not any(mark in text for mark in ("\x1b", "\r", "\t", "\u202e", "\U0001f604"))
    if json_too:
        json.loads(out)
    elif command not in ("profile", "evaluate"):
        assert SHOWN in (out + err).replace("\n", "")
    assert NAME in json.loads((home / "run" / "classes.json").read_text())["names"]
    for page in tmp_path.rglob("README.md"):
        text = page.read_text()
        assert "\x1b" not in text and f"# {markdown(NAME)}" in text.splitlines()
        assert json.dumps(NAME) in text


def test_errors_name_a_hostile_path_in_one_line(home, tmp_path, capsys):
    for words in (["verify", str(tmp_path / NAME)], ["data", f"folder:{tmp_path / NAME}"], ["train", NAME], [NAME],
                  ["sample", str(home), "--out", NAME], ["train", "digits", f"--{NAME}", "1"]):  # fmt: skip
        assert dispatch(words) in (2, 3)
        text = capsys.readouterr().err
        assert text.count("\n") == 1 and "\x1b" not in text and "\u202e" not in text


def test_a_name_that_is_not_unicode(home, tmp_path, capsys):
    run = os.fsencode(tmp_path) + b"/run\xff"
    shutil.copytree(os.fsencode(home / "run"), run)
    assert dispatch(["verify", os.fsdecode(run)]) == 0
    assert "run\\udcff" in capsys.readouterr().out
