"""A labelled set that is permuted, renamed and thinned keeps its labels in every source, or is refused."""

import io
import json
import tarfile
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from multistage_diffusion.data import load_data
from multistage_diffusion.data.collection import Reading
from multistage_diffusion.data.sources import convert
from multistage_diffusion.errors import DataError

NAMES = ("3", "10", "7", "0")  # as folders, in .cls files and in dataset.json alike


def pixels(number):
    return np.random.default_rng(number).integers(0, 256, (4, 4), dtype=np.uint8)


def png(number):
    buffer = io.BytesIO()
    Image.fromarray(pixels(number)).save(buffer, "PNG")
    return buffer.getvalue()


@st.composite
def labelled(draw):
    """Pictures by number, in an order, each with a file name and the name of its class or none."""
    numbers = draw(st.lists(st.integers(0, 30), min_size=2, max_size=9, unique=True))
    classes = draw(st.lists(st.sampled_from(NAMES), min_size=len(numbers), max_size=len(numbers)))
    without = draw(st.sets(st.sampled_from(numbers), max_size=2)) if draw(st.booleans()) else set()
    stems = draw(st.permutations([f"p{i}" for i in range(len(numbers))]))
    return [
        (number, stem, None if number in without else name)
        for number, stem, name in zip(numbers, stems, classes, strict=True)
    ]


def folder(path, rows, prefix=""):
    for number, stem, name in rows:
        place = path / "f" / prefix / (name or "")
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{stem}.png").write_bytes(png(number))
    return f"folder:{path}/f"


def nested(path, rows):
    return folder(path, rows, "all/train")


def table(path, rows):
    listed = "".join(f"{stem}.png,{name or ''}\n" for _, stem, name in rows)
    source = folder(path, [(number, stem, None) for number, stem, _ in rows])
    (path / "f" / "metadata.csv").write_text("file_name,label\n" + listed)
    return source


def edm(path, rows):
    with zipfile.ZipFile(path / "a.zip", "w") as archive:
        for number, stem, _ in rows:
            archive.writestr(f"{stem}.png", png(number))
        labels = [[f"{stem}.png", int(name)] for _, stem, name in rows if name is not None]
        archive.writestr("dataset.json", json.dumps({"labels": labels}))
    return f"zip:{path}/a.zip"


def tar(path, rows):
    with tarfile.open(path / "a.tar", "w") as archive:
        for number, stem, name in rows:
            for ending, content in (("png", png(number)), ("cls", None if name is None else name.encode())):
                if content is not None:
                    info = tarfile.TarInfo(f"v1.{stem}.{ending}")
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
    return f"webdataset:{path}/a.tar"


def npz(path, rows):
    labels = np.array([-1 if name is None else int(name) for *_, name in rows])
    np.savez(path / "a.npz", images=np.stack([pixels(number) for number, *_ in rows])[:, None], labels=labels)
    return f"npz:{path}/a.npz"


def named(path, rows):
    labels = np.array([name or "" for *_, name in rows])
    np.savez(path / "a.npz", x=np.stack([pixels(number) for number, *_ in rows])[:, None], y=labels)
    return f"npz:{path}/a.npz"


def shards(path, rows):
    convert(npz(path, rows), path / "shards", None, Reading())
    return f"shards:{path}/shards"


def parquet(path, rows):
    datasets = pytest.importorskip("datasets")
    kinds = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    labels = [None if name is None else int(name) for *_, name in rows]
    pictures = [Image.fromarray(pixels(number)) for number, *_ in rows]
    (path / "p").mkdir()
    datasets.Dataset.from_dict({"image": pictures, "label": labels}, features=kinds).to_parquet(f"{path}/p/a.parquet")
    return f"hf:{path}/p"


@pytest.mark.parametrize("write", [folder, nested, table, edm, tar, npz, named, shards, parquet])
@given(rows=labelled())
def test_labels_are_kept_or_refused(write, rows):
    whole = {pixels(number).tobytes(): name for number, _, name in rows}
    missing = None in whole.values()
    with tempfile.TemporaryDirectory() as path:
        try:
            images = load_data(write(Path(path), rows), split="all")
        except DataError as error:
            assert missing and ("label" in str(error)), str(error)
            return
        assert len(images) == len(rows)
        if images.labels is None:  # nothing is labelled, or folders do not tell a class from a folder around all
            assert images.notes["labels"].startswith("none: ") and len(set(whole.values()) - {None}) < 2
            return
        kept = {
            row.numpy().tobytes(): images.classes[label]
            for row, label in zip(images.stored(), images.labels, strict=True)
        }
        assert kept == whole and list(images.classes) == sorted(set(whole.values()), key=int)
