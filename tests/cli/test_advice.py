"""The line with which a command ends: what comes next."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from multistage_diffusion import cli
from multistage_diffusion.cli.advice import next_step


@pytest.mark.parametrize(
    ("name", "options", "document", "expected"),
    [
        ("data", {"source": "folder:my cats", "convert": None}, {},
         "msd cluster 'folder:my cats' --out stages.json"),
        ("data", {"source": "folder:cats", "convert": "sets/cats"}, {},
         "msd train fashion-mnist --data.source shards:sets/cats --out runs/cats"),
        ("cluster", {"source": "digits", "out": Path("s.json"), "process": "vp"}, {},
         "msd train digits --stages s.json --out runs/digits"),
        ("cluster", {"source": "digits", "out": Path("s.json"), "process": "flow"}, {},
         "msd train digits-flow --stages s.json --out runs/digits"),
        ("cluster", {"source": "zip:a/b.zip", "out": Path("s.json"), "process": "edm"}, {},
         "msd train fashion-mnist --data.source zip:a/b.zip --stages s.json --out runs/b"),
        ("cluster", {"source": "digits", "out": None}, {},
         "the same with --out stages.json, then msd train ... --stages stages.json"),
        ("autoencoder", {"source": "cifar10", "out": "runs/ae"}, {},
         "msd train fashion-mnist-latent --data.source cifar10 --data.autoencoder runs/ae --out runs/latent"),
        ("profile", {"target": "vp-cifar10"}, {}, "msd train vp-cifar10 --out runs/vp-cifar10"),
        ("profile", {"target": "runs/mine"}, {}, None),
        ("train", {}, {"run": "runs/a"}, "msd sample runs/a --out samples; then msd evaluate runs/a"),
        ("train", {"dry_run": True}, {"data": {}}, None),
        ("sample", {"run": "runs/a"}, {"grid": "s/grid.png"}, "open s/grid.png; msd evaluate runs/a"),
        ("evaluate", {"target": "no-such-folder"}, {}, None),
        ("verify", {"run": "runs/a"}, {}, "msd sample runs/a --out samples"),
        ("export", {"out": "a.safetensors"}, {}, "msd sample a.safetensors --out samples"),
        ("merge", {"out": "models/m"}, {}, "msd sample models/m --out samples"),
        ("convert", {"out": "models/m"}, {}, "msd sample models/m --out samples, or msd train ... --init models/m"),
        ("convert", {"out": "models/m"}, {"pipeline": "DDIMPipeline"}, None),  # says how to load it
        ("study", {}, {"report": "runs/study/report.html"}, "open runs/study/report.html"),
        ("demo", {"out": "runs/d"}, {"report": "runs/d/report.html"},
         "open runs/d/report.html; msd serve runs/d/multistage"),
        ("serve", {}, {}, None),
    ],
)  # fmt: skip
def test_what_comes_next(name, options, document, expected):
    assert name in cli.COMMANDS
    assert next_step(name, SimpleNamespace(**options), document) == expected


def test_a_finished_command_says_it_for_people_only(capsys):
    assert cli.dispatch(["profile", "digits"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "next: msd train digits --out runs/digits"
    assert cli.dispatch(["profile", "digits", "--json"]) == 0
    assert "next:" not in capsys.readouterr().out
