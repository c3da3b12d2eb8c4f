"""Classifier features: accuracy, determinism, cache, what it refuses."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from multistage_diffusion.data import Images, load_data, rows
from multistage_diffusion.data.collection import Reading
from multistage_diffusion.data.sources import convert
from multistage_diffusion.errors import DataError, NumericsError
from multistage_diffusion.metrics import classifier
from multistage_diffusion.metrics.classifier import Classifier, classifier_features


@pytest.fixture(scope="module")
def digits():
    return load_data("digits"), load_data("digits", split="test")


@pytest.fixture(scope="module")
def extractor(digits, tmp_path_factory):
    return classifier_features(*digits, cache=tmp_path_factory.mktemp("cache"))


def two_bars(count, seed, classes=("upright", "lying")):
    """Noisy bars, upright or lying: learnt in a few steps."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    pixels = torch.randint(0, 60, (count, 1, 8, 8), dtype=torch.uint8, generator=generator)
    pixels[labels == 0, :, :, 3:5] = 255
    pixels[labels == 1, :, 3:5] = 255
    return Images("bars", pixels, labels, classes)


def test_digits_are_classified(extractor, digits):
    assert extractor.accuracy > 0.97
    batch = extractor(digits[1].floats())
    assert (batch.logits.argmax(1) == digits[1].labels).float().mean().item() == pytest.approx(extractor.accuracy)
    assert batch.features.shape == (500, extractor.num_features) == (500, 64)
    assert batch.logits.shape == (500, extractor.num_classes) == (500, 10)
    assert extractor.name == "digits-classifier"
    assert torch.linalg.matrix_rank(batch.features.T.double().cov()) == 64


def test_features_of_an_image_do_not_depend_on_its_batch(extractor, digits):
    images = digits[1].floats()[:23]
    together = extractor(images)
    for size in (1, 4, 23):
        apart = torch.cat([extractor(part).features for part in images.split(size)])
        torch.testing.assert_close(apart, together.features, rtol=0, atol=3e-5)


def test_convolutions_are_exact_and_then_as_they_were(extractor, digits, monkeypatch):
    convolution, extract, chosen = torch.backends.cudnn.conv, extractor.extract, []
    before = convolution.fp32_precision
    monkeypatch.setattr(extractor, "extract", lambda x: chosen.append(convolution.fp32_precision) or extract(x))
    extractor(digits[1].images[:3])
    assert chosen == ["ieee"] and convolution.fp32_precision == before == "tf32"


def test_pixels_and_floats_give_the_same(extractor, digits):
    pixels = digits[1].images[:9]
    assert torch.equal(extractor(pixels).features, extractor(digits[1].floats()[:9]).features)


def test_the_kind_of_file_does_not_matter(extractor, digits, tmp_path):
    test = digits[1].take(torch.arange(60))
    (tmp_path / "pictures").mkdir()
    for i, image in enumerate(test.images):
        Image.fromarray(image[0].numpy()).save(tmp_path / "pictures" / f"{i:03}.png")
    np.savez(tmp_path / "bytes.npz", images=test.images.numpy())
    np.savez(tmp_path / "floats.npz", images=test.floats().numpy())
    expected = extractor(test.images).features
    order = load_data(f"folder:{tmp_path}/pictures", split="all")
    for name in ("bytes", "floats"):
        again = load_data(f"npz:{tmp_path}/{name}.npz", split="all")
        assert again.digest == order.digest  # the same images, the same split
        rows, target = (rows.sort(dim=0).values for rows in (extractor(again.images).features, expected))
        torch.testing.assert_close(rows, target, rtol=0, atol=3e-5)
    with pytest.raises(DataError, match="for images of shape"):  # grey stored as colour is refused, not guessed at
        extractor(test.images.expand(-1, 3, -1, -1))


def test_training_repeats_to_the_bit_and_leaves_the_generator_alone(tmp_path):
    train, test = two_bars(80, 0), two_bars(20, 1)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    first = classifier_features(train, test, cache=tmp_path / "a")
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        second = classifier_features(train, test, cache=tmp_path / "b")
        assert torch.get_num_threads() == threads + 1
    finally:
        torch.set_num_threads(threads)
    assert first.digest == second.digest
    assert first.accuracy == second.accuracy == 1.0
    other = classifier_features(two_bars(80, 2), test, cache=tmp_path / "a")
    assert other.digest != first.digest


def test_a_set_on_disk_is_never_held_whole(tmp_path, monkeypatch):
    monkeypatch.setenv("MSD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(classifier, "_MOST_SAMPLES", 640)
    convert("digits", tmp_path / "digits", None, Reading())
    made = []
    for number, source in enumerate(("digits", f"shards:{tmp_path}/digits")):
        train, test = (load_data(source, split=split) for split in ("train", "test"))
        made.append(classifier_features(train, test, cache=tmp_path / str(number)))
        monkeypatch.setattr(rows, "MAX_BYTES", 256 * 64)
    assert made[0].digest == made[1].digest
    assert made[0].accuracy == made[1].accuracy


def test_the_cache_is_used_and_rebuilt_when_damaged(tmp_path, monkeypatch):
    train, test = two_bars(80, 0), two_bars(20, 1)
    digest = classifier_features(train, test, cache=tmp_path).digest
    (weights,) = tmp_path.glob("*.safetensors")
    (document,) = tmp_path.glob("*.json")
    assert json.loads(document.read_text())["accuracy"] == 1.0
    with monkeypatch.context() as patch:
        patch.setattr("multistage_diffusion.metrics.classifier._train", None)  # so it cannot be trained again
        assert classifier_features(train, test, cache=tmp_path).digest == digest
    whole, written = weights.read_bytes(), document.read_text()
    flipped = bytearray(whole)
    flipped[-9] ^= 1
    for content, text in [
        (bytes(flipped), written),
        (whole[:1000], written),
        (b"", written),
        (whole, written[:20]),
        (whole, "[]"),
        (whole, json.dumps({"accuracy": "1", "sha256": json.loads(written)["sha256"]})),
    ]:
        weights.write_bytes(content)
        document.write_text(text)
        assert classifier_features(train, test, cache=tmp_path).digest == digest
        assert weights.read_bytes() == whole
        assert document.read_text() == written


def test_a_cache_that_cannot_be_written_only_costs_time(tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert classifier_features(two_bars(80, 0), two_bars(20, 1), cache=tmp_path / "file").accuracy == 1.0


def test_large_and_oblong_images_are_averaged_down():
    for shape in ((3, 64, 64), (1, 48, 20), (3, 16, 16), (1, 4, 4), (1, 200, 5)):
        extractor = Classifier("x", shape, ("a", "b"))
        assert extractor(torch.zeros(2, *shape)).features.shape == (2, 64)


def test_what_is_refused(extractor):
    with pytest.raises(DataError, match=r"for images of shape \(1, 8, 8\), got \(3, 8, 8\)"):
        extractor(torch.zeros(1, 3, 8, 8))
    with pytest.raises(DataError, match=r"must lie in \[-1, 1\], got 0\.\.255"):
        extractor(torch.linspace(0, 255, 64).reshape(1, 1, 8, 8))
    with pytest.raises(NumericsError, match="NaN"):
        extractor(torch.full((1, 1, 8, 8), torch.nan))
    plain = Images("plain", torch.zeros(4, 1, 8, 8, dtype=torch.uint8))
    with pytest.raises(DataError, match="features need labels"):
        classifier_features(plain, plain)
    with pytest.raises(DataError, match="the classes of training and held-out images have different names"):
        classifier_features(two_bars(4, 0), two_bars(4, 0, ("a", "b")))
