"""Shards: the same images as their source, in memory or not; nothing damaged is read; written whole or not at all."""

import errno
import json
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import tiny
from multistage_diffusion.cli import dispatch
from multistage_diffusion.data import Images, load_data, shards
from multistage_diffusion.data.collection import Collection, Reading
from multistage_diffusion.data.convert import write_images
from multistage_diffusion.data.shards import ShardWriter
from multistage_diffusion.data.sources import convert
from multistage_diffusion.errors import CheckpointError, DataError
from multistage_diffusion.evaluation import held_out_loss
from multistage_diffusion.files import whole_directory

SPLITS = ("train", "test", "all")


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(shards, "_SHARD_BYTES", 1000)  # fifteen grey pictures of 8 x 8


@pytest.fixture
def pictures(tmp_path):
    """Forty pictures of two classes, the first twenty grey."""
    generator = np.random.default_rng(0)
    for i in range(40):
        (tmp_path / "pictures" / "ab"[i // 20]).mkdir(parents=True, exist_ok=True)
        shape = (8, 8) if i < 20 else (8, 8, 3)
        pixels = generator.integers(0, 256, shape, dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pictures" / "ab"[i // 20] / f"{i:02}.png")
    return f"folder:{tmp_path / 'pictures'}"


@pytest.fixture
def written(pictures, tmp_path):
    convert(pictures, tmp_path / "shards", None, Reading())
    return tmp_path / "shards"


def same(first, second):
    assert torch.equal(first.pixels(), second.pixels())
    assert (first.labels is None) == (second.labels is None)
    assert first.labels is None or torch.equal(first.labels, second.labels)
    assert (first.classes, first.skipped, first.shape) == (second.classes, second.skipped, second.shape)
    assert first.digest == second.digest


@pytest.mark.parametrize("split", SPLITS)
def test_a_folder_and_its_shards_are_the_same_set(split, pictures, written):
    first, second = load_data(pictures, split=split), load_data(f"shards:{written}", split=split)
    same(first, second)
    assert len(list(written.glob("shard-*.bin"))) == 3
    assert isinstance(second.images, shards.Shards)
    index = torch.randint(0, len(first), (50,), generator=torch.Generator().manual_seed(0))
    assert torch.equal(second.floats(index), first.floats(index))
    same(second.take(index), first.take(index))
    assert torch.equal(second.images[3:7], first.images[3:7])


def test_every_kind_of_source_is_converted(fashion, tmp_path):
    sources = [("digits", None), ("fashion-mnist", str(fashion))]
    np.savez(tmp_path / "a.npz", images=np.random.default_rng(0).integers(0, 256, (20, 8, 8), dtype=np.uint8))
    for source, root in [*sources, (f"npz:{tmp_path}/a.npz", None), (f"shards:{tmp_path}/digits", None)]:
        folder = tmp_path / source.partition(":")[0]
        convert(source, folder, root, Reading())
        for split in SPLITS:
            same(load_data(source, split=split, root=root), load_data(f"shards:{folder}", split=split))


def test_shards_have_the_size_they_were_written_with(pictures, tmp_path):
    convert(pictures, tmp_path / "six", None, Reading(resolution=6))
    convert("digits", tmp_path / "digits", None, Reading(resolution=6))
    same(load_data(pictures, resolution=6), load_data(f"shards:{tmp_path}/six", resolution=6))
    same(load_data("digits", resolution=6), load_data(f"shards:{tmp_path}/digits"))
    with pytest.raises(DataError, match=r"holds images of 6 x 6.*again with the resolution 8"):
        load_data(f"shards:{tmp_path}/six", resolution=8)


def test_bad_pictures_are_left_out_or_refused(pictures, tmp_path):
    (tmp_path / "pictures" / "a" / "bad.png").write_bytes(b"no")
    with pytest.raises(DataError, match=r"a/bad\.png"):
        convert(pictures, tmp_path / "shards", None, Reading())
    assert not (tmp_path / "shards").exists()
    convert(pictures, tmp_path / "shards", None, Reading(max_bad=0.1))
    read = load_data(f"shards:{tmp_path}/shards")
    same(load_data(pictures, max_bad=0.1), read)
    assert read.skipped[0].startswith("a/bad.png: not a picture")


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 16
    path.write_bytes(bytes(content))


def test_every_flipped_bit_of_a_shard_is_noticed_when_its_image_is_read(written):
    chance = np.random.default_rng(0)
    whole = load_data(f"shards:{written}", split="all")
    for _ in range(40):
        path = chance.choice(sorted(written.glob("shard-*.bin")))
        at = int(chance.integers(path.stat().st_size))
        flip(path, at)
        number = int(path.stem[-5:]) * 15 + at // 192  # the colour ones came later
        read = load_data(f"shards:{written}", split="all")
        row = whole.images._chosen.tolist().index(number)
        others = torch.tensor([place for place in range(40) if place != row])
        assert torch.equal(read.images[others], whole.images[others])
        with pytest.raises(DataError, match=rf"{path.name}: row {at // 192} is damaged"):
            read.floats(torch.tensor([row]))
        flip(path, at)
    assert whole.pixels().shape == (40, 3, 8, 8)


def test_files_that_are_cut_off_lost_or_fail_after_they_were_opened_are_named(written, monkeypatch):
    """Files are read, not mapped: what a disk fails to give is an error with a name, where a map would be a signal."""
    read = load_data(f"shards:{written}", split="all")
    path = written / "shard-00001.bin"
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(DataError, match=r"shard-00001\.bin: cut off; delete"):
        read.pixels()
    path.unlink()
    with pytest.raises(DataError, match=r"shard-00001\.bin: cannot be read \(No such file"):
        read.pixels()

    def fail(*words):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(DataError, match=r"shard-00000\.bin: cannot be read \(Input/output error\)"):
        read.pixels(torch.arange(3))


@pytest.mark.parametrize(
    "name", ["digests.bin", "index.json", "images.json", "labels.bin", "test.bin", "shard-00001.bin"]
)
@pytest.mark.parametrize("damage", ["flip", "cut", "lose"])
def test_damage_beside_the_pixels_is_noticed_at_once(name, damage, written):
    path = written / name
    if damage == "flip":
        if name.startswith("shard"):
            return
        flip(path, path.stat().st_size // 2)
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.unlink()
    with pytest.raises(DataError) as caught:
        load_data(f"shards:{written}")
    assert "\n" not in str(caught.value)
    assert path.name in str(caught.value) or name == "index.json"


@pytest.mark.parametrize(
    "changes",
    [
        {"rows": 10**15}, {"rows": -1}, {"rows": 39.0}, {"rows": True}, {"shape": [3, 8]}, {"shape": [3, 8, 2**40]},
        {"rows_per_shard": 0}, {"dtype": "object"}, {"format": "pickle"}, {"about": []}, {"shape": {}},
    ],
)  # fmt: skip
def test_an_index_that_makes_no_sense_is_refused(changes, written):
    index = json.loads((written / "index.json").read_text())
    with whole_directory(written, replace=True) as folder:  # with a manifest that is right
        shutil.copytree(written, folder, dirs_exist_ok=True)
        (folder / "manifest.json").unlink()
        (folder / "index.json").write_text(json.dumps({**index, **changes}))
    with pytest.raises(DataError, match=r"index\.json|instead of"):
        load_data(f"shards:{written}")


def test_what_is_not_a_folder_of_shards_is_refused(tmp_path, pictures):
    for path in (tmp_path / "nothing", tmp_path / "pictures"):
        with pytest.raises(DataError, match="not a folder of shards; msd data SOURCE --convert"):
            load_data(f"shards:{path}")
    with pytest.raises(CheckpointError, match="which would be lost"):
        convert(pictures, tmp_path / "pictures", None, Reading())


def test_converting_again_replaces_what_a_conversion_wrote(written, pictures):
    convert("digits", written, None, Reading())
    same(load_data(f"shards:{written}"), load_data("digits"))


def test_a_disk_without_room_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shards.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 100))
    with pytest.raises(
        CheckpointError, match=r"cannot write .*/digits: 143760 bytes are needed and 100 are free; free"
    ):
        convert("digits", tmp_path / "digits", None, Reading())
    assert not [path for path in tmp_path.iterdir() if "digits" in path.name]


def test_what_a_killed_conversion_left_is_cleared_away(written, pictures):
    alive, dead = written.parent / ".shards.1.tmp", written.parent / ".shards.4194303.tmp"
    for path in (alive, dead):
        path.mkdir()
    convert(pictures, written, None, Reading())
    assert alive.exists() and not dead.exists()


def test_rows_of_floats(tmp_path):
    rows = torch.randn(23, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    writer = ShardWriter(tmp_path)
    for part in rows.split(9):
        writer.add(part)
    stored = writer.finish()
    assert torch.equal(stored[:], rows) and torch.equal(stored.to("cpu"), rows)
    assert stored.nbytes == rows.nbytes and len(list(tmp_path.glob("shard-*.bin"))) == 4


def test_images_in_memory_are_written_without_labels(tmp_path):
    images = tiny.images(7)
    with whole_directory(tmp_path / "shards") as folder:
        writer = ShardWriter(folder)
        write_images(Collection(images, torch.arange(7) == 3), folder, writer)
    read = load_data(f"shards:{tmp_path}/shards")
    same(read, images.take(torch.tensor([0, 1, 2, 4, 5, 6])))
    assert isinstance(read, Images) and read.labels is None


def test_stages_found_in_shards_are_those_of_their_source(tmp_path, capsys):
    assert dispatch(["data", "digits", "--convert", str(tmp_path / "digits")]) == 0
    found = []
    for source in ("digits", f"shards:{tmp_path / 'digits'}"):
        capsys.readouterr()
        words = ["cluster", source, "--objective", "variance", "--samples", "200", "--process", "vp", "--json"]
        assert dispatch(words) == 0
        found.append(json.loads(capsys.readouterr().out)["edges"])
    assert found[0] == found[1] and len(found[0]) == 2


def test_a_held_out_loss_on_shards_is_that_on_their_source(tmp_path):
    convert("digits", tmp_path / "digits", None, Reading())
    denoiser, figures = tiny.denoiser(), []
    for source in ("digits", f"shards:{tmp_path / 'digits'}"):
        held = held_out_loss(denoiser, load_data(source, split="test"), max_images=64)
        figures.append(held.loss)
    assert figures[0] == figures[1]
