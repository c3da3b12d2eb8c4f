"""`msd data`: its JSON, its grid, its errors."""

import json

import pytest
from PIL import Image

from multistage_diffusion.cli import dispatch


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MSD_CACHE", str(tmp_path / "cache"))


def test_json_stands_alone_on_stdout(capsys):
    assert dispatch(["data", "digits", "--split", "test", "--json"]) == 0
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert document["images"] == 500
    assert document["shape"] == [1, 8, 8]
    assert document["classes"] == list("0123456789")
    assert sum(document["images_per_class"]) == 500
    assert document["skipped"] == []
    assert document["range"] == [0, 255]
    assert document["dtype"] == "uint8"
    assert len(document["digest"]) == 64
    assert -1 < document["mean"] < 0 < document["std"] < 1
    assert "500 images" in err


def test_grid_is_a_picture(tmp_path, capsys):
    file = tmp_path / "new" / "grid.png"
    assert dispatch(["data", "digits", "--resolution", "16", "--grid", str(file)]) == 0
    assert "1,297 images" in capsys.readouterr().out
    with Image.open(file) as picture:
        assert picture.mode == "L"
        assert picture.size == (8 * 50, 8 * 50)


@pytest.mark.parametrize(
    ("words", "code", "part"),
    [
        (["digitz"], 3, 'did you mean "digits"'),
        (["digits", "--resolution", "2"], 3, "resolution must lie in 4..4096"),
        (["digits", "--grid", "grid.jpg"], 2, ".png"),
        (["digits", "--split", "val"], 2, "split"),
        ([], 2, "SOURCE"),
    ],
)
def test_errors_are_one_line_with_the_right_code(words, code, part, capsys):
    assert dispatch(["data", *words]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and err.count("\n") == 1
    assert part.lower() in err.lower()
