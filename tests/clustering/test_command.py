import itertools
import json
from dataclasses import replace

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from PIL import Image

from multistage_diffusion.cli import dispatch
from multistage_diffusion.clustering import cluster, plots
from multistage_diffusion.config import ModelConfig
from multistage_diffusion.data import load_data
from multistage_diffusion.data.pictures import STAGE_COLOURS
from multistage_diffusion.denoiser import Denoiser
from multistage_diffusion.noise import VP
from multistage_diffusion.stages import Stages

NEEDS_EXACT = "error: --{} needs --method optimal-denoiser"
SHAPE, STAGES = (1, 8, 8), Stages((0.6, 3.0))
SMALLEST = ModelConfig(width=8, decoder_widths=(8, 8, 4), multipliers=(1,), blocks=1, attention=(), dropout=0.0)


def test_one_json_document_with_edges_files_and_plots(tmp_path, capsys):
    words = ["digits", "--process", "edm", "--samples", "1000", "--json"]
    files = ["--out", str(tmp_path / "stages.json"), "--plot", str(tmp_path / "curves.png")]
    assert dispatch(["cluster", *words, *files]) == 0
    document = json.loads(capsys.readouterr().out)
    assert {"edges", "edges_t", "method", "process", "seconds", "intervals"} <= document.keys()
    assert Stages.load(tmp_path / "stages.json").edges == tuple(document["edges"])
    assert (tmp_path / "curves.png").stat().st_size > 5000
    assert document["effective_images"][0]["images"] == pytest.approx(1, abs=0.1)


@pytest.mark.slow
def test_a_strip_of_what_the_optimal_denoiser_sees(tmp_path):
    assert dispatch(["cluster", "digits", "--samples", "1000", "--strip", str(tmp_path / "strip.svg")]) == 0
    assert (tmp_path / "strip.svg").stat().st_size > 5000


@pytest.mark.slow
def test_gradients_of_a_short_run_and_of_a_unified_run(tmp_path, capsys):
    words = ["digits", "--method", "gradient", "--samples", "200", "--json"]
    assert dispatch(["cluster", *words, "--proxy-steps", "2"]) == 0
    assert len(json.loads(capsys.readouterr().out)["edges"]) == 2
    Denoiser.from_backbone(SMALLEST, "vp", SHAPE, STAGES).save_pretrained(tmp_path / "staged")
    assert dispatch(["cluster", *words, "--run", str(tmp_path / "staged")]) == 2
    assert "run must be a unified run" in capsys.readouterr().err
    run = tmp_path / "unified"
    Denoiser.from_backbone(replace(SMALLEST, architecture="unified"), "vp", SHAPE).save_pretrained(run)
    assert dispatch(["cluster", *words, "--run", str(run)]) == 0
    assert dispatch(["cluster", *words, "--run", str(run), "--process", "edm"]) == 2
    assert dispatch(["cluster", *words, "--run", str(tmp_path / "nothing")]) == 2
    (run / "model.safetensors").write_bytes(b"cut")
    assert dispatch(["cluster", *words, "--run", str(run)]) == 5
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")


def test_a_matrix_is_drawn_with_its_elbow(tmp_path, capsys):
    words = ["digits", "--stages", "4", "--samples", "1000", "--plot", str(tmp_path / "matrix.png"), "--json"]
    assert dispatch(["cluster", *words]) == 0
    document = json.loads(capsys.readouterr().out)
    assert len(document["edges"]) == 3
    assert len(document["elbow"]) == 8
    assert (tmp_path / "matrix.png").stat().st_size > 5000


