"""The command line as a whole: mistakes are one line with the right code, JSON is alone on stdout, help is quick."""

import json
import re
import subprocess
import sys
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from multistage_diffusion.cli import COMMANDS, dispatch, main


def ended(words, capsys):
    """Exit code, stdout and the lines of stderr."""
    code = dispatch(list(words))
    out, err = capsys.readouterr()
    return code, out, err.splitlines()


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["trian"], 'no command trian; did you mean "train"?'),
        (["xyz"], "profile, sample, "),
        (["--nonsense"], "no command --nonsense"),
        (["train"], "needs a recipe as its first word: digits,"),
        (["train", "--out", "x"], "needs a recipe as its first word"),
        (["train", "digist", "--out", "x"], 'no recipe digist; did you mean "digits"?'),
        (["train", "digits"], "--out"),
        (["train", "digits", "--out", "x", "--training.stepz", "5"], "did you mean --training.steps?"),
        (["train", "digits", "--out", "x", "--steps", "5"], "did you mean --sampling.steps or --training.steps?"),
        (["train", "digits", "--training.edges", "5"], "no option --training.edges; did you mean --stages.edges?"),
        (["train", "digits", "--sampling.solver", "huen"], "got huen; did you mean heun?"),
        (["cluster", "digits", "--process", "vpp"], "must be one of edm, flow, ldm, ve, vp, vp-cosine, got vpp"),
        (["train", "digits", "--out", "x", "--training.steps", "many"], "--training.steps"),
        (["train", "digits", "--out", "x", "--training.steps", "0"], "training.steps must be at least 1, got 0"),
        (["train", "digits", "--out", "x", "--training.learning-rate", "nan"], "training.learning-rate"),
        (["train", "digits", "--out", "x", "--training.learning-rate", "inf"], "must be a finite number, got inf"),
        (["train", "digits", "--out", "x", "--model.width", "7"], "multiples of 4"),
        (["train", "digits", "--out", "x", "--model.decoder-widths", "32"], "model.decoder-widths"),
        (["train", "digits", "--model.architecture", "multi"], "multistage, separate, unified, got multi;"),
        (["train", "digits", "--out", "x", "--stages.edges", "3", "1"], "stages.edges must be positive and increasing"),
        (["train", "digits", "--out", "x", "--config", "/missing.json"], "/missing.json: no such file"),
        (["train", "digits", "--out", "x", "--stages", "/missing.json"], "/missing.json: no such file"),
        (["train", "digits", "--out", "x", "--threads", "0"], "--threads must be at least 1, got 0"),
        (["train", "digits", "--out", "x", "--device", "abacus"], "--device 'abacus' is not available here"),
        (["profile", "vp-cifar"], 'no preset vp-cifar; did you mean "vp-cifar10"?'),
        (["profile"], "preset, or run directory"),
        (["verify", "/missing"], "/missing is not a run"),
        (["export", "/missing", "--out", "x"], "/missing is not a run"),
        (["export", "/missing"], "--out"),
        (["export", "/missing", "--out", "x", "--weights", "best"], "best"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_with_code_2(words, part, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = ended(words, capsys)
    assert code == 2, err
    assert out == ""
    assert len(err) == 1 and err[0].startswith("error: ")
    assert part.lower() in err[0].lower()
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_source_has_code_3(capsys, tmp_path):
    code, out, err = ended(["train", "digits", "--data.source", "digitz", "--out", str(tmp_path / "run")], capsys)
    assert (code, out) == (3, "")
    assert err[-1].startswith("error: ") and 'did you mean "digits"?' in err[-1]
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_where_it_happened():
    with pytest.raises(Exception, match="no recipe x"):
        dispatch(["train", "x", "--out", "y", "--debug"])


def test_the_overview_lists_every_command(capsys):
    assert ended([], capsys)[0] == 2
    code, out, err = ended(["--help"], capsys)
    assert (code, err) == (0, [])
    assert all(re.search(rf"^  {command} ", out, re.MULTILINE) for command in COMMANDS)
    assert "example: msd" in out


def test_the_version(capsys):
    code, out, _ = ended(["--version"], capsys)
    assert code == 0 and re.fullmatch(r"\d+\.\d+\.\d+\n", out)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example_that_parses(command, capsys):
    import importlib

    from multistage_diffusion.cli import parse

    with pytest.raises(SystemExit) as stop:
        dispatch([command, "--help"])
    assert stop.value.code == 0
    out = re.sub(r"\x1b\[[0-9;]*m|[│╭╮╰╯─]", " ", capsys.readouterr().out)
    example = re.search(rf"[Ee]xample: (msd {command}( [^\n]*)?)", out)
    assert example, out[:500]
    module = importlib.import_module(f"multistage_diffusion.cli.{command}")
    words = example[1].split()[2:]
    options = module.parse(words) if hasattr(module, "parse") else parse(module.Options, command, words)
    assert options.json is False
    assert "--json" in out


def test_help_of_all_commands_is_quick_and_needs_no_torch():
    code = """
import contextlib, io, sys
from multistage_diffusion.cli import COMMANDS, dispatch, main
for command in COMMANDS:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        dispatch([command, "--help"])
    assert "torch" not in sys.modules, command
dispatch(["train", "digits", "--out", "x", "--dry-run", "--json"])
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["data"]["source"] == "digits"


def test_python_m_is_msd():
    done = subprocess.run([sys.executable, "-m", "multistage_diffusion", "trian"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: no command trian")


def test_warnings_are_one_line(capsys, monkeypatch):
    monkeypatch.setattr(warnings, "showwarning", None)
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    warnings.showwarning(UserWarning("a\n b"), UserWarning, "file.py", 7)
    assert capsys.readouterr().err == "warning: a b\n"


@pytest.mark.parametrize(
    "words", ["--help", "train digits --dry-run", "train digits --dry-run --json", "nonsense 2>&1"]
)
def test_a_reader_who_leaves_ends_it_quietly(words):
    command = f"set -o pipefail; {sys.executable} -m multistage_diffusion {words} | (exec 0<&-; sleep 1)"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (141, "")


def test_choices_are_those_that_exist():
    from typing import get_args, get_type_hints

    from multistage_diffusion.cli import cluster
    from multistage_diffusion.noise import SPACINGS, Process, Spacing

    assert get_args(Spacing) == SPACINGS
    assert set(get_args(get_type_hints(cluster.Options)["process"])) <= Process.kinds().keys()


words = st.lists(
    st.one_of(
        st.sampled_from(
            ["train", "digits", "--out", "x", "--training.steps", "-1", "1e3", "--model.width", "--config", "--json",
             "--stages.edges", "--process.kind", "--process", "--data.flip", "--model.attention", "None", "--dry-run",
             "--training.clip-norm", "nan", "=", "--", "--out=", "--training.steps=3", "--config=", "profile", "verify"]
        ),
        st.text(max_size=6),
    ),
    max_size=6,
)  # fmt: skip


@given(words=words)
def test_any_words_end_with_a_code_and_a_line(words, tmp_path_factory):
    import contextlib
    import io

    words = ["train", "digits", "--dry-run", "--out", "x", *words] if len(words) % 2 else words
    if words and words[0] in COMMANDS and "--dry-run" not in words and words[0] not in ("profile", "verify"):
        words = [words[0], *words[1:], "--no-such-option"]  # nothing is to run
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = dispatch(words)
        except SystemExit as stop:
            assert stop.code == 0 and any(word in ("-h", "--help") for word in words)
            return
    assert code in (0, 2)
    if code and words:
        assert err.getvalue().splitlines()[-1].startswith("error: ")
