"""The notebooks run (slow), cell by cell as Jupyter would, with fewer steps; what they show is drawn."""

import sys
import types
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.py"))
FEWER = {"STEPS = 700": "STEPS = 8", "STEPS = 300": "STEPS = 3", "num_inference_steps=50": "num_inference_steps=2"}


def test_their_sources_are_cells():
    assert [path.stem for path in NOTEBOOKS] == ["first_model", "look_at_stages", "stage_your_model"]
    for path in NOTEBOOKS:
        text = path.read_text()
        assert "formats: py:percent" in text and text.count("\n# %%\n") >= 4
        compile(text, str(path), "exec")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:__array__")  # of diffusers, with numpy 2
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path, monkeypatch):
    import matplotlib

    monkeypatch.setattr(matplotlib, "rcParams", matplotlib.rcParams.copy())
    matplotlib.use("agg")
    if path.stem == "stage_your_model":
        pytest.importorskip("diffusers")
    shown = []
    display = types.ModuleType("IPython.display")  # in place of Jupyter's
    display.display, display.clear_output = (lambda *things: shown.extend(things)), (lambda wait: None)
    display.Image = lambda file: Path(file).read_bytes()
    package = types.ModuleType("IPython")
    package.version_info = (9, 0, 0)  # matplotlib reads it
    package.get_ipython = lambda: None
    monkeypatch.setitem(sys.modules, "IPython", package)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.setenv("MSD_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    text = path.read_text()
    for part, fewer in FEWER.items():
        text = text.replace(part, fewer)
    names = {"__name__": "__main__"}
    for cell in text.split("\n# %%\n")[1:]:
        exec(compile(cell, str(path), "exec"), names)
    if path.stem == "first_model":
        pictures = [thing for thing in shown if isinstance(thing, bytes)]
        assert len(pictures) == 4 and all(picture.startswith(b"\x89PNG") for picture in pictures)
        assert 0 < names["result"].loss < 10
    else:
        assert names["figure"].axes
        names["plt"].close("all")
