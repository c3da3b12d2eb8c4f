"""Sources by name: digits, the idx sets, their splits, unknown names."""

import pytest
import torch

from multistage_diffusion.data import load_data
from multistage_diffusion.errors import DataError


@pytest.mark.parametrize(
    ("name", "message"),
    [("digit", 'did you mean "digits"'), ("fashion_mnist", 'did you mean "fashion-mnist"'), ("", "known: ")],
)
def test_an_unknown_source_names_the_nearest(name, message):
    with pytest.raises(DataError, match=message):
        load_data(name)


def test_whoever_names_a_path_alone_is_told_what_to_write(tmp_path):
    for name, meant in (("photos", "folder"), ("a.zip", "zip"), ("a.npz", "npz"), ("a.tar", "webdataset")):
        path = tmp_path / name
        path.mkdir() if meant == "folder" else path.write_bytes(b"")
        with pytest.raises(DataError, match=f'did you mean "{meant}:{name}"'):
            load_data(name, root=str(tmp_path))
    (tmp_path / "photos" / "index.json").write_text("{}")
    with pytest.raises(DataError, match='did you mean "shards:'):
        load_data(str(tmp_path / "photos"))


@pytest.mark.parametrize("kind", ["folder", "zip", "npz", "shards", "webdataset", "hf"])
def test_names_that_no_file_has_are_refused(kind):
    for name, message in (
        ("x" * 300, "the name is too long"),
        ("x/" * 3000, "the name is too long"),
        ("a\0b", "no file has"),
    ):
        with pytest.raises(DataError, match=message) as caught:
            load_data(f"{kind}:{name}")
        assert len(str(caught.value)) < 100
    with pytest.raises(DataError, match="the name is too long"):
        load_data("mnist", root="x" * 300)


def test_digits_split_is_whole_fixed_and_stratified():
    train, test, both = (load_data("digits", split=split) for split in ("train", "test", "all"))
    assert (len(train), len(test), len(both)) == (1297, 500, 1797)
    assert train.shape == (1, 8, 8) and len(train.classes) == 10
    assert torch.equal(both.images, torch.cat((train.images, test.images)))
    assert torch.equal(both.labels, torch.cat((train.labels, test.labels)))
    share = test.labels.bincount() / both.labels.bincount()
    assert (share - 500 / 1797).abs().max() < 0.01
    assert (both.images.min(), both.images.max()) == (0, 255)
    assert len(both.images.unique()) == 17
    assert load_data("digits").digest == train.digest


def test_resolution_is_applied_only_when_asked():
    assert load_data("digits", resolution=8).digest == load_data("digits").digest
    assert load_data("digits", resolution=16).shape == (1, 16, 16)
    with pytest.raises(DataError, match="resolution must lie in"):
        load_data("digits", resolution=0)


def test_fashion_mnist_from_a_folder_then_from_the_cache(fashion, tmp_path):
    train = load_data("fashion-mnist", root=str(fashion))
    test = load_data("fashion-mnist", split="test", root=str(fashion))
    both = load_data("fashion-mnist", split="all", root=str(fashion))
    assert (len(train), len(test), len(both)) == (30, 10, 40)
    assert train.shape == (1, 28, 28) and train.classes[9] == "Ankle boot"
    assert train.labels.tolist()[:3] == [0, 1, 2]
    assert torch.equal(both.images[30:], test.images)
    (tmp_path / "cache").mkdir()
    fashion.rename(tmp_path / "cache" / "mnist")
    assert torch.equal(load_data("mnist").images, train.images)


def test_missing_files_name_the_three_places(tmp_path, monkeypatch):
    monkeypatch.setattr("multistage_diffusion.data.idx._DEBIAN", tmp_path / "share")
    with pytest.raises(DataError) as caught:
        load_data("fashion-mnist", root=str(tmp_path / "mine"))
    message = str(caught.value)
    for part in ("mine", "share/fashion-mnist", "cache/fashion-mnist", "apt-get install dataset-fashion-mnist"):
        assert part in message
    assert "\n" not in message