def test_the_table_names_edges_and_shares(capsys):
    assert dispatch(["cluster", "digits", "--method", "snr"]) == 0
    shown = capsys.readouterr().out
    assert "1.5519" in shown
    assert "training draws in each stage" in shown


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["digits", "--alpha", "1.5"], 2, "error: alpha must be between 0 and 1, got 1.5"),
        (["digits", "--process", "edn"], 2, "error: --process must be one of edm, flow, ldm"),
        (
            ["digits", "--method", "snr", "--by-class"],
            2,
            "error: --by-class needs --method optimal-denoiser; it is snr",
        ),
        (
            ["digits", "--method", "snr", "--plot", "x.png"],
            2,
            "error: --plot needs --method optimal-denoiser; it is snr",
        ),
        (["digits", "--samples", "500", "--plot", "x.gif9"], 2, "error: x.gif9: a plot's name must end in"),
        (["digits", "--run", "runs/x"], 2, "error: --run needs --method gradient; it is optimal-denoiser"),
        (["digits", "--paper", "--eta", "0.1"], 2, "error: --paper needs --eta 0.0078125; it is 0.1"),
        (
            ["digits", "--allocate", "1", "--process", "edm"],
            2,
            "error: --allocate needs --process vp, that of the reci",
        ),
        (["digits", "--stages", "4", "--objective", "crossing"], 2, "error: the objective crossing finds 3 stages"),
        (["nowhere"], 3, "error: "),
    ],
)
def test_bad_input_is_one_line(words, code, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert dispatch(["cluster", *words]) == code
    assert capsys.readouterr().err.splitlines()[-1].startswith(message)


def test_bad_pictures_are_refused_or_left_out_as_in_training(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MSD_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, pixels in enumerate(load_data("digits").pixels(torch.arange(40))[:, 0].numpy()):
        Image.fromarray(pixels).save(folder / f"{i:02}.png")
    words = [f"folder:{folder}", "--method", "snr", "--json"]
    assert dispatch(["cluster", *words]) == 0
    edges = json.loads(capsys.readouterr().out)["edges"]
    (folder / "bad.png").write_bytes(b"no")
    assert dispatch(["cluster", *words]) == 3
    line = capsys.readouterr().err.splitlines()[-1]
    assert "bad.png: not a picture" in line and line.endswith("leave it out (on-bad-file skip)")
    assert dispatch(["cluster", *words, "--on-bad-file", "skip"]) == 3
    line = capsys.readouterr().err.splitlines()[-1]
    assert "1 of 41 pictures cannot be read" in line and line.endswith("or raise max-bad (now 0.01)")
    with pytest.warns(UserWarning, match=r"left out: bad\.png: not a picture"):
        assert dispatch(["cluster", *words, "--on-bad-file", "skip", "--max-bad", "0.1"]) == 0
    assert json.loads(capsys.readouterr().out)["edges"] == edges
    assert dispatch(["cluster", *words, "--max-bad", "1.5"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "error: max-bad must be in [0, 1), got 1.5"


def test_stages_and_the_intervals_of_their_edges_are_bands():
    """Stages have the colours of every other picture; an edge lies in its grey band."""
    images = load_data("digits")
    found = cluster(images.floats(), VP(), samples=1000, resamples=50)
    axes = plots.similarity_figure(found).axes[0]
    bands = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    colours = [to_hex(band.get_facecolor()).upper() for band in bands]
    assert colours == [*STAGE_COLOURS[:3], "#808080", "#808080"]
    assert len(set(STAGE_COLOURS)) == 8
    clock = VP().t(torch.tensor([VP().sigma_min, *found.stages.edges, VP().sigma_max], dtype=torch.float64))
    shares = ((clock - clock[0]) / (clock[-1] - clock[0])).tolist()[1:-1]
    assert all(band.get_x() < share < band.get_x() + band.get_width() < share + 0.1
               for band, share in zip(bands[3:], shares, strict=True))  # fmt: skip
    assert axes.get_ylabel() == "share of entries within eta = 2/256"


def test_labels_of_a_matrix_do_not_touch():
    """Edges near one another have their labels at two distances; nothing that is written lies on anything else."""
    found = cluster(load_data("digits").floats(), VP(), stages=6, samples=500, resamples=0)
    figure = plots.similarity_figure(found)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    boxes = [text.get_window_extent(renderer) for text in texts]
    for (one, box), (other, beside) in itertools.combinations(zip(texts, boxes, strict=True), 2):
        moved = one.get_text() != one.get_text().strip() or other.get_text() != other.get_text().strip()
        assert moved or not box.overlaps(beside), (one.get_text(), other.get_text())
