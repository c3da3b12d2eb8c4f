"""Sums of features, and the cache of the reference's."""

import pytest
import torch

import tiny
from multistage_diffusion.data import Images
from multistage_diffusion.metrics.classifier import Classifier
from multistage_diffusion.metrics.statistics import reference_statistics


@pytest.fixture
def extractor():
    return Classifier("untrained", tiny.SHAPE, ("a", "b", "c"), 0.5).eval()


def counted(extractor, monkeypatch):
    """How many images the extractor sees from now on."""
    seen, extract = [0], extractor.extract

    def count(x):
        seen[0] += len(x)
        return extract(x)

    monkeypatch.setattr(extractor, "extract", count)
    return seen


def test_sums_give_mean_and_covariance(extractor, tmp_path):
    data = tiny.images(70)
    statistics = reference_statistics(extractor, data, keep=True, batch_size=9, cache=tmp_path)
    features = extractor(data.floats()).features.double()
    torch.testing.assert_close(statistics.mean(), features.mean(0), atol=1e-6, rtol=0)
    torch.testing.assert_close(statistics.covariance(), features.T.cov(), atol=1e-6, rtol=0)
    torch.testing.assert_close(statistics.features, features.float(), atol=3e-5, rtol=0)


def test_the_cache_is_used_for_the_same_content(extractor, tmp_path, monkeypatch):
    data = tiny.images(30)
    first = reference_statistics(extractor, data, cache=tmp_path)
    seen = counted(extractor, monkeypatch)
    again = reference_statistics(extractor, Images("another name", data.images.clone()), cache=tmp_path)
    assert seen == [0] and again.count == 30 and torch.equal(again.outer, first.outer)
    kept = reference_statistics(extractor, data, keep=True, cache=tmp_path)  # the cache has no features yet
    assert seen == [30] and kept.features.shape == (30, 64)
    for keep in (False, True):
        same = reference_statistics(extractor, data, keep=keep, cache=tmp_path)
        assert torch.equal(same.total, first.total)
    assert seen == [30] and torch.equal(same.features, kept.features)


def test_other_images_or_weights_are_another_entry(extractor, tmp_path, monkeypatch):
    seen = counted(extractor, monkeypatch)
    for data in (tiny.images(30), tiny.images(30, seed=1)):
        reference_statistics(extractor, data, cache=tmp_path)
    with torch.no_grad():
        extractor.head.bias.add_(1.0)
    reference_statistics(extractor, tiny.images(30), cache=tmp_path)
    extractor.name = "renamed"
    reference_statistics(extractor, tiny.images(30), cache=tmp_path)
    assert seen == [120] and len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "missing", "manifest"])
def test_a_damaged_cache_is_made_anew(extractor, tmp_path, monkeypatch, damage):
    data = tiny.images(30)
    whole = reference_statistics(extractor, data, keep=True, cache=tmp_path)
    (folder,) = tmp_path.iterdir()
    file = folder / ("manifest.json" if damage == "manifest" else "features.safetensors")
    content = file.read_bytes()
    match damage:
        case "flip":
            file.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
        case "missing":
            file.unlink()
        case "empty":
            file.write_bytes(b"")
        case _:
            file.write_bytes(content[:20])
    seen = counted(extractor, monkeypatch)
    again = reference_statistics(extractor, data, keep=True, cache=tmp_path)
    assert seen == [30] and torch.equal(again.features, whole.features)
    reference_statistics(extractor, data, keep=True, cache=tmp_path)
    assert seen == [30] and list(tmp_path.iterdir()) == [folder]


def test_a_cache_that_cannot_be_written_only_costs_time(extractor, tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert reference_statistics(extractor, tiny.images(30), cache=tmp_path / "file").count == 30
