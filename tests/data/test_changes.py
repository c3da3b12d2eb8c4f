"""Files that changed since the last look are named, however well they still decode."""

import warnings

import numpy as np
import pytest
from hostile import encoded
from PIL import Image

from multistage_diffusion.cli import dispatch
from multistage_diffusion.data import load_data
from multistage_diffusion.data.collection import Reading
from multistage_diffusion.data.sources import look


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for i in range(20):
        kind = "bmp" if i % 2 else "tif"
        Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{i:02}.{kind}")
    return folder


def changes(folder):
    return look(f"folder:{folder}", "all", None, Reading(max_bad=1.0)).changes


def test_every_flipped_bit_of_every_file_is_reported_by_name(pictures):
    """The decoders of BMP and TIFF notice nothing."""
    assert changes(pictures) is None
    generator = np.random.default_rng(1)
    for path in sorted(pictures.iterdir()):
        content = bytearray(path.read_bytes())
        content[generator.integers(60, len(content))] ^= 1 << generator.integers(8)
        path.write_bytes(content)
        assert changes(pictures) == f"1 changed ({path.name}) since it was looked at"
        assert changes(pictures) is None  # told once


def test_training_is_told_until_somebody_looks(pictures, tmp_path, monkeypatch):
    source = f"folder:{pictures}"
    load_data(source)
    (pictures / "00.tif").write_bytes(encoded("TIFF"))
    load_data(source)  # nobody has looked yet: no record
    assert changes(pictures) is None
    (pictures / "01.bmp").write_bytes(encoded("BMP"))
    (pictures / "02.tif").unlink()
    (pictures / "new\n.png").write_bytes(encoded("PNG"))
    told = r"1 changed \(01\.bmp\), 1 gone \(02\.tif\), 1 new \(new\\n\.png\) since"
    monkeypatch.chdir(tmp_path)
    for words in ({}, {"root": str(tmp_path)}):
        with pytest.warns(UserWarning, match=told):
            load_data("folder:pictures", **words)
    assert dispatch(["data", source]) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_data(source)


def test_many_changes_are_counted(pictures):
    changes(pictures)
    for path in pictures.iterdir():
        path.write_bytes(path.read_bytes() + b"\0")
    assert changes(pictures).startswith("20 changed (00.tif, 01.bmp, 02.tif, 03.bmp, 04.tif, ...)")


def test_a_conversion_looks_too_and_its_record_is_that_of_sha256sum(pictures, tmp_path, capsys):
    words = ["data", f"folder:{pictures}", "--convert", str(tmp_path / "shards"), "--json"]
    assert dispatch(words) == 0
    (record,) = (tmp_path / "cache" / "files").iterdir()
    digest, name = record.read_text().splitlines()[0].split("  ")
    assert (len(digest), name) == (64, "00.tif")
    capsys.readouterr()
    (pictures / "bad.png").write_bytes(b"no")
    assert dispatch(words) == 3  # 1 of 21 is more than the limit of a conversion
    assert "1 of 21 pictures cannot be read" in capsys.readouterr().err
    assert dispatch([*words, "--max-bad", "0.1"]) == 0
    assert dispatch([*words[:2], "--max-bad", "2"]) == 2
