"""Graphs of stages: what they compute, what says which serves which sigma, and a denoiser at a fixed sigma."""

import importlib.util
import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import tiny
from multistage_diffusion.cli import dispatch
from multistage_diffusion.denoiser import Denoiser
from multistage_diffusion.errors import ConfigError
from multistage_diffusion.files import sha256
from multistage_diffusion.interop.graphs import GRAPHS, save_graphs
from multistage_diffusion.noise import EDM, LDM, VE, VP, Cosine, Flow
from multistage_diffusion.runs import load_run
from multistage_diffusion.training.run import train

HAS_ONNX = all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime"))
PROCESSES = (VP(), Cosine(), LDM(), EDM(), VE(), Flow())
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore::FutureWarning:torch")
USE = """
import json, sys, torch
sys.modules["multistage_diffusion"] = None
folder = sys.argv[1]
about = json.load(open(folder + "/graphs.json"))
x, sigmas, labels, expected = torch.load(sys.argv[2])
for sigma, wanted in zip(sigmas, expected):
    entry = next(e for e in about["stages"] if e["above"] < sigma and (e["up_to"] is None or sigma <= e["up_to"]))
    graph = torch.export.load(folder + "/" + entry["file"]).module()
    output = graph(x, torch.full((len(x),), sigma), *labels)
    assert float((output - wanted).abs().max()) <= 1e-4 * float(wanted.abs().max()), sigma
"""


class Small(torch.nn.Module):
    """A network that is traced in a moment."""

    def __init__(self):
        super().__init__()
        self.out = torch.nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x, c_noise):
        return self.out(x) * torch.tanh(c_noise)[:, None, None, None]  # of the size of the images for every process


@pytest.mark.parametrize("process", [VP(), LDM(), EDM()], ids=lambda process: process.kind)
def test_a_small_network_is_a_graph(process, tmp_path):
    denoiser, x = Denoiser(Small(), process, shape=tiny.SHAPE), torch.randn(2, *tiny.SHAPE)
    program = torch.export.export(denoiser, (x, 0.8))
    torch.testing.assert_close(program.module()(x, 0.8), denoiser(x, 0.8))
    (graph,) = save_graphs(denoiser, tmp_path / "out")
    assert (graph.above, graph.up_to, graph.file) == (0.0, None, "stage-0.pt2") and graph.max_error < 1e-6
    written = torch.export.load(str(tmp_path / "out" / graph.file)).module()
    torch.testing.assert_close(written(x, torch.full((2,), 0.8)), denoiser(x, 0.8))


@pytest.mark.slow
@pytest.mark.parametrize("process", PROCESSES, ids=lambda process: process.kind)
def test_a_denoiser_at_a_fixed_sigma_is_a_graph(process):
    denoiser = tiny.denoiser(replace(tiny.SMALLEST, classes=2), process)
    x, labels = torch.randn(2, *tiny.SHAPE), torch.tensor([0, 2])
    program = torch.export.export(denoiser, (x, 0.8, labels))
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x, 0.8, labels), denoiser(x, 0.8, labels))
    used = {name for name, _ in program.named_parameters() if "decoders" in name}
    assert any(tensor.is_leaf for tensor in denoiser.parameters()) and used
    denoiser(x, torch.tensor([0.5, 2.0]))  # and the trace leaves nothing behind


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(tiny.run_config(steps=2), folder, data=tiny.images())
    return folder


def document(words, capsys):
    assert dispatch([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.slow
def test_one_stage_is_written_and_described(run, tmp_path, capsys):
    out = tmp_path / "graphs"
    told = document(["export", str(run), "--format", "torch-export", "--stage", "1", "--out", str(out)], capsys)
    about = json.loads((out / GRAPHS).read_text())
    (entry,) = about["stages"]
    assert told["stages"] == [entry] and told["step"] == about["step"] == 2
    assert (entry["stage"], entry["above"], entry["up_to"], entry["file"]) == (1, 0.6, 3.0, "stage-1.pt2")
    assert entry["max_error"] < 1e-5 and entry["sha256"] == sha256(out / "stage-1.pt2")
    assert about["edges"] == list(tiny.EDGES) and about["inputs"]["x"] == ["float32", ["batch", *tiny.SHAPE]]
    program = torch.export.load(str(out / "stage-1.pt2"))
    names = [name for name, _ in program.named_parameters()]
    assert any("encoders" in name for name in names) and not any("decoders.1" in name for name in names)
    denoiser, x = load_run(run).denoiser, torch.randn(2, *tiny.SHAPE)
    with torch.no_grad():
        ours = denoiser(x, 2.0)
        torch.testing.assert_close(program.module()(x, torch.full((2,), 2.0)), ours, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["multistage", "separate", "unified"])
@pytest.mark.parametrize("process", PROCESSES, ids=lambda process: process.kind)
def test_graphs_run_without_this_package_and_serve_their_sigmas(process, architecture, tmp_path):
    widths = (8,) if architecture == "unified" else tiny.SMALLEST.decoder_widths
    model = replace(tiny.SMALLEST, classes=2, architecture=architecture, decoder_widths=widths)
    denoiser = tiny.denoiser(model, process)
    graphs = save_graphs(denoiser, tmp_path / "out")
    assert [graph.stage for graph in graphs] == list(range(len(denoiser.stages)))
    assert all(graph.max_error < 1e-4 for graph in graphs)
    x, labels, sigmas = torch.randn(4, *tiny.SHAPE), torch.tensor([0, 1, 2, 1]), [0.1, 0.6, math.nextafter(0.6, 1), 3.0]
    with torch.no_grad():
        expected = [denoiser(x, sigma, labels) for sigma in (*sigmas, 9.0)]
    torch.save((x, [*sigmas, 9.0], (labels,), expected), tmp_path / "wanted.pt")
    words = [sys.executable, "-c", USE, str(tmp_path / "out"), str(tmp_path / "wanted.pt")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-800:]


@pytest.mark.slow
@pytest.mark.skipif(not HAS_ONNX, reason="onnx, onnxscript and onnxruntime are not installed")
@pytest.mark.parametrize("process", PROCESSES, ids=lambda process: process.kind)
def test_onnx_graphs_compute_the_same(process, tmp_path):
    import onnxruntime

    denoiser = tiny.denoiser(replace(tiny.MODEL, classes=2), process)
    save_graphs(denoiser, tmp_path / "out", format="onnx", stages=[1])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [GRAPHS, "manifest.json", "stage-1.onnx"]
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "stage-1.onnx"), providers=["CPUExecutionProvider"])
    x, labels = torch.randn(7, *tiny.SHAPE), torch.arange(7) % 3
    feed = {"x": x.numpy(), "sigma": torch.full((7,), 2.0).numpy(), "labels": labels.numpy()}
    with torch.no_grad():
        expected = denoiser(x, 2.0, labels)
    torch.testing.assert_close(torch.from_numpy(session.run(None, feed)[0]), expected, atol=1e-4, rtol=1e-4)


def test_without_the_packages_of_onnx_one_line_names_them(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert dispatch(["export", str(run), "--format", "onnx", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "pip install multistage-diffusion[onnx]" in error and "onnxruntime" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--format", "torch-export", "--stage", "3"], "stage must be all or in 0..2, got 3"),
        (["--format", "torch-export", "--stage", "-1"], "stage must be all or the number of a stage"),
        (["--format", "torch-export", "--stage", "first"], "stage must be all or the number of a stage"),
        (["--stage", "0"], "stage must be used with --format torch-export or onnx"),
        (["--format", "pickle"], "must be one of"),
    ],
)
def test_mistakes_are_one_line(run, tmp_path, capsys, words, message):
    assert dispatch(["export", str(run), "--out", str(tmp_path / "out"), *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_folder_with_something_else_is_not_replaced(run, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    assert dispatch(["export", str(run), "--format", "torch-export", "--stage", "0", "--out", str(tmp_path)]) == 5
    assert (tmp_path / "mine.txt").read_text() == "mine" and "choose another folder" in capsys.readouterr().err


def test_what_cannot_be_traced_is_said(tmp_path):
    class Deciding(torch.nn.Module):
        def forward(self, x, c_noise):
            return x if float(x.sum()) > 0 else -x

    with pytest.raises(ConfigError, match=r"cannot be traced by torch\.export: .*nothing was written") as caught:
        save_graphs(Denoiser(Deciding(), EDM(), shape=tiny.SHAPE), tmp_path / "out")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
